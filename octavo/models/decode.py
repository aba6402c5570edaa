"""Decoding with a key/value cache.

Training needs no cache, so `transformer.py` has none. `Decoder` runs the same modules in the same order, and
each layer caches the rotated keys and the values of all positions so far. The layer's data flow is therefore
written twice; a test checks that both give the same logits.

Shapes as in `attention.py`; T is the number of positions so far, including this call's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.attention import Attention
from octavo.models.latent_attention import LatentAttention
from octavo.models.transformer import Transformer, TransformerBlock


class Decoder:
    """Next-token logits for a batch of sequences of equal length.

    `capacity`: positions that the cache can hold, at most the model's `max_seq_len`.
    """

    def __init__(self, model: nn.Module, capacity: int, batch: int = 1):
        assert isinstance(model, Transformer)
        assert model.args.document_end is None  # generated text is one document
        assert capacity <= model.args.max_seq_len
        self._model = model
        self._seen = 0
        args, weight = model.args, model.tok_embeddings.weight
        shape = (args.n_layers, batch, args.n_kv_heads, capacity)
        self._keys_LBGTE = weight.new_empty(*shape, args.head_width)
        self._values_LBGTE = weight.new_empty(*shape, args.value_width)

    @torch.no_grad()
    def __call__(self, tokens_BS: Tensor) -> Tensor:
        """Append S tokens; the logits [B, V] after the last one, in the model's dtype."""
        model, start = self._model, self._seen
        self._seen += tokens_BS.shape[1]
        table = model.rope[:, start : self._seen]
        h_BSD = model.tok_embeddings(tokens_BS)
        for number, layer in enumerate(model.layers.values()):
            assert isinstance(layer, TransformerBlock)
            h_BSD = h_BSD + self._attend(layer.attention, number, layer.attention_norm(h_BSD), table, start)
            h_BSD = h_BSD + layer.feed(layer.ffn_norm(h_BSD))
        h_BD = model.norm(h_BSD[:, -1])
        return F.linear(h_BD, model.tok_embeddings.weight) if model.output is None else model.output(h_BD)

    def _attend(
        self,
        attention: Attention | LatentAttention,
        layer: int,
        x_BSD: Tensor,
        table: Tensor,
        start: int,
    ) -> Tensor:
        q_BHSE, k_BGSE, v_BGSE = attention.project(x_BSD, table)
        keys, values = self._keys_LBGTE[layer], self._values_LBGTE[layer]
        keys[:, :, start : self._seen] = k_BGSE
        values[:, :, start : self._seen] = v_BGSE
        positions = torch.arange(self._seen, device=x_BSD.device)
        y_BHSE = F.scaled_dot_product_attention(
            q_BHSE,
            keys[:, :, : self._seen],
            values[:, :, : self._seen],
            attn_mask=positions <= positions[start:, None],  # [S, T]
            enable_gqa=True,
        )
        return attention.wo(y_BHSE.transpose(1, 2).flatten(-2))
