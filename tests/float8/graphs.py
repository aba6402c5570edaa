"""What autograd saves, and what a compiled graph computes and saves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partialmethod
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn

# The compiler makes deprecated calls to PyTorch itself.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")
# The graphs that inductor would be given, run as they are: generating code is most of what compiling takes.
WITHOUT_CODE = "aot_eager_decomp_partition"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HIGH_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def layers_compile_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `module.compile()`, also in processes that are forked from here on, stop at the graphs."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=WITHOUT_CODE))


def saved_tensors(model: Callable[..., Tensor], x: Tensor, params: nn.Module) -> list[Tensor]:
    """What `model(x)` saves for backward, one tensor a storage, without the parameters'."""
    mine = {p.untyped_storage().data_ptr() for p in params.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in mine:
            seen.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return list(seen.values())


def saved_bytes(model: Callable[..., Tensor], x: Tensor, params: nn.Module) -> int:
    return sum(t.untyped_storage().nbytes() for t in saved_tensors(model, x, params))


@dataclass
class Graphs:
    """The forward and backward graphs that inductor was given, after partitioning."""

    forward: list[fx.GraphModule] = field(default_factory=list)
    backward: list[fx.GraphModule] = field(default_factory=list)

    def casts(self, which: str) -> list[tuple[int, ...]]:
        """Shapes of all conversions to float8 in `which`, "forward" or "backward"."""
        return [
            tuple(node.meta["val"].shape)
            for graph in getattr(self, which)
            for node in graph.graph.nodes
            if node.op == "call_function" and is_cast(node)
        ]

    def saved(self) -> list[Tensor]:
        """What the backward graph takes besides the gradients, as fake tensors."""
        (graph,) = self.backward
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder" and "tangent" not in n.name]
        return [n.meta["val"] for n in inputs if isinstance(n.meta["val"], Tensor)]


def is_cast(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in FLOAT8:
        return False
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    operand = source.meta.get("val") if source is not None else None
    return isinstance(operand, Tensor) and operand.dtype in HIGH_PRECISION


def compile_and_capture(model: nn.Module, x: Tensor) -> Graphs:
    """The graphs of `model(x)` and its backward as inductor partitions them, without generating code."""
    from torch._inductor import compile_fx

    graphs = Graphs()

    def spy(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        (graphs.backward if kwargs.get("is_backward") else graphs.forward).append(copy.deepcopy(gm))
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(gm, inputs, inner_compile=spy)

    torch._dynamo.reset()
    caches = torch._functorch.config.patch(enable_autograd_cache=False)
    with caches, torch._inductor.config.patch(fx_graph_cache=False):
        torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    return graphs


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of x and gradients of the parameters, for a fixed random gradient of the output."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
