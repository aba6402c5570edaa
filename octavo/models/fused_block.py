"""A layer in five fused passes: norm + q/k/v projections, attention, output projection, residual add +
norm + gate and up projections, SwiGLU + down projection.

The layer keeps its modules, names and parameters; only its class, and so its forward, changes. The passes
come from a `Fusion` (`octavo/distributed/parallelize_plan.py`), so this file is independent of the number
format.
"""

from typing import Any

from torch import Tensor, nn

from octavo.distributed.parallelize_plan import Fusion
from octavo.models.attention import Attention
from octavo.models.transformer import TransformerBlock


class FusedBlock(TransformerBlock):
    """A `TransformerBlock` after `fuse_layer`."""

    attention: Attention
    _into_attention: Any
    _out_of_attention: Any
    _into_gates: Any
    _out_of_gates: Any

    def forward(self, h_BSD: Tensor, table_2SE: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        h_BSD, (q, k, v) = self._into_attention(h_BSD)
        # q, k and v are views of one tensor. Attention saves v for backward; a view would keep all three.
        heads_BSN = self.attention.attend(q.value, k.value, v.value.contiguous(), table_2SE, mask_B1SS)
        (out,) = self._out_of_attention(heads_BSN, note_maxima=True)
        h_BSD, (gate, up) = self._into_gates(out, h_BSD, note_maxima=True)
        return h_BSD + self._out_of_gates(gate, up).value


def fuse_layer(layer: nn.Module, fusion: Fusion) -> None:
    """Turn `layer`, a `TransformerBlock`, into a `FusedBlock` in place; one with experts, or with
    latent attention, stays as it is.
    """
    assert isinstance(layer, TransformerBlock)
    if layer.has_experts or not isinstance(layer.attention, Attention):
        return
    attention, feed = layer.attention, layer.feed_forward
    linears = attention.wq, attention.wk, attention.wv
    layer.__class__ = FusedBlock
    assert isinstance(layer, FusedBlock)
    layer._into_attention = fusion.normed_input(layer.attention_norm, linears)
    layer._out_of_attention = fusion.shared_input([attention.wo])
    layer._into_gates = fusion.normed_input(layer.ffn_norm, (feed.w1, feed.w3))
    layer._out_of_gates = fusion.gated_linear(feed.w2)
