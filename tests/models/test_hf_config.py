"""Options in config.json that our model lacks are refused."""

import pytest

from octavo.config import ConfigError
from tests.models.small_llama import SCALING, SPEC, small

assert SPEC.hugging_face is not None
to_config, from_config = SPEC.hugging_face.to_config, SPEC.hugging_face.from_config


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


SCALED = to_config(small(rope_scaling=SCALING))["rope_scaling"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, "rope_scaling has rope_type 'llama3'"),
        ({"rope_scaling": {**SCALED, "factor": 9.0}, "rope_parameters": SCALED}, "has factor 9.0"),
        ({"rope_scaling": {**SCALED, "type": "linear"}}, "has type 'linear'"),
        ({"rope_scaling": {**SCALED, "attention_factor": 2.0}}, "has attention_factor 2.0"),
        ({"rope_parameters": {**SCALED, "partial_rotary_factor": 0.5}}, "has partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_statements_of_the_rotary_embedding_must_agree(change, message):
    args = small(rope_scaling=SCALING)
    config = {**to_config(args), **change}
    with pytest.raises(ConfigError) as error:
        from_config(config)
    assert message in str(error.value)
