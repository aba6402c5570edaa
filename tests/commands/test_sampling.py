"""The next token comes from the distribution that was asked for; text comes out whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.commands.sampling import Recompute, Sampling, TextStream, generate, probabilities, sample
from octavo.tokenizer import build_tokenizer
from tests.models.small_llama import SHAPES, noisy

TOKENIZER = build_tokenizer("octavo_bpe_2048")
LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampling(temperature=0.5), [0.25, 0.04, 0.0225, 0.01, 0.0025]),
        (Sampling(top_k=2), [0.5, 0.2, 0, 0, 0]),
        (Sampling(top_k=9), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampling(top_p=0.49), [0.5, 0, 0, 0, 0]),
        (Sampling(top_p=0.6), [0.5, 0.2, 0, 0, 0]),
        (Sampling(top_p=0.8), [0.5, 0.2, 0.15, 0, 0]),
        # top_p counts what top_k has left: 0.5 / 0.7 = 0.71
        (Sampling(top_k=2, top_p=0.7), [0.5, 0, 0, 0, 0]),
    ],
)
def test_distribution_by_hand(sampling, expected):
    kept = torch.tensor(expected)
    got = probabilities(LOGITS, sampling)
    torch.testing.assert_close(got / got.sum(), kept / kept.sum())


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(1)
    drawn = torch.tensor([sample(LOGITS, Sampling(top_k=3), generator) for _ in range(4000)])
    shares = drawn.bincount(minlength=5) / 4000
    torch.testing.assert_close(shares, probabilities(LOGITS, Sampling(top_k=3)), rtol=0, atol=0.03)


def test_temperature_0_is_greedy_and_damaged_logits_are_an_error():
    generator = torch.Generator()
    assert sample(LOGITS.flip(0), Sampling(0.0), generator) == 4
    with pytest.raises(ValueError, match="not finite"):
        sample(torch.tensor([0.0, torch.nan]), Sampling(), generator)


def test_a_seed_gives_the_same_tokens_and_another_seed_others():
    model = noisy(SHAPES["gqa"])
    texts = [
        list(generate(Recompute(model), [1, 2], Sampling(), max_tokens=30, seed=seed)) for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


def pieces(ids):
    stream = TextStream(TOKENIZER)
    return [*(stream.add(id_) for id_ in ids), stream.end()]


@given(st.lists(st.integers(2, TOKENIZER.vocab_size - 1), max_size=40))
def test_pieces_together_are_the_whole_text(ids):
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids)


@given(st.text(max_size=12))
def test_no_piece_of_a_text_holds_half_a_character(text):
    out = pieces(TOKENIZER.encode(text))
    assert "".join(out) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in out)


def test_a_character_of_several_tokens_comes_when_it_is_complete():
    ids = TOKENIZER.encode("\u6f22")
    assert len(ids) > 1
    assert pieces(ids) == [""] * (len(ids) - 1) + ["\u6f22", ""]
    assert pieces(ids[:-1])[-1] == "\ufffd"
