"""Every matrix product of Llama 3 8B and 70B: bfloat16 against float8, on operands cast beforehand and with
their casts.

    python benchmarks/gemm.py --out benchmarks/results          # some 4 minutes on an H100
    python benchmarks/gemm.py --predict H100                    # what the roofline model expects
    python benchmarks/gemm.py --smoke                           # tiny products, also on a CPU

What it answers: which shapes gain from float8 at all, what fast accumulation is worth, what one fused product
for wq, wk, wv (or w1, w3) gains over three (two), and how much of the gain the casts eat. Operands are normal
random numbers: of zeros a GPU draws less power and clocks higher. "with casts" casts both operands at every
product, which is the worst case: in training a cast serves several products, and a weight's a whole step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import sizes
from benchmarks.harness.comparison import Side, compare, predicted_only
from benchmarks.harness.machine import Conditions
from benchmarks.harness.options import Options, parse
from benchmarks.harness.report import Report
from octavo.commands.argparser import bounded_int
from octavo.float8 import RECIPES, Gemm
from octavo.float8.matmul import choose_backend, matmul
from octavo.float8.quantize import quantize
from octavo.roofline import Gpu, Shape, Tensors, cast_seconds, gemm_seconds

TOKENS = 8192
RECIPES_TIMED = ("tensorwise", "rowwise", "blockwise")
# Bytes of one cast over those of both casts of a tensor: along memory, and transposed.
ONE_CAST = {"tensorwise": (5 / 6, 5 / 6), "rowwise": (3 / 6, 5 / 6), "blockwise": (3 / 4, 3 / 4)}
PRODUCTS = ("output", "grad_input", "grad_weight")


@dataclass(frozen=True)
class Case:
    """One product `a[M, C] . b[N, C]^T` of a linear: `product` is a field of `Recipe`.

    M rows, C contraction, N columns, after `rows_first`: for grad_weight both operands are transposes of what
    lies in memory, for grad_input b is.
    """

    model: str
    linear: str
    product: str
    M: int
    C: int
    N: int

    @property
    def title(self) -> str:
        return f"{self.model} {self.linear} {self.product}"

    @property
    def flops(self) -> float:
        return 2.0 * self.M * self.C * self.N

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Normal random bfloat16, `[M, C]` and `[N, C]`, each as it lies in memory during training."""
        a = torch.randn(self.M, self.C, device=device, dtype=torch.bfloat16)
        b = torch.randn(self.N, self.C, device=device, dtype=torch.bfloat16)
        if self.product == "grad_weight":
            a = a.t().contiguous().t()
        if self.product != "output":
            b = b.t().contiguous().t()
        return a, b


def cases(smoke: bool, models: list[str], tokens: int) -> Iterator[Case]:
    """All products, a model at a time, the largest first: a time limit leaves out the small ones."""
    args_of = {"smoke": sizes.SMOKE} if smoke else {name: sizes.model(name) for name in models}
    for name, args in args_of.items():
        found = [
            Case(name, linear, product, m, c, n)
            for linear, (K, N) in sizes.linears(args).items()
            for product, (m, c, n) in zip(
                PRODUCTS, ((tokens, K, N), (tokens, N, K), (N, tokens, K)), strict=True
            )
        ]
        yield from sorted(found, key=lambda case: case.flops, reverse=True)


def ways(case: Case) -> dict[str, Gemm]:
    """Names of the float8 sides -> how they multiply: fast accumulation off and on where hardware has it."""
    found: dict[str, Gemm] = {}
    for name in RECIPES_TIMED:
        gemm = RECIPES[name].gemms[case.product]
        found[name] = replace(gemm, fast_accum=False)
        if name != "blockwise":
            found[f"{name} fast"] = replace(gemm, fast_accum=True)
    return found


def predictions(case: Case, gpu: Gpu | None) -> dict[str, float | None]:
    """Seconds of every side. Fast accumulation is not in the model."""
    names = ["bf16", *ways(case), *(f"{name} with casts" for name in RECIPES_TIMED)]
    if gpu is None:
        return dict.fromkeys(names)
    high = gemm_seconds(gpu, Shape(case.M, case.C, case.N))
    if gpu.float8 is None:  # no units, no float8 side
        return {"bf16": high}
    low = gemm_seconds(gpu, Shape(case.M, case.C, case.N, float8=True))
    found: dict[str, float | None] = {name: high if name == "bf16" else low for name in names}
    a_lies, b_lies = case.product != "grad_weight", case.product == "output"  # along memory
    for name in RECIPES_TIMED:
        seconds = low
        for rows, along in ((case.M, a_lies), (case.N, b_lies)):
            tensors = Tensors((0.0, 0.0, float(rows * case.C)), (0.0, 0.0, 0.0), 0.0)
            seconds += cast_seconds(gpu, tensors, name, "kernels") * ONE_CAST[name][not along]
        found[f"{name} with casts"] = seconds
    return found


def sides(case: Case, options: Options, report: Report) -> dict[str, Side]:
    """The calls. On a CPU the products are emulated; on a GPU what has no hardware path is left out."""
    a, b = case.operands(options.device)
    emulate = options.device.type == "cpu"
    told = predictions(case, options.gpu)
    found = {"bf16": Side(partial(torch.mm, a, b.t()), told["bf16"])}
    for name, gemm in ways(case).items():
        try:
            choose_backend(gemm, options.device, emulate)
        except ValueError as error:
            report.summary[f"{name}, not run"] = str(error)
            continue
        assert gemm.a is not None
        assert gemm.b is not None
        a_q, b_q = quantize(a, gemm.a), quantize(b, gemm.b)
        found[name] = Side(partial(matmul, a_q, b_q, gemm, a.dtype, emulate=emulate), told[name])
    for name in RECIPES_TIMED:
        if name in found:
            whole = partial(_cast_and_multiply, a, b, RECIPES[name].gemms[case.product], emulate)
            found[f"{name} with casts"] = Side(whole, told[f"{name} with casts"])
    return found


def _cast_and_multiply(a: Tensor, b: Tensor, gemm: Gemm, emulate: bool) -> Tensor:
    assert gemm.a is not None
    assert gemm.b is not None
    return matmul(quantize(a, gemm.a), quantize(b, gemm.b), gemm, a.dtype, emulate=emulate)


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["8B", "70B"], choices=["8B", "70B", "405B"])
    parser.add_argument("--tokens", type=bounded_int(1), default=TOKENS, help="M")
    options = parse(__doc__, rounds=20, parser=parser)
    tokens = 32 if options.smoke else options.own.tokens
    report = Report("gemm", options, {"tokens": tokens, "rounds": options.rounds}, {"tflops": "{:.0f}"})
    report.columns = {"tflops": "{:.0f} TFLOP/s" if not options.smoke else "{:.4f} TFLOP/s"}
    report.begin()
    if options.gpu is not None and options.gpu.float8 is None:
        report.summary["float8, not run"] = f"{options.gpu.name} has no units for it"
    torch.manual_seed(0)
    with Conditions(options.device) as conditions:
        for case in cases(options.smoke, options.own.models, tokens):
            if options.budget.over(case.title):
                continue
            facts = {"M": case.M, "contraction": case.C, "N": case.N}
            if options.predict is not None:
                report.add(predicted_only(case.title, predictions(case, options.gpu), facts))
                continue
            result = compare(case.title, sides(case, options, report), options, facts=facts)
            for side in result["sides"].values():
                side["tflops"] = case.flops / side["ms"]["median"] / 1e9
            report.add(result)
    return report.finish(None if options.predict else conditions)


if __name__ == "__main__":
    main()
