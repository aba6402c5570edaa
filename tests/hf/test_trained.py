"""A trained model exported to and imported from Hugging Face: the same logits, text and next loss."""

import json
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from octavo.checkpoint.reader import read_model
from octavo.cli import main
from octavo.commands.sampling import Recompute, Sampling, generate
from octavo.hf.model_sources import find_checkpoint, open_model
from octavo.hf.stored_weights import load_weights
from tests.helpers import launching

CONTEXT = 128
FLAGS = {
    **launching.recipe("rowwise"),
    "checkpoint.enable": True,
    "training.seq_len": CONTEXT,
    "training.local_batch_size": 2,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A float8 run of 4 steps on two processes, with its checkpoint and its final export in bfloat16."""
    folder = tmp_path_factory.mktemp("trained")
    final = {"checkpoint.last_save_in_hf": True, "checkpoint.export_dtype": "bfloat16"}
    run = launching.train(folder, {**FLAGS, **final}, world=2)
    assert run.exit_codes == [0, 0], run.log
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        assert main(["export", str(trained), "--out", str(out), "--shard-size", "8MB"]) == 0
    return out


@pytest.fixture(scope="module")
def theirs(exported):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(exported)).float().eval()


def own_model(path):
    source = open_model(path)
    return source, load_weights(source.build(source.context), source.weights, torch.float32, "cpu")


def text_ids(source, length):
    text = launching.small_corpus().read_text()[:2000]
    return source.tokenizer.encode(text, bos=True)[:length]


def test_transformers_computes_the_same_logits(trained, theirs):
    source, ours = own_model(trained)
    tokens = torch.tensor([text_ids(source, CONTEXT)])
    with torch.no_grad():
        difference = (theirs(tokens).logits - ours(tokens)).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("words", [3, 30])
def test_greedy_text_is_that_of_transformers(trained, theirs, words):
    source, model = own_model(trained)
    prompt = text_ids(source, words)
    decode = source.spec.decoder(model, CONTEXT)
    ours = list(generate(decode, prompt, Sampling(0.0), max_tokens=64, seed=0))
    again = list(generate(Recompute(model), prompt, Sampling(0.0), max_tokens=64, seed=0))
    expected = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=64, min_new_tokens=64, eos_token_id=None
    )
    assert ours == again == expected[0, len(prompt) :].tolist()


def test_transformers_reads_the_exported_tokenizer(trained, exported):
    from transformers import AutoTokenizer, GenerationConfig

    source = open_model(trained)
    tokenizer = AutoTokenizer.from_pretrained(str(exported))
    text = "HAMLET. Words, words, words. \u6f22"
    assert tokenizer.encode(text, add_special_tokens=False) == source.tokenizer.encode(text)
    assert tokenizer.encode(text) == source.tokenizer.encode(text, bos=True)  # as training saw it
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    ends = GenerationConfig.from_pretrained(str(exported))
    assert (ends.bos_token_id, ends.eos_token_id) == (0, 1)


def test_the_files_of_an_export_contain_every_tensor(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in exported.glob("*.safetensors"))
    assert shards == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert set(index["weight_map"].values()) == set(shards)
    assert sorted(path.name for path in exported.parent.iterdir()) == ["model"]


def test_the_final_export_is_the_rounded_checkpoint(trained):
    _, ours = own_model(trained)
    source, rounded = own_model(trained / "checkpoint" / "step-4-hf")
    for (name, kept), other in zip(ours.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(kept.to(torch.bfloat16).float(), other), name
    assert source.weights.read("norm.weight").dtype is torch.bfloat16
    assert find_checkpoint(trained).name == "step-4"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # this process saves alone
def test_training_continues_from_an_import_with_the_same_loss(trained, exported, tmp_path):
    """The next losses from the checkpoint's weights, from its export, from the import of its export, and from
    torchtitan's checkpoint of the same weights."""
    imported, titan = tmp_path / "imported", tmp_path / "titan"
    dcp.save(read_model(find_checkpoint(trained)), checkpoint_id=titan, no_dist=True)
    assert main(["import", str(exported), "--out", str(imported)]) == 0
    flags = {**FLAGS, "checkpoint.enable": False, "training.steps": 2}
    two = {"training.local_batch_size": 1, "checkpoint.initial_load_in_hf": True}
    starts = {
        "checkpoint": ({"checkpoint.initial_load_path": trained}, 1),
        "export": ({"checkpoint.initial_load_path": exported, **two}, 2),  # the same global batch
        "import": ({"checkpoint.initial_load_path": imported}, 1),
        "torchtitan": ({"checkpoint.initial_load_path": titan}, 1),
        "random": ({}, 1),
    }
    losses = {}
    for start, (more, world) in starts.items():
        run = launching.train(tmp_path / start, {**flags, **more}, world=world)
        assert run.exit_codes == [0] * world, run.log
        losses[start] = run.losses
    assert losses["checkpoint"] == losses["import"] == losses["torchtitan"]
    assert losses["export"][0] == pytest.approx(losses["import"][0], rel=1e-6)
    # two processes sum in another order, which float8 amplifies
    assert losses["export"] == pytest.approx(losses["import"], rel=1e-4)
    assert losses["random"][0] > losses["import"][0] + 0.1


def test_a_mismatch_is_reported_before_the_corpus_is_read(trained, exported, tmp_path):
    for flags, message in (
        ({"checkpoint.initial_load_path": trained}, "layers.6.attention.wq.weight is not in it"),
        (
            {"checkpoint.initial_load_path": exported, "checkpoint.initial_load_in_hf": True},
            "is not llama3 1B: dim is 256, not 2048",
        ),
    ):
        run = launching.train(tmp_path, {**FLAGS, "model.flavor": "1B", **flags}, world=2)
        assert run.exit_codes == [2, 2]
        assert message in run.log
        assert "Set model.flavor and model.hf_assets_path" in run.log
        assert "Building" not in run.log
        assert "Traceback" not in run.log


def test_a_resumed_run_does_not_need_its_initial_weights(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    gone = {"checkpoint.initial_load_path": tmp_path / "gone", "training.steps": 5}
    run = launching.train(tmp_path / "run", {**FLAGS, **gone}, world=2)
    assert run.exit_codes == [0, 0], run.log
    assert "Training starts at step 5" in run.log


def test_an_existing_folder_is_not_overwritten(trained, exported, tmp_path, capsys):
    for argv in (
        ["export", str(trained), "--out", str(exported)],
        ["import", str(exported), "--out", str(trained)],
    ):
        assert main(argv) == 2
        assert "already exists and is not empty" in capsys.readouterr().err
