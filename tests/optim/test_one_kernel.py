"""AdamW's update in one kernel: the compiled code's bits, its kernels, and its random bits."""

import pytest
import torch
from torch._inductor import metrics

from octavo.optim.one_kernel import compiled_update, hash32, rounded, seed_of, update
from tests.float8.graphs import compiles

NUMBERS = torch.tensor([0.99, 0.1, 0.95, 0.05, 1e-3, 0.05, 1e-8])


def tensors(size, dtype):
    generator = torch.Generator().manual_seed(size)
    w, g, m = (torch.randn(size, generator=generator).to(dtype) for _ in range(3))
    return [w, g, m, torch.rand(size, generator=generator).to(dtype)]


@compiles
def test_compiled_it_is_one_kernel_with_eager_codes_bits():
    torch._dynamo.reset()
    compiled_update.cache_clear()
    metrics.reset()
    step = compiled_update()
    for size, seed in ((5000, 7), (777, 8), (64, 2**31 - 1)):  # other sizes, numbers and seeds: the same code
        eager, compiled = tensors(size, torch.bfloat16), tensors(size, torch.bfloat16)
        update(*eager, NUMBERS * seed, seed)
        step(*compiled, NUMBERS * seed, seed)
        for one, other in zip(eager, compiled, strict=True):
            assert torch.equal(one, other)
    assert metrics.generated_kernel_count == 1


def test_rounding_goes_to_a_neighbour_and_is_right_on_average():
    """1 + 2^-10 lies an eighth of the way from 1 to the next bfloat16."""
    noise = hash32(torch.arange(200_000, dtype=torch.int32) * 3 + 7) & 0xFFFF
    value = rounded(torch.full((200_000,), 1 + 2**-10), noise, torch.bfloat16)
    assert set(value.tolist()) == {1.0, 1 + 2**-7}
    assert value.float().mean().item() == pytest.approx(1 + 2**-10, abs=3e-5)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3.0])
    kept = rounded(special, torch.full((5,), 0xFFFF, dtype=torch.int32), torch.bfloat16)
    assert torch.equal(kept.float().nan_to_num(7), special.nan_to_num(7))


def test_weight_and_moments_are_rounded_by_bits_of_their_own():
    """If two shared their bits, one being rounded up would tell that the other was."""
    size = 40_000
    w, m, v = (torch.full((size,), 1.0, dtype=torch.bfloat16) for _ in range(3))
    halfway = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])  # keeps w, m and v ...
    halfway[0] = halfway[2] = 1 + 2**-8  # ... or puts w and v halfway to the next number
    update(w, torch.full_like(w, 1 + 2**-7), m, v, halfway, 5)
    up_w, up_v = (w > 1).float(), (v > 1).float()
    assert up_w.mean().item() == pytest.approx(0.5, abs=0.02)
    assert up_v.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(torch.stack([up_w, up_v]))[0, 1].abs() < 0.03


def test_seeds_differ_by_step_parameter_and_piece():
    seeds = {seed_of(step, place, piece) for step in range(20) for place in range(20) for piece in range(20)}
    assert len(seeds) == 8000
    assert max(seeds) < 2**31
