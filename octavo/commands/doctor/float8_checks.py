"""Checks which recipes run on hardware here, and whether each GEMM backend computes correct products."""

from collections.abc import Iterator

import torch

from octavo.commands.doctor.findings import Finding, fail, note, ok
from octavo.train import quantization


def check_float8(device: torch.device) -> Iterator[Finding]:
    recipes: dict[str, list[str]] = {}  # by the description of how they are computed
    for name, description in quantization.describe_recipes(device).items():
        recipes.setdefault(description, []).append(name)
    for description, names in recipes.items():
        report = ok if description.startswith("hardware:") else note
        yield report("recipes", f"{', '.join(names)}\n{description}")
    passed = []
    for check in quantization.check_products(device):
        if check.passed:
            passed.append(check)
            continue
        problem = check.failure
        if not problem and not check.casts_equal:
            problem = "the casts differ from a CPU's"
        yield fail(
            "float8",
            f"{check.recipe} {check.gemm} through {check.backend}: "
            + (problem or f"the result is {check.error:.1e} off, {check.allowed:.0e} is allowed"),
            "--float8.emulate avoids the hardware's products, OCTAVO_KERNELS=0 the casting kernels",
        )
    if passed:
        backends = ", ".join(dict.fromkeys(check.backend for check in passed))
        error = max(check.error for check in passed)
        yield ok(
            "float8", f"{len(passed)} products tried ({backends}): correct, at most {error:.0e} off float64"
        )
