"""Conversion of Llama state dicts to Hugging Face's `LlamaForCausalLM` and back.

The names differ, and the order of the rows of wq and wk: Hugging Face rotates the halves of a head,
(x[i], x[i + E/2]), while Meta and octavo rotate neighbours, (x[2i], x[2i+1]). So within each head, our row 2i
is their row i, and our row 2i+1 is their row i + E/2.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from octavo.models.llama3.model import LlamaArgs

# our name -> Hugging Face's, outside and inside the layers
_GLOBAL = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_GLOBAL_BACK = {theirs: ours for ours, theirs in _GLOBAL.items()}
_PER_LAYER_BACK = {theirs: ours for ours, theirs in _PER_LAYER.items()}
_ROTATED = ("attention.wq.weight", "attention.wk.weight")
_BUFFER = "rotary_emb.inv_freq"  # saved by old versions of transformers


def _pairs_to_halves(w_NK: Tensor, head_dim: int) -> Tensor:
    """Our row order within each head -> Hugging Face's."""
    return w_NK.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _halves_to_pairs(w_NK: Tensor, head_dim: int) -> Tensor:
    """Hugging Face's row order within each head -> ours."""
    return w_NK.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_hf(state: Mapping[str, Tensor], args: LlamaArgs) -> dict[str, Tensor]:
    """Our state dict in Hugging Face's names and row order; `ValueError` for an unknown name."""
    renamed = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if name in _GLOBAL:
            renamed[_GLOBAL[name]] = tensor
        elif layer and layer[2] in _PER_LAYER:
            if layer[2] in _ROTATED:
                tensor = _pairs_to_halves(tensor, args.head_dim)
            renamed[f"model.layers.{layer[1]}.{_PER_LAYER[layer[2]]}"] = tensor
        else:
            raise ValueError(f"{name!r} is not the name of a parameter of Llama 3")
    return renamed


def from_hf(state: Mapping[str, Tensor], args: LlamaArgs) -> dict[str, Tensor]:
    """Hugging Face's state dict in our names and row order; `ValueError` for an unknown name.

    Drops rotary buffers, and lm_head where embeddings are tied.
    """
    renamed = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if name in _GLOBAL_BACK:
            if not (args.tie_embeddings and name == "lm_head.weight"):
                renamed[_GLOBAL_BACK[name]] = tensor
        elif layer and layer[2] in _PER_LAYER_BACK:
            ours = _PER_LAYER_BACK[layer[2]]
            if ours in _ROTATED:
                tensor = _halves_to_pairs(tensor, args.head_dim)
            renamed[f"layers.{layer[1]}.{ours}"] = tensor
        elif not name.endswith(_BUFFER):
            raise ValueError(f"{name!r} is not the name of a parameter of Hugging Face's LlamaForCausalLM")
    return renamed
