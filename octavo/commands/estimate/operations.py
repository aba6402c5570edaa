"""Counts the matrix products, attention calls and collectives of a step."""

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

# Operation -> kind of message, for functional collectives, FSDP2's and torch.distributed's.
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
    """One collective: its kind, the parallel axis of its process group, the number of processes in it."""

    kind: str
    axis: str
    size: int

    def bytes_sent(self, payload: float) -> float:
        """Bytes that one process sends in a ring when the larger side of the message is `payload` bytes."""
        if self.kind == "send":
            return payload
        share = (self.size - 1) / self.size
        return payload * share * (2 if self.kind == "all-reduce" else 1)


@dataclass
class Counts:
    """Products by shape, attention by (tokens, keys, width, causal, backward), payload bytes by message."""

    products: Counter[Shape] = field(default_factory=Counter)
    attention: Counter[tuple[int, int, int, bool, bool]] = field(default_factory=Counter)
    messages: Counter[Message] = field(default_factory=Counter)

    def plus(self, other: "Counts", times: int = 1) -> "Counts":
        """Return these counts plus `times` those of `other`, without zeros."""
        total = Counts()
        for name, counter in vars(total).items():
            ours, others = getattr(self, name), getattr(other, name)
            sums = {key: ours[key] + times * others[key] for key in ours | others}
            counter.update({key: value for key, value in sums.items() if value})
        return total


ActionCounts = tuple[Action, Counts]
"""An action of a pipeline's schedule, and the microbatches' counts before it."""


class OperationCounter:
    """Counts a step's operations: `microbatches` until `end_of_microbatches`, `rest` after it."""

    def __init__(self, layout: ParallelDims) -> None:
        self._axes = _axes_by_group(layout)
        self.clear()

    def clear(self) -> None:
        self.microbatches, self.rest = Counts(), Counts()
        self.by_action: list[ActionCounts] = []
        self._current = self.microbatches

    def begin_action(self, action: Action) -> None:
        self.by_action.append((action, self.microbatches.plus(Counts())))

    def end_of_microbatches(self) -> None:
        self._current = self.rest

    def record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count one dispatched operation."""
        name = func._schema.name.partition("::")[2]
        if name in ("mm", "addmm", "bmm", "mm_codes", *_SCALED):
            self._record_product(name, args)
        elif "scaled_dot_product" in name:
            self._record_attention(name, args, kwargs)
        elif name in _MESSAGES:
            self._record_message(_MESSAGES[name], args)

    def _record_product(self, name: str, args: Any) -> None:
        a, b = args[1:3] if name == "addmm" else args[:2]
        batch = a.shape[0] if name == "bmm" else 1
        shape = Shape(a.shape[-2], a.shape[-1], b.shape[-1], a.dtype in _FLOAT8)
        self._current.products[shape] += batch

    def _record_attention(self, name: str, args: Any, kwargs: Any) -> None:
        backward = "backward" in name
        q, k = args[1:3] if backward else args[:2]
        causal = next((a for a in args[3:] if isinstance(a, bool)), True)
        causal = bool(kwargs.get("is_causal", causal))
        width = q.shape[1] * q.shape[3]
        self._current.attention[(q.shape[0] * q.shape[2], k.shape[2], width, causal, backward)] += 1

    def _record_message(self, kind: str, args: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        payload = max((t.numel() * t.element_size() for t in tensors), default=0)
        ranks = _group_ranks(args)
        if len(ranks) < 2:
            return
        if kind == "all-gather" and len(tensors) == 1:  # functional: the result is not an argument
            payload *= len(ranks)
        axis = self._axes.get((len(ranks), ranks[1] - ranks[0]), "all")
        self._current.messages[Message(kind, axis, len(ranks))] += payload


def _group_ranks(args: Any) -> tuple[int, ...]:
    """The ranks of the process group in a collective's arguments."""
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


def _axes_by_group(layout: ParallelDims) -> dict[tuple[int, int], str]:
    """(size of a process group, stride of its ranks) -> the parallel axis, or axes, of the group."""
    axes: dict[tuple[int, int], str] = {}
    stride = 1
    strides = {}
    for axis, degree in reversed(layout.degrees.items()):
        strides[axis] = stride
        if degree > 1:
            axes.setdefault((degree, stride), axis)
        stride *= degree
    if layout.context > 1 and layout.shard > 1:
        axes[(layout.sharded, strides["context"])] = "shard x context"
    return axes
