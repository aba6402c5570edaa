"""The short run on a rented GPU: time limits, failing parts, the archive, the table, the documentation."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import first_gpu
from benchmarks.first_gpu import PARTS, TOTAL_SECONDS, Part
from benchmarks.harness import first_gpu_report
from tests.helpers.waiting import LIMIT, wait_for

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- first_gpu: begin -->", "<!-- first_gpu: end -->"


def part(name: str, code: str, *arguments: str, seconds: float = LIMIT) -> Part:
    command = ("-c", code, *arguments)
    return Part(name, seconds, "nothing", command, command)


def run(parts: list[Part], folder: Path, **options: float) -> dict[str, str]:
    outcomes = first_gpu.run(parts, folder / "out", folder / "packed" / "all.tar.gz", **options)
    return {outcome.name: outcome.ended for outcome in outcomes}


def members(archive: Path) -> set[str]:
    with tarfile.open(archive) as tar:
        return {name for name in tar.getnames() if "." in name}


def test_the_limits_fit_one_rental():
    assert sum(part.seconds for part in PARTS) <= TOTAL_SECONDS <= 540
    assert len({part.name for part in PARTS}) == len(PARTS)


@pytest.fixture
def times_out_at(monkeypatch):
    """Make the limit of the first part end as soon as a file is there, however slow the machine."""

    def install(file: Path) -> None:
        limits = iter([file])

        class Process(subprocess.Popen):
            def wait(self, timeout: float | None = None) -> int:
                if file := next(limits, None):
                    wait_for("the part's file", file.exists)
                    raise subprocess.TimeoutExpired(self.args, 0)
                return super().wait(timeout)

        monkeypatch.setattr(first_gpu.subprocess, "Popen", Process)

    return install


def test_a_part_that_hangs_ends_with_its_children_and_the_next_one_runs(tmp_path, times_out_at):
    pid_file = tmp_path / "pid"
    hang = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + "~", "w").write(str(child.pid))
os.rename(sys.argv[1] + "~", sys.argv[1])
time.sleep(600)
"""
    times_out_at(pid_file)
    parts = [part("hangs", hang, str(pid_file)), part("next", "print('ran')")]
    assert run(parts, tmp_path, grace=0.2, total=LIMIT) == {"hangs": "out of time", "next": "passed"}
    wait_for("the child's end", lambda: has_ended(int(pid_file.read_text())))
    assert (tmp_path / "out" / "logs" / "next.log").read_text() == "ran\n"


def has_ended(pid: int) -> bool:
    """Whether the process has; a zombie that nobody has waited for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_part_out_of_time_is_interrupted_and_can_write(tmp_path, times_out_at):
    code = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[2], "late.json").write_text("{}")
"""
    times_out_at(tmp_path / "up")
    parts = [part("slow", code, str(tmp_path / "up"), "{out}", seconds=2 * LIMIT)]
    assert run(parts, tmp_path, grace=LIMIT, total=2 * LIMIT) == {"slow": "out of time"}
    assert "results/late.json" in members(tmp_path / "packed" / "all.tar.gz")


def test_after_each_part_the_archive_has_all_so_far(tmp_path):
    """The second part sees the first one's archive; the last has both, and the failure's log."""
    archive = tmp_path / "packed" / "all.tar.gz"
    look = "import pathlib, sys, shutil; shutil.copy(sys.argv[1], pathlib.Path(sys.argv[2], 'seen.tar.gz'))"
    parts = [part("fails", "raise SystemExit('no luck')"), part("looks", look, str(archive), "{out}")]
    assert run(parts, tmp_path) == {"fails": "failed", "looks": "passed"}
    assert members(tmp_path / "out" / "results" / "seen.tar.gz") == {
        "parts.json",
        "table.txt",
        "logs/fails.log",
    }
    assert {"logs/looks.log", "results/seen.tar.gz"} <= members(archive)
    whole = json.loads((tmp_path / "out" / "parts.json").read_text())
    assert [(p["ended"], p["exit_code"]) for p in whole["parts"]] == [("failed", 1), ("passed", 0)]
    assert whole["complete"]
    assert "no luck" in (tmp_path / "out" / "logs" / "fails.log").read_text()


def test_no_part_starts_after_the_total(tmp_path):
    parts = [part("long", "import time; time.sleep(600)"), part("late", "pass")]
    assert run(parts, tmp_path, total=1.0, grace=0.5) == {"long": "out of time", "late": "not started"}


def test_a_stopped_run_ends_its_part_and_keeps_the_archive(tmp_path):
    started = tmp_path / "started"
    code = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""
    script = f"""
import sys
from benchmarks import first_gpu
from benchmarks.first_gpu import Part
command = ("-c", {code!r}, {str(started)!r})
first_gpu.PARTS = (Part("first", 500, "", command, command), Part("second", 500, "", command, command))
sys.exit(first_gpu.main(["run", "--out", {str(tmp_path / "out")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    pid = int(wait_for("the first part", lambda: started.exists() and started.read_text()))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    wait_for("the part's end", lambda: has_ended(pid))
    whole = json.loads((tmp_path / "out" / "parts.json").read_text())
    assert [p["ended"] for p in whole["parts"]] == ["interrupted"]
    assert not whole["complete"]
    assert "logs/first.log" in members(tmp_path / "out" / "first_gpu.tar.gz")


def side(ms: float, predicted_ms: float, **facts: object) -> dict[str, object]:
    ratio = ms / predicted_ms
    return {"ms": {"median": ms}, "predicted_ms": predicted_ms, "measured_over_predicted": ratio, **facts}


def made_up(out: Path, *, smoke: bool = False, kind: str = "cuda") -> Path:
    """Results as a GPU would give them, for the report; the archive of them."""
    machine = {"device": "NVIDIA H200", "kind": kind, "commit": "abc1234", "torch": "2.11.0", "cuda": "13.0"}
    machine |= {"triton": "3.6.0", "torchao": None}
    control = {"least": 0.99, "most": 1.01}
    layers = {
        "bf16": side(20.0, 20.0, peak_gb=20.0),
        "rowwise fused": side(14.0, 14.2, peak_gb=18.0),
        "tensorwise fused": side(16.0, 14.0, peak_gb=15.0),
        "torchao rowwise": side(17.5, 16.0, peak_gb=20.0),
    }
    model = {"rowwise": side(600.0, 500.0, peak_gb=101.0, predicted_peak_gb=100.0, tokens_per_second=13_000)}
    products = {"bf16": side(2.0, 2.0, tflops=700.0), "rowwise fast": side(1.0, 0.8, tflops=1400.0)}
    casts = {"copy": side(1.0, 1.0), "octavo": side(1.25, 1.2, share=0.8)}
    benchmarks = {
        "layer_stack": ("stack", layers, {"attention": "CUDNN_ATTENTION"}),
        "full_model": ("step", model, {}),
        "gemm": ("8B w1+w3 output", products, {}),
        "cast_bandwidth": ("rows [8192, 4096]", casts, {}),
    }
    results = out / "results"
    results.mkdir(parents=True)
    for name, (title, sides, summary) in benchmarks.items():
        comparison = {"title": title, "sides": sides, "control": control}
        settings = {"training.seq_len": 8192}
        whole = {"machine": machine, "comparisons": [comparison], "summary": summary, "settings": settings}
        (results / f"{name}-nvidia-h200.json").write_text(json.dumps(whole))
    check = {"recipe": "rowwise", "gemm": "output", "backend": "scaled_mm"}
    checks = [check | {"passed": True}, check | {"gemm": "grad_input", "passed": False}]
    (results / "selfcheck.json").write_text(json.dumps({"machine": machine, "checks": checks}))
    (results / "kernel_tests.xml").write_text("<testsuites><testsuite tests='9' skip")  # cut off
    ran = {"name": "layer_stack", "settles": "speed", "ended": "passed"}
    parts = {"smoke": smoke, "date": "2026-12-01T12:30:00+00:00", "parts": [ran]}
    (out / "parts.json").write_text(json.dumps(parts))
    (out / "table.txt").write_text("the table\n")
    first_gpu.pack(out, out / "first_gpu.tar.gz")
    return out / "first_gpu.tar.gz"


def test_the_table_compares_measurements_with_goals_and_predictions(tmp_path):
    made_up(tmp_path)
    rows = {row.what: row for row in first_gpu_report.rows(tmp_path)}

    def cells(what: str) -> tuple[str, ...]:
        return rows[what].cells[1:]

    assert cells("rowwise fused over bf16") == ("1.38x (H100)", "1.41x", "1.43x", "")
    assert cells("tensorwise fused over bf16")[2] == "1.25x"
    assert "profile" in cells("tensorwise fused over bf16")[3]
    assert cells("rowwise fused over torchao's") == ("1.18x (H100)", "1.13x", "1.25x", "")
    assert cells("tensorwise fused over torchao's")[2:] == ("not measured", "logs/layer_stack.log")
    assert rows["rowwise fused: peak memory over bf16's"].met is False
    assert rows["tensorwise fused: peak memory over bf16's"].met is True
    assert rows["control (bf16 against itself)"].met is True
    assert rows["attention kernel"].met is True
    assert cells("tests on the GPU")[2:] == ("not measured", "logs/kernel_tests.log")
    assert cells("  peak memory") == ("n/a", "100.0 GB", "101.0 GB", "")
    assert cells("  tokens/s")[1:3] == ("16,384", "13,000")
    assert rows["  tokens/s"].met is False
    assert cells("largest product, 8B w1+w3 output: rowwise fast")[1:3] == ("1750 TFLOP/s", "1400 TFLOP/s")
    assert rows["cast rows: share of a copy"].met is False
    assert cells("products and casts of all recipes")[2:] == (
        "1 of 2 right",
        "rowwise grad_input (scaled_mm)",
    )
    lines = first_gpu_report.text_table(list(rows.values())).splitlines()
    assert lines[0].split() == ["goal", "predicted", "measured", "look", "next", "at"]


def test_without_results_every_row_refers_to_a_log(tmp_path):
    rows = first_gpu_report.rows(tmp_path)
    assert {row.measured for row in rows} == {"not measured"}
    assert {row.cells[4] for row in rows} == {f"logs/{part.name}.log" for part in PARTS}


def checkout(folder: Path) -> Path:
    """The repository's own pages, so that they keep their regions."""
    for page in first_gpu_report.PAGES:
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text((ROOT / page).read_text())
    return folder


def test_the_report_fills_the_pages_from_the_archive(tmp_path, capsys):
    archive, root = made_up(tmp_path / "run"), checkout(tmp_path / "root")
    assert first_gpu.main(["report", str(archive), "--root", str(root)]) == 0
    results = root / "benchmarks" / "results" / "nvidia-h200-20261201T123000"
    assert str(results) in capsys.readouterr().out
    assert {"parts.json", "table.txt", "selfcheck.json"} <= {file.name for file in results.iterdir()}
    filled = {page: (root / page).read_text() for page in first_gpu_report.PAGES}
    for page, text in filled.items():
        before, _, rest = (ROOT / page).read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        assert text.startswith(before + BEGIN)
        assert text.endswith(END + after)
        assert "NVIDIA H200, 2026-12-01, commit abc1234, torch 2.11.0" in text
    assert "| rowwise fused over bf16 | 1.38x (H100) | 1.41x | 1.43x |" in filled["docs/performance.md"]
    assert "| layer_stack | speed | passed |" in filled["docs/hardware.md"]
    first_gpu.main(["report", str(archive), "--root", str(root)])
    assert filled == {page: (root / page).read_text() for page in first_gpu_report.PAGES}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"smoke": True}, "--smoke run, which measures nothing"), ({"kind": "cpu"}, "has no result from a GPU")],
)
def test_what_is_no_measurement_is_refused(options, message, tmp_path):
    archive, root = made_up(tmp_path / "run", **options), checkout(tmp_path / "root")
    with pytest.raises(SystemExit, match=message):
        first_gpu.main(["report", str(archive), "--root", str(root)])
    assert not (root / "benchmarks").exists()


def test_a_page_without_a_region_changes_nothing(tmp_path):
    archive, root = made_up(tmp_path / "run"), checkout(tmp_path / "root")
    page = root / first_gpu_report.PAGES[-1]
    page.write_text("no region\n")
    with pytest.raises(SystemExit, match="has no region"):
        first_gpu.main(["report", str(archive), "--root", str(root)])
    assert (root / first_gpu_report.PAGES[0]).read_text() == (ROOT / first_gpu_report.PAGES[0]).read_text()


def test_a_folder_with_results_is_not_overwritten(tmp_path):
    (tmp_path / "table.txt").write_text("earlier")
    with pytest.raises(SystemExit, match="is not empty"):
        first_gpu.main(["run", "--out", str(tmp_path), "--smoke"])


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "first_gpu.sh", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_the_script_unpacks_wheels_and_cleans_up(tmp_path):
    """A stand-in for Python shows what the script passes on."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "one.whl").touch()
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *zipfile*|*benchmarks*) echo "$*"; echo "$PYTHONPATH";; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    places = {"OCTAVO_PYTHON": str(python), "TMPDIR": str(tmp_path / "tmp")}
    done = script("--wheels", str(wheels), "--out", "x", "--smoke", **places)
    assert done.returncode == 0, done.stderr
    unpack, _, start, path = done.stdout.splitlines()
    assert unpack.startswith(f"-m zipfile -e {wheels}/one.whl {tmp_path}/tmp/")
    assert start == "-m benchmarks.first_gpu run --out x --smoke"
    assert path.split(":")[:2] == [str(ROOT), unpack.split()[-1]]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "python", "message"),
    [
        (["--wheels", "/nowhere"], sys.executable, "there is no folder '/nowhere'"),
        (["--out", "x"], "/bin/false", "/bin/false has no torch"),
    ],
)
def test_the_script_refuses(arguments, python, message):
    done = script(*arguments, OCTAVO_PYTHON=python)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
def test_smoke(tmp_path):
    """Every part in its smallest form: half a minute on one core, at most three."""
    done = subprocess.run(
        [ROOT / "scripts" / "first_gpu.sh", "--out", tmp_path / "out", "--smoke"],
        env={**os.environ, "OCTAVO_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((tmp_path / "out" / "parts.json").read_text())
    assert {part["name"]: part["ended"] for part in whole["parts"]} == {part.name: "passed" for part in PARTS}
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "28 of 28 right" in table
    assert " 0 failed, " in table
    assert "results/selfcheck.json" in members(tmp_path / "out" / "first_gpu.tar.gz")
