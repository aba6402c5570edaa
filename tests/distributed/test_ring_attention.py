"""Keys that travel round a group give what all keys in one place do."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.distributed.activation_checkpoint import _selective
from octavo.distributed.context_parallel import local_positions
from octavo.distributed.ring_attention import KERNELS, RingAttention
from tests.distributed.test_context_parallel import E, G, S, tensors
from tests.helpers import ranks


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


class Layer(torch.nn.Module):
    """Attention of products of its inputs, as in a model's layer."""

    def __init__(self, mesh):
        super().__init__()
        self.core = RingAttention(mesh)

    def forward(self, q, k, v):
        return self.core(q * 1.0, k * 1.0, v * 1.0, None)


def differences(dtype, how):
    """How far output and gradients of this process are from its part of the whole, relatively."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    mine = local_positions(mesh, S, torch.device("cpu"))
    *inputs, dy = tensors()
    whole = [x.clone().requires_grad_() for x in inputs]
    want = F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
    want.backward(dy)
    parts = [x[:, :, mine].to(dtype).requires_grad_() for x in inputs]
    layer = Layer(mesh)
    if how in ("checkpointed", "both"):
        layer = _selective(layer)
    if how in ("compiled", "both"):
        layer.compile(fullgraph=True)
    got = layer(*parts)
    got.backward(dy[:, :, mine].to(dtype))
    assert got.dtype == dtype
    pairs = [(got, want), *((p.grad, w.grad) for p, w in zip(parts, whole, strict=True))]
    return max(((a - b[:, :, mine]).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize(
    ("world", "dtype", "how", "limit"),
    [
        (1, torch.float64, "plain", 1e-12),
        (2, torch.float64, "plain", 1e-12),
        (3, torch.float64, "checkpointed", 1e-12),
        (4, torch.float32, "plain", 1e-5),
        (2, torch.bfloat16, "plain", 2e-2),
    ],
)
def test_attention_is_exact(world, dtype, how, limit):
    assert max(ranks.run(world, differences, dtype, how)) < limit


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compiled", "both"])
def test_compiled_attention_is_exact(how):
    assert max(ranks.run(2, differences, torch.float32, how)) < 1e-5


def largest():
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    mine = local_positions(mesh, S, torch.device("cpu"))
    q, k, v, _ = (x[:, :, mine].requires_grad_() for x in tensors())
    with Sizes() as sizes:
        RingAttention(mesh)(q, k, v, None).sum().backward()
    return sizes.largest


def test_no_process_holds_the_keys_of_the_whole_sequence():
    """The largest are keys and values of one process, or its queries."""
    B, H = tensors()[0].shape[:2]
    assert ranks.run(4, largest) == [max(2 * B * G, B * H) * (S // 4) * E] * 4


def test_the_gpu_kernel_takes_fewer_heads_of_keys_than_of_queries():
    """Repeated for each query head, keys and values would take H / G times the memory."""
    kernel = KERNELS["cuda"]
    with FakeTensorMode():
        q, dy = (torch.empty(2, 8, 64, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k = v = torch.empty(2, 2, 64, 32, device="cuda", dtype=torch.bfloat16)
        assert kernel.keys_for(k, heads=8) is k
        y, lse, rest = kernel.forward(q, k, v, True)
        dq, dk, dv = kernel.backward(dy, q, k, v, y, lse, rest, True)

    assert (y.shape, lse.shape) == (q.shape, q.shape[:3])
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert kernel.of_groups(dk, groups=2) is dk
