"""Float8 health of a model in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from octavo.float8.config import Options, resolve
from octavo.float8.health.measurements import Table
from octavo.float8.health.watch import LayerFilter, Watch, collect_rows, named_linears
from octavo.float8.linear import Float8Linear


def audit(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    recipes: Sequence[Options] | None = None,
    filter_fn: LayerFilter | None = None,
    group: dist.ProcessGroup | None = None,
    forward: Callable[..., Any] | None = None,
) -> Table:
    """Measure what casting does to every operand of every linear layer, in one forward and backward of
    `batch`.

    batch: a tensor, a tuple or list of arguments, or a mapping of keyword arguments, for the model.
    loss(output): a scalar to differentiate; None uses the output's `loss`, the output itself if it is a
    scalar, or else the mean of its squares, whose gradients have the right shapes but not the real loss's
    values. recipes: names, `Recipe`s or `Float8LinearConfig`s to try on the same tensors, besides each
    layer's own; with them, linears that were not converted are measured too. filter_fn(module, fqn): whether
    to measure that layer; None measures all. group: ranks that each have their own batch, and all receive the
    numbers over all batches. forward: what to call with the batch; None calls the model.

    Every value is measured, in eager mode, frozen parameters included. Layers that the loss does not depend
    on are left out. Parameters, buffers, gradients, modes and random number generators are left as they were.

    Raises ValueError if there is nothing to measure, the loss is not a scalar, or a layer is sharded by
    tensor parallelism.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("audit needs gradients: call it outside torch.inference_mode()")
    if isinstance(recipes, str):
        raise ValueError(f"recipes is the string {recipes!r}: give a list, [{recipes!r}]")
    others = [resolve(recipe)[0] for recipe in recipes or ()]
    linears = named_linears(model, nn.Linear if others else Float8Linear)
    if linears and filter_fn is not None:
        linears = {name: linear for name, linear in linears.items() if filter_fn(linear, name)}
        if not linears:
            raise ValueError("filter_fn chose none of the model's linear layers")
    if not linears:
        raise ValueError(
            "the model has no linear layers"
            if others
            else 'the model has no Float8Linear: convert it, or name recipes to try, as recipes=["rowwise"]'
        )
    watches = []
    for name, linear in linears.items():
        own = [linear.recipe] if isinstance(linear, Float8Linear) else []
        watches.append(Watch(name, linear, list(dict.fromkeys(own + others)), None, frozen=True))

    with ExitStack() as stack:
        stack.enter_context(_undisturbed(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        for watch in watches:
            if isinstance(watch.linear, Float8Linear):  # `fused` may bypass its forward
                stack.callback(setattr, watch.linear, "watch", watch.linear.watch)
                setattr(watch.linear, "watch", watch)  # noqa: B010
            else:
                stack.callback(watch.linear.register_forward_hook(watch.hook).remove)
            watch.start()
        call = model if forward is None else forward
        if isinstance(batch, Mapping):
            output = call(**batch)
        elif isinstance(batch, (tuple, list)):
            output = call(*batch)
        else:
            output = call(batch)
        value = _default_loss(output) if loss is None else loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"the loss is {_describe(value)}; it must be one number: give loss=")
        # Only the probes' gradients: parameters' gradients are unchanged, and their hooks do not run.
        probes = [probe for watch in watches for probe in watch.probes]
        if probes and value.requires_grad:
            value.backward(inputs=probes)
        rows = collect_rows(watches, group)
    if not rows:
        raise ValueError(
            "nothing was measured: the loss depends on no linear layer, because it was detached, or because "
            "checkpoint(..., use_reentrant=True) hid the layers; use_reentrant=False shows them"
        )
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
    """Scope that restores the model's buffers and the random number generators."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng([d.index for d in devices]):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
