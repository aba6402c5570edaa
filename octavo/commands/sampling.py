"""Sampling of the next token from logits, and streaming of tokens as text.

Sampling applies temperature, then keeps the `top_k` most likely tokens, then the smallest set of those whose
probabilities reach `top_p` (nucleus sampling, arXiv:1904.09751). It runs in float32 on the CPU with its own
generator, so a seed gives the same text on every run.

Shapes: B sequences, S tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.tokenizer import Tokenizer

UNDECODED = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: `temperature` 0 takes the most likely token; `top_k` 0 and `top_p` 1 keep all."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The float32 distribution [V], not normalised, that is sampled from; `temperature` must be above 0."""
    logits_V = logits_V.float().cpu() / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        kept = logits_V.topk(sampling.top_k).indices
        logits_V = torch.full_like(logits_V, -torch.inf).index_copy(0, kept, logits_V[kept])
    probabilities_V = logits_V.softmax(0)
    if sampling.top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        # A token is kept while the ones before it sum to less than top_p; the first is always kept.
        dropped_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p
        probabilities_V[order_V[dropped_V]] = 0
    return probabilities_V


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token's id. Raises `ValueError` if a logit is NaN or all are infinite."""
    if logits_V.isnan().any() or not logits_V.isfinite().any():
        raise ValueError("the model's logits are not finite: its weights are damaged, or training diverged")
    if sampling.temperature == 0:
        return int(logits_V.float().argmax())
    return int(torch.multinomial(probabilities(logits_V, sampling), 1, generator=generator))


def generate(
    decode: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_tokens: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Yield the `max_tokens` ids after `prompt`. `decode` maps new tokens [1, S] to logits [1, V]."""
    generator = torch.Generator().manual_seed(seed)
    new: Sequence[int] = prompt
    for _ in range(max_tokens):
        token = sample(decode(torch.tensor([new], device=device))[0], sampling, generator)
        yield token
        new = [token]


class Recompute:
    """A `decode` for models without a KV-cache decoder: each call runs the model on all tokens so far."""

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, tokens_BS: Tensor) -> Tensor:
        self._seen.append(tokens_BS)
        logits_BSV: Tensor = self._model(torch.cat(self._seen, dim=1))
        return logits_BSV[:, -1]


class TextStream:
    """Decodes ids incrementally; the pieces concatenate to the decoding of all ids at once.

    A character may span several tokens, and the text of a token may depend on the previous one. So text is
    returned once it ends in a complete character, and is decoded together with the piece before it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._returned = 0  # text of ids[:_returned] was returned; decoding starts at _start

    def add(self, token: int) -> str:
        """Append `token`; returns the text that is complete now, which may be empty."""
        self._ids.append(token)
        text = self._pending()
        if text.endswith(UNDECODED):
            return ""
        self._start, self._returned = self._returned, len(self._ids)
        return text

    def end(self) -> str:
        """Return the remaining text; an incomplete character decodes to U+FFFD."""
        text = self._pending()
        self._returned = len(self._ids)
        return text

    def _pending(self) -> str:
        returned = self._tokenizer.decode(self._ids[self._start : self._returned])
        return self._tokenizer.decode(self._ids[self._start :])[len(returned) :]
