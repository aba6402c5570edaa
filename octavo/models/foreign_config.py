"""Checks that a foreign `config.json` describes the model that was read from it, and nothing more.

A family reads the keys it knows. Any other key may change the model, and ignoring it would silently load
another one. So each key must be one that the family itself writes for the model that it read, with the same
value; or be unset (null); or be in the list below of keys that never change the logits.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from octavo.config import ConfigError

_HARMLESS = """
_name_or_path transformers_version transformers.js_config tokenizer_class task_specific_params dtype
torch_dtype torchscript _attn_implementation attn_implementation use_cache initializer_range
attention_dropout hidden_dropout dropout gradient_checkpointing return_dict use_return_dict
output_attentions output_hidden_states chunk_size_feed_forward use_bfloat16 max_sequence_length
is_llama_config router_aux_loss_coef aux_loss_alpha output_router_logits unsloth_fixed unsloth_version

bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id prefix max_length min_length
decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences return_dict_in_generate output_scores remove_invalid_values
exponential_decay_length_penalty

id2label label2id num_labels problem_type finetuning_task
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Keys that change no logits, whatever their value: how a model was made, trained and is run; tokens and how
text is generated; other heads than a language model's.
"""

_ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "is_decoder": (False,),
    "rope_interleaved": (False,),
    "pruned_heads": ({},),
    "auto_map": ({},),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
}
"""Keys that change no logits with one of these values."""

_WITHOUT_WINDOW = ("sliding_window", "max_window_layers")
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_TYPE = ("rope_type", "type")


def check_config(config: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """Check `config` against `written`, which the family writes for the model that it read from `config`.

    Raises:
        ConfigError: a key that is neither in `written`, with the same value, nor known to be harmless.
    """
    problems: list[str] = []
    for key, value in config.items():
        if value is None or key in HARMLESS:
            continue
        if key in _ROPE:
            problems += _rope_problems(key, value, written)
        elif key in written:
            if not _same(value, written[key]):
                problems.append(
                    f"{key} is {_short(value)}, but the model was read with {_short(written[key])}"
                )
        elif not (_is_plain_attention(key, config) or any(_same(value, one) for one in _ONLY.get(key, ()))):
            problems.append(f"{key} is {_short(value)}, which octavo does not know")
    if problems:
        raise ConfigError(
            f"config.json: {'; '.join(problems[:3])}: octavo might compute another model. Remove a key "
            "only if the logits do not depend on it"
        )


def _is_plain_attention(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a key about windows of attention says that there is none."""
    if key == "layer_types":
        return isinstance(config[key], list) and all(kind == "full_attention" for kind in config[key])
    return key in _WITHOUT_WINDOW and config.get("use_sliding_window") is False


def _rope_problems(key: str, value: Any, written: Mapping[str, Any]) -> Iterator[str]:
    """How one statement of the rotary embedding differs from the one that was read."""
    read = {"rope_theta": written.get("rope_theta"), **(written.get("rope_scaling") or {})}
    read |= dict.fromkeys(_ROPE_TYPE, read.get("rope_type", "default"))
    for name, found in (value if isinstance(value, Mapping) else {}).items():
        expected = read.get(name, next(iter(_ONLY.get(name, ())), None))
        if found is not None and not _same(found, expected):
            yield f"{key} has {name} {_short(found)}, but the model was read with {_short(expected)}"


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
