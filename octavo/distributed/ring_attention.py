"""Ring attention: attention over a sequence shared by several processes, with bounded memory.

Gathering (`context_parallel.ContextAttention`) holds the keys and values of the whole sequence on every
process. Here a process holds its own and those of one other process: they are passed around the ring, and the
partial results are merged by their log-sum-exps, which is exact (Ring Attention, arXiv:2310.01889; the merge
is online softmax, arXiv:1805.02867). Backward passes them around once more together with their gradients,
which return to their owner after n hops. This costs a second round of messages, but saves memory and needs no
mask in the kernels.

Process r of n has the pieces r and 2n - 1 - r of the sequence, in that order, so no block needs a mask:

    its own keys               causal, as in one sequence: the order of its positions is ascending
    those of a process s < r   all queries see s's first piece and none its second
    those of a process s > r   the second piece's queries see both, the first piece's none

Every block but the process's own has the same work, half a square, so the load is balanced.

Shapes: B batch, H heads, G key/value heads, P positions of this process, E head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

_aten = torch.ops.aten
_functional = torch.ops._c10d_functional  # collectives that torch.compile can trace


@dataclass(frozen=True)
class Kernel:
    """The attention kernels of a device type, without a mask. `grouped`: whether they take fewer key/value
    heads than query heads.

    forward(q, k, v, causal) -> y, log-sum-exp [B, H, P], further tensors for backward (`rest`).
    backward(dy, q, k, v, y, log-sum-exp, rest, causal) -> dq, dk, dv.
    """

    forward: Callable[..., tuple[Tensor, Tensor, list[Tensor]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    grouped: bool = False

    def keys_for(self, x_BGPE: Tensor, heads: int) -> Tensor:
        """Keys or values as the kernels take them."""
        return x_BGPE if self.grouped else x_BGPE.repeat_interleave(heads // x_BGPE.shape[1], dim=1)

    def of_groups(self, x: Tensor, groups: int) -> Tensor:
        """The gradient `[B, G, P, E]` of what `keys_for` returned."""
        return x if self.grouped else x.unflatten(1, (groups, -1)).sum(2)


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    y, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return y, lse, []


def _backward_cpu(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, rest: list[Tensor], causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # the memory layout of its forward
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    return tuple(backward(dy, q, k, v, y, lse, 0.0, causal))  # type: ignore[return-value]


def _forward_cuda(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    outputs = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return outputs[0], outputs[1], [outputs[6], outputs[7]]


def _backward_cuda(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, rest: list[Tensor], causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _aten._scaled_dot_product_flash_attention_backward
    lengths = (None, None, q.shape[2], k.shape[2])  # no variable-length sequences
    return tuple(backward(dy, q, k, v, y, lse.contiguous(), *lengths, 0.0, causal, *rest))  # type: ignore[return-value]


KERNELS = {
    "cpu": Kernel(_forward_cpu, _backward_cpu),
    "cuda": Kernel(_forward_cuda, _backward_cuda, grouped=True),
}


@dataclass(frozen=True)
class _Block:
    """The part computed with one process's keys: queries from `first`, keys before `last`."""

    first: int
    last: int
    causal: bool


def _block(rank: int, source: int, positions: int) -> _Block:
    half = positions // 2
    if source == rank:
        return _Block(0, positions, causal=True)
    return _Block(0, half, causal=False) if source < rank else _Block(half, positions, causal=False)


def _passed_on(x: Tensor, rank: int, size: int, group: str) -> Tensor:
    """Send `x` to the next process and receive that of the previous one; read it through `_arrived`."""
    sent, received = [0] * size, [0] * size
    sent[(rank + 1) % size] = received[(rank - 1) % size] = x.numel()
    return _functional.all_to_all_single(x.flatten(), received, sent, group)


def _arrived(x: Tensor, shape: torch.Size) -> Tensor:
    return _functional.wait_tensor(x).view(shape)


def _merged(y: Tensor, lse: Tensor, more_y: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, from the results over each."""
    both = torch.logaddexp(lse, more_lse)
    share, more = (torch.exp(part - both).unsqueeze(-1) for part in (lse, more_lse))
    return y * share + more_y * more, both


class _Ring(torch.autograd.Function):
    """Causal attention of this process's queries over the whole sequence."""

    @staticmethod
    def forward(
        ctx: Any, q_BHPE: Tensor, k_BGPE: Tensor, v_BGPE: Tensor, rank: int, size: int, group: str
    ) -> Tensor:
        kernel, heads, positions = KERNELS[q_BHPE.device.type], q_BHPE.shape[1], q_BHPE.shape[2]
        sums = torch.promote_types(q_BHPE.dtype, torch.float32)
        kv = torch.stack([k_BGPE, v_BGPE])
        y = lse = q_BHPE.new_empty(0)
        rest: list[Tensor] = []
        for hop in range(size):
            coming = _passed_on(kv, rank, size, group) if hop + 1 < size else None
            block = _block(rank, (rank - hop) % size, positions)
            k, v = (kernel.keys_for(x[:, :, : block.last], heads) for x in kv)
            part, part_lse, part_rest = kernel.forward(q_BHPE[:, :, block.first :], k, v, block.causal)
            part, part_lse = part.to(sums), part_lse.to(sums)
            if hop == 0:
                y, lse, rest = part, part_lse, part_rest
            else:
                first = block.first
                part, part_lse = _merged(y[:, :, first:], lse[:, :, first:], part, part_lse)
                y = torch.cat([y[:, :, :first], part], dim=2)
                lse = torch.cat([lse[:, :, :first], part_lse], dim=2)
            if coming is not None:
                kv = _arrived(coming, kv.shape)
        y = y.to(q_BHPE.dtype)
        ctx.save_for_backward(q_BHPE, k_BGPE, v_BGPE, y, lse, *rest)
        ctx.place = rank, size, group
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k_BGPE, v_BGPE, y, lse, *rest = ctx.saved_tensors
        rank, size, group = ctx.place
        kernel, heads, groups = KERNELS[q.device.type], q.shape[1], k_BGPE.shape[1]
        dy, positions = grads[0], q.shape[2]
        kv = torch.stack([k_BGPE, v_BGPE])
        dq = torch.zeros_like(q, dtype=lse.dtype)
        dkv = torch.zeros_like(
            kv, dtype=lse.dtype
        )  # gradients of the keys now here, summed over the processes passed
        coming_dkv: Tensor | None = None
        for hop in range(size):
            coming = _passed_on(kv, rank, size, group) if hop + 1 < size else None
            block = _block(rank, (rank - hop) % size, positions)
            rows = slice(block.first, None)
            k, v = (kernel.keys_for(x[:, :, : block.last], heads) for x in kv)
            inputs = [x[:, :, rows] for x in (dy, q)]
            saved = [x[:, :, rows] for x in (y, lse)]
            dq_part, dk, dv = kernel.backward(*inputs, k, v, *saved, rest, block.causal)
            dq = torch.cat([dq[:, :, : block.first], dq[:, :, rows] + dq_part], dim=2)
            part = torch.stack([kernel.of_groups(x.to(lse.dtype), groups) for x in (dk, dv)])
            part = nn.functional.pad(part, (0, 0, 0, positions - block.last))
            dkv = part if coming_dkv is None else _arrived(coming_dkv, dkv.shape) + part
            coming_dkv = _passed_on(dkv, rank, size, group)
            if coming is not None:
                kv = _arrived(coming, kv.shape)
        assert coming_dkv is not None
        dk, dv = _arrived(coming_dkv, dkv.shape).to(k_BGPE.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None


class RingAttention(nn.Module):
    """Causal attention of this process's queries to the keys and values of the whole sequence.

    Takes queries [B, H, P, E], keys and values [B, G, P, E] of this process's positions. There is no mask,
    so the last argument must be None.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, q_BHPE: Tensor, k_BGPE: Tensor, v_BGPE: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is None, "the configuration check rejects masks with ring attention"
        place = self.mesh.get_local_rank(), self.mesh.size(), self.mesh.get_group().group_name
        y: Tensor = _Ring.apply(q_BHPE, k_BGPE, v_BGPE, *place)
        return y
