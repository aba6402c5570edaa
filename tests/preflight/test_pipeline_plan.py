"""Pipelines: the stages that a model is cut into, and everything that is refused, in one clear message."""

from pathlib import Path

import pytest

from octavo.config import ConfigError, load
from octavo.preflight import check
from octavo.preflight.pipeline_csv import problem, read
from octavo.preflight.pipeline_plan import SCHEDULES, plan_of, splits_backward

P = "--parallelism.pipeline_parallel_"


def units(layers: int = 6) -> list[tuple[str, ...]]:
    return [("tok_embeddings",), *((f"layers.{i}",) for i in range(layers)), ("norm", "output")]


def job(*flags: str, degree: int = 2, local: int = 8):
    return load(
        [f"{P}degree={degree}", f"--training.local_batch_size={local}", *(f"{P}{flag}" for flag in flags)]
    )


def told(*flags: str, degree: int = 2, local: int = 8, more: tuple[str, ...] = ()) -> str:
    argv = [
        f"{P}degree={degree}",
        f"--training.local_batch_size={local}",
        "--activation_checkpoint.mode=none",
    ]
    try:
        check(load([*argv, *(f"{P}{flag}" for flag in flags), *more]), world_size=degree, gpus=0)
    except ConfigError as error:
        return str(error)
    return ""


def layers_of(plan) -> list[int]:
    return [sum(name.startswith("layers.") for name in stage) for stage in plan.stages]


@pytest.mark.parametrize(
    ("flags", "degree", "layers", "expected"),
    [
        ((), 2, 6, [3, 3]),
        ((), 4, 6, [1, 2, 2, 1]),
        ((), 4, 32, [8, 9, 8, 7]),
        ((), 2, 7, [4, 3]),
        ((), 6, 6, [1] * 6),
        (("first_stage_less_layers=0", "last_stage_less_layers=0"), 4, 8, [2, 2, 2, 2]),
        (("first_stage_less_layers=0", "last_stage_less_layers=3"), 2, 9, [6, 3]),
        (("schedule=Interleaved1F1B",), 2, 8, [2, 3, 2, 1]),
        (("schedule=Interleaved1F1B", "layers_per_stage=2"), 2, 10, [1, 2, 2, 2, 2, 1]),
        (("schedule=Interleaved1F1B", "layers_per_stage=1"), 2, 6, [0, 1, 1, 1, 1, 1, 1, 0]),
        (("schedule=Interleaved1F1B",), 4, 6, [0, 1, 1, 1, 1, 1, 1, 0]),
        (("schedule=InterleavedZeroBubble",), 4, 7, [1, 1, 1, 1, 1, 1, 1, 0]),
        ((), 2, 1, [1, 0]),
        (("last_stage_less_layers=0",), 2, 1, [0, 1]),
        (("split_points=layers.1",), 2, 6, [1, 5]),
        (("split_points=layers.0,layers.4,norm", "schedule=LoopedBFS"), 2, 6, [0, 4, 2, 0]),
    ],
)
def test_layers_of_each_stage(flags, degree, layers, expected):
    plan = plan_of(job(*flags, degree=degree), units(layers))
    assert layers_of(plan) == expected
    assert [name for stage in plan.stages for name in stage] == [n for unit in units(layers) for n in unit]


def test_no_stage_could_be_lighter_without_another_one_being_heavier():
    wanted = job()
    for layers in range(1, 40):
        for degree in range(1, layers + 1):
            wanted.parallelism.pipeline_parallel_degree = degree
            counts = layers_of(plan_of(wanted, units(layers)))
            loads = list(counts)
            loads[0] += 1
            loads[-1] += 1
            movable = [load for load, count in zip(loads, counts, strict=True) if count > 1]
            assert not movable or max(movable) - min(loads) <= 1
            assert min(counts) >= 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("1F1B", (0, 1, 2)),
        ("interleaved1f1b", (0, 1, 2, 0, 1, 2)),
        ("ZBVZeroBubble", (0, 1, 2, 2, 1, 0)),
    ],
)
def test_which_process_has_which_stage(schedule, expected):
    plan = plan_of(job(f"schedule={schedule}", degree=3), units(6))
    assert plan.process_of == expected
    assert plan.stages_of(0) == [i for i, process in enumerate(expected) if process == 0]


WRONG = [
    (
        ("microbatch_size=3",),
        {},
        ["training.local_batch_size = 8", "is not a multiple of", "microbatch_size = 3"],
    ),
    (
        ("schedule=1F2B",),
        {},
        ["schedule = 1F2B", "no such schedule; there are GPipe, 1F1B", "did you mean '1F1B'?"],
    ),
    (("schedule=DualPipeV",), {}, ["no such schedule"]),
    (("microbatch_size=4",), {"degree": 3, "local": 8}, ["1F1B", "3 stages and", "= 2 microbatches"]),
    (
        ("schedule=Interleaved1F1B",),
        {"local": 5},
        ["in 2 rounds", "= 5 do not divide by 2; 4 or 6 would do"],
    ),
    (
        ("schedule=PipelineScheduleMulti",),
        {},
        ["takes its order from a file; add --parallelism.pipeline_parallel_schedule_csv"],
    ),
    (
        ("split_points=layers.2,layers.4",),
        {},
        ["split_points = ", "names 2 cuts, which makes 3 stages", "(2 stages in all, 1 cuts)"],
    ),
    (
        ("schedule=Interleaved1F1B", "split_points=layers.2"),
        {},
        [
            "makes 2 stages",
            "takes 2 or more for each of the 2 processes (4, 8, ... stages in all, 3, ... cuts)",
        ],
    ),
    (
        ("schedule=ZBVZeroBubble", "split_points=layers.1,layers.2,layers.3,layers.4,layers.5"),
        {},
        ["makes 6 stages", "takes 2 for each of the 2 processes (4 stages in all, 3 cuts)"],
    ),
    (("split_points=layers.1", "layers_per_stage=3"), {}, ["layers_per_stage would have no effect"]),
    (
        ("split_points=layers.1", "last_stage_less_layers=3"),
        {},
        ["last_stage_less_layers would have no effect"],
    ),
    (("schedule_csv=nowhere.csv",), {}, ["schedule_csv = nowhere.csv", "No such file or directory"]),
    (("degree=0",), {}, ["at least 1"]),
    (("microbatch_size=0",), {}, ["at least 1"]),
    (("first_stage_less_layers=-1",), {}, ["at least 0"]),
    (
        ("schedule=ZBVZeroBubble",),
        {"more": ("--training.compile",)},
        ["would be computed twice", "--compile.components=loss"],
    ),
    (
        ("schedule=InterleavedZeroBubble",),
        {"more": ("--activation_checkpoint.mode=selective",)},
        ["activation_checkpoint.mode = selective", "only once", "set activation_checkpoint.mode = full"],
    ),
    (
        ("schedule=LoopedBFS",),
        {"more": ("--model.converters=float8", "--float8.recipe_name=tensorwise_previous_step")},
        ["float8.recipe_name = tensorwise_previous_step", "several stages (LoopedBFS)"],
    ),
]


@pytest.mark.parametrize(("flags", "where", "parts"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_what_is_wrong_whatever_the_model_is(flags, where, parts):
    message = told(*flags, **where)
    assert all(part in message for part in parts), message
    assert message.count("\n") == 0


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "Interleaved1F1B"])
def test_weights_freed_between_the_two_halves_of_a_backward(schedule):
    flags = [f"{P}degree=2", f"{P}schedule={schedule}", "--parallelism.fsdp_reshard_after_forward=always"]
    job = load(flags)
    if schedule == "Interleaved1F1B":
        check(job, world_size=4)
        return
    with pytest.raises(ConfigError, match=r"fsdp_reshard_after_forward = always .* lose gradients"):
        check(job, world_size=4)


@pytest.mark.parametrize("schedule", [name for name, s in SCHEDULES.items() if not s.csv])
def test_each_schedule_is_accepted_in_any_case(schedule):
    assert told(f"schedule={schedule.lower()}") == ""
    assert told(f"schedule={schedule}", more=("--training.compile", "--compile.components=loss")) == ""


@pytest.mark.parametrize(
    "key",
    [
        "schedule=GPipe",
        "schedule_csv=a.csv",
        "microbatch_size=2",
        "split_points=layers.2",
        "layers_per_stage=3",
    ],
)
def test_keys_of_a_pipeline_that_is_not_there(key):
    with pytest.raises(
        ConfigError, match=f"{key.partition('=')[0]} would have no effect: there is no pipeline"
    ):
        check(load([f"{P}{key}"]), world_size=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("split_points=layers.9",),
            "'layers.9' is no part of this model, which has layers.0 to layers.5, then norm",
        ),
        (("split_points=layer.3",), "did you mean 'layers.3'?"),
        (("split_points=tok_embeddings",), "is no part"),
        (
            ("split_points=layers.4,layers.1,layers.2", "schedule=LoopedBFS"),
            "out of order; the model's order is layers.1,layers.2,layers.4",
        ),
        (
            ("layers_per_stage=2",),
            "6 layers + 1 for the embedding + 1 for the head, by 2, rounded up, makes 4 stages",
        ),
    ],
)
def test_stages_that_this_model_has_not(flags, message):
    with pytest.raises(ConfigError) as error:
        plan_of(job(*flags), units())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "degree", "layers", "message"),
    [
        ((), 4, 5, "degree = 4 .* makes 4 x 2 = 8 stages, .* this model has 5; lower it"),
        (
            ("first_stage_less_layers=0", "last_stage_less_layers=0"),  # the ends count for nothing
            4,
            7,
            "degree = 4 .* makes 4 x 2 = 8 stages, .* this model has 7; lower it",
        ),
        (
            ("layers_per_stage=1", "first_stage_less_layers=2", "last_stage_less_layers=2"),
            2,
            6,
            "layers_per_stage = 1 .* makes 2 x 5 = 10 stages, .* this model has 6; raise it",
        ),
    ],
)
def test_more_stages_than_layers_and_ends(flags, degree, layers, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(job("schedule=Interleaved1F1B", *flags, degree=degree), units(layers))


SOUND = "0F0,0F1,,0B0,0B1\n,1F0,1B0,1F1,1B1\n"
BAD = [
    (SOUND + "2F0\n", "has 3 rows, and there are 2 processes"),
    ("0F0,0F1,0B0\n1F0,1B0,1F1,1B1\n", "does F with microbatch 1 in stage 0"),
    ("0F0,0F1,0B0,0B1\n1F0,1B0,1B1,1F1\n", "does B, F with microbatch 1 in stage 1"),
    ("0F0,0F1,0B0,0B1\n1F0,1I0,1F1,1B1\n", "does F, I with microbatch 0 in stage 1"),
    ("0F0,0F1,0B0,0B1\n2F0,2B0,2F1,2B1\n", "numbered from 0 without a gap"),
    ("0F0,1F0,0B0,1B0\n0F1,0B1,1F1,1B1\n", "has stage 0 in rows 1, 2"),
    ("0F0,1F0,1B0,0B0,0F1,1F1,1B1,0B1\n\n", "has nothing to do in row 2"),
    (
        SOUND.replace("0F1", "0F7"),
        "has a microbatch 7, and local_batch_size / pipeline_parallel_microbatch_size = 2",
    ),
    ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", "out of order"),
    ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "deadlocks: 0B0 in row 1 and 1F1 in row 2 wait for each other"),
]


@pytest.mark.parametrize(("text", "wrong"), BAD)
def test_a_file_that_is_no_schedule(text, wrong, tmp_path: Path):
    path = tmp_path / "schedule.csv"
    path.write_text(text)
    message = told(f"schedule_csv={path}", local=2)
    assert wrong in message
    assert message.startswith("parallelism.pipeline_parallel_schedule_csv")


@pytest.mark.parametrize("cell", ["0f0", "0SEND_F0", "F0", "0F", "-1F0", "0F0;"])
def test_a_cell_that_is_no_action(cell, tmp_path: Path):
    path = tmp_path / "schedule.csv"
    path.write_text(SOUND.replace("1F1", cell))
    assert f"row 2: '{cell}' is no action" in told(f"schedule_csv={path}", local=2)


def test_a_file_that_is_a_schedule(tmp_path: Path):
    path = tmp_path / "schedule.csv"
    path.write_text(SOUND)
    assert problem(read(path), 2, 2) is None
    assert told(f"schedule_csv={path}", local=2) == ""
    assert told(f"schedule_csv={path}", "schedule=PipelineScheduleSingle", local=2) == ""
    assert "are two schedules" in told(f"schedule_csv={path}", "schedule=GPipe", local=2)
    assert "layers_per_stage would have no effect" in told(
        f"schedule_csv={path}", "layers_per_stage=4", local=2
    )
    wanted = job(f"schedule_csv={path}", local=2)
    assert plan_of(wanted, units()).process_of == (0, 1)
    assert not splits_backward(wanted.parallelism)


def test_a_file_that_places_its_stages_itself(tmp_path: Path):
    path = tmp_path / "schedule.csv"
    path.write_text("0F0,3F0,3I0,0I0,3W0,0W0\n1F0,2F0,2B0,1B0\n")
    wanted = job(f"schedule_csv={path}", "schedule=PipelineScheduleMulti", local=1)
    plan = plan_of(wanted, units())
    assert plan.process_of == (0, 1, 1, 0)
    assert plan.microbatches == 1
    assert splits_backward(wanted.parallelism)
    assert "would be computed twice" in told(f"schedule_csv={path}", local=1, more=("--training.compile",))
    assert "which makes 2 stages, and parallelism.pipeline_parallel_schedule_csv has 4" in told(
        f"schedule_csv={path}", "split_points=layers.1", local=1
    )
