"""What every test shares: a quiet, single-threaded, offline process, and the rule for GPU tests.

Tests run one process per core, so each uses one thread, and none may depend on the caller's shell: the
variables that steer a launch are removed. All of it is set before any test imports torch, which reads some of
it only once.
"""

import importlib.util
import logging
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAUNCH_VARIABLES = (
    *("NGPU", "LOG_RANK", "CONFIG_FILE", "NNODES", "NODE_RANK", "RDZV_ENDPOINT", "RDZV_ID", "RDZV_TIMEOUT"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OCTAVO_PYTHON", "OCTAVO_TORCH_INDEX", "HF_TOKEN"),
    *("PET_NNODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
)

for variable in LAUNCH_VARIABLES:
    os.environ.pop(variable, None)
cache = tempfile.TemporaryDirectory(prefix="octavo-test-cache-")
os.environ.update(
    XDG_CACHE_HOME=cache.name,
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    GOMP_SPINCOUNT="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    # No pool of compiling threads: a forked process (ranks.py) would wait for threads it does not have.
    TORCHINDUCTOR_COMPILE_THREADS="1",
    # A test's child processes import this checkout, whatever their working directory is.
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
)
if as_on := os.environ.get("ATEN_CPU_CAPABILITY"):  # see tests/train/test_processors.py
    # torch's cache of compiled code does not tell instruction sets apart, and code in it made for one crashes
    # when it is compiled for another.
    cache = Path(tempfile.gettempdir()) / f"octavo-inductor-{os.getuid()}-{as_on}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)  # torch itself sets it in a process that has compiled

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples on every run: a failure seen once can be seen again.
    settings.register_profile("octavo", derandomize=True, deadline=None, database=None)
    settings.load_profile("octavo")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, skip files without GPU tests: they may need packages that a rented GPU machine lacks."""
    if config.option.markexpr != "gpu" or collection_path.suffix != ".py":
        return None
    return "mark.gpu" not in collection_path.read_text() or None


# The files that take longest. ./run_tests.sh hands out whole files in this order: in the end no core is left
# with a long one while the others are idle.
LONG = (
    *("float8/kernels/test_interpreted.py", "float8/test_compile.py", "train/test_trainer.py"),
    *("train/test_layouts.py", "docs/test_commands.py", "commands/compare/test_compare.py"),
    *("train/test_faults.py", "train/test_small_training.py", "launch/test_elastic.py"),
    *("float8/distributed/test_parallel_styles.py", "distributed", "train/test_processors.py"),
    *("launch/test_two_machines.py", "train/test_pipeline.py", "commands/estimate", "commands/doctor"),
    *("float8", "checkpoint"),
)


def _turn(item: pytest.Item) -> int:
    path = item.path.relative_to(ROOT / "tests").as_posix()
    return next((turn for turn, long in enumerate(LONG) if path.startswith(long)), len(LONG))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="a long sweep; ./run_tests.sh --all runs it"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason=f"needs a CUDA GPU; torch {torch.__version__} sees none")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """A command that a test calls sets the log up for itself; what the next test sees is as it was."""
    logger = logging.getLogger("octavo")
    kept = logger.handlers[:], logger.propagate, logger.level
    try:
        return (yield)
    finally:
        logger.handlers[:], logger.propagate, level = kept
        logger.setLevel(level)
