"""Context parallelism: the processes of a group share each sequence.

Everything except attention treats each position independently, so a process computes only its own positions.
In attention, its queries need the keys and values of all earlier positions. Those are gathered from the whole
group, which is exact, and cheap with few key/value heads; backward reduce-scatters their gradients.

Under causal attention a late position costs more than an early one. To balance the work, a sequence is cut
into 2n pieces for n processes, and process i gets the pieces i and 2n - 1 - i. (Llama 3, arXiv:2407.21783,
section 3.3.2, does both.)

`ring_attention.py` implements the alternative, ring attention.

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
    """The positions of process `rank` of `size` in a sequence of `length`, ascending; int64 [P]."""
    piece = length // (2 * size)
    front, back = torch.arange(piece), torch.arange(piece)
    return torch.cat([front + rank * piece, back + (2 * size - 1 - rank) * piece])


def local_positions(mesh: DeviceMesh, length: int, device: torch.device) -> Tensor:
    """The positions of this process; int64 [P] on `device`."""
    return positions_of(mesh.get_local_rank(), mesh.size(), length).to(device)


def in_order(size: int, length: int) -> Tensor:
    """Index of each position in the concatenation of the positions of `size` processes; int64 [S]."""
    gathered = torch.cat([positions_of(rank, size, length) for rank in range(size)])
    return gathered.argsort()


_functional = torch.ops._c10d_functional  # collectives that torch.compile can trace


class _Gather(torch.autograd.Function):
    """All-gather of `x[P, ...]` along the first dimension; backward reduce-scatters the gradients."""

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
    """Gather `[B, H, P, E]` of each process into `[B, H, S, E]`, in sequence order."""
    x_SBHE = _Gather.apply(x_BHPE.permute(2, 0, 1, 3), mesh.size(), mesh.get_group().group_name)
    order = in_order(mesh.size(), x_SBHE.shape[0]).to(x_SBHE.device)
    return x_SBHE.index_select(0, order).permute(1, 2, 0, 3)


class ContextAttention(nn.Module):
    """Attention of this process's queries to the keys and values of the whole sequence.

    Takes queries, keys and values of this process's positions, [B, H, P, E], and a mask of the keys that each
    query sees, bool [B, 1, P, S], or None for causal attention.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, q_BHPE: Tensor, k_BGPE: Tensor, v_BGPE: Tensor, mask: Tensor | None) -> Tensor:
        both = torch.cat([k_BGPE, v_BGPE], dim=-1)  # one message
        k_BGSE, v_BGSE = gather_sequence(both, self.mesh).chunk(2, dim=-1)
        if mask is None:
            length = k_BGSE.shape[2]
            positions = local_positions(self.mesh, length, q_BHPE.device)
            mask = positions[:, None] >= torch.arange(length, device=q_BHPE.device)
        # Fused kernels with a mask do not support grouped queries.
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
    """Make `model` compute only the positions of this process when it is called with `tokens[B, S]`.

    The model's forward must take `positions`, int64 [P], and then return logits [B, P, V].
    `replace_attention` is called with the attention module to use. ring: use ring attention instead of
    gathering keys and values.
    """
    replace_attention(RingAttention(mesh) if ring else ContextAttention(mesh))

    def with_positions(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = kwargs.get("tokens_BS", args[0])  # a later pipeline stage's first argument is not tokens
        return args, {**kwargs, "positions_P": local_positions(mesh, tokens.shape[1], tokens.device)}

    model.register_forward_pre_hook(with_positions, with_kwargs=True)
