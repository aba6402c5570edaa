"""Float8 for the weights of a mixture of experts: one product per group of rows, each with its own weight.

    y[r]  = x[r] . w[e]^T                      for the rows r of group e, from ends[e - 1] up to ends[e]
    dx[r] = dy[r] . w[e]
    dw[e] = dy[rows of e]^T . x[rows of e]

Each group is a linear layer of its own: its operands are cast as those of a `Float8Linear` with the weight
w[e] and the input x[rows of e]. So no scale spans two groups, and a token's result does not depend on which
other tokens share its expert, except through dw. Recipes with one scale per tensor have no such form in
hardware, and are refused (`why_not_grouped`).

Rows are first copied to where each group begins at a multiple of what its blocks and hardware need, filled up
with zeros. The number of padded rows is an upper bound that does not depend on the sizes of groups, so
nothing waits for the GPU, and compiled code has one shape.

A module that multiplies so declares it: `grouped_weights`, the names of its weights `[E, N, K]`, and an
attribute `product(x_RK, w_ENK, ends_E) -> y_RN`, which `convert_to_float8_training` replaces.

Letters: R rows, P padded rows, E groups, N output and K input features. `ends_E` is int32 and ascending, and
its last entry is R.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.float8.compiled.pin_saved import pin_saved
from octavo.float8.config import Options, resolve
from octavo.float8.gemm_backends import OPERATORS
from octavo.float8.matmul import choose_backend, matmul
from octavo.float8.product import needed_gradients, refuse_second_derivative, to_computing_dtype
from octavo.float8.quantize import Quantized, materialize, quantize, scales_from_amax
from octavo.float8.recipe import FULL, Cast, Gemm, Recipe

ALIGN = 16
"""Rows of a group are padded to a multiple of this, or of the block along them."""

GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


def why_not_grouped(recipe: Recipe) -> str | None:
    """Why `recipe` cannot cast grouped operands; None if it can."""
    casts = [cast for gemm in recipe.gemms.values() for cast in (gemm.a, gemm.b)]
    if None in casts:
        return f"recipe {recipe.name!r} keeps a product in high precision"
    if any(cast is not None and cast.block[0] == FULL for cast in casts):
        return f"recipe {recipe.name!r} has one scale per tensor, which would span groups"
    return None


# ------------------------------------------------------------------------------------------ padding and casts


class Groups(NamedTuple):
    """Where padded groups end, `[E]`; the padded place of each row, `[R]`; and of each place, `[P]`, its row,
    R if it has none, and its group.
    """

    ends: Tensor
    place: Tensor
    row: Tensor
    group: Tensor

    def pad(self, x_RK: Tensor) -> Tensor:
        return materialize(F.pad(x_RK, (0, 0, 0, 1))[self.row])


def pad_groups(ends_E: Tensor, rows: int, align: int) -> Groups:
    """The places of `rows` rows if each group begins at a multiple of `align`."""
    E = ends_E.shape[0]
    starts = F.pad(ends_E[:-1], (1, 0))
    sizes = (ends_E - starts + align - 1) // align * align
    ends = sizes.cumsum(0).int()
    number = torch.arange(rows, device=ends_E.device)
    place = number + (ends - sizes - starts)[torch.searchsorted(ends_E, number, right=True)]
    padded = (rows + E * (align - 1) + align - 1) // align * align
    row = torch.full((padded,), rows, device=ends_E.device).scatter(0, place, number)
    group = torch.searchsorted(ends, torch.arange(padded, device=ends_E.device), right=True)
    return Groups(ends, place, row, group.clamp(max=E - 1))  # places after the last group hold zeros


def _align(recipe: Recipe) -> int:
    casts = recipe.grad_weight.a, recipe.grad_weight.b
    return max(ALIGN, *(cast.block[1] for cast in casts if cast is not None))


def cast_columns(x_PK: Tensor, groups: Groups, cast: Cast) -> Quantized:
    """The transpose of padded x, `[K, P]`, cast along each group's rows. If a block is all of them, the
    scales are `[K, E]`, one per group.
    """
    if cast.block[1] != FULL:
        x_KP = x_PK.t()
        if torch.compiler.is_compiling() and x_KP.device.type == "cpu":
            # From memory of its own: inductor 2.13 fails where it fuses this cast with that of the rows.
            x_KP = materialize(x_KP.contiguous())
        return quantize(x_KP, cast)
    index = groups.group.unsqueeze(1).expand_as(x_PK)
    amax_EK = x_PK.new_zeros(groups.ends.shape[0], x_PK.shape[1])
    amax_EK = amax_EK.scatter_reduce(0, index, x_PK.abs(), "amax")  # NaN wins
    s, scale = scales_from_amax(amax_EK, cast)
    limit = torch.finfo(cast.dtype).max
    data = (x_PK.float() * s[groups.group]).clamp(-limit, limit).to(cast.dtype)
    return Quantized(data.t().contiguous(), scale.t())


def cast_weights_of_groups(w_ENK: Tensor, cast: Cast) -> Quantized:
    """Each group's weight, cast by itself: data `[E, N, K]`, scales `[E, ...]`."""
    E, N, _ = w_ENK.shape
    padded = F.pad(w_ENK, (0, 0, 0, -N % cast.block[0])) if N % cast.block[0] else w_ENK
    q = quantize(padded.flatten(0, 1), cast)
    return Quantized(q.data.unflatten(0, (E, -1))[:, :N], q.scale.unflatten(0, (E, -1)))


# ----------------------------------------------------------------------------------------------- the products

_GEMMS: dict[str, Gemm] = {}  # an operator's arguments are tensors and numbers: a Gemm by its text
OPERATORS.define(
    "grouped_mm_float8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor ends, str gemm, "
    "ScalarType out_dtype, bool? emulate) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(OPERATORS, "grouped_mm_float8", "CompositeExplicitAutograd")
def _grouped_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, gemm: str, out_dtype: torch.dtype,
    emulate: bool | None,
) -> Tensor:  # fmt: skip
    """`a[P, C] . b[E, N, C]^T` as `[P, N]`, or, with groups along the contraction, `a[N, P] . b[K, P]^T` as
    `[E, N, K]`. One kernel where there is one, else one product per group.
    """
    how = _GEMMS[gemm]
    if _has_kernel(a, b, how, out_dtype, emulate):
        # Scales of operands whose groups lie along the contraction go group by group.
        by_group = [
            s.t().contiguous().flatten() if b.dim() == 2 else s.flatten(-2) for s in (a_scale, b_scale)
        ]
        return torch._scaled_grouped_mm(
            a.contiguous(),
            b.contiguous().transpose(-2, -1),
            by_group[0],
            by_group[1],
            offs=ends,
            out_dtype=out_dtype,
            use_fast_accum=how.fast_accum,
        )
    y = _grouped_mm_shape(a, a_scale, b, b_scale, ends, gemm, out_dtype, emulate).zero_()
    for e, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start == end:
            continue
        if b.dim() == 3:
            one, other = Quantized(a[start:end], a_scale[start:end]), Quantized(b[e], b_scale[e])
            y[start:end] = matmul(one, other, how, out_dtype, emulate=emulate)
        else:
            one, other = (
                Quantized(data[:, start:end], scale[:, _blocks(cast, e, start, end)])
                for data, scale, cast in ((a, a_scale, how.a), (b, b_scale, how.b))
            )
            y[e] = matmul(one, other, how, out_dtype, emulate=emulate)
    return y


def _blocks(cast: Cast | None, group: int, start: int, end: int) -> slice:
    """The scales of a group's rows, which are columns here."""
    assert cast is not None
    size = cast.block[1]
    return slice(group, group + 1) if size == FULL else slice(start // size, -(-end // size))


def _has_kernel(a: Tensor, b: Tensor, gemm: Gemm, out_dtype: torch.dtype, emulate: bool | None) -> bool:
    """Whether `torch._scaled_grouped_mm` takes these operands: rowwise scales, on Hopper and later."""
    per_row = all(cast is not None and cast.block == (1, FULL) for cast in (gemm.a, gemm.b))
    wide = all(size % ALIGN == 0 for size in (*a.shape, *b.shape[-2:]))
    if not (a.is_cuda and per_row and wide and out_dtype == torch.bfloat16):
        return False
    return choose_backend(gemm, a.device, emulate) is not None


@torch.library.register_fake("octavo::grouped_mm_float8", lib=OPERATORS)
def _grouped_mm_shape(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, gemm: str, out_dtype: torch.dtype,
    emulate: bool | None,
) -> Tensor:  # fmt: skip
    groups = () if b.dim() == 3 else (ends.shape[0],)
    return a.new_empty(*groups, a.shape[0], b.shape[-2], dtype=out_dtype)


class _Gemms(NamedTuple):
    """The products of `recipe`, by their texts."""

    recipe: Recipe
    emulate: bool | None
    output: str
    grad_input: str
    grad_weight: str

    @staticmethod
    def of(recipe: Recipe, emulate: bool | None) -> _Gemms:
        texts = {name: repr(gemm) for name, gemm in recipe.gemms.items()}
        _GEMMS.update({texts[name]: gemm for name, gemm in recipe.gemms.items()})
        return _Gemms(recipe, emulate, **texts)

    def multiply(self, a: Quantized, b: Quantized, ends: Tensor, gemm: str, dtype: torch.dtype) -> Tensor:
        y: Tensor = torch.ops.octavo.grouped_mm_float8(*a, *b, ends, gemm, dtype, self.emulate)
        return y


class _Product(torch.autograd.Function):
    """See the module's docstring. Saves the cast of x for dw, one byte per element, and the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor, gemms: _Gemms) -> Tensor:
        recipe = gemms.recipe
        output, columns = recipe.output, recipe.grad_weight.b
        assert output.a is not None
        assert output.b is not None
        assert columns is not None
        groups = pad_groups(ends, x.shape[0], _align(recipe))
        x_PK = groups.pad(x)
        x_rows, x_columns = quantize(x_PK, output.a), None
        if ctx.needs_input_grad[1]:
            x_columns = cast_columns(x_PK, groups, columns)
            if torch.compiler.is_compiling():
                kept = pin_saved((x_rows, x_columns), one_cast=False)
                assert kept[0] is not None
                x_rows, x_columns = kept[0], kept[1]
        ctx.save_for_backward(w, *(x_columns or (None, None)), *groups)
        ctx.gemms = gemms
        weights = cast_weights_of_groups(w, output.b)
        y = gemms.multiply(x_rows, weights, groups.ends, gemms.output, x.dtype)
        return y[groups.place]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        w, data, scale, *places = ctx.saved_tensors
        gemms, groups = ctx.gemms, Groups(*places)
        grad_input, grad_weight = gemms.recipe.grad_input, gemms.recipe.grad_weight
        want_x, want_w = needed_gradients(ctx, 0, 2)
        dx = dw = None
        with torch.no_grad():
            dy_PN, dtype = groups.pad(grads[0]), grads[0].dtype
            if want_x:
                w_KN = cast_weights_of_groups(w.transpose(1, 2), grad_input.b)
                rows = quantize(dy_PN, grad_input.a)
                dx = gemms.multiply(rows, w_KN, groups.ends, gemms.grad_input, dtype)[groups.place]
            if want_w:
                columns = cast_columns(dy_PN, groups, grad_weight.a)
                saved = Quantized(data, scale)
                dw = gemms.multiply(columns, saved, groups.ends, gemms.grad_weight, dtype)
        return dx, dw, None, None


def _check_ends(ends: list[int], rows: int) -> None:
    if not ends or ends[-1] != rows or any(end < start for start, end in pairwise([0, *ends])):
        raise ValueError(f"ends = {ends}: they must ascend from 0 and end at the number of rows, {rows}")


class Float8GroupedMM:
    """`product(x_RK, w_ENK, ends_E) -> y_RN` in float8; differentiable in x and w.

    `config`: as for `Float8Linear`. `high_precision`: the product that this one replaces. Raises ValueError
    for a recipe that cannot be grouped.
    """

    def __init__(
        self, config: Options | None = "rowwise", *, high_precision: GroupedProduct | None = None
    ) -> None:
        self.recipe, options = resolve(config)
        why = why_not_grouped(self.recipe)
        if why is not None:
            raise ValueError(f"{why}: use rowwise, blockwise or mxfp8 for grouped weights")
        self.high_precision = high_precision
        self._gemms = _Gemms.of(self.recipe, None if options is None else options.emulate)

    def __call__(self, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        """ValueError for shapes that do not match, and on a CPU for ends that do not ascend to R; TypeError
        for dtypes other than bfloat16, float16 or float32, and for ends that are no integers.
        """
        if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[2] or ends.shape != w.shape[:1]:
            raise ValueError(
                f"a grouped product takes x[R, K], w[E, N, K] and ends[E]; these are {tuple(x.shape)}, "
                f"{tuple(w.shape)} and {tuple(ends.shape)}"
            )
        if ends.dtype not in (torch.int32, torch.int64) or not w.is_floating_point() or w.element_size() < 2:
            raise TypeError(
                "a grouped product takes weights in bfloat16, float16 or float32 and ends in int32; these "
                f"are {w.dtype} and {ends.dtype}"
            )
        if ends.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_ends(ends.tolist(), x.shape[0])
        x = to_computing_dtype(x, type(self).__name__)
        # Views: `needed_gradients` can ask the engine about inner nodes of the graph only, not leaves.
        y: Tensor = _Product.apply(x.view_as(x), w.view_as(w), ends, self._gemms)
        return y

    def __repr__(self) -> str:
        return f"Float8GroupedMM(recipe={self.recipe.name})"
