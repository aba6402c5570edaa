"""The parts of the benchmarks' harness, on figures made up."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from benchmarks import full_model
from benchmarks.harness.comparison import CONTROL, Side, judge
from benchmarks.harness.machine import Conditions, describe, summarise
from benchmarks.harness.options import Budget
from benchmarks.harness.report import file_stem, plot, table
from octavo.roofline.timing import Spread
from tests.helpers.waiting import wait_for

CPU = torch.device("cpu")


def comparison():
    times = {
        "slow": Spread((2.0, 4.0, 2.0)),
        "fast": Spread((1.0, 2.0, 1.0)),
        "same": Spread((2.1, 4.0, 1.9)),
        CONTROL: Spread((2.2, 4.0, 1.8)),
    }
    sides = {"slow": Side(None, 1.0, {"gbps": 7.0}), "fast": Side(None, 0.5), "same": Side(None)}
    return judge("a job", sides, times, facts={"M": 3})


def test_judging():
    found = comparison()
    slow, fast, same = found["sides"].values()
    assert (slow["ms"]["median"], fast["ms"]["median"]) == (2000, 1000)
    assert slow["measured_over_predicted"] == 2.0
    assert fast["measured_over_predicted"] == 2.0
    assert same["measured_over_predicted"] is None
    assert fast["speedup"]["median"] == 2.0
    assert found["control"]["least"] == pytest.approx(2 / 2.2)
    assert [side["beyond_noise"] for side in found["sides"].values()] == [False, True, False]


def test_table():
    lines = table(comparison(), {"gbps": "{:.1f} GB/s"})
    assert re.search(r"slow +2000 .* 1.000 .* 1000 +2.00 +7.0 GB/s", lines[1])
    assert re.search(r"fast +1000 .* 2.000 .* 500 +2.00 +n/a", lines[2])
    assert "within noise" in lines[3]
    assert "within noise" not in lines[2]
    assert lines[4] == "  control: slow against itself 1.000, from 0.909 to 1.111, 3 rounds"


def test_plot():
    """Bars as long as their medians, and a tick where the prediction is, below titles that are text."""
    root = ET.fromstring(plot("<title> & more", [comparison()]))
    labels = [element.get("aria-label") or "" for element in root.iter()]
    bars = {label for label in labels if label.startswith("value: ") and "fill" in label}
    assert len(bars) == 3
    assert any("value: 2,000" in label or "value: 2000" in label for label in bars), bars
    assert any("predicted: 500" in label for label in labels)
    assert "<title> & more" in "".join(root.itertext())


def test_conditions():
    """What nvidia-smi prints, with a quantity that this GPU does not tell."""
    found = summarise("1980, 2619, 640.1, 61\n1755, 2619, 699.0, [N/A]\n1860, 2619, 700.5, 66\n\ncut o")
    assert found["sm_clock_mhz"] == {"least": 1755, "median": 1860, "most": 1980}
    assert found["temperature_celsius"] == {"least": 61, "median": 63.5, "most": 66}
    assert summarise("") is None
    with Conditions(CPU) as conditions:
        pass
    assert conditions.summary() is None


def test_conditions_come_from_nvidia_smi(tmp_path, monkeypatch):
    """A program of that name is started, asked twice a second, and ended."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$@" >>"$0.args"\necho 1500, 2600, 300.0, 50\nexec sleep 30\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: object())
    with Conditions(torch.device("cuda")) as conditions:
        wait_for("a line of nvidia-smi", conditions.summary)
    assert conditions.summary()["power_watts"]["median"] == 300.0
    assert conditions._process.poll() is not None
    assert "-lms 500" in Path(f"{program}.args").read_text()


def test_budget():
    assert not Budget(1.0).over("a")
    budget = Budget(0.0)
    assert budget.over("b")
    assert budget.left_out == ["b"]


def test_names_of_files():
    whole = {
        "benchmark": "gemm",
        "machine": {"device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0+cu130"},
        "predict": None,
        "smoke": False,
        "written": "2026-11-23T19:45:00+00:00",
    }
    assert file_stem(whole) == "gemm-nvidia-h100-80gb-hbm3-torch2.13.0-20261123T194500"
    assert file_stem(whole | {"predict": "H200"}).startswith("gemm-predicted-h200-")
    assert describe(CPU)["kind"] == "cpu"


def test_a_model_that_does_not_fit():
    log = "…\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"
    assert full_model.why(log, 1) == "out of memory"
    assert full_model.why("one\ntwo\n", 2) == "exit code 2: two"
    failed = full_model.train({"training.steps": 0}, 60.0)
    assert "training.steps = 0" in failed["failed"]
