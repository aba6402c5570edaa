"""Context parallelism: the processes of a group share each sequence.

Everything but attention treats positions alone, so a process computes its own and no other. In attention its
queries meet the keys and values of all earlier positions: those are gathered from the whole group, which is
exact, and cheap where keys have few heads; their gradients are summed and scattered on the way back.

Under causal attention a late position costs more than an early one. So a sequence is cut into twice as many
pieces as there are processes, and process i of n has pieces i and 2n - 1 - i: the same work for each.
(Llama 3, arXiv:2407.21783, section 3.3.2, does both.)

`ring_attention.py` has the other way, where keys and values travel instead.

Shapes: B batch, H heads, S positions of the sequence, P of this process, E head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from octavo.distributed.ring_attention import RingAttention


def positions_of(rank: int, size: int, length: int) -> Tensor:
    """The positions P of a sequence of `length` that process `rank` of `size` has, ascending; int64."""
    piece = length // (2 * size)
    front, back = torch.arange(piece), torch.arange(piece)
    return torch.cat([front + rank * piece, back + (2 * size - 1 - rank) * piece])


def local_positions(mesh: DeviceMesh, length: int, device: torch.device) -> Tensor:
    """The positions of this process."""
    return positions_of(mesh.get_local_rank(), mesh.size(), length).to(device)


def in_order(size: int, length: int) -> Tensor:
    """Where position s of the sequence lies in what `size` processes give one after another; int64 [S]."""
    gathered = torch.cat([positions_of(rank, size, length) for rank in range(size)])
    return gathered.argsort()


_functional = torch.ops._c10d_functional  # collectives that the compiler knows


class _Gather(torch.autograd.Function):
    """`x[P, ...]` of each process, one after another. Backward sums what they ask of this process's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return _functional.wait_tensor(_functional.all_gather_into_tensor(x.contiguous(), size, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        part = _functional.reduce_scatter_tensor(grad, "sum", ctx.size, ctx.group)
        return _functional.wait_tensor(part), None, None


def gather_sequence(x_BHPE: Tensor, mesh: DeviceMesh) -> Tensor:
    """`[B, H, P, E]` of each process, as `[B, H, S, E]` in the order of the sequence."""
    x_SBHE = _Gather.apply(x_BHPE.permute(2, 0, 1, 3), mesh.size(), mesh.get_group().group_name)
    order = in_order(mesh.size(), x_SBHE.shape[0]).to(x_SBHE.device)
    return x_SBHE.index_select(0, order).permute(1, 2, 0, 3)


class ContextAttention(nn.Module):
    """Attention of this process's queries to the keys and values of the whole sequence.

    Takes queries, keys and values of this process's positions, [B, H, P, E], and which keys of the sequence
    each query sees, bool [B, 1, P, S], or None for all up to its own position.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, q_BHPE: Tensor, k_BGPE: Tensor, v_BGPE: Tensor, mask: Tensor | None) -> Tensor:
        both = torch.cat([k_BGPE, v_BGPE], dim=-1)  # one message
        k_BGSE, v_BGSE = gather_sequence(both, self.mesh).chunk(2, dim=-1)
        if mask is None:
            length = k_BGSE.shape[2]
            mine = local_positions(self.mesh, length, q_BHPE.device)
            mask = mine[:, None] >= torch.arange(length, device=q_BHPE.device)
        # Fused kernels that take a mask know no groups.
        groups = q_BHPE.shape[1] // k_BGSE.shape[1]
        k_BHSE, v_BHSE = (x.repeat_interleave(groups, dim=1) for x in (k_BGSE, v_BGSE))
        return F.scaled_dot_product_attention(q_BHPE, k_BHSE, v_BHSE, attn_mask=mask)


def share_sequences(
    model: nn.Module,
    replace_attention: Callable[[nn.Module], None],
    mesh: DeviceMesh,
    *,
    ring: bool = False,
) -> None:
    """Make `model`, called with whole sequences `tokens[B, S]`, compute the positions of this process alone.

    The model's forward must take `positions`, int64 [P], and then return logits [B, P, V].
    `replace_attention` is called with the attention that the model must use. ring: keys and values travel
    round the group instead of being gathered.
    """
    replace_attention(RingAttention(mesh) if ring else ContextAttention(mesh))

    def with_positions(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = kwargs.get("tokens_BS", args[0])  # a pipeline stage's first argument is no token
        return args, {**kwargs, "positions_P": local_positions(mesh, tokens.shape[1], tokens.device)}

    model.register_forward_pre_hook(with_positions, with_kwargs=True)
