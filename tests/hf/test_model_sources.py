"""An opened model is complete, fits its configuration and runs no code; other input is one clear error."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from octavo.assets import TOKENIZERS
from octavo.cli import main
from octavo.commands.import_ import write_checkpoint
from octavo.config import ConfigError, JobConfig
from octavo.hf import safetensors_folder
from octavo.hf.folder_writer import ExportPlan, save_pretrained
from octavo.hf.model_sources import compare_args, find_checkpoint, open_model
from octavo.hf.stored_weights import Weights, shapes_of
from octavo.models.rope import rope_frequencies
from octavo.tokenizer import build_tokenizer
from tests.models.small_llama import FLAVORS, SPEC, noisy, small

TOKENIZER = build_tokenizer("octavo_bpe_2048")
ARGS = small(vocab_size=2048)


def weights_of(model):
    state = model.state_dict()
    return Weights("a model", shapes_of(model), state.__getitem__)


@pytest.fixture
def hf(tmp_path):
    """A Hugging Face folder of a small model, and the model."""
    model = noisy(ARGS)
    layout = ExportPlan(SPEC, ARGS, weights_of(model), torch.float32, 200_000)
    save_pretrained(tmp_path / "hf", layout, TOKENIZER)
    return tmp_path / "hf", model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run's folder with a checkpoint of the debug model, by `write_checkpoint`."""
    folder = tmp_path_factory.mktemp("run")
    job = JobConfig()
    job.training.seq_len = 32
    write_checkpoint(folder / "checkpoint", noisy(SPEC.configure(FLAVORS["debugmodel"], 2048, 32)), job)
    return folder


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def one_token_more(tokenizer):
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 2048, "content": "<|more|>"})


def refused(path, **options):
    with pytest.raises(ConfigError) as error:
        open_model(path, **options)
    return str(error.value)


def test_a_folder_returns_the_saved_weights(hf):
    folder, model = hf
    source = open_model(folder)
    assert replace(source.args, document_end=None) == ARGS
    assert source.context == 48
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.weights.read(name), tensor), name


def test_tied_embeddings_are_one_tensor_and_a_copy_of_them_is_dropped(tmp_path):
    args = small(vocab_size=2048, tie_embeddings=True)
    layout = ExportPlan(SPEC, args, weights_of(noisy(args)), torch.float32, 10**9)
    save_pretrained(tmp_path / "hf", layout, TOKENIZER)
    assert "lm_head.weight" not in safetensors_folder.find_tensors(tmp_path / "hf")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "hf" / safetensors_folder.SINGLE
    tensors = load_file(path)
    copies = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    copies["model.layers.0.self_attn.rotary_emb.inv_freq"] = rope_frequencies(args).half()
    (tmp_path / "hf" / safetensors_folder.INDEX).unlink()
    save_file({**tensors, **copies}, path)
    assert "output.weight" not in open_model(tmp_path / "hf").weights.shapes
    for name, changed in copies.items():
        other = changed.clone()
        other.view(-1)[-1] *= 1.5
        save_file({**tensors, **copies, name: other}, path)
        assert f"{name} differs from" in refused(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"intermediate_size": 97},
            "model.layers.0.mlp.gate_proj.weight is (96, 64) in it and (97, 64) in the model",
        ),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is not in it"),
        ({"num_hidden_layers": 1}, "model.layers.1.self_attn.o_proj.weight (64, 64) is not in the model"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ({"num_hidden_layers": 1_000_000}, "has 21 tensors, but its sizes ask for more than 168 tensors"),
        ({"intermediate_size": 2**31 - 1}, "its sizes ask for"),
        (
            {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 16, "head_dim": 2**28 - 2},
            "no model has its sizes",
        ),
        ({"max_position_embeddings": 2**31 - 1}, None),
        ({"num_key_value_heads": 4}, "k_proj.weight is (16, 64) in it and (32, 64)"),
        ({"vocab_size": 2047}, "embed_tokens.weight is (2048, 64) in it and (2047, 64)"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported are llama"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5, which octavo does not know"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, but the model was read with False"),
        ({"architectures": ["OtherForCausalLM"]}, "architectures is ['OtherForCausalLM']"),
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_theta is 500000.0, but the model was read with 10000.0",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "auto_map"),
    ],
)
def test_weights_that_do_not_fit_are_named_with_both_shapes(hf, change, message):
    folder, _ = hf
    edit(folder / "config.json", lambda config: config.update(change))
    if message is None:
        open_model(folder)
    else:
        assert message in refused(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(hf):
    folder, _ = hf
    edit(folder / "tokenizer.json", one_token_more)
    assert "the tokenizer has 2,049 tokens, but this model has 2,048 embeddings" in refused(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000])
def test_an_invalid_config(hf, content):
    folder, _ = hf
    (folder / "config.json").write_text(content)
    assert "config.json" in refused(folder)


def test_no_such_folder_and_folders_without_a_model(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "neither a checkpoint (step-N)" in refused(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    assert f"octavo import {tmp_path}" in refused(tmp_path)


def test_a_run_is_found_by_its_folder_its_checkpoints_and_a_step(run_folder):
    step = run_folder / "checkpoint" / "step-0"
    for path in (run_folder, run_folder / "checkpoint", step):
        assert find_checkpoint(path) == step
    assert open_model(run_folder).context == 32


def test_a_checkpoint_that_does_not_verify_is_refused(run_folder, tmp_path, capsys):
    run = shutil.copytree(run_folder, tmp_path / "run")
    step = run / "checkpoint" / "step-0"
    shard = next(step.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert shard.name in refused(step)
    assert "none of them verifies" in refused(run)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 3
    assert shard.name in capsys.readouterr().err


def test_a_run_with_another_folder_of_checkpoints(run_folder, tmp_path):
    shutil.copytree(run_folder / "checkpoint", tmp_path / "kept")
    (tmp_path / "run.json").write_text(json.dumps({"config": {"checkpoint": {"folder": "kept"}}}))
    assert find_checkpoint(tmp_path) == tmp_path / "kept" / "step-0"


@pytest.fixture
def step(run_folder, tmp_path, monkeypatch):
    """A copy of the checkpoint that a test may change, without verification."""
    monkeypatch.setattr("octavo.hf.model_sources.find_problems", lambda path: [])
    return shutil.copytree(run_folder / "checkpoint" / "step-0", tmp_path / "step-0")


def test_a_tokenizer_that_has_moved_must_be_given(step):
    def change(state):
        state["config"]["model"]["hf_assets_path"] = "./assets/moved"

    edit(step / "state.json", change)
    message = refused(step)
    assert "'./assets/moved'" in message
    assert "--tokenizer PATH" in message
    assert open_model(step, tokenizer=str(TOKENIZERS["octavo_bpe_2048"])).tokenizer.vocab_size == 2048


def test_another_tokenizer_than_the_models_is_refused(step, tmp_path):
    shutil.copytree(TOKENIZERS["octavo_bpe_2048"], tmp_path / "other")
    edit(tmp_path / "other" / "tokenizer.json", one_token_more)
    message = refused(step, tokenizer=str(tmp_path / "other"))
    assert "tok_embeddings.weight is (2048, 256) in it and (2049, 256)" in message


def test_a_module_that_a_checkpoint_names_is_not_imported(step, tmp_path, monkeypatch):
    module = tmp_path / "planted.py"
    module.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)

    def change(state):
        state["config"]["experimental"]["custom_import"] = "planted"

    edit(step / "state.json", change)
    assert "--custom_import planted" in refused(step)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [2**62, 0, -1])
def test_a_checkpoint_with_an_impossible_sequence_length(step, length):
    edit(step / "state.json", lambda state: state["config"]["training"].update(seq_len=length))
    assert f"training.seq_len is {length}" in refused(step)


@pytest.mark.parametrize("config", [None, [], {}, {"model": 3}])
def test_a_checkpoint_without_a_configuration(step, config):
    edit(step / "state.json", lambda state: state.update(config=config))
    assert "so its model is unknown" in refused(step)


def test_args_of_training_are_not_compared():
    longer = replace(ARGS, max_seq_len=9, document_end=1)
    assert compare_args(longer, ARGS) == []
    assert compare_args(replace(ARGS, rope_theta=1e4), ARGS) == ["rope_theta is 10000.0, not 500000.0"]
