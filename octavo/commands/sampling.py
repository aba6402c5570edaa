"""From logits to the next token, and from tokens to text as they come.

Sampling narrows the distribution in this order: temperature, then the `top_k` most likely tokens, then the
fewest of those whose probabilities reach `top_p` (nucleus sampling, arXiv:1904.09751). It is computed in
float32 on the CPU with a generator of its own, so that a seed gives the same text on every run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.tokenizer import Tokenizer

UNDECODED = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: `temperature` 0 takes the likeliest; `top_k` 0 and `top_p` 1 keep all."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def probabilities(logits_V: Tensor, how: Sampling) -> Tensor:
    """The distribution [V] that is drawn from, float32; `how.temperature` is above 0."""
    logits_V = logits_V.float().cpu() / how.temperature
    if 0 < how.top_k < len(logits_V):
        kept = logits_V.topk(how.top_k).indices
        logits_V = torch.full_like(logits_V, -torch.inf).index_copy(0, kept, logits_V[kept])
    chances_V = logits_V.softmax(0)
    if how.top_p < 1:
        sorted_V, order_V = chances_V.sort(descending=True, stable=True)
        # A token stays while those before it have not reached top_p; the first always stays.
        enough_V = sorted_V.cumsum(0) - sorted_V >= how.top_p
        chances_V[order_V[enough_V]] = 0
    return chances_V


def choose(logits_V: Tensor, how: Sampling, generator: torch.Generator) -> int:
    """The next token's id. Raises `ValueError` if a logit is NaN or all are infinite."""
    if logits_V.isnan().any() or not logits_V.isfinite().any():
        raise ValueError("the model's logits are not finite: its weights are damaged, or training diverged")
    if how.temperature == 0:
        return int(logits_V.float().argmax())
    return int(torch.multinomial(probabilities(logits_V, how), 1, generator=generator))


def generate(
    decode: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    how: Sampling,
    *,
    most: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Up to `most` ids that follow `prompt`; `decode` maps new tokens [1, S] to logits [1, V] after them."""
    generator = torch.Generator().manual_seed(seed)
    new: Sequence[int] = prompt
    for _ in range(most):
        token = choose(decode(torch.tensor([new], device=device))[0], how, generator)
        yield token
        new = [token]


class Recompute:
    """Logits [1, V] after the last token, by the whole model each time: for models without a decoder."""

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, tokens_BS: Tensor) -> Tensor:
        self._seen.append(tokens_BS)
        logits_BSV: Tensor = self._model(torch.cat(self._seen, dim=1))
        return logits_BSV[:, -1]


class TextStream:
    """Turns ids into text piece by piece; the pieces together are what decoding all ids at once gives.

    A character may be spread over several tokens, and how a token reads may depend on the one before, so text
    is handed out when it ends in a whole character, decoded together with what was handed out last.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = self._done = 0  # text of ids[:_done] is out; decoding starts at _before

    def add(self, id_: int) -> str:
        """The text that is certain now that `id_` has come; often that of `id_`, sometimes none."""
        self._ids.append(id_)
        text = self._rest()
        if text.endswith(UNDECODED):
            return ""
        self._before, self._done = self._done, len(self._ids)
        return text

    def end(self) -> str:
        """What was held back; bytes that never became a character are U+FFFD."""
        text = self._rest()
        self._done = len(self._ids)
        return text

    def _rest(self) -> str:
        out = self._tokenizer.decode(self._ids[self._before : self._done])
        return self._tokenizer.decode(self._ids[self._before :])[len(out) :]
