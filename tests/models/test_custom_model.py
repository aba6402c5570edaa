"""The model of docs/your_own_model.md under data parallelism, and what it refuses."""

import importlib
import sys
from dataclasses import replace

import pytest

from octavo import models
from octavo.config import ConfigError
from octavo.config.schema import ActivationCheckpoint
from octavo.distributed.parallelize_plan import Parallelize
from tests.helpers import launching

FLAGS = {
    "experimental.custom_import": "tests.models.custom_model",
    "model.name": "bigram",
    "model.flavor": "small",
    "training.global_batch_size": 8,
    "optimizer.lr": 0.05,  # or four steps change too little to tell ranks apart
}


@pytest.mark.parametrize(
    "layout",
    [
        {"parallelism.data_parallel_shard_degree": 2},
        {"parallelism.data_parallel_shard_degree": 1, "parallelism.data_parallel_replicate_degree": 2},
    ],
    ids=["FSDP2", "DDP"],
)
def test_two_processes_train_as_one(layout, tmp_path):
    one = launching.train(tmp_path / "one", FLAGS)
    two = launching.train(tmp_path / "two", {**FLAGS, **layout}, world=2)

    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.losses[-1] < two.losses[0]


@pytest.fixture
def custom_model(monkeypatch):
    """The module, whose model leaves the registry again."""
    monkeypatch.setattr(models, "_SPECS", dict(models._SPECS))
    monkeypatch.delitem(sys.modules, FLAGS["experimental.custom_import"], raising=False)
    return importlib.import_module(FLAGS["experimental.custom_import"])


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_other_parallelism_is_refused(axis, custom_model):
    plan = Parallelize(ActivationCheckpoint(), compile_model=False, sharding=None)

    with pytest.raises(ConfigError, match="neither tensor nor context"):
        custom_model.parallelize(
            custom_model.Bigram(custom_model.BigramArgs(4, 8)), replace(plan, **{axis: object()})
        )
