"""The operands of a linear's products, cast: its input, its weights, and the gradient of its output.

A cast needs the largest magnitude of each block. It comes from

    the tensor itself, in one more read                       quantize.py
    the kernel that produced the tensor, as it wrote          producer_maxima.py
    the same operand in the previous step (delayed scaling)   delayed_statistics.py

and, for operands whose blocks span several ranks, is reduced over these (`distributed/tp_scales.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.float8.casts import gpu_cast
from octavo.float8.casts.delayed_statistics import LayerStatistics as LayerStatistics
from octavo.float8.casts.delayed_statistics import OperandStatistics, is_recomputing, quantize_operand
from octavo.float8.casts.input_cache import compute_once
from octavo.float8.casts.producer_maxima import Maxima, quantize_with_maxima
from octavo.float8.compiled.pin_saved import pin_saved
from octavo.float8.distributed.tp_gather import cast_and_gather
from octavo.float8.distributed.tp_scales import ShardedAxis, TensorParallelSpec
from octavo.float8.distributed.unsharded_weight import UnshardedWeight
from octavo.float8.quantize import Casts, Quantized, quantize_both, transposed
from octavo.float8.recipe import FULL, Cast, Recipe


def _casts(operands: tuple[Quantized | Tensor, Quantized | Tensor]) -> Casts:
    """The operands, with None in place of those that stay in high precision."""
    first, second = (q if isinstance(q, Quantized) else None for q in operands)
    return first, second


def cast_input(
    x: Tensor,
    recipe: Recipe,
    *,
    for_grad_weight: bool,
    owner: Tensor,
    pin: bool,
    maxima: Maxima | None = None,
    sharded: ShardedAxis | None = None,
    statistics: OperandStatistics | None = None,
) -> Casts:
    """`x[M, K]` as the output's operand `[M, K]` and, if `for_grad_weight`, as grad_weight's `[K, M]`.

    None for an operand that stays in high precision or is not wanted. Linears that read the same tensor
    `owner` share the result. `pin`: whether compiled code must save it for backward; an input in float32 is
    always pinned. `maxima`: of x's rows and columns, if known. `sharded`: how x is sharded over ranks.
    """
    trains = torch.is_grad_enabled()
    row, col = recipe.output.a, recipe.grad_weight.b if for_grad_weight else None

    def cast() -> Casts:
        if maxima is not None:
            return _casts(quantize_with_maxima(x, row, col, maxima))
        count = trains and not is_recomputing()
        plain = x.detach()
        return _casts(
            quantize_operand(plain, row, col, sharded, statistics, record=trains, count_saturated=count)
        )

    with torch.no_grad():
        made = compute_once(owner, (x.dtype, row, col, sharded, statistics), cast)
        if torch.compiler.is_compiling() and (pin or x.dtype == torch.float32):
            return pin_saved(made, one_cast=row == col and row is not None and row.square)
        return made


def cast_grad_output(
    dy: Tensor,
    recipe: Recipe,
    *,
    for_grad_input: bool,
    for_grad_weight: bool,
    maxima: Maxima | None,
    sharding: TensorParallelSpec | None,
    statistics: OperandStatistics | None,
    count_saturated: bool,
) -> tuple[Quantized | Tensor, Quantized | Tensor]:
    """`dy[M, N]` as grad_input's `[M, N]` and grad_weight's `[N, M]`, gathered if tokens are sharded."""
    row, col = recipe.grad_input.a, recipe.grad_weight.a if for_grad_weight else None
    if sharding is not None and sharding.pieces is not None:
        assert row is not None
        first, second = cast_and_gather(
            dy,
            row,
            col,
            pieces=sharding.pieces,
            size=sharding.size,
            group=sharding.group,
            statistics=statistics,
            count_saturated=count_saturated,
        )
        assert first is not None
        return first, dy if second is None else second
    row = row if for_grad_input else None
    if maxima is not None:
        return quantize_with_maxima(dy, row, col, maxima)
    sharded = sharding.grad_output if sharding else None
    return quantize_operand(dy, row, col, sharded, statistics, count_saturated=count_saturated)


def cast_weight(
    w: Tensor, recipe: Recipe, *, for_grad_input: bool, sharded: ShardedAxis | None = None
) -> Casts:
    """`w[N, K]` as the output's operand `[N, K]` and, if `for_grad_input`, as grad_input's `[K, N]`."""
    row, col = recipe.output.b, recipe.grad_input.b if for_grad_input else None
    return _casts(quantize_both(w, row, col, sharded))


def weight_operands(w: Tensor, recipe: Recipe, sharding: TensorParallelSpec | None = None) -> Casts:
    """The casts of a weight that has none cached: those of a weight gathered in float8, or a new one.

    A new cast is for the output only. Backward casts the weight again for grad_input, so that no memory of
    the weight's size is held between.
    """
    if isinstance(w, UnshardedWeight):
        return w.casts()
    with torch.no_grad():
        return cast_weight(w, recipe, for_grad_input=False, sharded=sharding.weight if sharding else None)


def why_not_joined(cast: Cast | None, rows: Sequence[int]) -> str | None:
    """Why the joined casts of weights with `rows` differ from the cast of the joined weights; or None."""
    if cast is None or cast.block[0] == 1:
        return None
    if cast.block[0] == FULL:
        return "each has one scale (shared_scales=True uses one for all, which changes numerics)"
    if any(n % cast.block[0] for n in rows[:-1]):
        return f"blocks of {cast.block[0]} rows would straddle two of them ({', '.join(map(str, rows))} rows)"
    return None


def cast_weights(
    weights: Sequence[Tensor], recipe: Recipe, *, for_grad_input: bool
) -> tuple[Quantized, list[Casts]]:
    """`cast_weight` of each of `weights[N_i, K]`, with the output's operands as slices of one buffer; and
    that buffer, the cast of the joined weights. For weights that can be joined (`why_not_joined`).
    """
    row, col = recipe.output.b, recipe.grad_input.b if for_grad_input else None
    assert row is not None
    if len(weights) == 1 or not all(gpu_cast.supports(w, row) for w in weights):
        return join([cast_weight(w.detach(), recipe, for_grad_input=for_grad_input) for w in weights], recipe)
    pair, columns = gpu_cast.cast_joined([w.detach() for w in weights], row, with_columns=col == row)
    joined = Quantized(*pair)
    firsts = _slices(joined, [(w.shape[0], -(-w.shape[0] // row.block[0])) for w in weights])
    if col == row:
        return joined, [(first, Quantized(*q)) for first, q in zip(firsts, columns, strict=True)]
    seconds = [_casts(quantize_both(w.detach(), None, col))[1] for w in weights]
    return joined, list(zip(firsts, seconds, strict=True))


def join(casts: Sequence[Casts], recipe: Recipe) -> tuple[Quantized, list[Casts]]:
    """`casts` of weights, with the first ones copied into one buffer; and that buffer."""
    one_cast = recipe.gatherable
    firsts = [first for first, _ in casts if first is not None]
    if len(firsts) == 1:
        return firsts[0], list(casts)
    data = torch.cat([q.data.view(torch.uint8) for q in firsts]).view(firsts[0].data.dtype)
    joined = Quantized(data, torch.cat([q.scale for q in firsts]))
    new: list[Casts] = []
    slices = _slices(joined, [(q.data.shape[0], q.scale.shape[0]) for q in firsts])
    for part, first, (_, second) in zip(slices, firsts, casts, strict=True):
        # One cast for both remains one, unless a kernel wrote the transpose out.
        is_view = one_cast and second is not None and second.data.stride() == first.data.t().stride()
        new.append((part, transposed(part) if is_view else second))
    return joined, new


def _slices(joined: Quantized, sizes: Sequence[tuple[int, int]]) -> list[Quantized]:
    """Consecutive parts of `joined`, of so many rows of data and of scales each."""
    data, scales = (torch.split(t, list(n)) for t, n in zip(joined, zip(*sizes, strict=True), strict=True))
    return [Quantized(*part) for part in zip(data, scales, strict=True)]
