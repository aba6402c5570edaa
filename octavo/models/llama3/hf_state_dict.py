"""Llama weights under Hugging Face's names, and back.

Two things differ. The names; and the order of the rows of wq and wk: Hugging Face rotates the halves of a
head, (x[i], x[i + E/2]), where Meta and we rotate neighbours, (x[2i], x[2i+1]). So within each head, row 2i
of ours is row i of theirs, and row 2i+1 is row i + E/2.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from octavo.models.llama3.model import LlamaArgs

# ours -> Hugging Face's, for the parts that stand once and those that stand in every layer
_ONCE = {
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
_ONCE_BACK = {theirs: ours for ours, theirs in _ONCE.items()}
_PER_LAYER_BACK = {theirs: ours for ours, theirs in _PER_LAYER.items()}
_ROTATED = ("attention.wq.weight", "attention.wk.weight")
_NOT_PARAMETERS = "rotary_emb.inv_freq"  # a buffer that old exports carry


def _halves(w_NK: Tensor, head_dim: int) -> Tensor:
    """Rows in pairs -> rows in halves, head by head."""
    return w_NK.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _pairs(w_NK: Tensor, head_dim: int) -> Tensor:
    """Rows in halves -> rows in pairs, head by head."""
    return w_NK.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_hf(state: Mapping[str, Tensor], args: LlamaArgs) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names and row order. `ValueError` for a name that is not a
    Llama's.
    """
    renamed = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if name in _ONCE:
            renamed[_ONCE[name]] = tensor
        elif layer and layer[2] in _PER_LAYER:
            if layer[2] in _ROTATED:
                tensor = _halves(tensor, args.head_dim)
            renamed[f"model.layers.{layer[1]}.{_PER_LAYER[layer[2]]}"] = tensor
        else:
            raise ValueError(f"{name!r} is not the name of a parameter of Llama 3")
    return renamed


def from_hf(state: Mapping[str, Tensor], args: LlamaArgs) -> dict[str, Tensor]:
    """A Hugging Face Llama's state dict under our names and row order; with tied embeddings lm_head is left
    out.

    `ValueError` for a name that is not a Llama's.
    """
    renamed = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if name in _ONCE_BACK:
            if not (args.tie_embeddings and name == "lm_head.weight"):
                renamed[_ONCE_BACK[name]] = tensor
        elif layer and layer[2] in _PER_LAYER_BACK:
            ours = _PER_LAYER_BACK[layer[2]]
            if ours in _ROTATED:
                tensor = _pairs(tensor, args.head_dim)
            renamed[f"layers.{layer[1]}.{ours}"] = tensor
        elif not name.endswith(_NOT_PARAMETERS):
            raise ValueError(f"{name!r} is not the name of a parameter of Hugging Face's LlamaForCausalLM")
    return renamed
