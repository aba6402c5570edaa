"""GB/s of every cast kernel, against copying as many bytes, against compiled PyTorch, and against torchao.

    python benchmarks/cast_bandwidth.py --out benchmarks/results        # some 4 minutes on an H100
    python benchmarks/cast_bandwidth.py --predict H100
    python benchmarks/cast_bandwidth.py --smoke                         # tiny tensors, also on a CPU

What it answers: whether a cast is as fast as memory allows. A job's bytes are those that it must move at
least: its inputs read as often as its scale demands (a maximum over the tensor, or over columns, costs a
second read), its results written once. The ceiling is `copy_` of the same number of bytes, half read and half
written, timed in the same rounds; "share" is its time over the side's, and the goal is 0.85.
`compiled` is inductor's code for the reference in PyTorch. `torchao` is its eager-mode cast, compiled, where
it has that cast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import sizes
from benchmarks.harness.comparison import Side, compare, predicted_only
from benchmarks.harness.goals import COPY_SHARE
from benchmarks.harness.machine import Conditions
from benchmarks.harness.makers import MAKERS, Maker, without_kernels
from benchmarks.harness.options import Options, parse
from benchmarks.harness.report import Report
from octavo.float8 import RECIPES, Cast
from octavo.float8.quantize import quantize_both
from octavo.roofline import Gpu

E4M3 = torch.float8_e4m3fn
STREAM = 0.9
"""Share of the memory's bandwidth, as it is sold, that a large copy reaches; E."""


@dataclass(frozen=True)
class Job:
    """One kernel's job on `[M, K]` bfloat16: the bytes an element that it must move, and the ways to do it.

    `make` gives the calls: ours, and those that it is compared with. `widest`: the longest row that it takes.
    """

    name: str
    bytes: float
    make: Callable[[int, int, Options], dict[str, Callable[[], object]]]
    widest: int | None = None


def random(M: int, K: int, device: torch.device) -> Tensor:
    return torch.randn(M, K, device=device, dtype=torch.bfloat16)


def _compiled(function: Callable[..., object], options: Options) -> Callable[..., object]:
    """Inductor's version; in a smoke run the function itself, since compiling takes longer than it."""
    return function if options.smoke else torch.compile(function, fullgraph=True, dynamic=False)


def cast_job(name: str, row: Cast | None, col: Cast | None, bytes_: float, torchao: str | None = None) -> Job:
    """`quantize_both`, by our kernel and by the compiler."""

    def make(M: int, K: int, options: Options) -> dict[str, Callable[[], object]]:
        x = random(M, K, options.device)
        plain = _compiled(partial(quantize_both, row=row, col=col), options)

        calls: dict[str, Callable[[], object]] = {"octavo": partial(quantize_both, x, row, col)}
        calls["compiled"] = partial(without_kernels, plain, x)
        theirs = torchao and _torchao(torchao, x, options)
        if theirs:
            calls["torchao"] = theirs
        return calls

    return Job(name, bytes_, make)


def _torchao(granularity: str, x: Tensor, options: Options) -> Callable[[], object] | None:
    """torchao's cast of x, and of its transpose, as its linear makes them."""
    try:
        from torchao.float8.config import ScalingGranularity
        from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
        from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig
    except ImportError:
        return None
    axiswise = granularity == "axiswise"
    how = ScalingGranularity.AXISWISE if axiswise else ScalingGranularity.TENSORWISE

    def both(x: Tensor) -> tuple[Tensor, ...]:
        def cast(t: Tensor, dim: int) -> Tensor:
            return hp_tensor_to_float8_dynamic(
                t,
                E4M3,
                LinearMMConfig(),
                gemm_input_role=GemmInputRole.INPUT,
                scaling_granularity=how,
                axiswise_dim=dim if axiswise else None,
                round_scales_to_power_of_2=axiswise,
            )._data

        if not axiswise:  # one cast, and a transposed copy of its data
            data = cast(x, -1)
            return data, data.t().contiguous()
        return cast(x, -1), cast(x, 0).t().contiguous()

    return partial(_compiled(both, options), x)


def maker_job(name: str, maker: Maker) -> Job:
    """A kernel that does more than cast, and what it replaces; nothing without a GPU and triton."""

    def make(M: int, K: int, options: Options) -> dict[str, Callable[[], object]]:
        if options.device.type != "cuda":
            return {}
        kernel, plain = maker.make(M, K, options.device, partial(_compiled, options=options))
        return {"octavo": kernel, "compiled": plain}

    return Job(name, maker.bytes, make, maker.widest)


def jobs() -> Iterator[Job]:
    """Bytes an element: 2 for a read or a write of bfloat16, 1 for float8."""
    tensor, row = RECIPES["tensorwise"].output.a, RECIPES["rowwise"].output.a
    block, tile, mx = RECIPES["blockwise"].output.a, RECIPES["blockwise"].output.b, RECIPES["mxfp8"].output.a
    assert tensor is not None
    yield cast_job("tensor, both", tensor, tensor, 2 + 2 + 1 + 1, "tensorwise")
    yield cast_job("tensor e5m2, both", *[replace(tensor, format=torch.float8_e5m2)] * 2, 2 + 2 + 1 + 1)
    yield cast_job("rows", row, None, 2 + 1)
    yield cast_job("rows and columns", row, row, 2 + 1 + 2 + 1, "axiswise")
    yield cast_job("1 x 128, both", block, block, 2 + 1 + 1)
    yield cast_job("128 x 128, both", tile, tile, 2 + 1 + 1)
    yield cast_job("MX 1 x 32, both", mx, mx, 2 + 1 + 1)
    for name, maker in MAKERS.items():
        yield maker_job(name, maker)


def shapes(smoke: bool, names: Sequence[str]) -> list[tuple[int, int]]:
    """[M, K] of activations, and of the widest weight, of each model."""
    if smoke:
        return [(64, 128)]
    found: dict[tuple[int, int], None] = {}
    for name in names:
        args = sizes.model(name)
        for shape in ((8192, args.dim), (8192, args.hidden_dim), (args.hidden_dim, args.dim)):
            found[shape] = None
    return list(found)


def predicted(job: Job, gpu: Gpu | None, elements: int) -> float | None:
    """Seconds at the goal's share of what a copy reaches."""
    return None if gpu is None else job.bytes * elements / (gpu.hbm * STREAM * COPY_SHARE)


def measure(job: Job, M: int, K: int, options: Options) -> dict[str, Any]:
    """One job on one shape, beside a copy of as many bytes."""
    calls = job.make(M, K, options)
    if options.own.ours_only:
        calls = {name: call for name, call in calls.items() if name == "octavo"}
    half = int(job.bytes * M * K) // 2
    source = torch.randint(256, (half,), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    told = None if options.gpu is None else job.bytes * M * K / (options.gpu.hbm * STREAM)
    sides = {"copy": Side(partial(target.copy_, source), told)}
    sides |= {name: Side(call, predicted(job, options.gpu, M * K)) for name, call in calls.items()}
    facts = {"M": M, "K": K, "bytes an element": job.bytes}
    result = compare(f"{job.name} [{M}, {K}]", sides, options, facts=facts)
    for side in result["sides"].values():
        side["gbps"] = job.bytes * M * K / side["ms"]["median"] / 1e6
        side["share"] = side["speedup"]["median"]
    return result


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["8B"], choices=["8B", "70B", "405B"])
    parser.add_argument("--ours-only", action="store_true", help="skip compiled PyTorch and torchao")
    options = parse(__doc__, rounds=30, parser=parser)
    report = Report(
        "cast_bandwidth", options, {"rounds": options.rounds, "goal, share of a copy": COPY_SHARE}
    )
    report.columns = {"gbps": "{:.4g} GB/s", "share": "{:.2f} of copy"}
    report.begin()
    torch.manual_seed(0)
    shares: dict[str, list[float]] = {}
    with Conditions(options.device) as conditions:
        for M, K in shapes(options.smoke, options.own.models):
            for job in jobs():
                title = f"{job.name} [{M}, {K}]"
                if (job.widest and job.widest < K) or options.budget.over(title):
                    continue
                if options.predict is not None:
                    gpu = options.gpu
                    assert gpu is not None
                    copy = job.bytes * M * K / (gpu.hbm * STREAM)
                    told = {"copy": copy, "octavo": predicted(job, gpu, M * K)}
                    report.add(predicted_only(title, told, {"bytes an element": job.bytes}))
                    continue
                if not options.smoke:
                    torch._dynamo.reset()
                result = measure(job, M, K, options)
                if len(result["sides"]) == 1:  # a kernel that is not there
                    continue
                report.add(result)
                if "octavo" in result["sides"]:
                    shares.setdefault(job.name, []).append(result["sides"]["octavo"]["share"])
    for name, values in shares.items():
        report.summary[f"{name}: least share of a copy's speed"] = min(values)
    return report.finish(None if options.predict else conditions)


if __name__ == "__main__":
    main()
