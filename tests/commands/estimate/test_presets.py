"""The shipped configs fit into the GPUs that they say they are for."""

import pytest

from octavo import config, preflight
from octavo.commands.estimate.estimate_report import estimate
from octavo.roofline import GPUS


@pytest.mark.parametrize(
    ("file", "gpus"),
    [
        pytest.param("llama3_8b.toml", 8, marks=pytest.mark.slow),
        pytest.param("llama3_70b.toml", 64, marks=pytest.mark.slow),
        ("llama3_405b.toml", 256),
    ],
)
def test_a_preset_fits(file, gpus):
    job = config.load([f"--job.config_file={file}"])
    preflight.check(job, world_size=gpus, gpus=gpus, elsewhere=True)
    found = estimate(job, gpus, GPUS["h100"])
    assert found.memory.peak < 0.9 * GPUS["h100"].hbm_bytes
