"""Decoding with a key/value cache gives the logits of the full forward."""

import pytest
import torch

from octavo.models.decode import Decoder
from tests.models.small_llama import SHAPES, noisy


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("calls", [[1] * 48, [20, 1, 1, 26], [48]], ids=["one by one", "mixed", "at once"])
def test_cached_logits_equal_the_full_forward(shape, calls):
    model = noisy(SHAPES[shape])
    tokens = torch.randint(131, (2, 48))
    with torch.no_grad():
        expected = model(tokens)
    decode = Decoder(model, capacity=48, batch=2)
    end = 0
    for part in tokens.split(calls, dim=1):
        end += part.shape[1]
        torch.testing.assert_close(decode(part), expected[:, end - 1], rtol=1e-5, atol=2e-5)
    assert expected.abs().max() > 1


def test_the_cache_holds_the_capacity_and_no_more():
    model = noisy(SHAPES["gqa"])
    decode = Decoder(model, capacity=8)
    assert decode(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 131)
    with pytest.raises(RuntimeError):
        decode(torch.zeros(1, 1, dtype=torch.int64))
