"""Kernels that do more than cast a bfloat16 tensor, and the PyTorch that each replaces, for
cast_bandwidth.py. They need triton, and a GPU or Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from octavo.float8 import RECIPES
from octavo.float8.casts.gpu_cast import use_kernels
from octavo.float8.quantize import quantize_both

E4M3 = torch.float8_e4m3fn
Call = Callable[[], object]
Compile = Callable[[Callable[..., object]], Callable[..., object]]


@dataclass(frozen=True)
class Maker:
    """bytes: an element of `[M, K]`, read and written. make: `(M, K, device, compile)` -> the kernel's call
    and that of what it replaces. widest: the longest row it takes.
    """

    bytes: float
    make: Callable[[int, int, torch.device, Compile], tuple[Call, Call]]
    widest: int | None = None


def random(M: int, K: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(M, K, device=device, dtype=dtype)


def with_maxima(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels note beside x: the largest magnitude of each column and row."""
    return x, x.abs().amax(dim=0), x.abs().amax(dim=1)


def without_kernels(function: Callable[..., object], *args: Tensor) -> object:
    with use_kernels(False):
        return function(*args)


def _known_maxima(M: int, K: int, device: torch.device, compiled: Compile) -> tuple[Call, Call]:
    from octavo.float8.kernels import ops

    x, row = random(M, K, device), RECIPES["rowwise"].output.a
    rows, cols = (x.abs().amax(dim=d).float().view(torch.int32).unsqueeze(0) for d in (1, 0))
    plain = compiled(partial(quantize_both, row=row, col=row))
    return partial(ops.cast_with_maxima, x, rows, cols, E4M3, "pow2"), partial(without_kernels, plain, x)


def _given_scale(M: int, K: int, device: torch.device, compiled: Compile) -> tuple[Call, Call]:
    from octavo.float8.kernels import ops

    x = random(M, K, device)
    amax = x.abs().max().float().view(1, 1)

    def plain(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
        data = (x.float() * (448.0 / amax)).clamp(-448.0, 448.0).to(E4M3)
        return data, data.t().contiguous()

    return partial(ops.cast_by_given_scale, x, amax, E4M3, "fp32", True, True), partial(
        compiled(plain), x, amax
    )


def _silu_mul(M: int, K: int, device: torch.device, compiled: Compile) -> tuple[Call, Call]:
    from octavo.float8.kernels import ops, silu_mul

    t = [random(M, K, device) for _ in range(2)]
    plain = compiled(lambda a, b: with_maxima(silu_mul.reference(a, b)))
    return partial(ops.silu_mul_with_maxima, *t), partial(plain, *t)


def _silu_mul_backward(M: int, K: int, device: torch.device, compiled: Compile) -> tuple[Call, Call]:
    from octavo.float8.kernels import ops, silu_mul

    t = [random(M, K, device) for _ in range(3)]
    plain = compiled(lambda *t: [with_maxima(d) for d in silu_mul.reference_backward(*t)])
    return partial(ops.silu_mul_backward_with_maxima, *t), partial(plain, *t)


def _norm(M: int, K: int, device: torch.device, compiled: Compile) -> tuple[Call, Call]:
    from octavo.float8.kernels import add_rms_norm, ops

    t = [random(M, K, device), random(M, K, device), torch.ones(K, device=device, dtype=torch.bfloat16)]
    plain = compiled(lambda *t: with_maxima(add_rms_norm.reference(*t, 1e-5)[2]))
    return partial(ops.add_rms_norm_with_maxima, *t, 1e-5), partial(plain, *t)


def _norm_backward(M: int, K: int, device: torch.device, compiled: Compile) -> tuple[Call, Call]:
    from octavo.float8.kernels import add_rms_norm, ops

    dy, dh, h = (random(M, K, device) for _ in range(3))
    t = [dy, dh, h, h.float().square().mean(dim=1).sqrt(), torch.ones(K, device=device, dtype=h.dtype)]
    plain = compiled(lambda *t: with_maxima(add_rms_norm.reference_backward(*t)[0]))
    return partial(ops.add_rms_norm_backward_with_maxima, *t), partial(plain, *t)


_STEP = [1.0 - 1e-6, 0.9, 0.95, 1e-5, 1.0, 1e-8]
"""decay, beta1, beta2, rate, root, eps: the fields of `adamw_cast.Step`."""


def _adamw_squares(M: int, K: int, device: torch.device, compiled: Compile) -> tuple[Call, Call]:
    from octavo.float8.kernels import adamw_cast, ops

    w, g, m = (random(M, K, device, torch.float32) for _ in range(3))
    v, tile = m.square(), RECIPES["blockwise"].output.b

    def plain(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> object:
        new = adamw_cast.reference(w, g, m, v, adamw_cast.Step(*_STEP))
        for old, value in zip((w, m, v), new, strict=True):
            old.copy_(value)
        return quantize_both(w, tile, tile)

    kernel = partial(ops.adamw_with_squares, w, g, m, v, _STEP, 128, E4M3, "fp32", None)
    return kernel, partial(without_kernels, compiled(plain), w, g, m, v)


MAKERS: Mapping[str, Maker] = {
    "rows and columns, maxima known": Maker(2 + 1 + 1, _known_maxima),
    "scale known, both": Maker(2 + 1 + 1, _given_scale),
    "silu_mul": Maker(2 + 2 + 2, _silu_mul),
    "silu_mul backward": Maker(3 * 2 + 2 * 2, _silu_mul_backward),
    "add_rms_norm": Maker(2 * 2 + 2 * 2, _norm, widest=8192),
    "add_rms_norm backward": Maker(3 * 2 + 2, _norm_backward, widest=8192),
    "AdamW and 128 x 128": Maker(4 * 4 + 3 * 4 + 1 + 1, _adamw_squares),
}
