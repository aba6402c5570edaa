"""A model told from two short traces, or a few microbatches, equals one that is traced whole."""

from dataclasses import replace
from pathlib import Path

import pytest

from octavo import config
from octavo.commands.estimate.forked_workers import TraceFailed, run_forked
from octavo.commands.estimate.layer_extrapolation import layers_to_skip
from octavo.commands.estimate.microbatch_extrapolation import (
    ManyMicrobatchesLog,
    ShortSchedule,
    short_schedule,
)
from octavo.commands.estimate.peak_memory import peak_memory
from octavo.commands.estimate.rank_trace import trace_rank
from octavo.preflight.pipeline_plan import PipelinePlan
from octavo.roofline import GPUS
from tests.models.small_llama import FLAVORS

SMALL = ["--training.seq_len=64", "--training.local_batch_size=2"]
ROWWISE = ["--model.converters=float8", "--float8.recipe_name=rowwise"]
CASES = {
    "FSDP, rowwise, full checkpointing": (8, [*ROWWISE, "--activation_checkpoint.mode=full"]),
    "pipeline": (
        2,
        ["--parallelism.pipeline_parallel_degree=2", "--activation_checkpoint.mode=none"],
    ),
    "one process, no checkpointing": (1, ["--activation_checkpoint.mode=none"]),
    "FSDP, selective checkpointing": (8, ["--activation_checkpoint.mode=selective"]),
    "FSDP, accumulation": (2, ["--activation_checkpoint.mode=none", "--training.global_batch_size=12"]),
    "FSDP, float8 gathers, accumulation": (
        4,
        [
            "--activation_checkpoint.mode=none",
            "--training.global_batch_size=16",
            "--model.converters=float8",
            "--float8.enable_fsdp_float8_all_gather",
            "--float8.precompute_float8_dynamic_scale_for_fsdp",
        ],
    ),
    "FSDP and tensor parallel, tensorwise": (
        4,
        [
            "--activation_checkpoint.mode=none",
            "--parallelism.tensor_parallel_degree=2",
            "--model.converters=float8",
        ],
    ),
}
OFTEN = ("FSDP, rowwise, full checkpointing",)


@pytest.fixture
def many_layers(monkeypatch):
    def give(number):
        few = replace(FLAVORS["debugmodel"], n_layers=number, dim=64, hidden_dim=192, n_heads=8, n_kv_heads=8)
        monkeypatch.setitem(FLAVORS, "debugmodel", few)

    return give


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_few_layers_tell_the_same_as_all(many_layers, name):
    processes, flags = CASES[name]
    many_layers(20 if name == "pipeline" else 10)
    job = config.load([*SMALL, *flags])
    calls = [{"gpu": GPUS["h100"], "whole": whole} for whole in (False, True)]
    few, whole = run_forked(trace_rank, (job, processes), calls)

    assert type(few.log) is not type(whole.log)
    assert peak_memory(few.log) == peak_memory(whole.log)
    assert few.parameters == whole.parameters
    for ours, theirs in ((few.microbatch, whole.microbatch), (few.rest, whole.rest)):
        assert vars(ours) == vars(theirs)


PP = "--parallelism.pipeline_parallel_degree"
PIPELINES = {  # processes, ranks, flags; warmup and steady state of each schedule differ
    "1F1B": (4, (0, 1, 3), [f"{PP}=4", "--training.local_batch_size=8"]),
    "1F1B, as many microbatches as stages": (
        6,
        (0, 2),
        [f"{PP}=6", "--training.local_batch_size=6", "--activation_checkpoint.mode=full"],
    ),
    "1F1B, one more": (6, (0,), [f"{PP}=6", "--training.local_batch_size=7"]),
    "GPipe, FSDP that reshards": (
        4,
        (0, 2),
        [
            f"{PP}=2",
            "--training.local_batch_size=7",
            "--parallelism.pipeline_parallel_schedule=GPipe",
            "--parallelism.fsdp_reshard_after_forward=always",
        ],
    ),
    "FSDP, accumulation, rowwise": (
        8,
        (0, 6),
        [f"{PP}=4", "--training.local_batch_size=8", "--training.global_batch_size=32", *ROWWISE],
    ),
}


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        pytest.param(name, rank, marks=[] if (name, rank) == ("1F1B", 3) else pytest.mark.slow)
        for name, (_, ranks, _) in PIPELINES.items()
        for rank in ranks
    ],
)
def test_a_few_of_a_pipelines_microbatches_tell_the_same_as_all(many_layers, name, rank):
    processes, _, flags = PIPELINES[name]
    many_layers(6)
    job = config.load(["--training.seq_len=64", "--activation_checkpoint.mode=none", *flags])
    calls = [{"rank": rank, "gpu": GPUS["h100"], "whole": whole} for whole in (False, True)]
    few, whole = run_forked(trace_rank, (job, processes), calls)

    assert isinstance(few.log, ManyMicrobatchesLog)
    for offload in (False, True):
        assert peak_memory(few.log, offload=offload) == peak_memory(whole.log, offload=offload)
    # When the last microbatch is done, only the losses, 4 bytes each, are told for longer than they are kept.
    ours, theirs = ([sum(held.values()) for _, held in log.peaks()] for log in (few.log, whole.log))
    assert ours[-2] - theirs[-2] in (0, 4 * few.log.short.skipped)
    assert vars(few.microbatch) == vars(whole.microbatch)
    assert vars(few.rest) == vars(whole.rest)


@pytest.mark.parametrize(
    ("schedule", "stages", "count", "expected"),
    [
        ("1F1B", 4, 8, [(3, 1, 1, 3), (3, 1, 0, 4), (2, 2, 0, 4), (1, 2, 0, 5)]),
        ("1F1B", 4, 4, [None, None, None, (1, 2, 0, 1)]),
        ("GPipe", 2, 9, [(4, 0, 5, 0), (4, 0, 5, 0)]),
        ("LoopedBFS", 2, 9, [None, None]),
    ],
)
def test_what_is_traced_and_left_out_of_a_schedule(schedule, stages, count, expected):
    plan = PipelinePlan(schedule, (("layers.0",),) * stages, tuple(range(stages)), count)
    for place, numbers in enumerate(expected):
        few = short_schedule(plan, place)
        assert few == (None if numbers is None else ShortSchedule(*numbers))
        assert few is None or few.traced + few.skipped == count
    assert short_schedule(replace(plan, csv=Path("x.csv")), 0) is None


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.converters=float8", "--float8.filter_fqns=layers.3"],
        ["--model.converters=float8", "--float8.layer_recipes=layers.3.*=rowwise"],
        ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"],
    ],
)
def test_layers_that_differ_are_all_traced(many_layers, flags):
    many_layers(30)
    args = FLAVORS["debugmodel"]
    assert layers_to_skip(config.load(SMALL), args, None) == 26
    assert layers_to_skip(config.load([*SMALL, *flags]), args, None) == 0


def _answer(what):
    if what == "raise":
        raise config.ConfigError("a mistake")
    if what == "die":
        import os

        os._exit(5)
    if what == "hang":
        import time

        time.sleep(60)
    return what


def test_calls_apart_answer_in_order_and_tell_what_went_wrong():
    assert run_forked(_answer, (), [{"what": n} for n in range(3)]) == [0, 1, 2]
    with pytest.raises(config.ConfigError, match="a mistake"):
        run_forked(_answer, (), [{"what": "raise"}])
    with pytest.raises(TraceFailed, match="exit code 5"):
        run_forked(_answer, (), [{"what": 1}, {"what": "die"}])
    with pytest.raises(TraceFailed, match="within 0 s"):
        run_forked(_answer, (), [{"what": "hang"}], limit=0.2)
