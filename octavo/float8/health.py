"""What casting to float8 does to the values of each layer: how much is lost, where, and what another recipe
would lose.

For each operand, as its recipe casts it, with s what a value is multiplied by before it is rounded:

    amax        the largest magnitude, in the tensor's own unit; NaN or infinite if a value is
    flushed     share of all values that are not zero, but are once cast
    saturated   share that exceeds the format's maximum once multiplied by s. Scales made from the tensor at
                hand leave only what rounding s lifted over it; power-of-two scales leave none
    nonfinite   share that is NaN or infinite before the cast
    sqnr        10 log10(sum x**2 / sum (x - x')**2) in decibels, with x' what the cast stands for: about 30
                for values that fill the format, infinite where nothing is lost, NaN if a value is not finite

`audit` measures one forward and backward. `Monitor` measures every k-th step of a training run, compiled or
not.

A compiled graph hides its tensors. So the numbers leave it as a gradient: a watched layer passes its output
through a function that also takes a *probe*, a small leaf tensor; and what its backward calls the gradient of
the probe is the statistics of the input, kept from forward, and those of grad_output. The compiler fuses them
with the casts, activation checkpointing counts them once, and a step that is not measured runs a graph
without them.

What remains is the cost of computing them. Scales need every value, but the compiler has them from the casts
already; the other numbers a Monitor takes from evenly spaced tokens. Weights are measured after backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octavo.float8.carrier import Carrier
from octavo.float8.config import Options, resolve
from octavo.float8.fsdp import plain_parameter
from octavo.float8.linear import Float8Linear
from octavo.float8.quantize import block_amax, scale_values, scales_from_amax, to_float32
from octavo.float8.recipe import FULL, Cast, Recipe

LayerFilter = Callable[[nn.Module, str], bool]

# ---------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """One operand of one layer under one recipe. The module's docstring defines the numbers.

    layer: fully qualified name. operand: "input", "weight" or "grad_output". gemms: the products that read
    this cast, of "output", "grad_input" and "grad_weight". values: how many were measured; amax is that of
    all.
    """

    layer: str
    recipe: str
    operand: str
    gemms: tuple[str, ...]
    values: int
    amax: float
    flushed: float
    saturated: float
    nonfinite: float
    sqnr: float


@dataclass(frozen=True)
class Table:
    """Rows as plain data; `str` aligns them in columns."""

    rows: tuple[Row, ...]

    def worst(self, count: int = 5, by: str = "flushed") -> Table:
        """The `count` rows that lose most `by` "flushed", "saturated", "nonfinite" or "sqnr"; those with NaN
        or infinite values before all.

        An outlier shows in "flushed": it takes the range of its block, so that the others become zero, while
        the outlier itself, which the SQNR is mostly made of, is cast well.
        """
        if by not in ("flushed", "saturated", "nonfinite", "sqnr"):
            raise ValueError(f"by={by!r} must be flushed, saturated, nonfinite or sqnr")
        sign = 1 if by == "sqnr" else -1

        def key(row: Row) -> tuple[bool, float]:
            finite = row.nonfinite == 0 and math.isfinite(row.amax)
            return finite, sign * getattr(row, by) if finite else 0.0

        return Table(tuple(sorted(self.rows, key=key)[:count]))

    def __str__(self) -> str:
        lines = [[field.name for field in fields(Row)]]
        for row in self.rows:
            texts = [
                row.layer,
                row.recipe,
                row.operand,
                "+".join(row.gemms),
                str(row.values),
                f"{row.amax:.3g}",
            ]
            shares = [f"{share:.3%}" for share in (row.flushed, row.saturated, row.nonfinite)]
            lines.append([*texts, *shares, f"{row.sqnr:.1f}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        names = 4  # the columns of words; numbers are aligned to the right
        return "\n".join(
            "  ".join(
                text.ljust(width) if i < names else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


# ------------------------------------------------------------------------------------------- measuring a cast


@dataclass(frozen=True)
class _Slot:
    """One cast to measure. `transposed`: the operand is the transpose of the tensor at hand."""

    recipe: str
    operand: str
    gemms: tuple[str, ...]
    cast: Cast
    transposed: bool


def _slots(recipe: Recipe) -> tuple[_Slot, ...]:
    """The distinct casts of `recipe`."""
    o, gi, gw = recipe.output, recipe.grad_input, recipe.grad_weight
    slots = []
    for operand, first, second in (
        ("input", ("output", o.a), ("grad_weight", gw.b)),
        ("weight", ("output", o.b), ("grad_input", gi.b)),
        ("grad_output", ("grad_input", gi.a), ("grad_weight", gw.a)),
    ):
        (gemm, row), (other, col) = first, second
        shared = row is not None and row == col and row.square
        if row is not None:
            gemms = (gemm, other) if shared else (gemm,)
            slots.append(_Slot(recipe.name, operand, gemms, row, False))
        if col is not None and not shared:
            slots.append(_Slot(recipe.name, operand, (other,), col, True))
    return tuple(slots)


_NUMBERS = 7  # amax, values, and how many are nonfinite, flushed, saturated; signal, noise


def _spread(blocks: Tensor, block: tuple[int, int], rows: Tensor, cols: int) -> Tensor:
    """`blocks[R / r, C / c]` at rows `rows[n]`: one number an element, `[n, C]`, or `[n, 1]` if a block is a
    whole row.
    """
    blocks = blocks[:1] if block[0] == FULL else blocks.index_select(0, rows // block[0])
    return blocks if block[1] == FULL else blocks.repeat_interleave(block[1], dim=1)[:, :cols]


def _energy(x: Tensor) -> Tensor:
    """The sum of squares, in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def _measure(x: Tensor, slots: Sequence[_Slot], sample: int | None) -> Tensor:
    """What each of `slots` does to `x[R, C]`: float64, `_NUMBERS` for each in a row.

    Scales and amax are those of all of x; the rest is counted in at most `sample` evenly spaced rows (None:
    all).
    """
    # An odd step, so that it does not visit the same few positions of every sequence.
    step = 1 if sample is None else -(-x.shape[0] // sample)
    step = max(step + 1 - step % 2, 1)
    rows = torch.arange(0, x.shape[0], step, device=x.device)
    some = x[::step].float()
    not_zero = some != 0
    nonfinite = torch.count_nonzero(~some.isfinite()).double()
    values = torch.full_like(nonfinite, some.numel())
    signal = _energy(some)
    numbers = []
    for slot in slots:
        cast, limit = slot.cast, torch.finfo(slot.cast.dtype).max
        block = (cast.block[1], cast.block[0]) if slot.transposed else cast.block
        amax = block_amax(x, block)
        s, scale = scales_from_amax(amax, cast)
        scaled = some * _spread(s, block, rows, x.shape[1])
        data = to_float32(scaled.clamp(-limit, limit).to(cast.dtype))
        back = data * _spread(scale_values(scale), block, rows, x.shape[1])
        # Neither counts a value of a block that a NaN or an infinity took with it: those come back as NaN.
        flushed = torch.count_nonzero((back == 0) & not_zero).double()
        saturated = torch.count_nonzero(scaled.abs() > limit).double()
        largest = amax.amax().double() if amax.numel() else torch.zeros_like(values)
        numbers += [largest, values, nonfinite, flushed, saturated, signal, _energy(back - some)]
    return torch.stack(numbers) if numbers else x.new_zeros(0, dtype=torch.float64)


def _row(layer: str, slot: _Slot, seen: Sequence[Sequence[float]]) -> Row:
    """The row of what was measured in several calls."""
    amaxes = [numbers[0] for numbers in seen]
    values, nonfinite, flushed, saturated, signal, noise = (
        math.fsum(column) if all(map(math.isfinite, column)) else sum(column)
        for column in list(zip(*seen, strict=True))[1:]
    )
    share = 1 / values if values else 0.0
    return Row(
        layer=layer,
        recipe=slot.recipe,
        operand=slot.operand,
        gemms=slot.gemms,
        values=int(values),
        amax=math.nan if any(map(math.isnan, amaxes)) else max(amaxes),
        flushed=flushed * share,
        saturated=saturated * share,
        nonfinite=nonfinite * share,
        sqnr=_decibels(signal, noise),
    )


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


# ------------------------------------------------------------------------------------------- watching a layer


class _Tap(torch.autograd.Function):
    """Identity on y. The gradient of the probe is the statistics of the input, then those of grad_output."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, of_input: Tensor, probe: Tensor, slots: tuple[_Slot, ...], sample: int | None
    ) -> Tensor:
        ctx.save_for_backward(of_input)
        ctx.slots, ctx.sample = slots, sample
        # Not a view, which may not be changed in place, and about which FSDP2 warns.
        return torch.ops.aten._unsafe_view.default(y, y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        (of_input,) = ctx.saved_tensors
        with torch.no_grad():
            of_dy = _measure(dy.reshape(-1, dy.shape[-1]), ctx.slots, ctx.sample)
        return dy, None, torch.cat([of_input, of_dy]), None, None


class _Watch:
    """Measures one layer, called with its input and output."""

    def __init__(
        self, layer: str, linear: nn.Linear, recipes: Sequence[Recipe], sample: int | None, *, frozen: bool
    ) -> None:
        if isinstance(linear, Float8Linear) and linear.tensor_parallel:
            raise ValueError(
                f"{layer} is sharded by tensor parallelism: one rank sees a part of its operands "
                "only. Measure the layer before parallelize_module, or leave it out with filter_fn"
            )
        self.layer, self.linear, self.sample = layer, linear, sample
        slots = [slot for recipe in recipes for slot in _slots(recipe)]
        self.input, self.weight, self.grad_output = (
            tuple(slot for slot in slots if slot.operand == operand)
            for operand in ("input", "weight", "grad_output")
        )
        self.frozen = frozen  # whether to measure where no gradient is asked for
        self.probe = self.new_probe(linear.weight.device)
        self.probes: list[Tensor] = []  # of an audit
        self.seen: list[Tensor] = []

    def start(self) -> None:
        self.seen = []
        if self.probe.device != self.linear.weight.device:
            self.probe = self.new_probe(self.linear.weight.device)

    def new_probe(self, device: torch.device) -> Tensor:
        size = _NUMBERS * (len(self.input) + len(self.grad_output))
        probe = torch.zeros(size, dtype=torch.float64, device=device, requires_grad=True)
        probe.register_post_accumulate_grad_hook(self.take)
        return probe

    def take(self, probe: Tensor) -> None:
        assert probe.grad is not None
        self.seen.append(probe.grad)
        probe.grad = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not (y.requires_grad or self.frozen):
            return y
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.no_grad():
            of_input = _measure(x.detach().reshape(-1, x.shape[-1]), self.input, self.sample)
        # The gradients of one probe are added up; maxima should not be. A graph has one probe a layer.
        probe = self.probe if torch.compiler.is_compiling() else self.new_probe(y.device)
        if self.frozen:
            self.probes.append(probe)
        return _Tap.apply(y, of_input, probe, self.grad_output, self.sample)

    def of_weight(self) -> Tensor:
        weight = plain_parameter(self.linear.weight.detach())
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return _measure(whole, () if isinstance(whole, Carrier) else self.weight, self.sample)

    def hook(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return self(args[0], y)


def _rows(watches: Sequence[_Watch]) -> tuple[Row, ...]:
    """What `watches` saw, brought from the device in one piece."""
    watches = [watch for watch in watches if watch.seen]
    with torch.no_grad():
        pieces = [piece for watch in watches for piece in (watch.of_weight(), *watch.seen)]
    if not pieces:
        return ()
    numbers = iter(torch.cat([piece.to(pieces[0].device) for piece in pieces]).tolist())

    def take(slots: Sequence[_Slot]) -> list[list[float]]:
        return [[next(numbers) for _ in range(_NUMBERS)] for _ in slots]

    rows = []
    for watch in watches:
        has_weight = not isinstance(watch.linear.weight, Carrier)
        of_weight = (
            [(slot, [n]) for slot, n in zip(watch.weight, take(watch.weight), strict=True)]
            if has_weight
            else []
        )
        moving = watch.input + watch.grad_output
        calls = [take(moving) for _ in watch.seen]
        of_moving = [(slot, [call[i] for call in calls]) for i, slot in enumerate(moving)]
        k = len(watch.input)
        ordered = [*of_moving[:k], *of_weight, *of_moving[k:]]
        rows += [_row(watch.layer, slot, seen) for slot, seen in ordered]
    return tuple(rows)


_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def _linears(model: nn.Module, kind: type[nn.Linear]) -> dict[str, nn.Linear]:
    """The linears of `model` by name, without what compiling and checkpointing add to names."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, kind):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            found[name] = module
    return found


# ------------------------------------------------------------------------------------------------ in training


class Monitor:
    """Measures the `Float8Linear`s of `model` on every `every`-th step.

        monitor = Monitor(model, every=10, filter_fn=lambda module, fqn: fqn.startswith("layers.0."))
        for batch in data:
            with monitor.step() as measuring:
                loss(model(batch)).backward()
            if measuring:
                print(monitor.table.worst())

    filter_fn(module, fqn): whether to measure that layer; None measures all. sample: how many evenly spaced
    tokens (rows of a weight) are counted, None for all; scales and amax are always those of the whole tensor.

    Compiled code compiles once more on the first measured step. On several ranks each measures its own
    tokens; weights sharded by FSDP are gathered one at a time, so all ranks must take the same steps. A layer
    that compiled code calls several times for one batch shows the sum of those calls' amaxes.

    Raises ValueError if no layer is chosen, `every` or `sample` is less than 1, or a chosen layer is sharded
    by tensor parallelism.
    """

    table: Table
    """What the last measured step gave; empty before."""

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 10,
        filter_fn: LayerFilter | None = None,
        sample: int | None = 128,
    ) -> None:
        if every < 1 or (sample is not None and sample < 1):
            raise ValueError(f"every={every} and sample={sample} must be at least 1")
        linears = _linears(model, Float8Linear)
        chosen = {n: m for n, m in linears.items() if filter_fn is None or filter_fn(m, n)}
        if not chosen:
            some = ", ".join(list(linears)[:3])
            raise ValueError(
                f"filter_fn chose none of the {len(linears)} Float8Linears ({some}, ...)"
                if linears
                else "the model has no Float8Linear: convert it first"
            )
        self.every, self.steps, self.table = every, 0, Table(())
        self._watches = [
            _Watch(name, linear, [linear.recipe], sample, frozen=False)
            for name, linear in chosen.items()
            if isinstance(linear, Float8Linear)
        ]

    @contextmanager
    def step(self) -> Iterator[bool]:
        """A scope around all forwards and backwards of one step; gives whether it is measured. The first is.

        Raises RuntimeError at its end if it was to be measured and no layer ran backward.
        """
        measuring = self.steps % self.every == 0
        self.steps += 1
        if not measuring:
            yield False
            return
        with ExitStack() as stack:
            for watch in self._watches:
                watch.start()
                setattr(watch.linear, "watch", watch)  # noqa: B010
                stack.callback(setattr, watch.linear, "watch", None)
            yield True
        rows = _rows(self._watches)
        for watch in self._watches:
            watch.seen = []
        if not rows:
            raise RuntimeError(
                "no layer of this Monitor ran forward and backward inside Monitor.step: put both inside"
            )
        self.table = Table(rows)


# ------------------------------------------------------------------------------------------------ in one call


def audit(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    recipes: Sequence[Options] | None = None,
) -> Table:
    """What casting does to every operand of every linear layer, in one forward and backward of `batch`.

    batch: a tensor, a tuple or list of arguments, or a mapping of keyword arguments, for the model.
    loss(output): a scalar to differentiate. None takes the output's `loss`, the output itself if it is a
    scalar, or else the mean of its squares, whose gradients have the real loss's place but not its values.
    recipes: names, `Recipe`s or `Float8LinearConfig`s to try on the same tensors, beside each layer's own;
    with them, linears that were not converted are measured too.

    Every value is measured, in eager mode, as though no parameter were frozen. Layers that the loss does not
    depend on are left out. Parameters, buffers, gradients, modes and the state of random number generators
    are as before.

    Raises ValueError if there is nothing to measure, the loss is not a scalar, or a layer is sharded by
    tensor parallelism.
    """
    others = [resolve(recipe)[0] for recipe in recipes or ()]
    linears = _linears(model, nn.Linear if others else Float8Linear)
    if not linears:
        raise ValueError(
            "the model has no linear layers"
            if others
            else 'the model has no Float8Linear: convert it, or name recipes to try, as recipes=["rowwise"]'
        )
    watches = []
    for name, linear in linears.items():
        own = [linear.recipe] if isinstance(linear, Float8Linear) else []
        watches.append(_Watch(name, linear, list(dict.fromkeys(own + others)), None, frozen=True))

    with ExitStack() as stack:
        stack.enter_context(_undisturbed(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        for watch in watches:
            stack.callback(watch.linear.register_forward_hook(watch.hook).remove)
            watch.start()
        if isinstance(batch, Mapping):
            output = model(**batch)
        elif isinstance(batch, (tuple, list)):
            output = model(*batch)
        else:
            output = model(batch)
        value = _default_loss(output) if loss is None else loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"the loss is {_describe(value)}; it must be one number: give loss=")
        # Only the probes' gradients, so that no parameter's is touched and none of its hooks runs.
        probes = [probe for watch in watches for probe in watch.probes]
        if probes and value.requires_grad:
            value.backward(inputs=probes)
        rows = _rows(watches)
    return Table(rows)


def _default_loss(output: Any) -> Any:
    value = getattr(output, "loss", None)
    value = output if value is None else value
    if isinstance(value, Tensor) and value.numel() != 1:
        return value.float().square().mean()
    return value


def _describe(value: Any) -> str:
    return (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers and the random number generators back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng([d.index for d in devices]):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
