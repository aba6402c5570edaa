"""A run that is resumed with other numbers of processes and workers reads the same batches."""

import pytest

from octavo.commands.prepare import prepare
from tests.helpers import launching


def test_world_and_workers_change_between_restarts(tmp_path):
    """Two ranks, then one, then four; no worker, then two, then one: prepared shards, through the trainer.

    Losses of different batches differ by far more than rounding makes those of the same batch differ.
    """
    folder = tmp_path / "prepared"
    prepare([str(launching.small_corpus())], tokenizer="octavo_bpe_2048", out=folder, workers=1)
    common = {
        **launching.shallow(2),
        "training.dataset": folder,
        "training.global_batch_size": 8,
        "training.seq_len": 32,
        "lr_scheduler.warmup_steps": 0,
    }
    alone = launching.train(
        tmp_path / "alone", {**common, "training.local_batch_size": 8, "training.steps": 6}
    ).losses
    assert min(abs(a - b) for k, a in enumerate(alone) for b in alone[:k]) > 4e-4

    found = []
    for steps, world, workers in ((2, 2, 0), (4, 1, 2), (6, 4, 1)):
        run = launching.train(
            tmp_path / "changing",
            {
                **common,
                "training.local_batch_size": 8 // world,
                "training.steps": steps,
                "training.num_workers": workers,
                "checkpoint.enable": "true",
                "checkpoint.interval": 2,
            },
            world=world,
        )
        found = run.losses
        if steps > 2:
            assert "The data does not go on" not in run.log
    assert found == pytest.approx(alone, rel=2e-5)
