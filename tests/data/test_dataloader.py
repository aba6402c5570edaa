"""The batches of a step depend on corpus, seed and step, not on ranks, restarts or threads."""

import gc
import json
import threading

import pytest
import torch

from octavo.core.errors import ConfigError
from octavo.data import corpus, prefetch
from octavo.data.corpus import InMemoryCorpus, tokenize
from octavo.data.dataloader import DataLoader, merge_state_dicts
from octavo.data.labels import IGNORED, split_samples
from octavo.data.sample_source import SourceOptions
from tests.helpers import ranks as forks
from tests.helpers.loaders import make_loader

SEQ_LEN = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of some 100 samples."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(7):
        words = " ".join(f"w{number * 1000 + word}" for word in range(40 + 13 * number))
        (root / f"{number}.txt").write_text(words)
    return root


def loader(folder, tokenizer, **options):
    return make_loader(folder, tokenizer, **{"batch": 8, "seed": 3, **options})


def source(folder, tokenizer, seed=3):
    found = loader(folder, tokenizer, seed=seed).source
    assert isinstance(found, InMemoryCorpus)
    return found


def global_batches(loaders, microbatches, steps):
    """The tokens of each step over all ranks, in order of global sample: [samples, SEQ_LEN + 1]."""
    result = []
    for _ in range(steps):
        rows = []
        for _ in range(microbatches):
            for one in loaders:
                tokens, labels = one.next_batch()
                rows.append(torch.cat([tokens, labels[:, -1:]], dim=1))
        result.append(torch.cat(rows))
    return result


def test_labels_are_the_following_tokens(folder, tokenizer):
    tokens, labels = loader(folder, tokenizer).next_batch()
    assert tokens.shape == labels.shape == (8, SEQ_LEN)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.is_contiguous()
    assert labels.is_contiguous()
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    row = source(folder, tokenizer).tokens_N.tolist()
    windows = [row[start : start + SEQ_LEN + 1] for start in range(0, len(row) - SEQ_LEN, SEQ_LEN)]
    for tokens_S, labels_S in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert [*tokens_S, labels_S[-1]] in windows


@pytest.mark.parametrize("batch", [1, 8])  # of one sample, tokens and labels can share memory
def test_labels_after_a_documents_end_are_ignored(batch):
    tokens, labels = split_samples(torch.tensor([[5, 0, 1, 7, 0, 0, 6]] * batch), document_end=0)
    assert tokens.tolist() == [[5, 0, 1, 7, 0, 0]] * batch
    assert labels.tolist() == [[0, IGNORED, 7, 0, IGNORED, IGNORED]] * batch


def test_packing_keeps_every_document_whole(folder, tokenizer):
    expected: list[int] = []
    for path in sorted(folder.iterdir()):
        expected += tokenizer.encode(path.read_text(), bos=True, eos=True)
    assert source(folder, tokenizer).tokens_N.tolist() == expected


@pytest.mark.parametrize(("most", "calls"), [(1, [1, 1, 1, 1, 1]), (14, [1, 2, 2]), (1000, [5])])
def test_batches_of_text_change_no_token(most, calls, tokenizer, monkeypatch):
    texts = ["Nay, answer me.", "", "Stand, and unfold", "yourself.", ""]
    expected = tokenize(texts, tokenizer)
    sizes, encode_batch = [], tokenizer.encode_batch

    def counted(texts, **ends):
        sizes.append(len(texts))
        return encode_batch(texts, **ends)

    monkeypatch.setattr(corpus, "_CHARACTERS_PER_CALL", most)
    monkeypatch.setattr(tokenizer, "encode_batch", counted)
    batched = tokenize(iter(texts), tokenizer)
    assert sizes == calls
    assert batched.ids_N.tolist() == expected.ids_N.tolist()
    assert batched.documents == expected.documents == 5


def test_an_epoch_uses_every_sample_once(folder, tokenizer):
    """Windows overlap in one token, the last label of one and the first input of the next: no label twice."""
    corpus = source(folder, tokenizer)
    assert corpus.samples > 50
    for epoch in range(2):
        samples = corpus.read(epoch * corpus.samples, corpus.samples)
        in_order = {tuple(sample) for sample in samples.tolist()}
        assert len(in_order) == corpus.samples
        labels = sorted(samples[:, 1:].flatten().tolist())
        assert labels == sorted(corpus.tokens_N[1 : 1 + corpus.samples * SEQ_LEN].tolist())


def test_epochs_and_seeds_differ(folder, tokenizer):
    corpus = source(folder, tokenizer)
    first, second = (corpus.read(epoch * corpus.samples, corpus.samples) for epoch in range(2))
    other = source(folder, tokenizer, seed=4).read(0, corpus.samples)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(first, source(folder, tokenizer).read(0, corpus.samples))


@pytest.mark.parametrize(
    ("ranks", "batch", "microbatches"), [(1, 4, 2), (2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)]
)
def test_any_layout_sees_the_same_global_batches(folder, tokenizer, ranks, batch, microbatches):
    reference = global_batches([loader(folder, tokenizer, batch=8)], 1, 30)
    layout = [loader(folder, tokenizer, rank=rank, ranks=ranks, batch=batch) for rank in range(ranks)]
    for expected, found in zip(reference, global_batches(layout, microbatches, 30), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    "saved_at", [0, 5, 12, 25]
)  # an epoch has 12 to 13 batches: before, at and after its end
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_resumed_is_uninterrupted(folder, tokenizer, saved_at, ranks):
    whole = global_batches([loader(folder, tokenizer)], 1, saved_at + 20)
    interrupted = loader(folder, tokenizer)
    global_batches([interrupted], 1, saved_at)
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = [loader(folder, tokenizer, rank=rank, ranks=ranks, batch=8 // ranks) for rank in range(ranks)]
    assert [one.load_state_dict(state) for one in resumed] == [None] * ranks
    for expected, found in zip(whole[saved_at:], global_batches(resumed, 1, 20), strict=True):
        assert torch.equal(expected, found)


def test_a_state_of_another_corpus_or_seed_is_reported(folder, tokenizer, tmp_path):
    state = loader(folder, tokenizer, seed=3).state_dict()
    assert loader(folder, tokenizer, seed=4).load_state_dict(state) == "seed was 3, is 4"
    (tmp_path / "other.txt").write_text("other text " * 100)
    assert "crc32 was" in (loader(tmp_path, tokenizer).load_state_dict(state) or "")


@pytest.mark.parametrize(
    "state", [{}, {"global_sample": -1}, {"global_sample": "5"}, {"global_sample": 0, "source": 1}]
)
def test_refuses_an_invalid_state(folder, tokenizer, state):
    with pytest.raises(ConfigError, match="global_sample"):
        loader(folder, tokenizer).load_state_dict(state)


def test_the_shipped_corpus(tokenizer):
    shipped = make_loader("shakespeare", tokenizer, batch=2, seq_len=256, seed=42)
    tokens, _ = shipped.next_batch()
    assert "41 documents" in shipped.source.description
    assert "1,667,809 tokens" in shipped.source.description
    assert tokens.max() < tokenizer.vocab_size
    words = tokenizer.decode(tokens[0].tolist()).split()
    assert len(words) > 80  # 256 tokens of English, not single letters


def test_too_little_text_for_one_sample(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("Who's there?")
    with pytest.raises(
        ConfigError, match=r"too few for one sample of seq_len 16 .*training\.seq_len"
    ) as caught:
        loader(tmp_path, tokenizer)
    tokens = len(tokenizer.encode("Who's there?", bos=True, eos=True))
    assert f"{tokens} tokens in 1 documents" in str(caught.value)


def test_one_sample_is_enough(tokenizer):
    text = "\x01" * (SEQ_LEN - 1)  # one token each; begin and end ids complete the sample

    def packed(text):
        return InMemoryCorpus(tokenize([text], tokenizer), "tiny", SourceOptions(tokenizer, SEQ_LEN, seed=0))

    corpus = packed(text)
    assert corpus.samples == 1
    assert torch.equal(corpus.read(7, 1)[0], corpus.tokens_N)
    with pytest.raises(ConfigError, match="16 tokens in 1 documents"):
        packed(text[1:])


def test_refuses_an_empty_batch():
    with pytest.raises(ConfigError, match=r"training\.local_batch_size is 0"):
        DataLoader(Counting(), local_batch_size=0, dp_rank=0, dp_degree=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "shakespear"}, r"'shakespear'.*did you mean 'shakespeare'"),
        (
            {"dataset": "/no/such/folder"},
            r"/no/such/folder.*neither a known corpus \(shakespeare, c4, c4_",
        ),
        ({"dataset": "shakespeare", "dataset_path": "/x"}, r"dataset_path = '/x' has no effect"),
        ({"dataset": "shakespeare", "seq_len": 0}, r"training\.seq_len is 0"),
        ({"dataset": "c4", "dataset_path": "/no/such/copy"}, r"/no/such/copy: no such file or folder"),
    ],
)
def test_a_dataset_that_cannot_be_loaded(tokenizer, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_loader(tokenizer=tokenizer, **arguments)


class Counting:
    """A forward-only source whose sample i contains the number i, and which counts reads."""

    description, forward_only, identity = "counting", True, {"seq_len": 1}

    def __init__(self, fails_at=None):
        self.fails_at, self.reads, self.place = fails_at, 0, 0

    def read(self, first, count):
        if self.fails_at is not None and first >= self.fails_at:
            raise ConfigError("the third shard is torn")
        assert first >= self.place, "read backwards"
        self.place = first + count
        self.reads += 1
        return torch.arange(first, first + count).unsqueeze(1).expand(count, 2)

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state.get("place", 0)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "octavo-data"]


@pytest.fixture
def no_threads_left():
    assert not threads()
    yield
    gc.collect()
    assert not threads()


@pytest.mark.usefixtures("no_threads_left")
def test_prefetching_does_not_move_the_saved_position():
    ahead = DataLoader(Counting(), local_batch_size=2, dp_rank=1, dp_degree=2)
    for step in range(3):
        tokens, _ = ahead.next_batch()
        assert tokens.tolist() == [[4 * step + 2], [4 * step + 3]]
    assert ahead.state_dict() == {"global_sample": 12, "identity": {"seq_len": 1}, "source": {"place": 12}}
    resumed = DataLoader(Counting(), local_batch_size=2, dp_rank=1, dp_degree=2)
    assert resumed.load_state_dict(ahead.state_dict()) is None
    assert torch.equal(resumed.next_batch()[0], ahead.next_batch()[0])
    ahead.load_state_dict(
        {"global_sample": 4, "identity": {"seq_len": 1}, "source": {"place": 4}}
    )  # back in time
    assert ahead.next_batch()[0].tolist() == [[6], [7]]
    ahead.close()
    assert ahead.next_batch()[0].tolist() == [[10], [11]]


@pytest.mark.usefixtures("no_threads_left")
def test_prefetching_is_bounded_and_ends_with_its_loader():
    counting = Counting()
    ahead = DataLoader(counting, local_batch_size=1, dp_rank=0, dp_degree=1)
    ahead.next_batch()
    for _ in range(100):
        if counting.reads > prefetch._QUEUED_MICROBATCHES + 1:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.1)
    assert counting.reads <= prefetch._QUEUED_MICROBATCHES + 2  # returned, queued, being put
    assert len(threads()) == 1


@pytest.mark.usefixtures("no_threads_left")
def test_a_failure_in_the_thread_is_raised_where_the_batch_is_asked_for():
    ahead = DataLoader(Counting(fails_at=3), local_batch_size=1, dp_rank=0, dp_degree=1)
    for _ in range(3):
        ahead.next_batch()
    for _ in range(2):
        with pytest.raises(ConfigError, match="third shard"):
            ahead.next_batch()


@pytest.mark.usefixtures("no_threads_left")
@pytest.mark.parametrize("ranks", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(folder, tokenizer, ranks):
    """Also when a run saved with one number of workers resumes with another."""
    inline = loader(folder, tokenizer, rank=ranks - 1, ranks=ranks, workers=0)
    expected = [inline.next_batch() for _ in range(40)]
    state = None
    for start, workers in ((0, 1), (9, 2), (18, 3), (27, 0)):
        resumed = loader(folder, tokenizer, rank=ranks - 1, ranks=ranks, workers=workers)
        if state is not None:
            assert resumed.load_state_dict(state) is None
        for step in range(start, start + 9):
            for found, wanted in zip(resumed.next_batch(), expected[step], strict=True):
                assert torch.equal(found, wanted)
        state = resumed.state_dict()
        resumed.close()


@pytest.mark.usefixtures("no_threads_left")
def test_the_main_thread_waits_for_batches_and_makes_none(folder, tokenizer):
    made_by = []
    ahead = loader(folder, tokenizer, workers=2)
    read = ahead.source.read
    ahead.source.read = lambda *place: made_by.append(threading.current_thread().name) or read(*place)  # type: ignore[method-assign]
    for _ in range(20):
        ahead.next_batch()
    assert set(made_by) == {"octavo-data"}
    ahead.close()


@pytest.mark.usefixtures("no_threads_left")
def test_skip(folder, tokenizer):
    whole, jumping = loader(folder, tokenizer), loader(folder, tokenizer, workers=0)
    batches = [whole.next_batch()[0] for _ in range(9)]
    jumping.next_batch()
    jumping.skip(3 * 8)
    assert torch.equal(jumping.next_batch()[0], batches[4])
    jumping.skip(0)
    assert torch.equal(jumping.next_batch()[0], batches[5])
    whole.close()
    with pytest.raises(ValueError, match="-1"):
        jumping.skip(-1)


@pytest.mark.usefixtures("no_threads_left")
def test_a_forked_process_continues_with_its_own_threads(folder, tokenizer):
    """The child has none of the parent's threads and starts its own, at the same position."""
    ahead = loader(folder, tokenizer)
    ahead.next_batch()
    state = ahead.state_dict()

    def child():
        return [ahead.next_batch()[0].tolist() for _ in range(3)]

    (found,) = forks.fork([(child, ())])
    assert ahead.state_dict() == state
    assert found == [ahead.next_batch()[0].tolist() for _ in range(3)]
    ahead.close()


def test_held_out_samples_are_never_trained_on(folder, tokenizer):
    def windows(held_out_fraction, seed):
        made = loader(folder, tokenizer, seed=seed, held_out_fraction=held_out_fraction).source
        assert isinstance(made, InMemoryCorpus)
        trained = {tuple(row) for row in made.read(0, 2 * made.samples).tolist()}
        if not held_out_fraction:
            return trained, set()
        part = made.held_out(seed=0)
        return trained, {tuple(row) for row in part.read(0, part.samples).tolist()}

    everything, _ = windows(0.0, 1)
    trained, held_out = windows(0.1, 1)
    assert trained | held_out == everything
    assert not trained & held_out
    assert len(held_out) == -(-len(everything) // 10)
    assert windows(0.1, 2)[1] == held_out  # whatever the run's seed is


def test_merging_keeps_the_furthest_bookmark():
    def state(position, **streams):
        return {
            "global_sample": position,
            "identity": {},
            "source": {"streams": {k: {"sample": v} for k, v in streams.items()}},
        }

    merged = merge_state_dicts([state(8, a=3, b=1), state(8, b=2, c=5)])
    assert merged == state(8, a=3, b=2, c=5)
    with pytest.raises(ValueError, match=r"\[8, 9\]"):
        merge_state_dicts([state(8), state(9)])
