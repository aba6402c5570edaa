"""Every layout computes what one process does: same weights, same batches, same losses and gradient norms."""

import hashlib
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.tensor import DTensor

from octavo import config
from octavo.checkpoint.checkpointer import Checkpointer
from octavo.distributed import mesh
from octavo.models.init import plain_name
from octavo.train.signals import Signals
from octavo.train.trainer import Trainer
from octavo.train.watchdog import Watchdog
from tests.helpers import launching, ranks
from tests.helpers.layouts import (
    ALL,
    BASE,
    DEGREES,
    PRECISIONS,
    SCHEDULE,
    Case,
    Precision,
    in_every_way,
    measure,
)

TENSOR, CONTEXT, REPLICATE, PIPELINE = (DEGREES[a] for a in ("tensor", "context", "replicate", "pipeline"))

# One case of each layout, with few layers. `./run_tests.sh --all` runs the others with the debug model's six,
# and `python -m tests.helpers.layout_table` all of them.
CHOSEN = {
    "DDP 2": "bfloat16",
    "FSDP 2": "tensorwise",
    "HSDP 2 x 2": "rowwise",
    "TP 2": "float32",
    "CP 2": "rowwise",
    "CP 2, ring": "float32",
    "CP 4, ring": "rowwise",
    "PP 2": "tensorwise",
    "FSDP 2, TP 2": "tensorwise",
    "FSDP 2, PP 2": "rowwise",
    "FSDP 2, CP 2": "float32",
    "HSDP 2 x 1, TP 2": "rowwise",
    "TP 2, CP 2": "float32",
    "TP 2, PP 2": "rowwise",
    "CP 2, PP 2": "float32",
    "HSDP 2 x 2, TP 2": "rowwise",
    "FSDP 2, TP 2, PP 2": "tensorwise",
    "FSDP 2, TP 2, CP 2": "float32",
    "FSDP 2, PP 2, GPipe": "float32",
    "FSDP 2, PP 2, LoopedBFS": "float32",
    "FSDP 2, PP 2, Interleaved1F1B": "rowwise",
    "FSDP 2, PP 2, InterleavedZeroBubble": "tensorwise",
    "FSDP 2, PP 2, ZBVZeroBubble": "float32",
}
QUICK = [case for case in ALL if not case.compiled and CHOSEN[case.layout] == case.precision.name]
# Each has fewer axes than another of the chosen ones, split in the same way.
WITHIN_OTHERS = ("TP 2, CP 2", "TP 2, PP 2", "FSDP 2, CP 2", "HSDP 2 x 1, TP 2")
DOCUMENTS = {"training.document_mask": True, "training.dataset": launching.many_documents()}
CHUNKS = {"training.loss_chunk_tokens": 48}
QWEN3 = {"model.name": "shallow_qwen3"}
EXPERTS = {"model.name": "shallow_qwen3_moe"}
VARIANTS = [
    Case("TP 2, whole logits", 2, {"tensor": 2}, flags={"parallelism.disable_loss_parallel": True}),
    Case("DDP 2, one reduction a step", 2, {"replicate": 2}),
    Case("TP 2, float8 whole", 2, {"tensor": 2}, Precision("all", {"model.converters": "float8"}, 1e-2)),
    Case("CP 2, documents", 2, {"context": 2}, both=DOCUMENTS),
    Case("DDP 2, documents, chunked", 2, {"replicate": 2}, flags=CHUNKS, both=DOCUMENTS),
    Case(
        "PP 2, documents, recomputed",
        2,
        {"pipeline": 2},
        flags={SCHEDULE: "ZBVZeroBubble", "activation_checkpoint.mode": "full"},
        both=DOCUMENTS,
    ),
    Case(
        "FSDP 2, PP 2, resharded",
        4,
        {"pipeline": 2},
        PRECISIONS["tensorwise"],
        flags={SCHEDULE: "Interleaved1F1B", "parallelism.fsdp_reshard_after_forward": "always"},
    ),
    Case("Qwen3, FSDP 2, TP 2", 4, {"tensor": 2}, PRECISIONS["rowwise"], both=QWEN3),
    Case("experts, FSDP 2, TP 2", 4, {"tensor": 2}, both=EXPERTS),
    Case("DeepSeek, FSDP 2, PP 2", 4, {"pipeline": 2}, both={"model.name": "shallow_deepseek_v3"}),
    Case("experts, HSDP 2 x 1, PP 2", 4, {"replicate": 2, "pipeline": 2}, both=EXPERTS),
    Case("Qwen3, CP 2, PP 2", 4, {"context": 2, "pipeline": 2}, both=QWEN3),
]
_alone: dict[str, launching.Run] = {}


@pytest.fixture
def alone(tmp_path_factory):
    """Runs of one process, each made once."""

    def run(case: Case) -> launching.Run:
        key = str(case.alone)
        if key not in _alone:
            _alone[key] = launching.train(tmp_path_factory.mktemp("alone"), case.alone)
        return _alone[key]

    return run


def quick(case: Case) -> Case:
    """`case` with as few layers as its stages need, for two steps and what is validated after them."""
    layers = 4 if "pipeline" in case.degrees else 2
    fewer = {"training.steps": 2, "validation.freq": 2, "validation.fraction": 0.01}
    return replace(case, both={**launching.shallow(layers), **fewer, **case.both})


def check(case: Case, alone, folder: Path) -> None:
    found = measure(case, alone, folder)
    assert found.loss <= case.precision.limit
    assert found.grad_norm <= case.precision.limit
    assert found.validation <= case.precision.limit


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case.layout in WITHIN_OTHERS else case
        for case in (*QUICK, *VARIANTS)
    ],
    ids=lambda case: case.name,
)
def test_layout_equals_one_process(case, alone, tmp_path):
    check(quick(case), alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if case not in QUICK], ids=lambda case: case.name)
def test_layout_equals_one_process_in_every_way(case, alone, tmp_path):
    check(case, alone, tmp_path)


def test_every_layout_is_run():
    assert {case.layout for case in QUICK} == {case.layout for case in ALL} == CHOSEN.keys()
    assert len(QUICK) == len(CHOSEN)
    assert len(ALL) == len({case.name for case in ALL}) == 21 * 8 + 2 * 4
    assert len(in_every_way(ALL[0])) == 8


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loaded(argv, port, rank, world, again=None):
    """Hashes of all parameters and optimizer states that this rank has after loading the checkpoint, which it
    then saves into the folder `again`.
    """
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    warnings.simplefilter("ignore")
    job = config.load(argv)
    with Signals() as signals, Watchdog() as watchdog:
        trainer = Trainer(job, signals, watchdog)
        step, tokens_seen = trainer.checkpoints.resume()
    found = {"step": step}
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        for kind, tensor in {"weight": parameter.detach(), **state}.items():
            found[f"{plain_name(name)} {kind}"] = hashlib.sha256(
                _whole(tensor).contiguous().numpy().tobytes()
            ).hexdigest()
    if again is not None:
        state = trainer.checkpoints.state_dict(tokens_seen)
        Checkpointer(job.checkpoint, again, trainer.model, trainer.optimizer).save(step, 0, state)
    mesh.finish()
    return found


def everywhere(world, flags, again=None):
    """The state that `world` processes have after loading; shared entries must be equal on all of them."""
    port = ranks.free_port()
    argv = [f"--{key}={value}" for key, value in flags.items()]
    results = ranks.fork([(loaded, (argv, port, rank, world, again)) for rank in range(world)])
    found = {}
    for one in results:
        assert all(found.get(key, value) == value for key, value in one.items())
        found |= one
    return found


SAVED = {key: value for key, value in BASE.items() if not key.startswith("validation.")}
SAVED |= {"checkpoint.enable": True, "training.steps": 2, **launching.shallow(4)}
ZBV = {PIPELINE: 2, SCHEDULE: "ZBVZeroBubble", "training.local_batch_size": 4}
SINGLE = {PIPELINE: 2, "training.local_batch_size": 4}
LOOPED = {**SINGLE, SCHEDULE: "Interleaved1F1B"}


def test_a_checkpoint_goes_from_layout_to_layout_bit_for_bit(tmp_path):
    """What FSDP 2 x TP 2 saves loads everywhere; FSDP 3 and two kinds of pipelines save what they loaded."""
    assert launching.train(tmp_path / "trained", {**SAVED, TENSOR: 2}, world=4).exit_codes == [0] * 4
    journeys = [  # from which folder, into how many processes, in which layout, saved again where
        ("trained", 1, {}, None),
        ("trained", 3, {"training.global_batch_size": 6}, "sharded"),
        ("trained", 4, {TENSOR: 2, CONTEXT: 2}, None),
        ("trained", 4, {REPLICATE: 2, TENSOR: 2}, None),
        ("trained", 2, ZBV, "v"),
        ("v", 2, {}, None),
        ("v", 4, LOOPED, None),
        ("sharded", 4, SINGLE | {TENSOR: 2}, "pipeline"),
        ("pipeline", 1, {}, None),
    ]
    found = []
    for start, world, degrees, again in journeys:
        folder = {"job.dump_folder": tmp_path / start, "training.dataset": launching.small_corpus()}
        flags = {**launching.TINY, **SAVED, **folder, **degrees}
        found.append(everywhere(world, flags, again and tmp_path / again / "checkpoint"))
    assert len(found[0]) > 100
    assert found[0]["step"] == 2
    assert all(other == found[0] for other in found)


def test_sizes_that_do_not_divide_are_one_error(tmp_path):
    flags = {TENSOR: 3, "training.seq_len": 63}
    run = launching.train(tmp_path, flags, world=3)
    assert run.exit_codes == [2, 2, 2]
    assert "parallelism.tensor_parallel_degree = 3: the model has 16 heads" in run.log
    assert "Traceback" not in run.log


@pytest.mark.slow
def test_three_replicas_resume_bit_for_bit(tmp_path):
    """From three on the order of a sum shows: buckets must not be sorted anew after the first step."""
    saves = {"checkpoint.enable": True, "checkpoint.interval": 2, "training.steps": 4}
    flags = {**BASE, **saves, REPLICATE: 3, "training.global_batch_size": 12}
    whole = launching.train(tmp_path / "whole", flags, world=3)
    step = tmp_path / "resumed" / "checkpoint" / "step-2"
    shutil.copytree(tmp_path / "whole" / "checkpoint" / "step-2", step)
    resumed = launching.train(tmp_path / "resumed", flags, world=3)
    assert [line["step"] for line in resumed.metrics] == [3, 4]
    assert resumed.losses == whole.losses[2:]
