"""The first minutes on a rented GPU: what decides most, in one run of at most nine minutes.

    scripts/first_gpu.sh --out first_gpu                          # all parts; needs no network
    scripts/first_gpu.sh --out first_gpu --smoke                  # the smallest form of each, also on a CPU
    python -m benchmarks.first_gpu report first_gpu/first_gpu.tar.gz    # the archive into the documentation

`PARTS` run in order, each in processes of its own with its own time limit. A part that fails or reaches its
limit does not stop the next one, and what it has written is kept. After each part, `parts.json`, `table.txt`,
the logs and all results are packed into one archive, so a run that is cut off leaves all that it measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import first_gpu_report
from octavo.core.fs import replacing, write_file

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 535.0
GRACE_SECONDS = 5.0
"""At the end of a part's limit: for its processes to write what they have after an interrupt."""
ARCHIVE = "first_gpu.tar.gz"


@dataclass(frozen=True)
class Part:
    """One program with arguments for a GPU and, with `smoke`, for any machine.

    arguments: of Python; `{out}` is the folder for results. seconds: limit. settles: what its result decides.
    """

    name: str
    seconds: float
    settles: str
    arguments: tuple[str, ...]
    smoke: tuple[str, ...]

    def command(self, out: Path, *, smoke: bool) -> list[str]:
        arguments = self.smoke if smoke else self.arguments
        return [sys.executable, *(argument.replace("{out}", str(out)) for argument in arguments)]


def benchmark(name: str, seconds: float, settles: str, *options: str) -> Part:
    """`benchmarks/name.py` with `options`, or with --smoke."""
    start = (f"benchmarks/{name}.py", "--out", "{out}")
    return Part(name, seconds, settles, (*start, *options), (*start, "--smoke"))


def kernel_tests(seconds: float) -> Part:
    # The rest of test_gpu_smoke.py runs benchmarks, as the other parts do.
    products = (
        f"tests/benchmarks/test_gpu_smoke.py::test_{name}" for name in ("products", "compiled_equals_eager")
    )
    files = ("tests/float8/kernels", *products)
    parallel = ("-n", "12") if importlib.util.find_spec("xdist") else ()
    start = ("-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--junitxml={out}/kernel_tests.xml")
    return Part(
        "kernel_tests",
        seconds,
        "whether kernels give the reference's bits, and compiled code those of eager code",
        (*start, *parallel, *files),
        (*start, *files),
    )


PARTS = (
    Part(
        "selfcheck",
        40,
        "whether every product of every recipe is right on this GPU",
        ("benchmarks/selfcheck.py", "--out", "{out}"),
        ("benchmarks/selfcheck.py", "--out", "{out}"),
    ),
    benchmark(
        "layer_stack",
        195,
        "speed and memory over bfloat16 and torchao; the attention kernel; the noise of the machine",
        *("--layers", "4", "--minutes", "2.8", "--rounds", "8"),
    ),
    kernel_tests(100),
    benchmark(
        "full_model",
        95,
        "whether Llama3-8B trains on one GPU, and how fast",
        *("--sides", "rowwise", "--states", "bfloat16", "--steps", "8", "--no-control", "--minutes", "1.25"),
    ),
    benchmark(
        "gemm",
        50,
        "what the products allow, and what fast accumulation gains",
        *("--models", "8B", "--rounds", "10", "--minutes", "0.5"),
    ),
    benchmark(
        "cast_bandwidth",
        55,
        "which cast kernel is slower than memory allows",
        *("--ours-only", "--rounds", "10", "--minutes", "0.6"),
    ),
)
"""What decides most comes first. The limits add up to at most `TOTAL_SECONDS`."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "passed", "failed" (its exit code), "out of time", "interrupted" or "not started"."""

    name: str
    settles: str
    limit: float
    ended: str
    seconds: float = 0.0
    exit_code: int | None = None


def run_part(
    part: Part, out: Path, limit: float, *, smoke: bool = False, grace: float = GRACE_SECONDS
) -> Outcome:
    """Run one part for at most `limit` seconds; end all its processes."""
    if limit <= grace:
        return Outcome(part.name, part.settles, limit, "not started")
    log = out / "logs" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    ended = "interrupted"
    with log.open("w") as output:
        process = subprocess.Popen(
            part.command(out / "results", smoke=smoke),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            ended = "passed" if process.wait(limit - grace) == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        except KeyboardInterrupt:
            ended = "interrupted"
        finally:
            _end_group(process, grace)
    return Outcome(
        part.name, part.settles, limit, ended, round(time.perf_counter() - started, 1), process.returncode
    )


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """Interrupt `process`, so that it writes what it has; then kill what is left of its group."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    parts: Sequence[Part],
    out: Path,
    archive: Path,
    *,
    smoke: bool = False,
    total: float = TOTAL_SECONDS,
    grace: float = GRACE_SECONDS,
) -> list[Outcome]:
    """Run `parts` in order within `total` seconds. Results, table and archive are complete after each."""
    (out / "results").mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    deadline = time.perf_counter() + total
    outcomes: list[Outcome] = []
    for part in parts:
        print(f"{part.name}, at most {part.seconds:g} s: {part.settles}", flush=True)
        limit = min(part.seconds, deadline - time.perf_counter())
        outcomes.append(run_part(part, out, limit, smoke=smoke, grace=grace))
        print(f"  {outcomes[-1].ended} after {outcomes[-1].seconds:g} s", flush=True)
        whole = {
            "format": 1,
            "date": date,
            "smoke": smoke,
            "complete": len(outcomes) == len(parts),
            "parts": [asdict(outcome) for outcome in outcomes],
        }
        write_file(out / "parts.json", json.dumps(whole, indent=1) + "\n")
        table = first_gpu_report.text_table(first_gpu_report.rows(out))
        smoke_note = "a --smoke run: tiny sizes, no figure counts\n" if smoke else ""
        write_file(out / "table.txt", f"{smoke_note}{table}\n")
        pack(out, archive)
        if outcomes[-1].ended == "interrupted":
            break
    return outcomes


def pack(out: Path, archive: Path) -> None:
    """Everything of a run that is worth keeping, as one file, replaced as a whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with replacing(archive) as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as tar:
        for name in ("parts.json", "table.txt", "logs", "results"):
            if (out / name).exists():
                tar.add(out / name, name)


def _run_command(own: argparse.Namespace) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    if own.out.exists() and any(own.out.iterdir()):
        raise SystemExit(f"octavo: {own.out} is not empty; pass another --out, or delete it")
    archive = own.archive or own.out / ARCHIVE
    outcomes = run(PARTS, own.out, archive, smoke=own.smoke)
    print(f"\n{(own.out / 'table.txt').read_text()}\neverything is in {archive}")
    return 0 if all(outcome.ended == "passed" for outcome in outcomes) else 1


def _report_command(own: argparse.Namespace) -> int:
    try:
        folder = first_gpu_report.publish(own.archive, own.root)
    except ValueError as error:
        raise SystemExit(f"octavo: {error}") from None
    print(f"results: {folder}\nfilled: {', '.join(first_gpu_report.PAGES)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="first_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="run the parts")
    runs.add_argument("--out", type=Path, required=True, help="folder for results; must be empty")
    runs.add_argument("--archive", type=Path, help=f"where to pack them; {ARCHIVE} in --out if not given")
    runs.add_argument("--smoke", action="store_true", help="the smallest form of each part, also on a CPU")
    runs.set_defaults(command=_run_command)
    report = commands.add_parser("report", help="fill the documentation from an archive")
    report.add_argument("archive", type=Path)
    report.add_argument("--root", type=Path, default=ROOT, help="checkout whose pages are filled")
    report.set_defaults(command=_report_command)
    own = parser.parse_args(arguments)
    return own.command(own)


if __name__ == "__main__":
    sys.exit(main())
