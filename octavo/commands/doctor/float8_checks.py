"""Which recipes run on hardware here and which are emulated, and whether each way of multiplying is right."""

from collections.abc import Iterator

import torch

from octavo.commands.doctor.findings import Finding, fail, note, ok
from octavo.train import quantization


def look(device: torch.device) -> Iterator[Finding]:
    """The recipes by the path they take, and what the products are worth."""
    recipes_of: dict[str, list[str]] = {}
    for name, path in quantization.describe_recipes(device).items():
        recipes_of.setdefault(path, []).append(name)
    for path, names in recipes_of.items():
        told = f"{', '.join(names)}\n{path}"
        yield ok("recipes", told) if path.startswith("hardware:") else note("recipes", told)
    checks = list(quantization.check_products(device))
    for check in checks:
        if check.passed:
            continue
        what = check.failure or (
            "the casts have other bits than a CPU's"
            if not check.casts_equal
            else f"the result is {check.error:.1e} off, {check.allowed:.0e} is allowed"
        )
        yield fail(
            "float8",
            f"{check.recipe} {check.gemm} through {check.backend}: {what}",
            "--float8.emulate avoids the hardware's products, OCTAVO_KERNELS=0 the casting kernels",
        )
    right = [check for check in checks if check.passed]
    if right:
        paths = ", ".join(dict.fromkeys(check.backend for check in right))
        worst = max(check.error for check in right)
        yield ok("float8", f"{len(right)} products tried ({paths}): right, at most {worst:.0e} off float64")
