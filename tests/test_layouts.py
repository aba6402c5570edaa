"""Every layout computes what one process does: same weights, same batches, same losses and gradient norms."""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from torch.distributed.tensor import DTensor

from octavo import config
from octavo.components.init import plain_name
from octavo.components.signals import Signals
from octavo.distributed import mesh
from octavo.distributed.watchdog import Watchdog
from octavo.train import Trainer
from tests import ranks, runs

BASE = {
    "training.global_batch_size": 8,
    "training.local_batch_size": 2,
    "training.steps": 3,
    "metrics.log_grad_norm": True,
}
REPLICATE, TENSOR, CONTEXT = (
    f"parallelism.{axis}_degree"
    for axis in ("data_parallel_replicate", "tensor_parallel", "context_parallel")
)
BFLOAT16 = {"training.mixed_precision_param": "bfloat16"}
TRAVEL = {"parallelism.context_parallel_rotate_method": "alltoall"}
COMPILED = {"training.compile": True}
# The most that a loss and a gradient norm may differ by, relatively.
EXACT, ROUNDED = 1e-5, 1e-2
GATHERED = {**runs.recipe("tensorwise"), "float8.enable_fsdp_float8_all_gather": True}


@dataclass(frozen=True)
class Row:
    """`world` processes with `degrees`, under `flags`, compared with one process under `alone`."""

    name: str
    world: int
    degrees: dict[str, int]
    flags: dict[str, object] = field(default_factory=dict)
    alone: dict[str, object] = field(default_factory=dict)
    limit: float = EXACT


ROWS = [
    Row("DDP 2", 2, {REPLICATE: 2}, {"validation.steps": 1}),
    Row("DDP 4, bfloat16", 4, {REPLICATE: 4}, *[runs.recipe("tensorwise") | BFLOAT16] * 2, ROUNDED),
    Row("TP 2", 2, {TENSOR: 2}),
    Row("TP 2, whole logits", 2, {TENSOR: 2}, {"parallelism.disable_loss_parallel": True}),
    Row("TP 2, float8 whole", 2, {TENSOR: 2}, *[{"model.converters": "float8"}] * 2, ROUNDED),
    Row("CP 2, documents", 2, {CONTEXT: 2}, *[{"training.document_mask": True}] * 2),
    Row("CP 2, keys travel", 2, {CONTEXT: 2}, TRAVEL),
    Row("HSDP 2 x 1, TP 2", 4, {REPLICATE: 2, TENSOR: 2}, *[runs.recipe("rowwise")] * 2, ROUNDED),
    Row("FSDP 2, TP 2", 4, {TENSOR: 2}, GATHERED, runs.recipe("tensorwise"), ROUNDED),
    Row("FSDP 2, CP 2", 4, {CONTEXT: 2}, *[runs.recipe("rowwise")] * 2, ROUNDED),
    Row("TP 2, CP 2, validated", 4, {TENSOR: 2, CONTEXT: 2}),
]
THREE_WAYS = [
    Row("DDP 2, compiled", 2, {REPLICATE: 2}, *[runs.recipe("rowwise") | COMPILED] * 2, ROUNDED),
    Row(
        "DDP 3",
        3,
        {REPLICATE: 3},
        {"training.global_batch_size": 12, "validation.steps": 1},
        {"training.global_batch_size": 12, "validation.steps": 3},
    ),
    Row(
        "HSDP 2 x 2",
        4,
        {REPLICATE: 2},
        {
            "parallelism.fsdp_reshard_after_forward": "never",
            "training.local_batch_size": 1,
            "validation.steps": 1,
        },
    ),
    Row("FSDP 2, TP 2, CP 2", 8, {TENSOR: 2, CONTEXT: 2}),
    Row(
        "FSDP 2, TP 2, CP 2, gathered",
        8,
        {TENSOR: 2, CONTEXT: 2},
        GATHERED,
        runs.recipe("tensorwise"),
        ROUNDED,
    ),
    Row("TP 2, compiled", 2, {TENSOR: 2}, *[runs.recipe("rowwise") | COMPILED] * 2, ROUNDED),
    Row("CP 2, compiled", 2, {CONTEXT: 2}, *[runs.recipe("rowwise") | COMPILED] * 2, ROUNDED),
    Row("CP 4, keys travel", 4, {CONTEXT: 4}, TRAVEL),
    Row(
        "CP 2, keys travel, compiled",
        2,
        {CONTEXT: 2},
        runs.recipe("rowwise") | COMPILED | TRAVEL,
        runs.recipe("rowwise") | COMPILED,
        ROUNDED,
    ),
    Row(
        "FSDP 2, TP 2, bfloat16",
        4,
        {TENSOR: 2},
        *[BFLOAT16] * 2,
        ROUNDED,
    ),
]
VALIDATED = {
    "validation.enable": True,
    "validation.fraction": 0.05,
    "validation.freq": 3,
    "validation.steps": 2,
}


@cache
def alone(flags: str, folder: Path) -> runs.Run:
    return runs.train(folder / f"alone{abs(hash(flags))}", {**BASE, **VALIDATED, **json.loads(flags)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


def check(row: Row, folder: Path) -> None:
    want = alone(json.dumps(row.alone), folder)
    got = runs.train(
        folder / row.name.replace(" ", "_"),
        {**BASE, **VALIDATED, **row.flags, **row.degrees},
        world=row.world,
    )
    assert got.exit_codes == [0] * row.world
    assert got.losses == pytest.approx(want.losses, rel=row.limit)
    norms = [line["grad_norm"] for line in got.metrics]
    assert norms == pytest.approx([line["grad_norm"] for line in want.metrics], rel=row.limit)
    assert got.validation_losses == pytest.approx(want.validation_losses, rel=row.limit)
    assert len(got.losses) == 3
    assert got.validation_losses


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_layout_equals_one_process(row, folder):
    check(row, folder)


@pytest.mark.slow
@pytest.mark.parametrize("row", THREE_WAYS, ids=lambda row: row.name)
def test_more_layouts_equal_one_process(row, folder):
    check(row, folder)


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loaded(argv, port, rank, world):
    """Hashes of all parameters and optimizer states that this rank has after loading the checkpoint."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    warnings.simplefilter("ignore")
    with Signals() as signals, Watchdog() as watchdog:
        trainer = Trainer(config.load(argv), signals, watchdog)
        step = trainer._resume()
    found = {"step": step}
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        for kind, tensor in {"weight": parameter.detach(), **state}.items():
            found[f"{plain_name(name)} {kind}"] = hashlib.sha256(
                _whole(tensor).contiguous().numpy().tobytes()
            ).hexdigest()
    mesh.finish()
    return found


def test_a_checkpoint_loads_into_every_layout_bit_for_bit(tmp_path):
    checkpoint = {"checkpoint.enable": True, "training.steps": 2}
    runs.train(tmp_path, {**BASE, **checkpoint, TENSOR: 2}, world=4)
    flags = {
        **runs.TINY,
        **BASE,
        **checkpoint,
        "job.dump_folder": tmp_path,
        "training.dataset": runs.small_corpus(),
    }
    found = []
    for world, degrees in ((1, {}), (3, {}), (4, {TENSOR: 2, CONTEXT: 2}), (4, {REPLICATE: 2, TENSOR: 2})):
        argv = [f"--{key}={value}" for key, value in {**flags, **degrees}.items()]
        if world == 3:
            argv.append("--training.global_batch_size=6")
        port = ranks.free_port()
        found += ranks.fork([(loaded, (argv, port, rank, world)) for rank in range(world)])
    assert len(found[0]) > 100
    assert found[0]["step"] == 2
    assert all(other == found[0] for other in found)


def test_sizes_that_do_not_divide_are_one_error(tmp_path):
    flags = {TENSOR: 3, "training.seq_len": 63}
    told = runs.train(tmp_path, flags, world=3)
    assert told.exit_codes == [2, 2, 2]
    assert "parallelism.tensor_parallel_degree = 3: the model has 16 heads" in told.log
    assert "Traceback" not in told.log
