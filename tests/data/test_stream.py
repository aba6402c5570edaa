"""A streamed dataset gives every layout the same samples, and resumes exactly from a bookmark."""

import gzip
import json
import random
import subprocess
import sys

import pytest
import torch

from octavo.core.errors import ConfigError
from octavo.data import stream as data_stream
from octavo.data.corpus_files import BadRecords
from octavo.data.dataloader import merge_state_dicts
from octavo.data.sample_source import SourceOptions
from octavo.data.stream import StreamedCorpus, open_hub_files
from tests.helpers.loaders import make_loader
from tests.helpers.waiting import LIMIT

SEQ_LEN = 16
FILES = 6


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A local copy as C4 is laid out: some files compressed, unequal lengths, some documents empty."""
    root = tmp_path_factory.mktemp("c4")
    draw = random.Random(0)
    for file in range(FILES):
        lines = []
        for document in range(10 + 7 * file):
            text = " ".join(f"f{file}d{document}w{word}" for word in range(draw.randrange(25)))
            lines.append(
                json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://localhost"})
            )
        content = "\n".join(lines).encode() + b"\n"
        name = f"c4-train.{file:05d}-of-{FILES:05d}.json"
        if file % 2:
            (root / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (root / name).write_bytes(content)
    return root


@pytest.fixture(autouse=True, params=[64, 4], ids=["one file per stream", "several files per stream"])
def streams(request, monkeypatch):
    monkeypatch.setattr(data_stream, "STREAMS", request.param)
    count: int = min(request.param, FILES)
    return count


def make(copy, tokenizer, **options):
    return make_loader("c4", tokenizer, dataset_path=str(copy), **options)


def steps(loaders, count):
    """[count, global batch, SEQ_LEN + 1]"""
    result = []
    for _ in range(count):
        pairs = [one.next_batch() for one in loaders]
        result.append(torch.cat([torch.cat([tokens, labels[:, -1:]], dim=1) for tokens, labels in pairs]))
    return torch.stack(result)


def test_streams_hold_the_documents_in_order(copy, tokenizer, streams, opened):
    """Sample i is sample i // V of stream i % V; a stream's windows join to whole documents of its files."""
    one = make(copy, tokenizer, batch=streams)
    opened.append(one)
    samples = steps([one], 80)  # [80, streams, SEQ_LEN + 1]
    seen: list[set[str]] = []
    for number in range(streams):
        row = [*samples[:, number, :-1].flatten().tolist(), int(samples[-1, number, -1])]
        assert torch.equal(samples[1:, number, 0], samples[:-1, number, -1])  # windows overlap in one token
        assert row[0] == tokenizer.bos_id
        documents = tokenizer.decode(row).replace("<|end_of_text|>", "").split("<|begin_of_text|>")[1:-1]
        assert len(documents) > 5
        for document in documents:
            words = document.split(" ")
            assert [word.rsplit("w", 1)[1] for word in words] == [str(index) for index in range(len(words))]
        seen.append({document[:2] for document in documents})
    for number, files in enumerate(seen):
        for other in seen[number + 1 :]:
            assert not files & other


@pytest.mark.parametrize(("ranks", "batch"), [(2, 4), (4, 2), (8, 1)])
def test_any_layout_sees_the_same_global_batches(copy, tokenizer, ranks, batch, opened):
    """60 steps of 8 samples: every stream is past the end of its files, most several times."""
    opened += [make(copy, tokenizer, batch=8)]
    opened += [make(copy, tokenizer, rank=rank, ranks=ranks, batch=batch) for rank in range(ranks)]
    assert torch.equal(steps(opened[:1], 60), steps(opened[1:], 60))


def test_a_rank_opens_only_its_own_streams(copy, tokenizer, streams, opened):
    half = make(copy, tokenizer, rank=1, ranks=2, batch=streams // 2)
    opened.append(half)
    steps([half], 5)
    assert set(half.state_dict()["source"]["streams"]) == {
        str(number) for number in range(streams // 2, streams)
    }


@pytest.mark.parametrize("saved_at", [0, 1, 7, 40])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("merged", [True, False])
def test_resumed_is_uninterrupted(copy, tokenizer, saved_at, ranks, merged, opened):
    """Saved by two ranks, resumed by one, two or four, with the bookmarks of both or of one."""
    whole = make(copy, tokenizer, batch=8)
    saving = [make(copy, tokenizer, rank=rank, ranks=2, batch=4) for rank in range(2)]
    resumed = [make(copy, tokenizer, rank=rank, ranks=ranks, batch=8 // ranks) for rank in range(ranks)]
    opened += [whole, *saving, *resumed]
    expected = steps([whole], saved_at + 20)[saved_at:]
    if saved_at:
        steps(saving, saved_at)
    states = [one.state_dict() for one in saving]
    state = json.loads(json.dumps(merge_state_dicts(states) if merged else states[1]))
    assert [one.load_state_dict(state) for one in resumed] == [None] * ranks
    assert torch.equal(expected, steps(resumed, 20))


def test_a_bookmark_avoids_reading_from_the_start(copy, tokenizer, monkeypatch, opened):
    first = make(copy, tokenizer, batch=8)
    opened.append(first)
    steps([first], 200)
    calls: list[int] = []
    encode_batch = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer,
        "encode_batch",
        lambda texts, **rest: calls.append(len(texts)) or encode_batch(texts, **rest),
    )
    for state, expected in [
        (first.state_dict(), range(1, 250)),
        ({**first.state_dict(), "source": {}}, range(350, 1500)),
    ]:
        calls.clear()
        second = make(copy, tokenizer, batch=8)
        opened.append(second)
        second.load_state_dict(state)
        second.next_batch()
        second.close()
        assert sum(calls) in expected  # documents tokenised


def test_seeds_differ(copy, tokenizer, opened):
    opened += [make(copy, tokenizer, seed=seed) for seed in (1, 1, 2)]
    one, same, other = (steps([loader], 10) for loader in opened)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_passes_differ_where_a_stream_has_several_files(copy, tokenizer, monkeypatch, opened):
    monkeypatch.setattr(data_stream, "STREAMS", 1)
    opened.append(make(copy, tokenizer, batch=1))
    text = tokenizer.decode(steps(opened, 2000)[:, 0, :-1].flatten().tolist())
    first_words = [
        piece.split(" ")[0].removesuffix("<|end_of_text|>") for piece in text.split("<|begin_of_text|>")[1:-1]
    ]
    files = [word[1] for word in first_words]
    order = [file for index, file in enumerate(files) if index == 0 or files[index - 1] != file]
    assert sorted(order[:FILES]) == sorted(order[FILES : 2 * FILES]) == sorted("012345")
    assert order[:FILES] != order[FILES : 2 * FILES]


def test_a_damaged_file_ends_the_run_with_its_name(tokenizer, tmp_path, opened):
    (tmp_path / "a.json").write_text(json.dumps({"text": "word " * 100}) + '\n{"text": "cut')
    opened.append(make(tmp_path, tokenizer, batch=1))
    with pytest.raises(ConfigError, match=r"a\.json, line 2 \(offset 513\): not a JSON object"):
        steps(opened, 100)


def test_a_dataset_without_a_document(tokenizer, tmp_path, opened):
    (tmp_path / "a.json").write_text('{"text": ""}\n')
    opened.append(make(tmp_path, tokenizer, batch=1))
    with pytest.raises(ConfigError, match="have no document"):
        steps(opened, 1)


class TestHub:
    """Reading through `datasets`, with local files in place of the hub's."""

    @pytest.fixture(autouse=True)
    def redirect(self, copy, monkeypatch, tmp_path):
        datasets = pytest.importorskip("datasets")
        load_dataset = datasets.load_dataset

        def redirected(repository, config, **options):
            assert (repository, config) == ("allenai/c4", "en")
            assert options == {"split": "train", "streaming": True}
            files = {"train": [str(path) for path in sorted(copy.iterdir())]}
            return load_dataset("json", data_files=files, cache_dir=str(tmp_path), **options)

        monkeypatch.setattr(datasets, "load_dataset", redirected)

    def test_equals_the_local_copy(self, copy, tokenizer, opened):
        hub = make_loader("c4", tokenizer)
        opened += [hub, make(copy, tokenizer)]
        assert torch.equal(steps([hub], 60), steps(opened[1:], 60))
        later = make(copy, tokenizer)
        opened.append(later)
        assert later.load_state_dict(hub.state_dict()) is None
        assert torch.equal(steps([hub], 10), steps([later], 10))

    def test_opens_a_file_at_a_document(self, monkeypatch):
        monkeypatch.setattr(data_stream, "_ROWS_PER_TABLE", 4)
        for open_file in open_hub_files("allenai/c4", "en"):
            every = list(open_file(0))
            for start in (1, 4, 9, len(every) - 1, len(every)):
                assert list(open_file(start)) == every[start:]


def test_the_hub_cannot_be_reached(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ConfigError, match=r"allenai/c4 cannot be opened \(ConnectionError: no route\).*dataset_path"
    ):
        open_hub_files("allenai/c4", "en")


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[train\]'"):
        open_hub_files("allenai/c4", "en")


def test_needs_files(tokenizer):
    with pytest.raises(ConfigError, match="c4: no files"):
        StreamedCorpus([], "c4", SourceOptions(tokenizer, SEQ_LEN, seed=0))


ABANDONED = """
import sys
from tests.helpers.loaders import make_loader
loader = make_loader("c4", dataset_path=sys.argv[1])
loader.next_batch()
sys.exit(7)
"""


def test_a_process_ends_cleanly_while_it_prefetches(copy):
    run = subprocess.run(
        [sys.executable, "-c", ABANDONED, str(copy)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (run.returncode, run.stderr) == (7, "")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mixture_with_a_stream_resumes_exactly(copy, tokenizer, tmp_path, ranks, opened):
    """Saved by two ranks with a worker each, resumed by one or two, inline."""
    (tmp_path / "a.txt").write_text(" ".join(f"a{word}" for word in range(300)))

    def loaders(count, workers):
        mixture = f"c4:0.6,{tmp_path / 'a.txt'}:0.4"
        sizes = {"ranks": count, "batch": 8 // count, "workers": workers}
        made = [
            make_loader(mixture, tokenizer, dataset_path=str(copy), rank=r, **sizes) for r in range(count)
        ]
        opened.extend(made)
        return made

    expected = steps(loaders(1, 0), 40)
    saving = loaders(2, 1)
    assert torch.equal(steps(saving, 25), expected[:25])
    state = json.loads(json.dumps(merge_state_dicts([one.state_dict() for one in saving])))
    assert state["source"]["mixture"][0]["streams"]
    resumed = loaders(ranks, 0)
    assert [one.load_state_dict(state) for one in resumed] == [None] * ranks
    assert torch.equal(steps(resumed, 15), expected[25:])


def test_bad_records_of_a_stream_are_skipped_and_counted_once(tokenizer, tmp_path, opened):
    """Although every pass reads them again."""
    good = json.dumps({"text": "word " * 40})
    (tmp_path / "a.json").write_text(f'{good}\n{{"text": "cut\n{good}\n{{"body": "x"}}\n')
    bad = BadRecords(2)
    one = make(tmp_path, tokenizer, batch=1, bad=bad)
    opened.append(one)
    steps([one], 60)
    assert len(bad.found) == 2
    assert "2 bad records were skipped" in bad.summary()
