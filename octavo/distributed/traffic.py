"""Counts the bytes that a process sends in collectives, by what they carry.

Collectives of eager code are counted at the dispatcher. FSDP and DDP use `c10d` operators, for weights and
gradients; DTensor, tensor and context parallelism use `_c10d_functional` ones, for activations and the maxima
of float8 scales. The bytes on the wire depend on the algorithm; counted are those of a ring, the minimum that
each process must send:

    all-gather of n parts of b bytes, and reduce-scatter into them      (n - 1) b
    all-reduce of b bytes                                               2 (n - 1) / n b
    all-to-all                                                          the parts for others
    send                                                                b

Collectives in compiled code are not counted; it calls the same ones.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FUNCTIONAL = "_c10d_functional"


def _bytes(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in a list."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_bytes, tensors))


def _group(group: Any) -> Any:
    """The process group: functional operators pass its name, others a boxed object."""
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(group) if isinstance(group, str) else dist.ProcessGroup.unbox(group)


def _size(group: Any) -> int:
    return int(_group(group).size())


def _reduced(payload: int, group: Any) -> int:
    n = _size(group)
    return 2 * (n - 1) * payload // n


def _exchanged(x: Tensor, splits: list[int], group: Any) -> int:
    n = _size(group)
    if not splits:
        return x.nbytes * (n - 1) // n
    own = splits[_group(group).rank()]
    return x.nbytes * (sum(splits) - own) // sum(splits)


_SENT: dict[str, Callable[..., int]] = {
    # operator, without leading and trailing underscores -> its arguments -> bytes
    "c10d::allgather_base": lambda out, x, *_: out.nbytes - x.nbytes,
    "c10d::allgather": lambda outs, xs, *_: _bytes(outs) - _bytes(xs),
    "c10d::reduce_scatter_base": lambda out, x, *_: x.nbytes - out.nbytes,
    "c10d::reduce_scatter": lambda outs, xs, *_: _bytes(xs) - _bytes(outs),
    "c10d::allreduce": lambda xs, group, *_: _reduced(_bytes(xs), group),
    "c10d::alltoall_base": lambda out, x, group, received, sent, *_: _exchanged(x, sent, group),
    "c10d::broadcast": lambda xs, group, *_: _bytes(xs),
    "c10d::send": lambda xs, *_: _bytes(xs),
    f"{_FUNCTIONAL}::all_gather_into_tensor": lambda x, n, *_: (n - 1) * x.nbytes,
    f"{_FUNCTIONAL}::reduce_scatter_tensor": lambda x, op, n, *_: (n - 1) * x.nbytes // n,
    f"{_FUNCTIONAL}::all_reduce": lambda x, op, group: _reduced(x.nbytes, group),
    f"{_FUNCTIONAL}::all_to_all_single": lambda x, received, sent, group: _exchanged(x, sent, group),
    f"{_FUNCTIONAL}::broadcast": lambda x, *_: x.nbytes,
}
_SILENT = ("barrier", "wait_tensor", "wrap_tensor_autograd", "recv", "monitored_barrier")


class Traffic(TorchDispatchMode):
    """Within `with`, counts what this process sends.

    sent: bytes by "weights" (gathered), "gradients" (scattered or reduced), "activations". calls: number of
    calls of each collective.

    Raises:
        NotImplementedError: a collective without a rule in `_SENT`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        name = name.strip("_")
        if space in ("c10d", _FUNCTIONAL) and name not in _SILENT:
            count = _SENT.get(f"{space}::{name}")
            if count is None:
                raise NotImplementedError(f"the bytes of {func._schema.name} are not known")
            self.sent[_carried(space, name)] += count(*args, **(kwargs or {}))
            self.calls[f"{space}::{name}"] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All bytes sent."""
        return self.sent.total()


def _carried(space: str, name: str) -> str:
    if space == _FUNCTIONAL or name in ("send", "alltoall_base"):
        return "activations"
    return "weights" if "gather" in name or name == "broadcast" else "gradients"
