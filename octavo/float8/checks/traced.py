"""The memory traffic of a float8 module on a GPU, read off its graphs; needs triton, but no GPU.

    with FakeTensorMode(allow_non_fake_inputs=True), force_kernels():
        traffic = trace(model, *inputs)      # or trace_eager(function)
    print(traffic.total("cast"), traffic.times_cast(), traffic.saved)

`trace` compiles the model up to the graphs that the compiler would generate code from: after dynamo, AOT
autograd and the partitioner, which decides what is saved for backward. Our operators run up to the Triton
kernels that they launch, whose arguments are what each reads and writes. Nothing is computed, so sizes do not
matter.

Bytes are counted as if each kernel read its inputs and wrote its outputs once. Elementwise operations that
feed each other count as one kernel, unless a product, an attention or a kernel of ours is between them; the
compiler may need more kernels. `_cast_wide_rows` reads its input twice, mostly from cache.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_CASTS = "octavo.float8.kernels.cast_"
_VIEWS = (
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "slice",
    "select", "split", "split_with_sizes", "alias", "detach", "as_strided", "unbind", "narrow",
)  # fmt: skip
_FREE = ("empty", "new_empty", "empty_like", "zeros", "new_zeros", "full", "ones", "scalar_tensor", "arange")
_PRODUCTS = ("mm", "addmm", "bmm", "_scaled_mm", "_scaled_mm_v2", "scaled_mm_blocks")
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int32)
"""Codes, one-byte scales and the bits of maxima: what only casts read and write, besides products."""


@dataclass(frozen=True)
class KernelCall:
    """A kernel. `kind`: cast, producer (of a tensor with its maxima), product, attention or elementwise.
    `operand`: the tensor that a cast casts; `makes`: "rows", "columns", both, or neither (maxima only).
    """

    name: str
    kind: str
    read: int
    written: int
    operand: str = ""
    makes: tuple[str, ...] = ()
    backward: bool = False
    tuning: tuple[Hashable, int] | None = None
    """Of a Triton kernel: the sizes for which it is tuned, and among how many configurations."""

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass
class KernelTraffic:
    """All launches of forward and backward, and the bytes of each tensor saved for backward, by name."""

    launches: list[KernelCall] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)

    def total(self, kind: str) -> int:
        return sum(launch.bytes for launch in self.launches if launch.kind == kind)

    def configurations(self) -> int:
        """How many configurations of kernels are timed, at the first launch for each size."""
        tuned = {(call.name, call.tuning) for call in self.launches if call.tuning is not None}
        return sum(count for _, (_, count) in tuned if count > 1)

    def times_cast(self) -> Counter[tuple[str, str]]:
        """(operand, "rows" or "columns") -> how often it is cast so."""
        return Counter((launch.operand, made) for launch in self.launches for made in launch.makes)


def trace(model: nn.Module, *inputs: Tensor) -> KernelTraffic:
    """The traffic of `model(*inputs)` and its backward, compiled; one of the inputs requires a gradient."""
    from torch._inductor import compile_fx

    graphs: list[tuple[bool, fx.GraphModule]] = []
    names: list[str] = []

    def keep(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        graphs.append((bool(kwargs.get("is_backward")), gm))
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        names.extend(_plain(node.name) for node in gm.graph.nodes if node.op == "placeholder")
        return compile_fx.compile_fx(gm, example_inputs, inner_compile=keep)

    torch._dynamo.reset()
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with uncached, torch._inductor.config.patch(fx_graph_cache=False):
        torch.compile(model, backend=backend, fullgraph=True)(*inputs).sum().backward()
    traffic = KernelTraffic()
    known = {f"primals_{i}": name for i, name in enumerate(names, 1)}
    held = {name for name in names if not re.fullmatch(r"l_\w+_", name)}
    for backward, gm in graphs:
        reader = _GraphReader(gm, known, held, backward)
        traffic.launches += reader.launches()
        if backward:
            traffic.saved = reader.saved()
    return traffic


def trace_eager(function: Callable[[], Any]) -> KernelTraffic:
    """The traffic of `function()`, run operation by operation."""
    with _Launches() as run:
        function()
    return KernelTraffic(run.calls)


def _plain(name: str) -> str:
    """`wq.weight` for dynamo's `l_self_modules_attention_modules_wq_parameters_weight_`."""
    if not name.startswith("l_self_"):
        return name
    return re.sub(r"_(modules|parameters|buffers)_", ".", name.removeprefix("l_self")).strip("._")


def _size(value: Any) -> int:
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _op(node: fx.Node) -> str:
    if node.op != "call_function":  # a placeholder may be called after the operation that made it
        return ""
    return getattr(node.target, "_opname", "") or getattr(node.target, "__name__", str(node.target))


class _GraphReader:
    """`known`: the original names of placeholders, extended by the forward graph for the backward one.
    `held`: those that the module holds anyway.
    """

    def __init__(
        self, gm: fx.GraphModule, known: dict[str, str], held: set[str], backward: bool = False
    ) -> None:
        self.nodes, self.known, self.held, self.backward = list(gm.graph.nodes), known, held, backward
        for node in self.nodes:
            known[node.name] = self._root(node)

    def _root(self, node: fx.Node) -> str:
        """The name of the tensor of which `node` is a view, or itself."""
        if node.op == "placeholder":
            return self.known.get(node.name, node.name)
        if _op(node) == "getitem":
            source, i = node.args
            assert isinstance(source, fx.Node)
            if "auto_functionalized" in _op(source):  # `pin_saved`: its outputs are its inputs
                return self.known[source.kwargs["_all_bases"][i - 1].name]  # type: ignore[index,operator,union-attr]
            if _op(source) in _VIEWS:
                return self.known[source.name]
            return f"{_op(source)}.{i} {node.name}"
        if _op(node) in _VIEWS:
            return self.known[node.all_input_nodes[0].name]
        return node.name

    def saved(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for node in self.nodes:
            name = self.known[node.name]
            if node.op != "placeholder" or name in self.held or "tangents" in name:
                continue
            value = node.meta.get("val")
            if isinstance(value, Tensor):  # a view keeps the whole tensor
                found[name] = max(found.get(name, 0), value.untyped_storage().nbytes())
        return found

    def launches(self) -> Iterator[KernelCall]:
        level: dict[fx.Node, int] = {}  # products, attentions and Triton kernels before it
        computed: set[fx.Node] = set()  # by elementwise operations
        wanted: set[fx.Node] = set()  # in memory: by what is none, and as results
        for node in self.nodes:
            sources = [self._computed(n) for n in node.all_input_nodes]
            level[node] = max((level[n] + self._barrier(n) for n in node.all_input_nodes), default=0)
            if node.op == "call_function" and self._is_free(node):
                continue
            if node.op != "call_function" or self._barrier(node) or self._touches_codes(node):
                wanted.update(sources)
            else:
                computed.add(node)
            if self._is_ours(node):
                yield from self._kernels(node)
            elif self._barrier(node):
                kind = "attention" if "scaled_dot_product" in _op(node) else "product"
                yield self._launch(_op(node), kind, node.all_input_nodes, [node])
            elif node.op == "call_function" and node not in computed:
                yield self._launch(_op(node), "cast", node.all_input_nodes, [node])
        yield from self._elementwise(computed, wanted, level)

    def _elementwise(
        self, computed: set[fx.Node], wanted: set[fx.Node], level: dict[fx.Node, int]
    ) -> Iterator[KernelCall]:
        """One kernel for all wanted values of a level that share an input; others are computed in passing."""
        inputs: dict[fx.Node, set[fx.Node]] = {}
        groups: list[tuple[set[fx.Node], set[fx.Node]]] = []
        for node in (n for n in self.nodes if n in computed):
            inputs[node] = set()
            for source in (self._computed(n) for n in node.all_input_nodes):
                passing = source in computed and (source not in wanted or level[source] == level[node])
                inputs[node] |= inputs[source] if passing else {source}
            if node not in wanted:
                continue
            near = [g for g in groups if g[1] & inputs[node] and level[next(iter(g[0]))] == level[node]]
            groups = [g for g in groups if g not in near]
            groups.append(({node}.union(*(g[0] for g in near)), inputs[node].union(*(g[1] for g in near))))
        for outputs, sources in groups:
            name = "+".join(_op(n) for n in self.nodes if n in outputs)
            yield self._launch(f"for {name}", "elementwise", sources, outputs)

    def _computed(self, node: fx.Node) -> fx.Node:
        """The node of which `node` is a view, or itself."""
        while _op(node) in _VIEWS or (_op(node) == "getitem" and _op(node.all_input_nodes[0]) in _VIEWS):
            node = node.all_input_nodes[0]
        return node

    def _barrier(self, node: fx.Node) -> bool:
        name = _op(node)
        return name in _PRODUCTS or "scaled_dot_product" in name or self._is_ours(node)

    def _is_ours(self, node: fx.Node) -> bool:
        return getattr(node.target, "namespace", "") == "octavo" and _op(node) not in _PRODUCTS

    def _is_free(self, node: fx.Node) -> bool:
        name = _op(node)
        return name in _VIEWS or name in _FREE or name == "getitem" or "auto_functionalized" in name

    def _touches_codes(self, node: fx.Node) -> bool:
        values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        return any(isinstance(v, Tensor) and v.dtype in _NARROW for v in values)

    def _launch(self, name: str, kind: str, inputs: Any, outputs: Any) -> KernelCall:
        read = {self.known[n.name]: _size(n.meta.get("val")) for n in inputs}
        written = sum(_size(n.meta.get("val")) for n in outputs)
        return KernelCall(name, kind, sum(read.values()), written, backward=self.backward)

    def _kernels(self, node: fx.Node) -> list[KernelCall]:
        """Those that our operator `node` launches."""
        run = _Launches(self.backward)

        def stand_in(n: fx.Node) -> Any:
            value = n.meta["val"]
            if not isinstance(value, Tensor):
                return value
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            run.name(meta, self.known[n.name])
            return meta

        args = fx.node.map_arg(node.args, stand_in)
        with run:
            node.target(*args)  # type: ignore[operator]
        return run.calls


class _Launches(TorchDispatchMode):
    """Records what operations read and write. Our operators run as far as their Triton kernels, which are
    recorded instead of launched.
    """

    def __init__(self, backward: bool = False) -> None:
        super().__init__()
        self.calls: list[KernelCall] = []
        self.backward = backward
        self._names: dict[int, str] = {}  # of what was computed, by storage
        self._parts: set[tuple[int, int]] = set()  # what kernels have written, by storage and offset
        self._alive: list[Tensor] = []  # so that no storage is used twice

    def name(self, x: Tensor, name: str = "") -> str:
        self._alive.append(x)
        return self._names.setdefault(x.untyped_storage()._cdata, name or f"tensor {len(self._names)}")

    def _is_new(self, x: Tensor) -> bool:
        storage = x.untyped_storage()._cdata
        return storage not in self._names and (storage, int(x.storage_offset())) not in self._parts

    def _distinct(self, tensors: Iterable[Tensor]) -> int:
        """Bytes; a tensor may be given twice, in place of one that is not there."""
        places = {(t.untyped_storage()._cdata, int(t.storage_offset())): _size(t) for t in tensors}
        return sum(places.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from octavo.float8.kernels.kernel_launch import handed_to
        from octavo.float8.kernels.ops import LAUNCHERS

        kwargs = kwargs or {}
        launcher = LAUNCHERS.get(func._opname) if func.namespace == "octavo" else None
        if launcher is not None:
            reads = [a for a, of in zip(args, func._schema.arguments, strict=False) if not _is_written(of)]
            for x in (t for t in pytree.tree_leaves(reads) if isinstance(t, Tensor)):
                self.name(x)
            with self, handed_to(self.launch):
                return launcher(*args)
        made = func(*args, **kwargs)
        if func._opname not in _FREE and _size(made):
            tensors = [t for t in pytree.tree_leaves((args, kwargs, made)) if isinstance(t, Tensor)]
            if func._opname not in _VIEWS:
                for x in pytree.tree_leaves(made):
                    self.name(x)
                kind = "cast" if any(t.dtype in _NARROW for t in tensors) else "elementwise"
                read, written = _size((args, kwargs)), _size(made)
                self.calls.append(KernelCall(func._opname, kind, read, written, backward=self.backward))
        return made

    def launch(self, kernel: Any, args: Any, kwargs: Any) -> None:
        """What a kernel is given that nothing has written yet, it writes."""
        from octavo.float8.kernels.kernel_launch import tuning_of

        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
        written = {name for name, t in tensors.items() if self._is_new(t)}
        function = kernel.fn
        while hasattr(function, "fn"):
            function = function.fn
        both = set(getattr(kernel, "restore_value", None) or ())  # updated in place
        for name in written:
            self._alive.append(tensors[name])
            place = tensors[name].untyped_storage()._cdata, int(tensors[name].storage_offset())
            self._parts.add(place)
        is_cast = function.__module__.startswith(_CASTS)
        outputs = {"rows": "data_ptr", "columns": "data_t_ptr"}
        call = KernelCall(
            f"{function.__module__.rpartition('.')[2]}.{function.__name__}",
            "cast" if is_cast else "producer",
            self._distinct(t for name, t in tensors.items() if name not in written),
            self._distinct(t for name, t in tensors.items() if name in written | both),
            self.name(tensors["x_ptr"]) if is_cast else "",
            tuple(way for way, name in outputs.items() if name in written and tensors[name].numel() > 0),
            self.backward,
            tuning_of(kernel, args, kwargs),
        )
        self.calls.append(call)
