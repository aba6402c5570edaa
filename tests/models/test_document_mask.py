"""With the document mask, a document's logits do not depend on its neighbours in the sequence."""

import math

import pytest
import torch
from torch import Tensor

from octavo.families import ModelArgs
from octavo.float8 import Float8LinearConfig, convert_to_float8_training
from octavo.models.attention import document_mask
from octavo.models.init import init_weights
from octavo.models.transformer import Transformer
from tests.float8.graphs import compiles
from tests.helpers import launching

END = 0
LENGTHS = (5, 9, 3, 15)  # of the documents in a sequence of 32, with their end tokens
ARGS = ModelArgs(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=96,
    vocab_size=80,
    max_seq_len=32,
    document_end=END,
)


def model(args: ModelArgs = ARGS, recipe: str | None = None) -> Transformer:
    made = Transformer(args)
    init_weights(made, seed=1)
    if recipe is not None:
        convert_to_float8_training(made, config=Float8LinearConfig.from_recipe_name(recipe))
    return made


def document(length: int, seed: int) -> Tensor:
    ids = torch.randint(1, 80, (length,), generator=torch.Generator().manual_seed(seed))
    ids[-1] = END
    return ids


def sequence(seeds: tuple[int, ...]) -> Tensor:
    """[1, 32]: a random document of each of LENGTHS, by its seed."""
    return torch.cat([document(length, seed) for length, seed in zip(LENGTHS, seeds, strict=True)])[None]


def logits_of_third(made: torch.nn.Module, tokens: Tensor) -> Tensor:
    start = sum(LENGTHS[:2])
    with torch.no_grad():
        return made(tokens)[0, start : start + LENGTHS[2]]


def test_the_mask_follows_its_definition() -> None:
    tokens = torch.tensor([[7, 0, 8, 8, 0, 0, 9], [5, 5, 5, 5, 5, 5, 5]])
    mask = document_mask(tokens, END)
    number = [
        [0, 0, 1, 1, 1, 2, 3],
        [0] * 7,
    ]  # an end token belongs to its document, and alone it is a document
    for row in range(2):
        for query in range(7):
            for key in range(7):
                seen = key <= query and number[row][query] == number[row][key]
                assert mask[row, 0, query, key].item() is seen


@compiles
@pytest.mark.parametrize(
    ("recipe", "compiled"),
    [
        (None, False),
        ("rowwise", False),
        ("rowwise_with_gw_hp", False),
        (None, True),
        pytest.param("rowwise", True, marks=pytest.mark.slow),
    ],
)
def test_neighbours_do_not_matter(recipe: str | None, compiled: bool) -> None:
    """Bitwise, also in float8 with one scale per token."""
    made = model(recipe=recipe)
    if compiled:
        for layer in made.layers.values():
            layer.compile(fullgraph=True)
    one, other = sequence((1, 2, 3, 4)), sequence((5, 6, 3, 7))
    assert not torch.equal(one, other)
    assert torch.equal(logits_of_third(made, one), logits_of_third(made, other))


def test_a_document_alone_has_the_same_logits_up_to_rounding() -> None:
    """Alone, its positions differ, which rotary attention does not see."""
    alone = document(LENGTHS[2], 3)[None]
    made = model()
    with torch.no_grad():
        expected = made(alone)[0]
    torch.testing.assert_close(logits_of_third(made, sequence((1, 2, 3, 4))), expected, rtol=1e-4, atol=1e-5)


def test_without_the_mask_neighbours_matter() -> None:
    made = model(ModelArgs(**{**vars(ARGS), "document_end": None}))
    one, other = (logits_of_third(made, sequence(seeds)) for seeds in ((1, 2, 3, 4), (5, 6, 3, 7)))
    assert not torch.allclose(one, other)


def test_one_document_is_plain_causal_attention() -> None:
    tokens = torch.randint(1, 80, (2, 32), generator=torch.Generator().manual_seed(0))
    masked, plain = model(), model(ModelArgs(**{**vars(ARGS), "document_end": None}))
    torch.testing.assert_close(masked(tokens), plain(tokens), rtol=1e-4, atol=1e-5)


def test_gradients_stay_within_documents() -> None:
    made = model()
    h = []
    made.tok_embeddings.register_forward_hook(lambda *args: h.append(args[2].requires_grad_()) or None)
    start = sum(LENGTHS[:2])
    logits = made(sequence((1, 2, 3, 4)))
    (gradient,) = torch.autograd.grad(logits[0, start : start + LENGTHS[2]].sum(), h[0])
    assert gradient[0, start : start + LENGTHS[2]].abs().min() > 0
    assert gradient[0, :start].abs().max() == gradient[0, start + LENGTHS[2] :].abs().max() == 0


def test_trains(tmp_path) -> None:
    """In the trainer, on two ranks in float8: the mask changes the loss, and the loss falls."""
    flags = {
        **launching.recipe("rowwise"),
        **launching.shallow(2),
        "training.dataset": launching.many_documents(),
        "activation_checkpoint.mode": "selective",
        "optimizer.lr": 4e-3,
    }
    plain = launching.train(tmp_path / "plain", flags)
    masked = launching.train(tmp_path / "masked", {**flags, "training.document_mask": "true"}, world=2)
    assert masked.losses[0] != pytest.approx(plain.losses[0], abs=1e-3)
    assert masked.losses[-1] < masked.losses[0] - 0.2
    assert all(map(math.isfinite, masked.losses))
