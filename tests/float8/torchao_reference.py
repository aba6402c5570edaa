"""torchao 0.18 as the reference for numbers, and the random cases to compare with.

Letters: M tokens, K input features, N output features.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from octavo.float8 import Float8LinearConfig, convert_to_float8_training

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # it reports GPU libraries that a CPU build cannot load
    import torchao.float8 as torchao
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    logging.disable(logging.NOTSET)

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
# tensorwise is defined by torchao's native path; the others by its emulation, which in float32 does not round
# through bfloat16 as its native path does.
EMULATE = {"tensorwise": False, "rowwise": True, "rowwise_with_gw_hp": True}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One random linear layer and batch."""

    M: int
    K: int
    N: int
    dtype: torch.dtype
    magnitudes: tuple[float, float, float]  # of x, w, dy
    feature: str
    bias: bool
    leading: tuple[int, ...]
    seed: int

    @property
    def aligned(self) -> bool:
        return not (self.M % 16 or self.K % 16 or self.N % 16)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x[*, K], w[N, K], dy[*, N] and the bias[N]."""
        g = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.M, self.K, generator=g)
        w = torch.randn(self.N, self.K, generator=g)
        dy = torch.randn(self.M, self.N, generator=g)
        for t, magnitude in zip((x, w, dy), self.magnitudes, strict=True):
            t *= magnitude
            if self.feature == "zero rows":
                t[torch.rand(len(t), generator=g) < 0.3] = 0
            elif self.feature == "zero tensor":
                t.zero_()
            elif self.feature == "outlier columns":
                t[:, torch.randint(t.shape[1], (2,), generator=g)] *= 100
            elif self.feature == "rows far apart":
                t *= torch.exp2(torch.randint(-6, 6, (len(t), 1), generator=g).float())
        bias = torch.randn(self.N, generator=g).to(self.dtype) if self.bias else None
        x, w, dy = (t.to(self.dtype) for t in (x, w, dy))
        return x.reshape(*self.leading, -1, self.K), w, dy.reshape(*self.leading, -1, self.N), bias


@st.composite
def cases(draw: st.DrawFn, large: bool) -> Case:
    """Cases with dimensions of at least 128 (`large`) or from 1 to 127; half are multiples of 16."""
    if draw(st.booleans()):
        size = st.integers(8, 16).map(lambda n: 16 * n) if large else st.integers(1, 7).map(lambda n: 16 * n)
    else:
        size = st.integers(128, 260) if large else st.integers(1, 127)
    M, K, N = draw(size), draw(size), draw(size)
    dtype = draw(st.sampled_from(DTYPES))
    low, high = (-4, 2) if dtype == torch.float16 else (-8, 6)
    magnitude = st.floats(low, high).map(lambda e: 10.0**e)
    splits = [d for d in (2, 3, 4) if M % d == 0]
    leading = draw(st.sampled_from([(), (1,), *[(d,) for d in splits], *[(1, d) for d in splits]]))
    return Case(
        M,
        K,
        N,
        dtype,
        (draw(magnitude), draw(magnitude), draw(magnitude)),
        draw(
            st.sampled_from(
                ("plain", "plain", "zero rows", "zero tensor", "outlier columns", "rows far apart")
            )
        ),
        draw(st.booleans()),
        leading,
        draw(st.integers(0, 2**31)),
    )


def run(linear: nn.Linear, case: Case) -> dict[str, Tensor]:
    """Output and gradients of `linear` given the case's parameters, input and output gradient."""
    x, w, dy, bias = case.tensors()
    with torch.no_grad():
        linear.weight.copy_(w)
        if bias is not None:
            linear.bias.copy_(bias)
    x.requires_grad_()
    y = linear(x)
    y.backward(dy)
    result = {"output": y.detach(), "grad_input": x.grad, "grad_weight": linear.weight.grad}
    if bias is not None:
        result["grad_bias"] = linear.bias.grad
    return result


def high_precision(case: Case) -> nn.Linear:
    return nn.Linear(case.K, case.N, bias=case.bias, dtype=case.dtype)


def ours(case: Case, recipe: str, emulate: bool | None = None) -> dict[str, Tensor]:
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    return run(convert_to_float8_training(high_precision(case), config=config), case)


def torchaos(case: Case, recipe: str) -> dict[str, Tensor]:
    config = replace(torchao.Float8LinearConfig.from_recipe_name(recipe), emulate=EMULATE[recipe])
    return run(torchao.convert_to_float8_training(high_precision(case), config=config), case)


def torchao_cast(x: Tensor, dtype: torch.dtype, *, rowwise: bool, pow2: bool) -> tuple[Tensor, Tensor]:
    """torchao's float8 bytes of `x[R, C]`, and its scale, by which it multiplies."""
    granularity = torchao.ScalingGranularity.AXISWISE if rowwise else torchao.ScalingGranularity.TENSORWISE
    cast = hp_tensor_to_float8_dynamic(
        x,
        dtype,
        LinearMMConfig(),
        scaling_granularity=granularity,
        axiswise_dim=-1 if rowwise else None,
        round_scales_to_power_of_2=pow2,
    )
    return cast._data, cast._scale


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, where any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    both_nan = a.float().isnan() & b.float().isnan()
    return bool(((a.contiguous().view(integer) == b.contiguous().view(integer)) | both_nan).all())


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    a, b = a.double(), b.double()
    norm = b.norm().item()
    return ((a - b).norm().item() / norm) if norm else (a - b).norm().item()
