"""The page for torchtitan's users is what the configuration does."""

import pytest

from octavo.config import load
from octavo.preflight import check
from tests.docs.torchtitan_page import PAGE, RUNS, TitanRun, page


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "python -m tests.docs.torchtitan_page"


@pytest.mark.parametrize("run", [run for run in RUNS if not run.missing], ids=lambda run: run.name)
def test_a_run_of_torchtitans_is_in_order(run: TitanRun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = load(["--config-file=debug_model.toml", "--training.local_batch_size=8", *run.flags.split()])
    check(job, world_size=run.processes, gpus=run.processes)
