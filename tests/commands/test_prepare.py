"""A prepared folder holds the text's tokens exactly, however it came about; what is wrong is named."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo import cli
from octavo.commands.prepare import prepare, verify
from octavo.core.errors import ConfigError
from octavo.data import shard_format
from octavo.data.corpus_files import BadRecords
from octavo.data.dataloader import DataLoader
from octavo.tokenizer import build_tokenizer
from tests.helpers import launching, warm
from tests.helpers.loaders import make_loader
from tests.helpers.waiting import LIMIT, wait_for

TOKENIZER = "octavo_bpe_2048"
TEXTS = [
    f"Document {number}: " + "naïve 漢字 words and more words. " * (1 + number % 7) for number in range(150)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in all three formats."""
    pyarrow = pytest.importorskip("pyarrow")
    root = tmp_path_factory.mktemp("corpus")
    (root / "a.txt").write_text(TEXTS[0])
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[1:90]]
    (root / "b.jsonl").write_text("".join(lines[:50]) + "\n" + "".join(lines[50:]))
    table = pyarrow.table({"text": TEXTS[90:]})
    __import__("pyarrow.parquet").parquet.write_table(table, root / "c.parquet")
    return root


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "folder"
    prepare([str(corpus)], tokenizer=TOKENIZER, out=out, workers=1, shard_tokens=2000)
    return out


@pytest.fixture(autouse=True, scope="module")
def _small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.commands.prepare._BATCH_RECORDS", 8)
        yield


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loader(dataset: Path, tokenizer: str = TOKENIZER, **options: object) -> DataLoader:
    return make_loader(dataset, tokenizer, **{"seq_len": 32, "workers": 0, **options})


def test_trains_on_the_same_batches_as_the_text(corpus: Path, prepared: Path) -> None:
    """Samples cross the ends of shards."""
    text, folder = loader(corpus), loader(prepared)
    assert len(shard_format.read_index(prepared).splits["train"]) > 2
    for _ in range(120):
        for a, b in zip(text.next_batch(), folder.next_batch(), strict=True):
            assert torch.equal(a, b)


def test_documents_are_where_the_index_says(prepared: Path) -> None:
    tokenizer, found = build_tokenizer(TOKENIZER), []
    for shard in shard_format.read_index(prepared).splits["train"]:
        ids = np.fromfile(prepared / shard.ids.name, dtype="<u2")
        offsets = np.fromfile(prepared / shard.offsets.name, dtype="<i8")
        assert len(offsets) == shard.documents + 1
        found += [ids[a:b].tolist() for a, b in pairwise(offsets)]
    assert found == tokenizer.encode_batch(TEXTS, bos=True, eos=True)


def test_two_processes_write_the_same_bytes(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    prepare([str(corpus)], tokenizer=TOKENIZER, out=tmp_path / "two", workers=2, shard_tokens=2000)
    assert content(tmp_path / "two") == content(prepared)


def test_goes_on_after_an_interruption_at_any_point(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that makes something durable fails once; nothing is visible before all of it is there."""
    out, calls = tmp_path / "out", 0

    def failing(original: Callable[..., object], at: int) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise InterruptedError("killed")
            return original(*arguments)

        return call

    interrupted = went_on = 0
    for at in range(1, 200):
        calls = 0
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "rename"):
                patch.setattr(os, name, failing(getattr(os, name), at))
            try:
                prepare([str(corpus)], tokenizer=TOKENIZER, out=out, workers=1, shard_tokens=2000)
            except InterruptedError:
                interrupted += 1
                went_on += out.with_name("out.partial").joinpath("progress.json").exists()
        if out.exists():
            assert content(out) == content(prepared)
            shutil.rmtree(out)
        if calls < at:
            break
    assert interrupted > 10
    assert went_on > 5


def test_an_interrupted_run_does_not_tokenise_again(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original, seen = build_tokenizer(TOKENIZER).__class__.encode_batch, []

    def counting(self: object, texts: list[str], **rest: bool) -> list[list[int]]:
        if len(seen) >= 100 and not out.with_name("again").exists():
            raise KeyboardInterrupt
        seen.extend(texts)
        return original(self, texts, **rest)

    monkeypatch.setattr("octavo.tokenizer.Tokenizer.encode_batch", counting)
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tokenizer=TOKENIZER, out=out, workers=1, shard_tokens=2000)
    assert not out.exists()
    out.with_name("again").touch()
    before = len(seen)
    prepare([str(corpus)], tokenizer=TOKENIZER, out=out, workers=1, shard_tokens=2000)
    assert content(out) == content(prepared)
    assert len(seen) - before < 100
    # with other settings it would be another corpus
    out.rename(tmp_path / "done")
    out.with_name("again").unlink()
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tokenizer=TOKENIZER, out=out, workers=1, shard_tokens=2000)
    with pytest.raises(ConfigError, match=r"an interrupted run with another shard_tokens; use the same"):
        prepare([str(corpus)], tokenizer=TOKENIZER, out=out, workers=1, shard_tokens=3000)


def test_a_killed_command_is_gone_on_with_and_leaves_no_process(tmp_path: Path) -> None:
    """SIGKILL to the main process alone, as the kernel does it when memory is short."""
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 100))
    arguments = ["prepare", str(source), "--tokenizer", TOKENIZER, "--workers=2", "--shard-tokens=20000"]
    command = ["-m", "octavo.cli", *arguments, "--out"]
    partial = tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, *command, tmp_path / "out"], stderr=subprocess.PIPE)
    progress = partial / "progress.json"
    wait_for("some progress, or an end", lambda: progress.exists() or process.poll() is not None)
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=LIMIT)  # ends when nobody holds stderr any more, the workers neither
    assert not (tmp_path / "out").exists()
    done = json.loads(progress.read_bytes())["number"]
    assert done >= 1
    for out in ("out", "whole"):
        again = [warm.python(), *command, tmp_path / out]
        subprocess.run(again, check=True, capture_output=True, timeout=LIMIT)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_share_of_the_documents_is_for_validation(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index, _ = prepare([str(corpus)], tokenizer=TOKENIZER, out=out, workers=1, validation_share=0.2)
    assert 15 < index.documents("validation") < 45
    assert index.documents("train") + index.documents("validation") == len(TEXTS)
    tokenizer = build_tokenizer(TOKENIZER)
    numbers: list[set[int]] = []
    for split in ("train", "validation"):
        text = tokenizer.decode(np.fromfile(out / f"{split}-00000.tokens", dtype="<u2").tolist())
        numbers.append({int(part.split(":")[0]) for part in text.split("Document ")[1:]})
    assert not numbers[0] & numbers[1]
    run = launching.train(
        tmp_path / "run",
        {"training.dataset": out, "validation.enable": "true", "validation.freq": 4, "validation.steps": 1},
    )
    assert len(run.validations) == 1
    assert f"{out} (validation): {index.documents('validation')} documents" in run.log


def test_a_validation_split_without_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One document is in one split only.")
    with pytest.raises(
        ConfigError, match=r"none of the 1 documents .* validation split.*--val_fraction=0.01"
    ):
        prepare([str(tmp_path / "a.txt")], tokenizer=TOKENIZER, out=tmp_path / "out", validation_share=0.01)
    assert not list(tmp_path.glob("out*"))


BAD = (
    b'{"text": "good"}\n{"text": "b\xff"}\n{"text": ""}\n{"body": "x"}\n{"text": "also good"}\n{"text": "cut'
)


def test_bad_records_are_passed_over_as_far_as_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_bytes(BAD)
    arguments = ["prepare", str(source), "--tokenizer", TOKENIZER, "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert f"{source}, line 2 (offset 17): byte 11 (0xff) is not UTF-8" in capsys.readouterr().err
    assert cli.main([*arguments, "--max-bad-records=3"]) == 2
    told = capsys.readouterr().err
    assert "line 6" in told
    assert "--max_bad_records = 3: 3 were skipped before it" in told
    assert cli.main([*arguments, "--max-bad-records=4", "--workers=2"]) == 0
    told = capsys.readouterr().out
    assert "4 bad records were skipped; the first:" in told
    assert "2 documents" in told
    assert shard_format.read_index(tmp_path / "out").bad_records == 4


def test_training_passes_over_bad_records_too(tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS) + BAD)
    with pytest.raises(ConfigError, match=r"line 152 .*not UTF-8.*max_bad_records = 0: none is skipped"):
        loader(source, bad=BadRecords())
    run = launching.train(tmp_path / "run", {"training.dataset": source, "training.max_bad_records": 4})
    assert "4 bad records were skipped; the first:" in run.log
    assert "152 documents" in run.log


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "copy")


def test_a_damaged_shard_is_named(copy: Path) -> None:
    path = copy / "train-00001.tokens"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(ConfigError, match=r"train-00001\.tokens: .* bytes, but .* in the index.*truncated"):
        loader(copy)
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    loader(copy)  # the size is right
    for read in (lambda: loader(copy, verify=(0, 1)), lambda: verify(copy)):
        with pytest.raises(ConfigError, match=r"train-00001\.tokens: its SHA-256 is .*content has changed"):
            read()
    path.unlink()
    with pytest.raises(ConfigError, match=r"train-00001\.tokens: No such file or directory, but the index"):
        loader(copy)


def test_ranks_share_the_checksums(copy: Path) -> None:
    """Each shard is read by one rank."""
    path = copy / "train-00001.tokens"
    path.write_bytes(path.read_bytes()[::-1])
    loader(copy, verify=(0, 2))
    with pytest.raises(ConfigError, match=r"train-00001\.tokens: its SHA-256"):
        loader(copy, verify=(1, 2))


def _read_an_epoch(reader: DataLoader) -> None:
    for _ in range(200):
        reader.next_batch()


def test_an_id_outside_the_vocabulary_is_named(copy: Path) -> None:
    path = copy / "train-00001.tokens"
    ids = np.fromfile(path, dtype="<u2")
    ids[77] = 2048
    path.write_bytes(ids.tobytes())
    message = (
        r"train-00001\.tokens, token 77: the token id 2048 is outside the vocabulary of 2,048 "
        r"\(sample \d+, offset \d+\)"
    )
    with pytest.raises(ConfigError, match=message):
        _read_an_epoch(loader(copy))
    ahead = loader(copy, workers=2)  # found by a worker, raised here
    with pytest.raises(ConfigError, match=message):
        _read_an_epoch(ahead)
    ahead.close()
    with pytest.raises(ConfigError, match=r"SHA-256"):
        verify(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:200], r"index\.json: damaged, not JSON"),
        (lambda text: "[]", r"its format is None"),
        (lambda text: text.replace("octavo-tokens-1", "octavo-tokens-9"), r"its format is 'octavo-tokens-9'"),
        (lambda text: text.replace('"uint16"', '"uint8"'), r"damaged \(dtype 'uint8'\)"),
        (
            lambda text: text.replace('"uint16"', '"uint32"'),
            r"\(train-00000\.tokens: .* of uint32\)",
        ),
        (
            lambda text: text.replace('"train-00000.tokens"', '"../secret"'),
            r"a file name with a folder",
        ),
        (
            lambda text: re.sub(r'"tokens": \d+', '"tokens": 4611686018427387904', text, count=1),
            r"with the sizes",
        ),
        (lambda text: text.replace('"splits"', '"parts"'), r"damaged \(KeyError: 'splits'\)"),
        (lambda text: text.replace('"train": [', '"other": ['), r"no split for training"),
    ],
)
def test_a_damaged_index_is_named(copy: Path, damage, message: str) -> None:
    path = copy / "index.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match=message):
        loader(copy)


def test_another_tokenizer_is_refused(prepared: Path, tmp_path: Path) -> None:
    source = Path(build_tokenizer(TOKENIZER).source)
    other = json.loads(source.read_text())
    vocabulary = other["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"prepared with the tokenizer .* so the ids mean other text"):
        loader(prepared, str(tmp_path / "tokenizer.json"))
    same = tmp_path / "same"
    same.mkdir()
    (same / "tokenizer.json").write_text(json.dumps(json.loads(source.read_text()), indent=3))
    loader(prepared, str(same)).next_batch()  # another file, the same meaning


def test_is_refused_before_a_model_is_built(copy: Path, tmp_path: Path) -> None:
    (copy / "train-00000.tokens").unlink()
    run = launching.train(tmp_path / "run", {"training.dataset": copy})
    assert run.exit_codes == [2]
    assert "train-00000.tokens: No such file" in run.log
    assert "Building" not in run.log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs SOURCE…, --tokenizer and --out"),
        (["{}/none", "--tokenizer", TOKENIZER, "--out", "{}/x"], "no such file or folder"),
        (["{}/a.txt", "--tokenizer", "nobody", "--out", "{}/x"], "tokenizer 'nobody'"),
        (["{}/a.txt", "{}/a.txt", "--tokenizer", TOKENIZER, "--out", "{}/x"], "named twice"),
        (["{}/a.txt", "--tokenizer", TOKENIZER, "--out", "{}"], "already exists; name a new folder"),
        (["{}/a.txt", "--tokenizer", TOKENIZER, "--out", "{}/x", "--workers", "0"], "from 1 to"),
        (["{}/a.txt", "--tokenizer", TOKENIZER, "--out", "{}/x", "--val-fraction", "2"], "from 0 to 0.5"),
        (["--verify", "{}"], "index.json: cannot be read"),
        (["{}/a.txt", "--verify", "{}"], "cannot be combined"),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert cli.main(["prepare", *[argument.format(tmp_path) for argument in arguments]]) == 2
    assert message in capsys.readouterr().err
