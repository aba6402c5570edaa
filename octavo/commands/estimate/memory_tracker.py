"""Logs every allocation of a training step in order: how many bytes are held when, and for what.

A dispatch mode receives each operation and so each new storage; a weak reference reports its end. FSDP2 also
resizes storages in place, without an operation, so `resize_` is wrapped too. The log of changes is read after
the step, because only then the use of each storage is known: a storage that a parameter's `.grad` shares is a
gradient, whichever operation made it.

The same class tracks real and fake tensors, so an estimate and a measurement count the same way. It does not
include scratch memory that a kernel allocates and frees itself.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
ACTIVATIONS, FLOAT8, COMMUNICATION = "activations", "float8", "communication"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, FLOAT8, COMMUNICATION)

LayerPass = tuple[str, int, int]
"""A layer's forward or backward: (FORWARD or BACKWARD, number of the stage, number of the layer)."""
FORWARD, BACKWARD = "forward", "backward"
Action = tuple[str, int]
"""An action of a pipeline's schedule: (FORWARD or BACKWARD, number of the microbatch)."""


@dataclass
class Log:
    """Changes in order: (storage's number, bytes more or less, number of the mark before it). For each mark:
    layer_passes, the layer that begins or ends at it; actions, the pipeline's action in progress; batches,
    the number of named marks so far.
    """

    changes: list[tuple[int, int, int]] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)
    marks: list[str] = field(default_factory=lambda: ["start"])
    layer_passes: list[LayerPass | None] = field(default_factory=lambda: [None])
    actions: list[Action | None] = field(default_factory=lambda: [None])
    batches: list[int] = field(default_factory=lambda: [0])

    def peaks(self, without: Iterable[str] = ()) -> list[tuple[str, dict[str, int]]]:
        """For each mark in order: its name and the bytes by kind at the peak before the next mark.

        Kinds in `without` are not counted.
        """
        hidden = set(without)
        held = dict.fromkeys(KINDS, 0)
        total, highest, current = 0, -1, 0
        peaks: list[tuple[str, dict[str, int]]] = []
        snapshot = dict(held)
        for number, change, mark in self.changes:
            while mark > current:
                peaks.append((self.marks[current], snapshot if highest >= 0 else dict(held)))
                current, highest = current + 1, -1
                if total > highest:
                    highest, snapshot = total, dict(held)
            kind = self.kinds.get(number, ACTIVATIONS)
            if kind in hidden:
                continue
            held[kind] += change
            total += change
            if total > highest:
                highest, snapshot = total, dict(held)
        peaks.append((self.marks[current], snapshot))
        peaks += [(mark, dict(held)) for mark in self.marks[current + 1 :]]
        return peaks


class MemoryTracker(TorchDispatchMode):
    """A context manager that logs allocations. `fake`: the mode whose tensors are tracked; None: real
    tensors.

    `on_operation` is called with every operation on tracked tensors: (operation, args, kwargs, result).
    """

    def __init__(
        self,
        fake: FakeTensorMode | None = None,
        on_operation: Callable[[Any, Any, Any, Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.log = Log()
        self._fake, self._on_operation = fake, on_operation
        self._numbers: dict[int, int] = {}  # id of a living storage -> its number
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._label: str | None = None
        self._paused = False

    def mark(self, name: str) -> None:
        """Begin the part `name` of the step."""
        self._add_mark(name, None, None, self.log.batches[-1] + 1)

    def mark_layer(self, layer_pass: LayerPass) -> None:
        """Begin a section for `layer_pass` within the current part."""
        self._add_mark(self.log.marks[-1], layer_pass, self.log.actions[-1], self.log.batches[-1])

    def mark_action(self, action: Action) -> None:
        """Begin a section for `action` within the current part."""
        self._add_mark(self.log.marks[-1], None, action, self.log.batches[-1])

    def _add_mark(self, name: str, layer_pass: LayerPass | None, action: Action | None, batch: int) -> None:
        self.log.marks.append(name)
        self.log.layer_passes.append(layer_pass)
        self.log.actions.append(action)
        self.log.batches.append(batch)

    @contextmanager
    def label(self, kind: str) -> Iterator[None]:
        """Within this context, new storages are of `kind`."""
        before, self._label = self._label, kind
        try:
            yield
        finally:
            self._label = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within this context, nothing is logged."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def claim(self, tensors: Iterable[Any], kind: str) -> None:
        """Set the kind of the storages of `tensors`, tracked so far or not."""
        for tensor in tensors:
            for plain in plain_tensors(tensor):
                number = self._storage_number(plain)
                if number is not None:
                    self.log.kinds[number] = kind

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # a subclass, which dispatches again with its inner tensors
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        tracked = False
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                tracked |= self._storage_number(leaf) is not None
        if tracked and self._on_operation is not None:
            self._on_operation(func, args, kwargs or {}, out)
        return out

    def __enter__(self) -> "MemoryTracker":
        original = self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            number = self._numbers.get(id(storage))
            if number is not None:
                self._change(number, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _storage_number(self, tensor: Tensor) -> int | None:
        """Number the storage of `tensor`, and log it if it is new; None if it is not tracked."""
        if isinstance(tensor, FakeTensor):
            if tensor.fake_mode is not self._fake:
                return None
        elif self._fake is not None or tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        number = self._numbers.get(id(storage))
        if number is None:
            number = len(self._sizes)
            self._numbers[id(storage)] = number
            self._references[number] = weakref.ref(storage, self._on_freed(id(storage), number))
            if self._label is not None:
                self.log.kinds[number] = self._label
            elif tensor.dtype in _FLOAT8:
                self.log.kinds[number] = FLOAT8
        self._change(number, storage.nbytes())
        return number

    def _change(self, number: int, size: int) -> None:
        before = self._sizes.get(number, 0)
        self._sizes[number] = size
        if size != before:
            self.log.changes.append((number, size - before, len(self.log.marks) - 1))

    def _on_freed(self, key: int, number: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self._numbers.pop(key, None)
            self._references.pop(number, None)
            self._change(number, 0)

        return freed


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """Yield the plain tensors inside a tensor subclass, or `tensor` itself."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield tensor
    else:
        for name in inner()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a DTensor also lists its mesh
                yield from plain_tensors(part)


@contextmanager
def label_hidden_memory(tracker: MemoryTracker) -> Iterator[None]:
    """Patch PyTorch so that what FSDP2 gathers is labelled as communication and DTensor's shape inference is
    not logged.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    def within(context: Callable[[], Any], function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with context():
                return function(*args, **kwargs)

        return run

    def labelled(function: Any) -> Any:
        return within(lambda: tracker.label(COMMUNICATION), function)

    def paused(function: Any) -> Any:
        return within(tracker.pause, function)

    def agreed(function: Any) -> Any:
        return lambda *args, **kwargs: SimpleNamespace(item=lambda: 1)

    patches = [
        (_fsdp_param_group, "foreach_all_gather", labelled),
        (_fsdp_param_group, "foreach_all_gather_copy_out", labelled),
        (_fsdp_param_group, "foreach_reduce", labelled),
        (_fsdp_param.FSDPParam, "init_all_gather_outputs", labelled),
        (_fsdp_param.FSDPParam, "init_unsharded_param", labelled),
        # Stages vote on whether shapes are static; the fake ones cannot, and shapes are static here.
        (PipelineStage, "_warmup_forward_vote", agreed),
        (PipelineStage, "_warmup_backward_result", agreed),
        # DTensor infers shapes by running an operation on whole tensors, on the meta device.
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", paused),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches if hasattr(owner, name)]
    try:
        for owner, name, patch in patches:
            if hasattr(owner, name):
                setattr(owner, name, patch(getattr(owner, name)))
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
