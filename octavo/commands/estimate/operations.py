"""The work and the messages of a step, as they are called: matrix products, attention, collectives."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from octavo.commands.estimate.memory_tracker import Action
from octavo.config.parallel_dims import ParallelDims
from octavo.roofline import Shape

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALED = ("_scaled_mm", "scaled_mm_blocks")

# Operation's name -> the kind of message: functional collectives, FSDP2's, and those of torch.distributed.
_MESSAGES: Mapping[str, str] = {
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "allreduce_": "all-reduce",
    "all_to_all_single": "all-to-all",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "broadcast_": "broadcast",
}


@dataclass(frozen=True)
class Message:
    """One collective: what it is, the axis whose processes take part, how many they are."""

    kind: str
    axis: str
    size: int


def sent(kind: str, size: int, payload: float) -> float:
    """Bytes that one process of `size` sends when the larger side of the message is `payload` bytes, by a
    ring.
    """
    if kind == "send":
        return payload
    share = (size - 1) / size
    return payload * share * (2 if kind == "all-reduce" else 1)


@dataclass
class Counts:
    """Products by shape, attention by (tokens, keys, width, causal), messages and their bytes."""

    products: Counter[Shape] = field(default_factory=Counter)
    attention: Counter[tuple[int, int, int, bool, bool]] = field(default_factory=Counter)
    messages: Counter[Message] = field(default_factory=Counter)

    def plus(self, other: "Counts", times: int = 1) -> "Counts":
        """These and `times` those of `other`; what is then 0 is left out."""
        found = Counts()
        for name, counter in vars(found).items():
            mine, theirs = getattr(self, name), getattr(other, name)
            both = {key: mine[key] + times * theirs[key] for key in mine | theirs}
            counter.update({key: value for key, value in both.items() if value})
        return found


Noted = tuple[Action, Counts]
"""What a pipeline's schedule does, and the microbatches' counts until then."""


class Operations:
    """What an observer of a step sees. `microbatches` holds what happens until `end_of_microbatches`, and
    `rest` what comes after.
    """

    def __init__(self, layout: ParallelDims) -> None:
        self._axes = _axes(layout)
        self.clear()

    def clear(self) -> None:
        self.microbatches, self.rest = Counts(), Counts()
        self.noted: list[Noted] = []
        self._now = self.microbatches

    def note(self, action: Action) -> None:
        """`action` begins."""
        self.noted.append((action, self.microbatches.plus(Counts())))

    def end_of_microbatches(self) -> None:
        self._now = self.rest

    def see(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.partition("::")[2]
        if name in ("mm", "addmm", "bmm", "mm_codes", *_SCALED):
            self._product(name, args)
        elif "scaled_dot_product" in name:
            self._attention(name, args, kwargs)
        elif name in _MESSAGES:
            self._message(_MESSAGES[name], args)

    def _product(self, name: str, args: Any) -> None:
        a, b = args[1:3] if name == "addmm" else args[:2]
        batch = a.shape[0] if name == "bmm" else 1
        shape = Shape(a.shape[-2], a.shape[-1], b.shape[-1], a.dtype in _FLOAT8)
        self._now.products[shape] += batch

    def _attention(self, name: str, args: Any, kwargs: Any) -> None:
        backward = "backward" in name
        q, k = args[1:3] if backward else args[:2]
        causal = next((a for a in args[3:] if isinstance(a, bool)), True)
        causal = bool(kwargs.get("is_causal", causal))
        width = q.shape[1] * q.shape[3]
        self._now.attention[(q.shape[0] * q.shape[2], k.shape[2], width, causal, backward)] += 1

    def _message(self, kind: str, args: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        payload = max((t.numel() * t.element_size() for t in tensors), default=0)
        ranks = _members(args)
        if len(ranks) < 2:
            return
        grows = kind == "all-gather" and len(tensors) == 1  # functional: the result is not an argument
        self._now.messages[Message(kind, self._axis(ranks), len(ranks))] += payload * (
            len(ranks) if grows else 1
        )

    def _axis(self, ranks: tuple[int, ...]) -> str:
        stride = ranks[1] - ranks[0]
        return self._axes.get((len(ranks), stride), "all")


def _members(args: Any) -> tuple[int, ...]:
    """The ranks of the group that a collective's arguments name."""
    for arg in tree_leaves(args):
        if isinstance(arg, str):
            try:
                return tuple(
                    dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(cast(Any, arg)))
                )
            except (RuntimeError, LookupError, ValueError):
                continue
        if isinstance(arg, torch.ScriptObject):
            try:
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(arg)))
            except (RuntimeError, TypeError, KeyError):
                continue
        if isinstance(arg, dist.ProcessGroup):
            return tuple(dist.get_process_group_ranks(arg))
    return ()


def _axes(layout: ParallelDims) -> dict[tuple[int, int], str]:
    """(processes of a group, distance between them) -> the axis, or axes, that they differ in."""
    found: dict[tuple[int, int], str] = {}
    stride = 1
    strides = {}
    for axis, degree in reversed(layout.degrees.items()):
        strides[axis] = stride
        if degree > 1:
            found.setdefault((degree, stride), axis)
        stride *= degree
    if layout.context > 1 and layout.shard > 1:
        found[(layout.sharded, strides["context"])] = "shard x context"
    return found
