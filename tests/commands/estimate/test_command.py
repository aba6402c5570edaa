"""`octavo estimate` as a command: what it tells, and its mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from octavo import config
from octavo.cli import main
from octavo.commands.estimate import estimate_report
from octavo.commands.estimate import main as estimate
from octavo.commands.estimate.operations import Message
from octavo.commands.estimate.peak_memory import peak_memory
from octavo.commands.estimate.rank_trace import trace_ranks
from octavo.commands.estimate.weak_scaling import choose
from octavo.config.parallel_dims import ParallelDims
from octavo.preflight.pipeline_plan import PipelinePlan
from octavo.roofline import GPUS

SMALL = ["--training.seq_len=64", "--training.local_batch_size=2", "--activation_checkpoint.mode=none"]
FLOAT32 = "--training.mixed_precision_param=float32"  # where nothing is said of a GPU


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--ngpu", "0"], "--ngpu: expected a whole number from 1 to 999999, got '0'"),
        (["--ngpu", "-8"], "--ngpu: expected a whole number from 1 to 999999, got '-8'"),
        (["--ngpu", "many"], "got 'many'"),
        ([], "--ngpu is missing"),
        (["--ngpu", "8", "--device", "h1000"], "no GPU is called 'h1000'"),
        (["--ngpu", "8", "--config-file", "nowhere.toml"], "nowhere.toml"),
        (["--ngpu", "8", "--parallelism.tensor_parallel_degree", "3"], "does not divide 8 processes"),
        (["--ngpu", "8", "--parallelism.tensor_paralel_degree", "2"], "tensor_parallel_degree"),
        (["--ngpu", "8", "--json=yes"], "--json takes no value"),
        (["--weak-scaling", "--ngpu", "8"], "--ngpu has no effect with --weak-scaling"),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_2(argv, told, capsys):
    assert main(["estimate", *argv]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.fixture
def run(capsys):
    def command(*argv):
        code = estimate.main([*SMALL, *argv])
        return code, capsys.readouterr().out

    return command


def test_a_job_on_eight_gpus_as_json(run):
    code, text = run("--ngpu", "8", "--json", "--model.converters=float8", "--float8.recipe_name=rowwise")
    found = json.loads(text)
    assert code == 0
    assert found["fits"] is True
    assert sum(found["memory_bytes"].values()) == found["peak_bytes"]
    assert found["parameters_per_rank"] * 8 == pytest.approx(found["parameters"], rel=0.001)
    kinds = {(m["kind"], m["axis"]) for m in found["sent_bytes_per_step"]}
    assert {("all-gather", "shard"), ("reduce-scatter", "shard")} <= kinds
    assert 0 < found["mfu"] < 1
    assert sum(found["step_seconds_by"].values()) == pytest.approx(found["step_seconds"])


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param(2, marks=pytest.mark.slow),
        3,  # shards of different sizes
    ],
)
def test_float8_gathers_send_one_byte_a_weight(run, processes):
    """What `tests/distributed/test_traffic.py` counts on two processes that exist."""
    layers = 6 * (4 * 256 * 256 + 3 * 256 * 768)
    last = 256 + 2048 * 256  # norm and output, which backward begins with
    rest = 2048 * 256 + 12 * 256 + last
    gathered = {}
    for gather in (False, True):
        flags = ["--model.converters=float8", "--float8.filter_fqns=output"]
        flags.append(f"--float8.enable_fsdp_float8_all_gather={gather}")
        _, text = run("--ngpu", str(processes), "--json", *flags)
        messages = json.loads(text)["sent_bytes_per_step"]
        gathered[gather] = sum(m["bytes"] for m in messages if m["kind"] == "all-gather")
    share = (processes - 1) / processes
    wanted = {
        False: 2 * (2 * (layers + rest) - last) * share,
        True: (1 * 2 * layers + 2 * (2 * rest - last)) * share,
    }
    padding = 1.01 if processes == 3 else 1
    for gather, bytes_ in gathered.items():
        assert wanted[gather] <= bytes_ <= wanted[gather] * padding + 1


def test_what_does_not_fit_is_exit_code_1(run):
    code, text = run(
        "--ngpu", "1", "--device", "rtx4090", "--model.flavor", "8B", "--model.hf_assets_path", "x"
    )
    assert code == 1
    assert "DOES NOT FIT into 24 GB" in text


def test_stages_of_a_pipeline_are_traced_apart_and_the_fullest_is_told(run):
    code, text = run("--ngpu", "4", "--json", "--parallelism.pipeline_parallel_degree=2")
    found = json.loads(text)
    assert code == 0
    assert found["layout"]["pipeline_parallel_degree"] == 2
    assert found["rank"] in (0, 2)
    assert found["step_seconds_by"]["bubble"] > 0
    sent = {(m["kind"], m["axis"]): m["bytes"] for m in found["sent_bytes_per_step"]}
    assert ("all-reduce", "pipeline") in sent
    # 2 sequences of 64 positions, 256 wide, in bfloat16, to the one other stage
    assert sent["send", "pipeline"] == 2 * 64 * 256 * 2


def test_the_peak_of_uneven_stages_is_the_highest_of_all_processes():
    cuts = "--parallelism.pipeline_parallel_split_points=layers.1,layers.2,layers.5"
    pipeline = ["--training.local_batch_size=4", "--parallelism.pipeline_parallel_degree=4", cuts]
    flags = [*SMALL, FLOAT32, *pipeline]
    job = config.load(flags)
    told = estimate_report.estimate(job, 4, None)
    peaks = [peak_memory(trial.log).peak for trial in trace_ranks(job, 4, range(4))]
    assert told.memory.peak == max(peaks) == peaks[told.rank]
    assert told.rank == 2  # three layers; the second, which was told before, has one


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([2, 2, 2, 2, 2], [0, 1, 4]),
        ([1, 2, 2, 2, 1], [0, 1, 4]),
        ([2, 1, 2, 1, 2], [0, 1, 2, 4]),
        ([2, 2], [0, 1]),
    ],
)
def test_places_that_can_be_the_worst_are_traced(stages, expected):
    names = [tuple(f"layers.{10 * stage + n}" for n in range(many)) for stage, many in enumerate(stages)]
    names[0], names[-1] = ("tok_embeddings", *names[0]), (*names[-1], "norm", "output")
    one = PipelinePlan("1F1B", tuple(names), tuple(range(len(names))), 8)
    everyone = list(range(len(names)))
    assert estimate_report.pipeline_ranks_to_trace(one, alike=True) == expected
    assert estimate_report.pipeline_ranks_to_trace(one, alike=False) == everyone
    assert estimate_report.pipeline_ranks_to_trace(replace(one, csv=Path("x.csv")), alike=True) == everyone


@pytest.mark.parametrize(("second", "expected"), [(1, [0, 1, 3]), (2, [0, 1, 2, 3])])
def test_places_of_several_stages_that_differ_are_all_traced(second, expected):
    sizes = [1, 1, 1, 1, 1, 1, second, 1]
    names = tuple(tuple(f"layers.{10 * stage + n}" for n in range(many)) for stage, many in enumerate(sizes))
    plan = PipelinePlan("Interleaved1F1B", names, (0, 1, 2, 3) * 2, 8)
    assert estimate_report.pipeline_ranks_to_trace(plan, alike=True) == expected


def test_bytes_sent_by_a_ring():
    assert Message("all-gather", "shard", 8).bytes_sent(800.0) == 700.0
    assert Message("all-reduce", "shard", 8).bytes_sent(800.0) == 1400.0
    assert Message("send", "pipeline", 2).bytes_sent(800.0) == 800.0


def test_the_layout_that_is_recommended_fits_and_uses_all_gpus():
    for model, gpus in (("8B", 8), ("70B", 512)):
        choice = choose(model, gpus, GPUS["h100"], "rowwise")
        assert choice is not None
        assert choice.peak_bytes < 80e9
        layout: ParallelDims = choice.layout
        assert layout.pipeline * layout.data * layout.context * layout.tensor == gpus
        plain = choose(model, gpus, GPUS["h100"], None)
        assert plain is not None
        assert choice.tokens_per_second > plain.tokens_per_second
    assert choose("405B", 8, GPUS["h100"], None) is None
