"""How long a user waits: seconds from `./run_train.sh` to the first step, and from the last line to the
prompt.

    python benchmarks/startup.py [--rounds 5] [--json FILE]

The demo config as it is, with two processes, and compiled. The first start, told apart, finds no tokens and
no compiled code kept; the rounds after it, whose medians are told, find both. The sides take turns, and the
one that goes first changes each round. Lines are timed as they appear:

    launched   the options are judged, and Python has torch and octavo loaded
    built      tokens, model and optimizer are there
    stepped    the first step is done
    left       from the last line to the prompt
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from octavo.train.run_record import processor

ROOT = Path(__file__).resolve().parents[1]
SIDES: dict[str, tuple[int, tuple[str, ...]]] = {  # processes, options
    "demo": (1, ()),
    "two processes": (2, ()),
    "compiled": (1, ("--training.compile",)),
    "two processes, compiled": (2, ("--training.compile",)),
}
LINES = {"launched": " Starting job: ", "built": " Training starts at step ", "stepped": " step:  1 "}
PHASES = (*LINES, "left")


def start(side: str, folder: Path, options: tuple[str, ...] = ()) -> dict[str, float]:
    """Start `side` once, with its files in `folder`; returns seconds since the command, and to leave."""
    processes, own = SIDES[side]
    environ = {**os.environ, "NGPU": str(processes)}
    environ.setdefault("OCTAVO_PYTHON", sys.executable)
    environ["XDG_CACHE_HOME"] = environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    command = [str(ROOT / "run_train.sh"), "--training.steps=2", f"--job.dump_folder={folder / 'run'}"]
    seen: dict[str, float] = {}
    lines = []
    began = last = time.perf_counter()
    with subprocess.Popen(
        [*command, *own, *options], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = time.perf_counter()
            lines.append(line)
            for phase, text in LINES.items():
                if text in line:
                    seen.setdefault(phase, last - began)
        process.wait()
        seen["left"] = time.perf_counter() - last
    if process.returncode or set(seen) != set(PHASES):
        sys.exit(f"{side}: exit code {process.returncode}\n{''.join(lines)}")
    return seen


def measure(folder: Path, sides: list[str], rounds: int, options: tuple[str, ...]) -> dict[str, list]:
    """Every start by side; the first is the one with empty caches, and no round where there are several."""
    starts: dict[str, list] = {side: [] for side in sides}
    for number in range(rounds + (rounds > 1)):
        for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
            own = folder / side.replace(" ", "_")
            own.mkdir(exist_ok=True)
            starts[side].append(start(side, own, options))
    return starts


def main() -> None:
    """Print the seconds."""
    parser = argparse.ArgumentParser(
        description="Seconds to the first step, and from the last line to the prompt."
    )
    parser.add_argument("--rounds", type=int, default=5, help="starts with full caches")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="seconds: does it work at all?")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    options: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory(prefix="octavo-benchmark-") as name:
        folder = Path(name)
        if given.smoke:
            (folder / "text.txt").write_text("A line of text to train on.\n" * 500)
            given.rounds, given.sides = 1, ["demo", "two processes"]
            options = (f"--training.dataset={folder / 'text.txt'}", "--training.seq_len=16")
        starts = measure(folder, given.sides, given.rounds, options)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers")}
    result = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
        "rounds": given.rounds,
        "starts": starts,
    }
    print(f"{result['processor']}, {result['cores']} cores; torch {versions['torch']}; {given.rounds} rounds")
    print(f"{'':25}{''.join(f'{phase:>10}' for phase in PHASES)}   first start stepped")
    for side, taken in starts.items():
        counted = taken[1:] or taken
        medians = [statistics.median(one[phase] for one in counted) for phase in PHASES]
        print(f"{side:25}{''.join(f'{value:10.2f}' for value in medians)}{taken[0]['stepped']:22.2f}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
