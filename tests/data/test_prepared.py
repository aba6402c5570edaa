"""A prepared corpus of more shards than a process may have files open."""

import os
import resource
from types import SimpleNamespace

import numpy as np
import pytest

from octavo.data import prepared


@pytest.fixture
def few_files():
    """Lets this process open 40 more files than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 40, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_open_files(tmp_path, few_files, monkeypatch):
    monkeypatch.setattr(prepared, "_mapped", prepared.lru_cache(16)(prepared._mapped.__wrapped__))
    assert prepared.MOST_MAPPED <= 512  # of the 1,024 that many systems allow
    shards = []
    for number in range(100):
        np.arange(number * 10, number * 10 + 10, dtype="<u2").tofile(tmp_path / f"{number}.ids")
        shards.append(SimpleNamespace(tokens=10, ids=SimpleNamespace(name=f"{number}.ids")))
    mapped = prepared._MappedShards(tmp_path, shards, "uint16")
    again = prepared._MappedShards(tmp_path, shards, "uint16")
    for start in (0, 995, 15, 500):
        got = np.empty(5, dtype=np.int64)
        for corpus in (mapped, again):
            corpus.copy(start, got)
            assert got.tolist() == list(range(start, start + 5))
    whole = np.empty(1000, dtype=np.int64)
    mapped.copy(0, whole)
    assert whole.tolist() == list(range(1000))
