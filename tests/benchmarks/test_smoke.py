"""Every GPU benchmark at tiny sizes on this machine: that it runs, and that its figures agree with each
other. Nothing here asserts a speed.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.helpers import warm
from tests.helpers.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's

RECIPES = ("tensorwise", "rowwise", "blockwise")
SIDES = {
    "gemm": ["bf16", *RECIPES, "tensorwise fast", "rowwise fast", *(f"{r} with casts" for r in RECIPES)],
    "cast_bandwidth": ["copy", "octavo", "compiled", "torchao"],
    "layer_stack": ["bf16", *RECIPES, "rowwise_with_gw_hp", "torchao rowwise", "torchao tensorwise"],
    "full_model": ["rowwise", "bf16"],
}


def run(name, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    return importlib.import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize("name", SIDES)
def test_smoke(name, monkeypatch, tmp_path, capsys):
    extra = ["--dataset", str(small_text(tmp_path))] if name == "full_model" else []
    whole = run(name, monkeypatch, "--smoke", "--out", str(tmp_path / "out"), *extra)
    printed = capsys.readouterr().out
    assert whole["benchmark"] == name
    assert whole["left_out"] == []
    machine = whole["machine"]
    assert machine["torch"].startswith("2.")
    assert machine["command"][0] == f"{name}.py"
    assert {"device", "commit", "python", "torchao", "load"} <= set(machine)
    for comparison in whole["comparisons"]:
        assert consistent(comparison)
        assert comparison["title"] in printed
    last = whole["comparisons"][-1]["sides"] if name != "cast_bandwidth" else whole["comparisons"][0]["sides"]
    assert set(SIDES[name]) <= set(last)

    files = sorted((tmp_path / "out").iterdir())
    assert [file.suffix for file in files] == [".json", ".svg", ".txt"]
    assert files[0].name.startswith(f"{name}-smoke-")
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(whole))
    bars = [e for e in ET.parse(files[1]).iter() if e.get("aria-roledescription") == "bar"]
    assert len(bars) == sum(len(c["sides"]) for c in whole["comparisons"])
    assert whole["comparisons"][0]["title"] in files[2].read_text()


def test_elder_benchmarks():
    """Those that measure what a CPU can tell, each in a process of its own, which they set up."""
    names = ("checkpoint", "emulation", "health", "loop_overhead")
    commands = [[warm.python(), f"benchmarks/{name}.py", "--smoke"] for name in names]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [subprocess.Popen(command, **pipes) for command in commands]
    printed = {}
    for name, process in zip(names, started, strict=True):
        out, error = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, error[-2000:]
        printed[name] = out
    assert "crc32" in printed["checkpoint"]
    assert "geometric mean" in printed["emulation"]
    assert "one block" in printed["health"]
    assert "trainer / bare, 1 processes" in printed["loop_overhead"]


def test_startup(tmp_path):
    """The phases of each start, in their order; with the stand-in, which spares the imports it measures."""
    done = subprocess.run(
        [sys.executable, "benchmarks/startup.py", "--smoke", "--json", tmp_path / "figures.json"],
        env={**os.environ, "OCTAVO_PYTHON": warm.python()},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "two processes" in done.stdout
    told = json.loads((tmp_path / "figures.json").read_text())
    assert set(told["starts"]) == {"demo", "two processes"}
    for (start,) in told["starts"].values():
        assert 0 < start["launched"] < start["built"] < start["stepped"]
        assert start["left"] > 0


def small_text(folder):
    file = folder / "text.txt"
    file.write_text("A line of text to train on.\n" * 500)
    return file


def consistent(comparison):
    """Medians and ratios are those of the rounds that stand beside them."""
    sides, reference = comparison["sides"], comparison["reference"]
    assert next(iter(sides)) == comparison["controlled"]
    assert reference in ("bf16", comparison["controlled"])
    assert reference == "bf16" or "bf16" not in sides
    base = sides[reference]["samples_ms"]
    for name, side in sides.items():
        samples = side["samples_ms"]
        assert side["ms"]["median"] == pytest.approx(statistics.median(samples))
        assert side["ms"]["least"] <= side["ms"]["q1"] <= side["ms"]["median"] <= side["ms"]["q3"]
        assert side["ms"]["n"] == len(samples) == len(base) == comparison["control"]["n"]
        ratios = [a / b for a, b in zip(base, samples, strict=True)]
        assert side["speedup"]["median"] == pytest.approx(statistics.median(ratios))
        assert side["predicted_ms"] is None  # the roofline knows no CPU
        assert side["measured_over_predicted"] is None
        within = comparison["control"]["least"] <= side["speedup"]["median"] <= comparison["control"]["most"]
        assert side["beyond_noise"] == (name != reference and not within)
    return True


def test_what_the_stack_tells_of_memory_and_precision(monkeypatch):
    sides = run("layer_stack", monkeypatch, "--smoke", "--rounds", "1")["comparisons"][0]["sides"]
    assert sides["bf16"]["saved_over_bf16"] == 1.0
    assert sides["rowwise"]["saved_over_bf16"] < 1.0
    assert sides["bf16"]["sqnr_db"] > 40
    for name, side in sides.items():
        if name != "bf16":
            assert 20 < side["sqnr_db"] < 35
        if name.startswith("torchao "):  # the same numbers, to the bit or nearly so
            assert side["sqnr_db"] == pytest.approx(sides[name.removeprefix("torchao ")]["sqnr_db"], abs=0.5)


@pytest.mark.parametrize("name", SIDES)
def test_predictions(name, monkeypatch, capsys):
    """What the roofline expects: nothing is measured, and faster memory never makes it slower."""
    h100, h200 = (run(name, monkeypatch, "--predict", gpu) for gpu in ("H100", "h200"))
    assert h100["predict"] == "H100"
    for one, two in zip(h100["comparisons"], h200["comparisons"], strict=True):
        assert "control" not in one
        for side, row in one["sides"].items():
            assert 0 < two["sides"][side]["predicted_ms"] <= row["predicted_ms"]
    assert "predictions for H100; nothing is measured" in capsys.readouterr().out


def test_predictions_agree_with_the_goals(monkeypatch):
    """The goals of layer_stack.py are above what the model finds, where all is fused, by what
    docs/performance.md lists.
    """
    from benchmarks.harness.goals import OVER_BF16

    sides = run("layer_stack", monkeypatch, "--predict", "H100")["comparisons"][0]["sides"]
    known = [name for name in OVER_BF16 if name in sides]
    for name in known:
        assert 0.86 < sides[name]["predicted_speedup"] / OVER_BF16[name] < 1
    assert sides["torchao rowwise"]["predicted_speedup"] < sides["rowwise"]["predicted_speedup"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "there is no GPU here: --smoke tries the benchmark out, --predict H100"),
        (["--predict", "tpu"], "--predict: no GPU is called 'tpu'"),
        (["--smoke", "--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_errors(argv, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        run("gemm", monkeypatch, *argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
