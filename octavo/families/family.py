"""What a family is: flavors, and Hugging Face's format of them. All data; `octavo/models` interprets it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from octavo.core.errors import ConfigError
from octavo.families.model_args import ModelArgs, get

SIZES: Mapping[str, str] = MappingProxyType(
    {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "hidden_dim": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
    }
)
"""Field of `ModelArgs` -> key of config.json."""

OUTSIDE: Mapping[str, str] = MappingProxyType(
    {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
LAYER: Mapping[str, str] = MappingProxyType(
    {
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
)
ROTATED = ("attention.wq.weight", "attention.wk.weight")


@dataclass(frozen=True)
class HubFormat:
    """How transformers stores a model: the keys of its `config.json`, and the names of its parameters.

    Attributes:
        model_type, architecture: in `config.json`; the architecture is transformers' class.
        float8: whether weights may be in float8, in blocks of 128 x 128 (`octavo/hf/float8_source.py`).
        extra_layers: whether layers may follow that predict several tokens, and are not imported.
        fixed: key -> the only value that the model implements; a config that lacks the key means this value.
        written: key -> a value that is only written.
        fields: field of `ModelArgs` -> key; `moe.top_k` is a field of its `moe`.
        ignored: keys that change no logits, beside those of `octavo/models/foreign_config.py`.
        aliases: another spelling of a key -> the key, where versions of transformers differ.
        variant: field of `ModelArgs` -> its value in all models of this format, and in none of another.
        assumed: field of `ModelArgs` -> its value where config.json has no key for it.
        rope_types: the rotary scalings that the family has.
        outside, layer: our name -> theirs, outside the layers and within one. `{}` in theirs: ours is a stack
            of one tensor per expert, and this is the expert's number.
        rotated: names within a layer whose rows are in pairs in ours, and in halves in theirs
            (`octavo/models/hf_state_dict.py`).
    """

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    written: Mapping[str, Any]
    fields: Mapping[str, str] = field(default_factory=lambda: SIZES)
    ignored: tuple[str, ...] = ()
    float8: bool = False
    extra_layers: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    variant: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default",)
    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)
    rotated: tuple[str, ...] = ROTATED

    @property
    def has_experts(self) -> bool:
        return any(name.startswith("moe.") for name in self.fields)


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: the value of `model.name`.
        flavors: the values of `model.flavor` -> the model's arguments.
        hub_formats: of Hugging Face's transformers.
        owner, repository: who publishes the models on Hugging Face, and a pattern of the repositories' names.
    """

    name: str
    flavors: Mapping[str, ModelArgs]
    hub_formats: tuple[HubFormat, ...]
    owner: str
    repository: re.Pattern[str]

    def format_of(self, args: ModelArgs) -> HubFormat:
        """The format in which transformers stores the model of `args`; `ConfigError` if there is none."""

        def fits(stored: HubFormat) -> bool:
            same = all(get(args, name) == value for name, value in stored.variant.items())
            return same and stored.has_experts == (args.moe is not None)

        found = next(filter(fits, self.hub_formats), None)
        if found is None:
            raise ConfigError(
                f"Hugging Face's {' and '.join(one.architecture for one in self.hub_formats)} have no such "
                f"model: {args}; set model.args to variants that {self.name} has"
            )
        return found
