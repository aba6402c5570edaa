"""What a resumed job has changed: told in one sentence each, or refused where it makes another run."""

import pytest

from octavo.config import JobConfig
from octavo.config.parallel_dims import ParallelDims
from octavo.config.schema import OPTIONS
from octavo.optim.lr_schedule import schedule_of
from octavo.train.changed_job import EFFECTS, JobIdentity, changes, other_run
from tests.helpers import launching

TEXT = {"tokens": 1_329_951, "crc32": 1, "seq_len": 64, "seed": 42}


def identity(flags=(), *, data=(), world=1, tokenizer="a", precision="float32"):
    job = JobConfig()
    for key, value in dict(flags).items():
        section, _, name = key.partition(".")
        setattr(getattr(job, section), name, value)
    schedule = schedule_of(job.optimizer, job.lr_scheduler, job.training.steps)
    layout = ParallelDims(shard=world)
    text = dict(data) if "files" in data else {**TEXT, **dict(data)}
    return JobIdentity(job, layout, text, tokenizer, precision, schedule)


def state(of):
    """What a checkpoint of it says."""
    return {
        "config": of.job.to_dict(),
        "layout": of.layout.degrees,
        "data": {"identity": dict(of.data)},
        **of.facts(),
    }


FLOAT8 = {"model.converters": ["float8"]}


@pytest.mark.parametrize(
    ("was", "now", "sentence"),
    [
        ({}, {"optimizer.lr": 1e-4}, "optimizer.lr was 0.0008, is 0.0001: later steps take the new"),
        ({}, FLOAT8, "the recipe (float8.recipe_name) was high precision, is tensorwise: matrix products"),
        (
            FLOAT8,
            {**FLOAT8, "float8.recipe_name": "rowwise"},
            "the recipe (float8.recipe_name) was tensorwise, is rowwise: matrix products round",
        ),
        (
            FLOAT8,
            {**FLOAT8, "float8.filter_fqns": ["output"]},
            "float8.filter_fqns was nothing, is output: float8 layers round differently",
        ),
        ({}, {"training.steps": 7}, "the length of the schedule (training.steps) was 10000, is 7: the lear"),
        (
            {},
            {"training.global_batch_size": 16},
            "the global batch size (training.global_batch_size) was 8, is 16: a step averages over another",
        ),
    ],
)
def test_a_changed_option_is_one_sentence(was, now, sentence):
    found = [str(change) for change in changes(state(identity(was)), identity(now))]
    assert len(found) == 1, found
    assert found[0].startswith(sentence)
    assert other_run(state(identity(was)), identity(now)) == []


def test_changes_that_come_from_the_machine_are_told():
    before = state(identity())
    (batch,) = changes(before, identity(world=2))
    assert (batch.was, batch.now) == (8, 16)
    (dtype,) = changes(before, identity(precision="bfloat16"))
    assert str(dtype).startswith("high precision was float32, is bfloat16")
    (order,) = changes(before, identity(data={"seed": 7}))
    assert "the order of the data (training.data_seed) was 42, is 7" in str(order)


def test_what_changes_no_loss_is_not_told():
    now = {"activation_checkpoint.mode": "full", "metrics.log_freq": 1, "checkpoint.interval": 7}
    assert list(changes(state(identity()), identity({**now, "compile.enable": True}))) == []
    assert list(changes({"config": {}, "schedule": {}}, identity())) == []  # an older checkpoint


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        ({"flags": {"model.flavor": "8B"}}, "model.flavor was debugmodel, is 8B: "),
        ({"flags": {"model.args": ["n_layers=2"]}}, "model.args was nothing, is n_layers=2: "),
        ({"tokenizer": "b", "data": {"crc32": 2}}, "model.hf_assets_path was octavo_bpe_2048, is octavo_bpe"),
        (
            {"flags": {"training.dataset": "b"}, "data": {"crc32": 2}},
            "training.dataset was shakespeare, is b: training continues at the same position of the new",
        ),
        ({"data": {"tokens": 1_667_809}}, "the text of training.dataset was 1,329,951 tokens, is 1,667,809"),
        ({"data": {"crc32": 2}}, "the text of training.dataset was another, is of the same size"),
    ],
)
def test_another_run_is_recognised(now, sentence):
    (change,) = other_run(state(identity()), identity(now.pop("flags", ()), **now))
    assert str(change).startswith(sentence)


def test_a_streamed_text_is_recognised_by_its_name():
    streamed = {"files": 3, "seq_len": 64, "seed": 42}
    before = state(identity({"training.dataset": "here/a"}, data=streamed))
    assert other_run(before, identity({"training.dataset": "./here/a"}, data=streamed)) == []
    assert len(other_run(before, identity({"training.dataset": "here/b"}, data=streamed))) == 1


def test_every_effect_is_of_an_option_that_changes_the_loss():
    assert [key for key in EFFECTS if not OPTIONS[key].changes_loss] == []


def test_a_run_on_another_text_is_refused_or_told(tmp_path):
    flags = {**launching.shallow(2), "checkpoint.enable": True, "training.steps": 2}
    launching.train(tmp_path, flags)
    text = tmp_path / "other.txt"
    text.write_text(launching.small_corpus().read_text()[:9000])
    other = {**flags, "training.steps": 3, "training.dataset": text, "training.max_norm": 0.5}
    refused = launching.train(tmp_path, other)
    assert refused.exit_codes == [2]
    assert f"is of another run: training.dataset was {launching.small_corpus()}, is {text}" in refused.log
    assert "add --checkpoint.allow_changed" in refused.log
    assert "Traceback" not in refused.log
    told = launching.train(tmp_path, {**other, "checkpoint.allow_changed": True})
    assert told.exit_codes == [0]
    assert "WARNING - Changed since the checkpoint: training.dataset was" in told.log
    assert "WARNING - Changed since the checkpoint: training.max_norm was 1.0, is 0.5" in told.log
    assert [line["step"] for line in told.metrics] == [1, 2, 3]
