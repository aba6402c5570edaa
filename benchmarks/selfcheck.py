"""Every float8 product of every recipe on this device, against float64; every cast, against a CPU's bits.

    python benchmarks/selfcheck.py --out results      # seconds; exit code 1 if a check fails

The checks are those of `octavo.float8.checks.selfcheck`. `--out` writes `selfcheck.json` into a folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness.machine import describe
from octavo.float8.checks.selfcheck import check_device


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for selfcheck.json")
    out = parser.parse_args().out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks = []
    for check in check_device(device):
        verdict = "passed" if check.passed else f"FAILED {check.failure}"
        print(f"{check.recipe} {check.gemm} {check.backend}: error {check.error:.1e}, {verdict}", flush=True)
        checks.append(asdict(check) | {"passed": check.passed})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        result = {"machine": describe(device), "checks": checks}
        (out / "selfcheck.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(check["passed"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
