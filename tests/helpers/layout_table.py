"""Run every layout in every precision against one process; print the table of docs/parallelism_reference.md.

    python -m tests.helpers.layout_table                       all of it: an hour and more on two cores
    python -m tests.helpers.layout_table "PP 2" 'rowwise$'     the rows whose names match one of these:
                                                       all with a pipeline, and rowwise where it is eager

Each line is printed when it is measured. The exit code is 1 if one is beyond its limit.
"""

import re
import sys
import tempfile
from pathlib import Path

import torch

import tests.conftest  # noqa: F401  one thread a process, whatever the shell says
from tests.helpers import launching, layouts


def row(case: layouts.Case, told: str) -> str:
    mode = "compiled" if case.compiled else "eager"
    return f"| {case.layout} | {case.world} | {case.precision.name} | {mode} | {told} |"


def main(words: list[str]) -> int:
    chosen = [case for case in layouts.ALL if not words or any(re.search(w, case.name) for w in words)]
    print(f"torch {torch.__version__}, gloo, CPU; {layouts.BASE['training.steps']} steps of the debug model")
    print("| layout | processes | precision | mode | loss | gradient norm | validation |")
    print("|---|---|---|---|---|---|---|", flush=True)
    beyond = 0
    made: dict[str, launching.Run] = {}
    with tempfile.TemporaryDirectory() as folder:

        def alone(case: layouts.Case) -> launching.Run:
            key = str(case.alone)
            if key not in made:
                made[key] = launching.train(Path(folder) / f"alone{len(made)}", case.alone)
            return made[key]

        for number, case in enumerate(chosen):
            try:
                found = layouts.measure(case, alone, Path(folder) / str(number))
            except AssertionError as error:
                print(row(case, "failed | | "), f"\n{error}", flush=True)
                beyond += 1
                continue
            told = f"{found.loss:.1e} | {found.grad_norm:.1e} | {found.validation:.1e}"
            good = max(found.loss, found.grad_norm) <= case.precision.limit
            beyond += not good
            print(row(case, told if good else f"{told} BEYOND {case.precision.limit:g}"), flush=True)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
