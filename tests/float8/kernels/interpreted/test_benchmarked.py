"""What cast_bandwidth.py compares: each kernel computes what the call beside it does."""

import pytest
import torch

from benchmarks.harness.makers import MAKERS

# Where in the results of the kernel, and of what it replaces, the same tensor stands; None: both change their
# operands, so that the second call sees others.
SAME = {
    "rows and columns, maxima known": ((0, ()), (0, 0)),
    "scale known, both": ((0, ()), (0, ())),
    "silu_mul": ((0, ()), (0, ())),
    "silu_mul backward": ((0, ()), (0, 0)),
    "add_rms_norm": ((2, ()), (0, ())),
    "add_rms_norm backward": ((0, ()), (0, ())),
    "AdamW and 128 x 128": None,
}


def part(result, path):
    first, second = path
    return result[first] if second == () else result[first][second]


def test_every_one_is_compared():
    assert set(SAME) == set(MAKERS)


@pytest.mark.parametrize("name", SAME)
def test_maker(name):
    torch.manual_seed(0)
    kernel, plain = MAKERS[name].make(64, 256, torch.device("cpu"), lambda function: function)
    ours, theirs = kernel(), plain()
    if SAME[name] is None:
        assert ours[0].shape == theirs[0].data.shape == (64, 256)
        return
    one, two = part(ours, SAME[name][0]), part(theirs, SAME[name][1])
    assert one.shape == two.shape
    if one.element_size() == 1:  # one rounding may differ where the replacement's arithmetic does
        assert (one.view(torch.uint8) == two.view(torch.uint8)).float().mean() > 0.99
    else:
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)
