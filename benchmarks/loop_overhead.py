"""What the trainer costs over a bare PyTorch loop: the same model, the same batches, on a CPU.

    python benchmarks/loop_overhead.py [--steps 20] [--processes 2] [--json FILE]
        [--precisions float32 bfloat16] [--modes eager compiled] [--measures step memory start]

Every figure is trainer / bare: below 1 the trainer is ahead. Both train the debug model with fused AdamW,
clipping and a loss read back on every step (`harness/loops.py`); the trainer also logs, writes metrics,
collects garbage and asks for checkpoints and profiles as it always does.

    step     seconds of a step. Both sides run in one process and take single steps in turn, and the one that
             goes first changes each time, so that both meet the same state of the machine. The median of the
             pairs' ratios, and its quartiles.
    memory   the process's peak of resident memory, each side in a process of its own.
    start    the first step compiled with a warm cache, each time in a process of its own, in turns; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 3
LIMITS = {"step": 1.02, "memory": 1.03, "start": 1.1}


def work(case: dict[str, Any], processes: int = 1, cache: Path | None = None) -> dict[str, Any]:
    """What the first of `processes` workers says of `case`, the fields of a `harness.loops.Case`."""
    environment = dict(os.environ)
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    if processes > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        environment |= {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(threads)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    command = [sys.executable, "-m", "benchmarks.harness.loops", json.dumps(case)]
    workers = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | ({"RANK": str(n), "LOCAL_RANK": str(n)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(processes)
    ]
    said = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a worker failed: {' '.join(command)}")
    result: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return result


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def measure_step(case: dict[str, Any], processes: int, steps: int) -> dict[str, Any]:
    result = work({**case, "sides": ["bare", "trainer"], "steps": WARMUP + steps}, processes)
    bare, trainer = (result["seconds"][name][WARMUP:] for name in ("bare", "trainer"))
    ratios = [ours / theirs for ours, theirs in zip(trainer, bare, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2] if steps > 1 else ratios * 2,
        "bare": statistics.median(bare),
        "trainer": statistics.median(trainer),
        "unit": "s",
        "machine": result["machine"],
        "ratios": ratios,
    }


def measure_memory(case: dict[str, Any], processes: int, steps: int) -> dict[str, Any]:
    found = {
        name: work({**case, "sides": [name], "steps": min(steps, 6)}, processes)["peak_mib"]
        for name in ("bare", "trainer")
    }
    return {**found, "ratio": found["trainer"] / found["bare"], "unit": "MiB"}


def measure_start(case: dict[str, Any], processes: int, steps: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"bare": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(1 + min(steps, 5)):
            for name in sorted(seconds, reverse=bool(turn % 2)):
                result = work({**case, "sides": [name], "steps": 1}, processes, Path(folder, name))
                seconds[name].append(result["seconds"][name][0])
    cold = {f"{name}_cold": taken[0] for name, taken in seconds.items()}
    warm = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    return {**warm, **cold, "ratio": warm["trainer"] / warm["bare"], "unit": "s"}


MEASURES = {"step": measure_step, "memory": measure_memory, "start": measure_start}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for precision in options.precisions:
        for mode in options.modes:
            for name in options.measures:
                if name == "start" and mode == "eager":
                    continue
                case = {"precision": precision, "compiled": mode == "compiled", "length": options.length}
                found = MEASURES[name](case, options.processes, options.steps)
                yield {"precision": precision, "mode": mode, "measure": name, **found}


def line(row: dict[str, Any]) -> str:
    text = (
        f"{row['precision']:9} {row['mode']:9} {row['measure']:7} {row['ratio']:.3f} (limit "
        f"{LIMITS[row['measure']]})   trainer {row['trainer']:.4g} {row['unit']}, bare {row['bare']:.4g}"
    )
    if "quartiles" in row:
        text += "   quartiles {:.3f} and {:.3f}".format(*row["quartiles"])
    if "bare_cold" in row:
        text += f"   with no cache {row['trainer_cold']:.4g}, {row['bare_cold']:.4g}"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps, after three that don't count")
    for name, values in (
        ("precisions", ("float32", "bfloat16")),
        ("modes", ("eager", "compiled")),
        ("measures", tuple(MEASURES)),
    ):
        parser.add_argument(f"--{name}", nargs="+", default=values, choices=values)
    parser.add_argument("--processes", type=int, default=1, help="on this machine; above 1 both take FSDP2")
    parser.add_argument(
        "--length", type=int, default=256, help="tokens in each of the 8 sequences of a batch"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--smoke", action="store_true", help="seconds: does it work at all?")
    options = parser.parse_args(argv)
    if options.smoke:
        options.steps, options.length = 1, 16
        options.precisions, options.modes, options.measures = ["float32"], ["eager"], ["step"]
    if min(options.steps, options.processes, options.length) < 1:
        parser.error("--steps, --processes and --length must be at least 1")

    found = []
    print(f"trainer / bare, {options.processes} processes, {options.steps} pairs of steps", flush=True)
    for row in rows(options):
        found.append(row)
        if "machine" in row and len(found) == 1:
            print(", ".join(f"{name} {value}" for name, value in row["machine"].items()))
        print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
