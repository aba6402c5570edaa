"""The command line that all GPU benchmarks share, and the clock they run against."""

from __future__ import annotations

import argparse
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch

from octavo.roofline import Gpu, find_gpu, gpu_of


@dataclass
class Budget:
    """Time that a benchmark may take, and what it left out for want of it."""

    minutes: float
    started: float = field(default_factory=time.perf_counter)
    left_out: list[str] = field(default_factory=list)

    @property
    def until(self) -> float:
        return self.started + 60 * self.minutes

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return time.perf_counter() - self.started

    def over(self, what: str) -> bool:
        """Whether there is no time left for `what`, which is then noted as left out."""
        if time.perf_counter() < self.until:
            return False
        self.left_out.append(what)
        return True


@dataclass(frozen=True)
class Options:
    """What was asked for. `own` are the benchmark's own flags."""

    device: torch.device
    smoke: bool
    rounds: int
    out: Path | None
    predict: str | None
    budget: Budget
    own: argparse.Namespace

    @property
    def gpu(self) -> Gpu | None:
        """What the roofline model knows of the device: of --predict's, or of the one here; None: nothing."""
        if self.predict is not None:
            return find_gpu(self.predict)
        return gpu_of(torch.cuda.get_device_name()) if self.device.type == "cuda" else None


def parse(
    description: str | None,
    *,
    rounds: int,
    minutes: float = 9.0,
    parser: argparse.ArgumentParser | None = None,
) -> Options:
    """The command line of a benchmark; `parser` has its own flags. `rounds` and `minutes` are defaults."""
    parser = parser or argparse.ArgumentParser()
    parser.description = description
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds: does it work at all?")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds, {rounds} if not given")
    parser.add_argument("--minutes", type=float, default=minutes, help="no comparison begins after so many")
    parser.add_argument("--out", type=Path, help="folder for JSON, table and plot (benchmarks/results)")
    parser.add_argument(
        "--predict",
        metavar="DEVICE",
        help="measure nothing: print what the roofline model says for this device, e.g. H100",
    )
    own = parser.parse_args()
    if own.rounds < 1 or own.minutes <= 0:
        parser.error("--rounds must be at least 1, --minutes above 0")
    if own.predict is not None:
        try:
            find_gpu(own.predict)
        except ValueError as error:
            parser.error(f"--predict: {error}")
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not own.smoke and own.predict is None:
        parser.error(
            "there is no GPU here: --smoke tries the benchmark out, --predict H100 tells what to expect"
        )
    rounds = min(own.rounds, 3) if own.smoke else own.rounds
    return Options(device, own.smoke, rounds, own.out, own.predict, Budget(own.minutes), own)
