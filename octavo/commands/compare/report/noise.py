"""The statistics of a comparison: when is a gap between two losses larger than noise?

The runs read the same batches, so the noise of the batches, which dominates a loss curve, cancels in the
difference of two runs at each step. A recipe's difference is compared with the differences between runs of
the baseline that differ only in the seed of their initial weights. If a recipe changes the loss by less than
that, its effect cannot be distinguished from a change of the seed.

    l(t)    mean of the last w losses of a run up to report t; w is a twentieth of the reports
    g(t)    l of the recipe's run - l of the baseline's, which started from the same weights
    v(t)    variance of l(t) over the n seeds of the baseline (divided by n - 1)
    s2(t)   mean of v over a fifth of the run around t
    b(t)    q sqrt(2 s2(t)), with q the 97.5% quantile of Student's t for n - 1 degrees of freedom

So at one step the difference of two seeds is within b in 19 cases of 20, for any number of seeds that
estimate the variance: two give q = 12.7, three 4.3, six 2.6. (With a fixed q of 2, as if three seeds gave the
variance exactly, a fourth seed leaves the band somewhere in seven runs of ten; with this q in one of nine;
`test_noise.py` simulates both.) A recipe is inside if |g(t)| <= b(t) from the first whole window to the last
report.

The band does not detect a small steady gap. So the mean difference over the second half of the run is
reported too, with an interval from the means of `BATCHES` parts of it (the method of batch means), and the
number of steps of the baseline's training that it is worth. The interval is about these two runs; it does not
include the divergence of two runs by rounding alone.

Gaps are in nats per token; positive is worse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

BATCHES = 8
# 97.5% quantiles of Student's t with 1, 2, … degrees of freedom.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_WINDOWS = 20  # smoothing windows per run
_SPANS = 5  # spans of the variance's mean per run


def deviations(values: int) -> float:
    """How many standard deviations, estimated from so many values, contain 95%."""
    freedom = values - 1
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.46 / freedom


def smoothing_window(reports: int) -> int:
    """The number of losses that a smoothed loss is the mean of, for a run with so many reports."""
    return max(1, round(reports / _WINDOWS))


def smooth(losses: Mapping[int, float], window: int) -> dict[int, float]:
    """step -> mean of the last `window` finite losses up to that step, from the first complete window on."""
    steps = [step for step, loss in losses.items() if math.isfinite(loss)]
    return {
        steps[i]: fmean(losses[step] for step in steps[i - window + 1 : i + 1])
        for i in range(window - 1, len(steps))
    }


def gap(losses: Mapping[int, float], baseline: Mapping[int, float], window: int) -> dict[int, float]:
    """step -> difference of the smoothed losses, for the steps that both runs report."""
    both = {step: loss - baseline[step] for step, loss in losses.items() if step in baseline}
    return smooth(both, window)


def noise_band(seeds: Sequence[Mapping[int, float]], window: int) -> dict[int, float]:
    """step -> half-width b of the band, from the losses of the baseline's seeds; empty for fewer than two."""
    if len(seeds) < 2:
        return {}
    smoothed = [smooth(losses, window) for losses in seeds]
    steps = [step for step in smoothed[0] if all(step in one for one in smoothed)]
    variances = [stdev(one[step] for one in smoothed) ** 2 for step in steps]
    half = max(window, len(steps) // (2 * _SPANS))
    band = {}
    for i, step in enumerate(steps):
        around = variances[max(0, i - half) : i + half + 1]
        band[step] = deviations(len(seeds)) * math.sqrt(2 * fmean(around))
    return band


@dataclass(frozen=True)
class Widest:
    """Where a gap is largest relative to the band: the step, the gap, the band's half-width, |gap| / band."""

    step: int
    gap: float
    band: float
    share: float

    @property
    def inside(self) -> bool:
        return self.share <= 1


def widest(gaps: Mapping[int, float], band: Mapping[int, float]) -> Widest | None:
    """Return where the gap is largest relative to the band; None if they have no common step."""
    steps = [step for step in gaps if step in band]
    if not steps:
        return None

    def share(step: int) -> float:
        if band[step]:
            return abs(gaps[step]) / band[step]
        return math.inf if gaps[step] else 0.0

    step = max(steps, key=share)
    return Widest(step, gaps[step], band[step], share(step))


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95% interval."""

    mean: float
    half_width: float


def mean_difference(losses: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """Return the mean difference over the second half of the common steps, with an interval from batch means;
    None for fewer than two differences per batch.
    """
    differences = [
        loss - baseline[step]
        for step, loss in losses.items()
        if step in baseline and math.isfinite(loss) and math.isfinite(baseline[step])
    ]
    late = differences[len(differences) // 2 :]
    size = len(late) // BATCHES
    if size < 2:
        return None
    late = late[len(late) - size * BATCHES :]
    means = [fmean(late[i : i + size]) for i in range(0, len(late), size)]
    half_width = deviations(BATCHES) * stdev(means) / math.sqrt(BATCHES)
    return Interval(fmean(means), half_width)


def slope(smoothed: Mapping[int, float]) -> float:
    """Slope of the least-squares line through the second half of a smoothed loss, in nats per step."""
    points = list(smoothed.items())[len(smoothed) // 2 :]
    if len(points) < 2:
        return 0.0
    x_mean, y_mean = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = math.fsum((x - x_mean) ** 2 for x, _ in points)
    return math.fsum((x - x_mean) * (y - y_mean) for x, y in points) / spread


def steps_behind(
    mean: Interval | None, smoothed: Mapping[int, float], baseline: Mapping[int, float]
) -> float | None:
    """Return how many steps earlier the baseline had the run's loss; negative if later. mean: their
    difference.

    A small gap is divided by the baseline's slope, which is nearly constant over its second half. For a gap
    worth more than half of that, the step at which the baseline had the run's last loss is looked up. None if
    the baseline does not fall, or never had that loss.
    """
    falls = -slope(baseline)
    if mean is None or falls <= 0 or not smoothed:
        return None
    steps = mean.mean / falls
    last, known = max(smoothed), max(baseline) - min(baseline)
    if abs(steps) <= known / 4:
        return steps
    reached = first_below(baseline, smoothed[last])
    return None if steps < 0 or reached is None else float(last - reached)


def first_below(smoothed: Mapping[int, float], target: float) -> int | None:
    """Return the first step whose loss is at most `target`; None if there is none."""
    return next((step for step, loss in smoothed.items() if loss <= target), None)
