"""`octavo import`: which model it is, that it fits, and a checkpoint that is the model."""

import json
import re
from dataclasses import replace

import pytest
import torch

from octavo.assets import TOKENIZERS
from octavo.cli import main
from octavo.hf.folder_writer import ExportPlan, save_pretrained
from octavo.hf.model_sources import open_model
from tests.hf.test_meta import write_ranks
from tests.hf.test_model_sources import TOKENIZER, edit, weights_of
from tests.models.small_llama import FLAVORS, SCALING, SPEC, noisy, small

DEBUG = SPEC.configure(FLAVORS["debugmodel"], 2048, 32)


@pytest.fixture(scope="module")
def model():
    return noisy(DEBUG)


def write_hf(folder, model, args, dtype=torch.float32):
    save_pretrained(folder, ExportPlan(SPEC, args, weights_of(model), dtype, 10**9), TOKENIZER)
    return folder


def same(path, model, dtype=torch.float32):
    source = open_model(path)
    state = model.state_dict()
    assert source.weights.shapes.keys() == state.keys()
    for name, tensor in state.items():
        read = source.weights.read(name)
        assert read.dtype is torch.float32
        assert torch.equal(read, tensor.to(dtype).float()), name
    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hugging_face_folder(tmp_path, model, dtype, capsys):
    folder = write_hf(tmp_path / "hf", model, DEBUG, dtype)
    assert main(["import", str(folder), "--out", str(tmp_path / "out")]) == 0
    source = same(tmp_path / "out", model, dtype)
    assert source.context == 32
    out = capsys.readouterr().out
    assert f"--model.flavor debugmodel --model.hf_assets_path {folder}" in out
    assert f"--checkpoint.initial_load_path {tmp_path / 'out'}" in out


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["not scaled", "scaled"])
def test_sizes_of_no_flavor_become_settings(tmp_path, capsys, scaling):
    args = small(
        vocab_size=2048, max_seq_len=32, dim=96, hidden_dim=112, rope_theta=1e4, rope_scaling=scaling
    )
    model = noisy(args)
    folder = write_hf(tmp_path / "hf", model, args)
    assert main(["import", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert same(tmp_path / "out", model).args == args
    told = capsys.readouterr().out
    assert "with other sizes" in told
    (settings,) = re.findall(r"--model.args (\S+)", told)
    flavor = "8B" if scaling else "debugmodel"
    assert f"--model.flavor {flavor} " in told
    assert replace(SPEC.args(flavor, settings.split(",")), max_seq_len=32, vocab_size=2048) == args


@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_original_files(tmp_path, model, ranks):
    params = {"dim": 256, "n_layers": 6, "n_heads": 16, "vocab_size": 2048, "multiple_of": 256}
    params |= {"rope_theta": 500000.0, "norm_eps": 1e-5}
    source = tmp_path / "original"
    source.mkdir()
    (source / "params.json").write_text(json.dumps(params))
    write_ranks(source, model.state_dict(), ranks, kv_heads=16)
    tokenizer = ["--tokenizer", str(TOKENIZERS["octavo_bpe_2048"])]
    assert main(["import", str(source), "--out", str(tmp_path / "out"), *tokenizer]) == 0
    same(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("change", "flags", "told"),
    [
        ({}, ["--flavor=8B"], "is not llama3 8B: dim is 256, not 4096"),
        ({}, ["--flavor=9B"], "llama3 has no such flavor"),
        ({"hidden_act": "relu"}, [], "hidden_act is 'relu'"),
        ({}, ["--tokenizer=nowhere"], "tokenizer 'nowhere'"),
    ],
)
def test_another_model_is_refused_by_what_differs(tmp_path, model, capsys, change, flags, told):
    folder = write_hf(tmp_path / "hf", model, DEBUG)
    edit(folder / "config.json", lambda config: config.update(change))
    assert main(["import", str(folder), "--out", str(tmp_path / "out"), *flags]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("octavo: ") == 1
    assert not (tmp_path / "out").exists()


def test_tensors_of_another_shape_are_named_with_both(tmp_path, capsys):
    args = small(vocab_size=2048, dim=256, n_layers=6, n_heads=16, n_kv_heads=16, hidden_dim=512)
    folder = write_hf(tmp_path / "hf", noisy(args), args)
    edit(folder / "config.json", lambda config: config.update(intermediate_size=768))
    assert main(["import", str(folder), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert (
        "model.layers.0.mlp.gate_proj.weight is (512, 256) in it and (768, 256) in llama3 debugmodel" in told
    )


def test_sources_that_are_none(tmp_path, capsys):
    for source, told in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "neither *.safetensors")):
        argv = ["import", str(source), "--out", str(tmp_path / "out"), "--tokenizer=octavo_bpe_2048"]
        assert main(argv) == 2
        assert told in capsys.readouterr().err
