"""What every test shares: a quiet, single-threaded, offline process, and the rule for GPU tests.

Tests run one process per core, so each uses one thread, and none may depend on the caller's shell: the
variables that steer a launch are removed. All of it is set before any test imports torch, which reads some of
it only once.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

LAUNCH_VARIABLES = (
    *("NGPU", "LOG_RANK", "CONFIG_FILE", "NNODES", "NODE_RANK", "RDZV_ENDPOINT", "RDZV_ID", "RDZV_TIMEOUT"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OCTAVO_PYTHON", "OCTAVO_TORCH_INDEX", "HF_TOKEN"),
)

for variable in LAUNCH_VARIABLES:
    os.environ.pop(variable, None)
os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    GOMP_SPINCOUNT="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    # No pool of compiling threads: a forked process (tests/ranks.py) would wait for threads it has not got.
    TORCHINDUCTOR_COMPILE_THREADS="1",
    # A test's child processes import this checkout, whatever their working directory is.
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
)

# The same examples on every run: a failure seen once can be seen again.
settings.register_profile("octavo", derandomize=True, deadline=None, database=None)
settings.load_profile("octavo")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="a long sweep; by hand: pytest -m slow"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason=f"needs a CUDA GPU; torch {torch.__version__} sees none")
        for item in gpu_items:
            item.add_marker(skip)
