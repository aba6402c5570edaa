"""Weights published in float8 blocks are dequantised on import."""

import json
from dataclasses import replace

import pytest
import torch

from octavo import models
from octavo.config import ConfigError
from octavo.hf.float8_source import dequantize
from octavo.hf.folder_writer import save_tokenizer
from octavo.hf.model_sources import open_model
from octavo.hf.safetensors_folder import write_json, write_shards
from tests.hf.test_model_sources import TOKENIZER
from tests.models.small_llama import SMALL, noisy

QUANTIZED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def quantize(weight):
    """Codes and factors, one block at a time."""
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    for i, rows in enumerate(weight.split(128)):
        for j, block in enumerate(rows.split(128, dim=1)):
            scale[i, j] = block.abs().max() / 448
            codes[i * 128 :, j * 128 :][: block.shape[0], : block.shape[1]] = (block / scale[i, j]).to(
                codes.dtype
            )
    return codes, scale


@pytest.fixture
def source(tmp_path):
    """A folder as DeepSeek-V3's, with a layer that predicts several tokens, and the model."""
    _, args = SMALL["deepseek_v3"]
    stored = models.get("deepseek_v3").hugging_face
    assert stored is not None
    args = replace(args, vocab_size=2048)
    model = noisy(args)
    tensors = {}
    for name, tensor in stored.to_names(model.state_dict(), args).items():
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensor)
        else:
            tensors[name] = tensor.clone()
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(2, 2)
    write_shards(tmp_path, [list(tensors)], tensors.__getitem__)
    write_json(tmp_path / "config.json", {**stored.to_config(args), "quantization_config": QUANTIZED})
    save_tokenizer(tmp_path, TOKENIZER)
    return tmp_path, model


def test_float8_weights_are_read_as_they_were_within_their_rounding(source):
    folder, model = source
    opened = open_model(folder)
    for name, tensor in model.state_dict().items():
        read = opened.weights.read(name)
        exact = not any(part in name for part in (".w", "wkv", "wq"))
        limit = 0.0 if exact else 2.0**-4
        assert read.dtype == torch.float32
        assert ((read - tensor).abs() <= limit * tensor.abs() + 1e-3 * (not exact)).all(), name


def test_each_block_has_its_own_factor():
    weight = torch.randn(200, 300) * torch.logspace(0, -3, 300)
    assert ((dequantize(*quantize(weight)) - weight).abs() <= 2.0**-4 * weight.abs() + 1e-4).all()


def test_a_weight_without_its_scales_is_named(source):
    folder, _ = source
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"o_proj.weight \(64, 80\) is stored as F8_E4M3 with none scales"):
        open_model(folder)


def test_other_blocks_are_refused(source):
    folder, _ = source
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [1, 128]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantization_config"):
        open_model(folder)
