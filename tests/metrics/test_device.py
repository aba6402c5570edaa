"""What the trainer says of a device: a known peak or none, the dtype that pays, memory that is the
process's own.
"""

import gc
import logging

import pytest
import torch

from octavo.metrics import device
from octavo.train.garbage_collection import GarbageCollector


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3070", None),
    ],
)
def test_peaks_of_gpus(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert device.peak_flops(torch.device("cuda", 0)).flops == flops


def test_peak_of_a_cpu_is_measured_and_says_so():
    peak = device.peak_flops(torch.device("cpu"))
    assert 1e8 < peak.flops < 1e14
    assert "measured" in peak.source


@pytest.mark.parametrize(
    ("amx", "asked", "dtype"),
    [
        (True, "", torch.bfloat16),
        (False, "", torch.float32),
        (True, "float32", torch.float32),
        (False, "bfloat16", torch.bfloat16),
    ],
)
def test_dtype_of_a_cpu(monkeypatch, amx, asked, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setenv("OCTAVO_CPU_DTYPE", asked)
    assert device.choose_param_dtype("auto", torch.device("cpu")) is dtype
    assert device.choose_param_dtype("float32", torch.device("cpu")) is torch.float32
    assert device.auto_param_dtype(torch.device("cuda"))[0] is torch.bfloat16


def test_memory_is_this_process_s():
    before = device.memory_in_use(torch.device("cpu"))
    block = torch.ones(64 * 2**20)  # 0.25 GiB, touched
    after = device.memory_in_use(torch.device("cpu"))
    assert after.gib - before.gib == pytest.approx(0.25, abs=0.05)
    assert 0 < after.percent < 100
    del block


def test_garbage_is_collected_at_its_steps_only(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("octavo"), "propagate", True)
    try:
        with caplog.at_level("DEBUG", logger="octavo"):
            collector = GarbageCollector(every=10)
            for start in (0, 2):  # again after a rewind
                collector.on_start(start)
            assert not gc.isenabled()
            for step in range(1, 31):
                collector.before_step(step)
    finally:
        gc.enable()
    periodical = [line for line in caplog.messages if "[GC] Performing periodical GC collection." in line]
    assert len(periodical) == 3
    assert len(caplog.messages) == 1 + len(periodical)
    assert periodical[0].endswith(" seconds.")
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "INFO", "DEBUG"]
