"""Validation measures what it says, on any number of ranks, and leaves no trace in the training."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from octavo.commands.prepare import prepare
from octavo.config.parallel_dims import ParallelDims
from octavo.data.corpus import InMemoryCorpus, tokenize
from octavo.data.mixture import Mixture
from octavo.data.prepared import open_prepared
from octavo.data.sample_source import SourceOptions
from octavo.tokenizer import build_tokenizer
from octavo.train.step import TrainStep
from octavo.train.validate import Validator, _byte_lengths
from tests.helpers import launching, ranks

TEXT = "It was the best of times, it was the worst of times. 漢字 naïve.\n" * 12
SEQ_LEN = 16


class Bigram(torch.nn.Module):
    """Logits of a token from the one before."""

    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
        torch.nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, tokens_BS):
        return self.table(tokens_BS)


def all_reduce(values):
    torch.distributed.all_reduce(values)
    return values


def measure(world, batch, *, texts=(TEXT,), document_end=None):
    """The report of this rank, out of `world`, over the whole of `texts`."""
    tokenizer = build_tokenizer("octavo_bpe_2048")
    source = InMemoryCorpus(tokenize(texts, tokenizer), "text", SourceOptions(tokenizer, SEQ_LEN, seed=0))
    rank = torch.distributed.get_rank() if world > 1 else 0
    place = SimpleNamespace(
        data_rank=rank,
        layout=ParallelDims(shard=world),
        loss_parallel=False,
        sum=all_reduce if world > 1 else lambda values: values,
        local_labels=lambda labels: labels,
    )
    validator = Validator(
        source,
        samples=source.samples,
        local_batch_size=batch,
        world=place,
        byte_lengths=tokenizer.byte_lengths(),
        device=torch.device("cpu"),
        document_end=document_end,
    )
    model = Bigram(tokenizer.vocab_size).train()
    before = torch.get_rng_state()
    report = validator.run(
        TrainStep(model, place, torch.device("cpu"), microbatches=1, global_tokens=batch * SEQ_LEN)
    )
    assert model.training
    assert model.table.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    return report


def test_loss_and_bits_per_byte_by_their_definition():
    """A last batch that is not full counts no sample twice."""
    tokenizer = build_tokenizer("octavo_bpe_2048")
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    samples = (len(ids) - 1) // SEQ_LEN
    counted = torch.tensor(ids[: samples * SEQ_LEN + 1])
    model = Bigram(tokenizer.vocab_size)
    nats = F.cross_entropy(model(counted[:-1]), counted[1:], reduction="sum").item()
    text_bytes = len(tokenizer.decode(counted[1:].tolist()).replace("<|end_of_text|>", "").encode())
    report = measure(1, batch=4)
    assert samples % 4
    assert report.tokens == samples * SEQ_LEN
    assert report.loss == pytest.approx(nats / report.tokens, rel=1e-5)
    assert report.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_the_first_tokens_of_documents_are_not_counted():
    """Neither their nats nor their bytes."""
    tokenizer = build_tokenizer("octavo_bpe_2048")
    texts = [f"{line}, it was." for line in "abcdefgh" * 4]
    ids = [id for text in texts for id in tokenizer.encode(text, bos=True, eos=True)]
    samples = (len(ids) - 1) // SEQ_LEN
    tokens, labels = torch.tensor(ids[: samples * SEQ_LEN + 1]).unfold(0, 2, 1).unbind(1)
    inside = tokens != tokenizer.eos_id
    nats = F.cross_entropy(Bigram(tokenizer.vocab_size)(tokens[inside]), labels[inside], reduction="sum")
    lengths = tokenizer.byte_lengths()
    report = measure(1, batch=4, texts=texts, document_end=tokenizer.eos_id)
    assert report.tokens == inside.sum() < samples * SEQ_LEN - 20
    assert report.loss == pytest.approx(nats.item() / report.tokens, rel=1e-5)
    text_bytes = sum(lengths[id] for id in labels[inside].tolist())
    assert report.bits_per_byte == pytest.approx(nats.item() / math.log(2) / text_bytes, rel=1e-5)


def test_any_number_of_ranks_measures_the_same():
    one = measure(1, batch=4)
    for report in ranks.run(2, measure, 2, 3):
        assert report.tokens == one.tokens
        assert report.loss == pytest.approx(one.loss, rel=1e-6)
        assert report.bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-6)


@pytest.fixture
def word_pieces(tmp_path):
    """The path of a tokenizer whose tokens have marks, which are not of the text."""
    vocabulary = {"to": 0, "##day": 1, "[UNK]": 2, "<|end_of_text|>": 3}
    model = {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]"}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return str(tmp_path)


def test_bytes_are_those_of_the_text_where_tokens_have_marks(word_pieces):
    tokenizer = build_tokenizer(word_pieces)
    text = "today to today " * 20
    source = InMemoryCorpus(tokenize([text], tokenizer), "text", SourceOptions(tokenizer, SEQ_LEN, seed=0))
    lengths = _byte_lengths(tokenizer, source)
    ids = tokenizer.encode(text, eos=True)
    assert sum(lengths[id] for id in ids) == pytest.approx(len(text.encode()))
    assert set(_byte_lengths(tokenizer, object())) == {0.0}  # not known: not reported


def test_prepared_text_and_mixtures_know_their_bytes(word_pieces, tmp_path):
    """Unless one of the folders was prepared before they were counted."""
    tokenizer, texts = build_tokenizer(word_pieces), {"a": "today to today " * 20, "b": "to to to " * 30}
    options = SourceOptions(tokenizer, SEQ_LEN, seed=0)

    def mean(source):
        (same,) = set(_byte_lengths(tokenizer, source))
        return same

    sources, means = {}, {}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        prepare([str(tmp_path / f"{name}.txt")], tokenizer=word_pieces, out=tmp_path / name)
        sources[name] = open_prepared(tmp_path / name, options)
        means[name] = len(text.encode()) / len(tokenizer.encode(text, eos=True))
        assert mean(sources[name]) == pytest.approx(means[name])
    mixture = Mixture([("a", 1.0, sources["a"]), ("b", 3.0, sources["b"])], seed=0)
    assert mean(mixture) == pytest.approx((means["a"] + 3 * means["b"]) / 4)
    index = tmp_path / "a" / "index.json"
    content = json.loads(index.read_text())
    del content["splits"]["train"][0]["text_bytes"]
    index.write_text(json.dumps(content))
    older = open_prepared(tmp_path / "a", options)
    assert mean(older) == 0.0
    assert mean(Mixture([("a", 1.0, older), ("b", 3.0, sources["b"])], seed=0)) == 0.0


def test_byte_lengths_add_up_to_the_text():
    tokenizer = build_tokenizer("octavo_bpe_2048")
    lengths = tokenizer.byte_lengths()
    assert sum(lengths[id] for id in tokenizer.encode(TEXT, bos=True, eos=True)) == len(TEXT.encode())
    assert len(lengths) == tokenizer.vocab_size


HELD_OUT = {**launching.shallow(2), "validation.fraction": 0.05}
VALIDATE = {**HELD_OUT, "validation.enable": "true", "validation.freq": 2, "validation.steps": 2}


@pytest.mark.parametrize(
    ("flags", "world"),
    [
        ({}, 1),
        (
            {
                **launching.recipe("tensorwise"),
                "float8.enable_fsdp_float8_all_gather": "true",
                "float8.precompute_float8_dynamic_scale_for_fsdp": "true",
                "training.steps": 3,
            },
            2,
        ),
    ],
    ids=["float32", "float8, gathered, two ranks"],
)
def test_the_training_is_bitwise_the_same(tmp_path, flags, world):
    """Parameters too, because the loss after an update depends on them; and the checkpoint that follows."""
    without = launching.train(tmp_path / "off", {**HELD_OUT, **flags}, world=world)
    run = launching.train(tmp_path / "on", {**VALIDATE, **flags}, world=world)
    assert run.losses == without.losses
    assert [line["grad_norm"] for line in run.metrics] == [line["grad_norm"] for line in without.metrics]
    steps = len(run.losses)
    assert [line["step"] for line in run.validations] == sorted({2, steps - steps % 2, steps})
    assert "validate step:  2  loss: " in run.log
    assert without.validations == []


def test_validates_on_a_dataset_of_its_own(tmp_path):
    text = tmp_path / "held_out.txt"
    text.write_text(launching.small_corpus().read_text()[:9000])
    flags = {
        **launching.shallow(2),
        "optimizer.lr": 4e-3,
        "validation.enable": "true",
        "validation.dataset": text,
        "validation.freq": 1,
        "validation.seq_len": 32,
        "validation.local_batch_size": 8,
        "training.steps": 3,
        "metrics.enable_tensorboard": "true",
    }
    run = launching.train(tmp_path / "run", flags)
    assert [line["step"] for line in run.validations] == [1, 2, 3]
    first, _, last = run.validation_losses
    assert last < first - 0.05  # it is measured on the trained weights
    assert 1 < run.validations[0]["validation_bits_per_byte"] < 8
    assert "samples each time" in run.log
    assert "validation_loss" not in json.dumps(run.metrics)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"validation.enable": "true"},
            "has no validation split; name a validation.dataset, or hold",
        ),
        ({"validation.freq": 5}, "would have no effect: nothing is validated"),
        ({**VALIDATE, "validation.dataset": "shakespeare"}, "nothing needs to be held out"),
        ({**VALIDATE, "validation.seq_len": 32}, "have training.seq_len = 64"),
        (
            {"validation.enable": "true", "validation.dataset": "shakespeare", "validation.seq_len": 128},
            "exceeds training.seq_len",
        ),
        ({"validation.fraction": 0.7}, "must be between 0 and 0.5"),
    ],
)
def test_what_cannot_be_validated(tmp_path, flags, message):
    run = launching.train(tmp_path, flags)
    assert run.exit_codes == [2]
    assert message in run.log
