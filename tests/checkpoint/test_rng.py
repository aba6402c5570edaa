"""Loading restores the random number generators of torch, Python and NumPy."""

import random

import numpy
import pytest
import torch
import torch.distributed as dist

from octavo.checkpoint.checkpointer import Checkpointer
from tests.checkpoint.small import ON, build, train
from tests.helpers import ranks


@pytest.mark.parametrize("world", [1, 2])
def test_random_numbers_continue(folder, world):
    drawn = ranks.run(world, _save_and_draw, folder)
    assert ranks.run(world, _load_and_draw, folder) == [(numbers, {}) for numbers in drawn]
    assert len({tuple(numbers) for numbers in drawn}) == world
    for numbers, not_exact in ranks.run(3 - world, _load_and_draw, folder):
        assert numbers not in drawn
        assert not_exact == {"RNG": f"{world} processes then, {3 - world} now"}


# NumPy's global generator is the one that a checkpoint saves.
# ruff: noqa: NPY002
def _seed(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    random.gauss(0, 1)  # leaves a spare number
    numpy.random.normal()


def _draw():
    return [
        torch.rand(()).item(),
        torch.randn(()).item(),
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.normal()),
        float(numpy.random.rand()),
    ]


def _save_and_draw(folder):
    model, optimizer = build()
    train(model, optimizer)
    checkpointer = Checkpointer(ON, folder, model, optimizer)
    _seed(dist.get_rank())
    checkpointer.save(1, 1, {})
    return _draw()


def _load_and_draw(folder):
    model, optimizer = build()
    checkpointer = Checkpointer(ON, folder, model, optimizer)
    _seed(100 + dist.get_rank())
    not_exact = checkpointer.load()["not_exact"]
    return _draw(), not_exact
