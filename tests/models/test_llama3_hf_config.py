"""config.json means the same to transformers, and options that our model lacks are refused."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from octavo.config import ConfigError
from octavo.models.llama3 import FLAVORS
from octavo.models.llama3.hf_config import from_config, to_config
from tests.models.small_llama import SHAPES, small

ALL = {**SHAPES, **{name: replace(args, vocab_size=args.vocab_size or 9) for name, args in FLAVORS.items()}}


@pytest.mark.parametrize("name", ALL)
def test_round_trip(name):
    assert from_config(to_config(ALL[name])) == ALL[name]


@pytest.mark.parametrize("name", ["gqa", "3.1", "tied", "8B", "8B-3.0", "1B"])
def test_what_transformers_writes_means_the_same(name):
    assert from_config(LlamaConfig(**to_config(ALL[name])).to_dict()) == ALL[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type is None"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is nan"),
        ({"rope_scaling": 3}, "rope_scaling is 3"),
        ({"head_dim": 128}, "head_dim 128"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match="config.json") as error:
        from_config({**to_config(small()), **change})
    assert message in str(error.value)
