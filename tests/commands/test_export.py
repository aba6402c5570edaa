"""`octavo export`: what it writes beside the weights, what it says, and that it sees its own mistakes."""

import json
import shutil

import pytest
import torch

from octavo import models
from octavo.cli import main
from octavo.config import ConfigError
from octavo.hf import check_export
from octavo.hf.folder_writer import ExportPlan, save_pretrained
from octavo.hf.training_io import require_exportable
from tests.hf.test_model_sources import ARGS, TOKENIZER, weights_of
from tests.models.small_llama import SPEC, noisy, small
from tests.test_tokenizer import byte_tokens, write_tiktoken


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder: as good a source of an export as a checkpoint."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    save_pretrained(folder, ExportPlan(SPEC, ARGS, weights_of(noisy(ARGS)), torch.float32, 10**9), TOKENIZER)
    return folder


@pytest.fixture
def alone(monkeypatch):
    """As where transformers is not installed."""
    find = check_export.importlib.util.find_spec
    monkeypatch.setattr(
        check_export.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )


def test_without_transformers_it_says_which_check_ran(model, alone, tmp_path, capsys):
    assert main(["export", str(model), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "read back by octavo: max abs difference 0.00e+00 over 48 positions, within the tolerance" in out
    assert "not compared with transformers: it is not installed" in out


def test_bfloat16_tells_what_rounding_does(model, alone, tmp_path, capsys):
    assert main(["export", str(model), "--out", str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "max abs difference 0.00e+00" in out
    moved = float(out.rpartition("logits by up to ")[2])
    assert 1e-4 < moved < 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_wrong_export_is_exit_code_1(model, alone, tmp_path, capsys, monkeypatch):
    read = ExportPlan.read
    monkeypatch.setattr(ExportPlan, "read", lambda self, name: read(self, name) * (1 + ("norm" in name)))
    assert main(["export", str(model), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "BEYOND the tolerance" in captured.out
    assert "do not use it" in captured.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--shard_size=big"], "expected a size such as 5GB"),
        (["--dtype=float16"], "invalid choice: 'float16'"),
        (["extra"], "unrecognized arguments: extra"),
        (["--outt=x"], "unrecognized arguments: --outt=x"),
    ],
)
def test_mistakes_are_one_message(model, tmp_path, capsys, flags, told):
    assert main(["export", str(model), "--out", str(tmp_path / "out"), *flags]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("octavo: ") == 1


def test_a_folder_that_filled_up_meanwhile_is_left_as_it_is(tmp_path):
    layout = ExportPlan(SPEC, ARGS, weights_of(noisy(ARGS)), torch.float32, 10**9)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        save_pretrained(tmp_path / "out", layout, TOKENIZER)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_failed_export_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    def fail(self, name):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(ExportPlan, "read", fail)
    assert main(["export", str(model), "--out", str(tmp_path / "out")]) == 2
    assert "No space left on device; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(model, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(["export", str(model), "--out", str(tmp_path / "out")]) == 2
    assert "bytes are needed and 1,000 are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_metas_becomes_a_tokenizer_json(tmp_path):
    from transformers import AutoTokenizer

    from octavo.assets import TOKENIZERS
    from octavo.tokenizer import build_tokenizer

    tokens = byte_tokens(TOKENIZERS["octavo_bpe_2048"] / "tokenizer.json")
    path = write_tiktoken(tmp_path / "tokenizer.model", tokens)
    tokenizer = build_tokenizer(str(path))
    args = small(vocab_size=tokenizer.vocab_size)
    layout = ExportPlan(SPEC, args, weights_of(noisy(args)), torch.float32, 10**9)
    save_pretrained(tmp_path / "out", layout, tokenizer)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    text = "Who's there?  Nay, 12345 \u6f22\n\n"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eos_id


def test_a_model_without_such_a_form_is_told_before_training():
    import dataclasses

    plain = dataclasses.replace(models.get("llama3"), name="mine", hugging_face=None)
    with pytest.raises(ConfigError, match="the model mine cannot be exported"):
        require_exportable(plain)
