"""Every allocation of a training step, in order: who holds how many bytes when.

A dispatch mode sees each operation and with it each new storage; a weak reference tells when the storage is
gone. FSDP2 also resizes storages in place, which no operation shows, so that method is watched too. What is
kept is a log of changes. It is read when the step is over, because only then it is known what a storage was
for: one that a parameter's `.grad` shares is a gradient, whatever made it.

The same class watches real tensors and fake ones, so an estimate and a measurement count alike. It does not
see what a kernel allocates for itself and frees again.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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

Place = tuple[str, int, int]
"""Where in a step something is: forward or backward, number of the stage, number of the layer."""
FORWARD, BACKWARD = "forward", "backward"
Action = tuple[str, int]
"""What a pipeline's schedule does: forward or backward, number of the microbatch."""


@dataclass
class Log:
    """Changes in order: (storage's number, bytes more or less, number of the mark before it). For each mark:
    places, the layer that begins or ends at it; actions, what a pipeline's schedule does then; batches, how
    many had a name of their own until it.
    """

    changes: list[tuple[int, int, int]] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)
    marks: list[str] = field(default_factory=lambda: ["start"])
    places: list[Place | None] = field(default_factory=lambda: [None])
    actions: list[Action | None] = field(default_factory=lambda: [None])
    batches: list[int] = field(default_factory=lambda: [0])

    def peaks(self, without: Iterable[str] = ()) -> list[tuple[str, dict[str, int]]]:
        """For each mark, in order, what was held by kind at the highest moment until the next mark.

        Kinds in `without` are not counted, as they are somewhere else.
        """
        hidden = set(without)
        held = dict.fromkeys(KINDS, 0)
        total, best, place = 0, -1, 0
        found: list[tuple[str, dict[str, int]]] = []
        snapshot = dict(held)
        for number, change, mark in self.changes:
            while mark > place:
                found.append((self.marks[place], snapshot if best >= 0 else dict(held)))
                place, best = place + 1, -1
                if total > best:
                    best, snapshot = total, dict(held)
            kind = self.kinds.get(number, ACTIVATIONS)
            if kind in hidden:
                continue
            held[kind] += change
            total += change
            if total > best:
                best, snapshot = total, dict(held)
        found.append((self.marks[place], snapshot))
        found += [(mark, dict(held)) for mark in self.marks[place + 1 :]]
        return found


class MemoryTracker(TorchDispatchMode):
    """A scope in which allocations are logged. `fake`: the mode whose tensors count; None: real ones.

    `seen` is called with every operation that counts: (operation, arguments, keywords, result).
    """

    def __init__(
        self,
        fake: FakeTensorMode | None = None,
        seen: Callable[[Any, Any, Any, Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.log = Log()
        self._fake, self._seen = fake, seen
        self._numbers: dict[int, int] = {}  # id of a living storage -> its number
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._label: str | None = None
        self._paused = False

    # ---------------------------------------------------------------------------------------- what is told

    def mark(self, name: str) -> None:
        """What follows is `name`."""
        self._add(name, None, None, self.log.batches[-1] + 1)

    def cut(self, place: Place) -> None:
        """What follows bears the same name, but is counted on its own."""
        self._add(self.log.marks[-1], place, self.log.actions[-1], self.log.batches[-1])

    def begin(self, action: Action) -> None:
        """What follows is `action`, under the same name."""
        self._add(self.log.marks[-1], None, action, self.log.batches[-1])

    def _add(self, name: str, place: Place | None, action: Action | None, batch: int) -> None:
        self.log.marks.append(name)
        self.log.places.append(place)
        self.log.actions.append(action)
        self.log.batches.append(batch)

    @contextmanager
    def label(self, kind: str) -> Iterator[None]:
        """New storages within are of `kind`."""
        before, self._label = self._label, kind
        try:
            yield
        finally:
            self._label = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens within is not looked at."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def claim(self, tensors: Iterable[Any], kind: str) -> None:
        """The storages of `tensors`, known or not, are of `kind`."""
        for tensor in tensors:
            for plain in plain_tensors(tensor):
                number = self._see(plain)
                if number is not None:
                    self.log.kinds[number] = kind

    # ---------------------------------------------------------------------------------------- what is seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # a subclass, which comes again with the tensors in it
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        counts = False
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                counts |= self._see(leaf) is not None
        if counts and self._seen is not None:
            self._seen(func, args, kwargs or {}, out)
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

    def _see(self, tensor: Tensor) -> int | None:
        """The number of its storage; None if it does not count."""
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
            self._references[number] = weakref.ref(storage, self._gone(id(storage), number))
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

    def _gone(self, key: int, number: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self._numbers.pop(key, None)
            self._references.pop(number, None)
            self._change(number, 0)

        return gone


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """The tensors with memory of their own that `tensor` is made of."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield tensor
    else:
        for name in inner()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a DTensor names its mesh, too
                yield from plain_tensors(part)
