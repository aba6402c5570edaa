"""Float8 health during training, every k-th step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from torch import nn

from octavo.float8.health.measurements import Table
from octavo.float8.health.watch import LayerFilter, Watch, collect_rows, named_linears
from octavo.float8.linear import Float8Linear


class Monitor:
    """Measures the `Float8Linear`s of `model` on every `every`-th step.

        monitor = Monitor(model, every=10, filter_fn=lambda module, fqn: fqn.startswith("layers.0."))
        for batch in data:
            with monitor.step() as measuring:
                loss(model(batch)).backward()
            if measuring:
                print(monitor.table.worst())

    filter_fn(module, fqn): whether to measure that layer; None measures all. sample: the number of evenly
    spaced tokens (rows of a weight) to count, None for all; scales and amax are those of the whole tensor.

    Compiled code compiles once more on the first measured step. Each rank measures its own tokens, or, with
    `group`, all receive the numbers over all its ranks' tokens. Weights sharded by FSDP are gathered one at a
    time, so all ranks must measure the same steps. A layer that compiled code calls several times for one
    batch shows the sum of those calls' amaxes.

    Raises ValueError if no layer is chosen, `every` or `sample` is less than 1, or a chosen layer is sharded
    by tensor parallelism.
    """

    table: Table
    """The numbers of the last measured step; empty before."""

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 10,
        filter_fn: LayerFilter | None = None,
        sample: int | None = 32,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, value in (("every", every), ("sample", 1 if sample is None else sample)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        linears = named_linears(model, Float8Linear)
        chosen = {n: m for n, m in linears.items() if filter_fn is None or filter_fn(m, n)}
        if not chosen:
            examples = ", ".join(list(linears)[:3])
            raise ValueError(
                f"filter_fn chose none of the {len(linears)} Float8Linears ({examples}, ...)"
                if linears
                else "the model has no Float8Linear: convert it first"
            )
        self.every, self.steps, self.table = every, 0, Table(())
        self._group = group
        self._watches = [
            Watch(name, linear, [linear.recipe], sample, frozen=False)
            for name, linear in chosen.items()
            if isinstance(linear, Float8Linear)
        ]

    @contextmanager
    def step(self) -> Iterator[bool]:
        """Scope of all forwards and backwards of one step; yields whether it is measured, as the first one
        is.

        Raises RuntimeError if a layer is already being measured, and at its end if a measured step ran no
        layer backward.
        """
        measuring = self.steps % self.every == 0
        self.steps += 1
        if not measuring:
            yield False
            return
        busy = next((w.layer for w in self._watches if w.linear.watch is not None), None)
        if busy is not None:
            raise RuntimeError(
                f"{busy} is already being measured: another Monitor's step, or this one's, is still open"
            )
        with ExitStack() as stack:
            for watch in self._watches:
                watch.start()
                setattr(watch.linear, "watch", watch)  # noqa: B010
                stack.callback(setattr, watch.linear, "watch", None)
            yield True
        rows = collect_rows(self._watches, self._group)
        for watch in self._watches:
            watch.seen = []
        if not rows:
            raise RuntimeError(
                "no layer of this Monitor ran forward and backward inside Monitor.step: put both inside"
            )
        self.table = Table(rows)
