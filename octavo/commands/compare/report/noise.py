"""When is a gap between two losses more than noise? The statistics of a comparison, on plain numbers.

The runs read the same batches, so the noise of the batches, which is what a loss curve mostly shows, cancels
in the difference of two runs, step by step. What a recipe's difference is measured against is how far two
runs of the baseline lie apart that differ in the seed of their initial weights alone, which nobody chooses. A
recipe that moves the loss less than that has cost nothing that could be told from luck.

    l(t)    mean of the last w losses of a run up to report t; w is a twentieth of the reports
    g(t)    l of the recipe's run - l of the baseline's, which started from the same weights
    v(t)    variance of l(t) over the n seeds of the baseline (divided by n - 1)
    s2(t)   mean of v over a fifth of the run around t
    b(t)    q sqrt(2 s2(t)), with q the 97.5% quantile of Student's t for n - 1 degrees of freedom

So at one step the difference of two seeds is within b in 19 cases of 20, however few seeds have told the
variance: two give q = 12.7, three 4.3, six 2.6. (With a fixed q of 2, as if three seeds told the variance
exactly, a fourth leaves the band somewhere in seven runs of ten; with this q in one of nine;
`test_noise.py` draws them.) A recipe is inside if |g(t)| <= b(t) from the first whole window to the last
report.

The band cannot tell a small steady gap. So the mean difference over the second half of the run is told as
well, with an interval from the means of `BATCHES` stretches of it (the method of batch means), and how many
steps of the baseline's training it is worth. The interval takes the two runs as they are: how far rounding
alone drives two runs apart it does not know.

Gaps are in nats per token; positive is worse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

BATCHES = 8
# 97.5% quantiles of Student's t with 1, 2, … degrees of freedom, as any table of it has them.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_WINDOWS = 20  # in a run
_SPANS = 5


def deviations(values: int) -> float:
    """How many estimated standard deviations hold 95%, where so many values gave the estimate."""
    freedom = values - 1
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.46 / freedom


def window_of(reports: int) -> int:
    """How many reports a smoothed loss covers, in a run of so many."""
    return max(1, round(reports / _WINDOWS))


def smooth(losses: Mapping[int, float], window: int) -> dict[int, float]:
    """step -> mean of the last `window` finite losses up to that step, from the first whole window on."""
    steps = [step for step, loss in losses.items() if math.isfinite(loss)]
    return {
        steps[i]: fmean(losses[step] for step in steps[i - window + 1 : i + 1])
        for i in range(window - 1, len(steps))
    }


def gap(losses: Mapping[int, float], baseline: Mapping[int, float], window: int) -> dict[int, float]:
    """step -> difference of the smoothed losses, over the steps that both runs report."""
    both = {step: loss - baseline[step] for step, loss in losses.items() if step in baseline}
    return smooth(both, window)


def noise_band(seeds: Sequence[Mapping[int, float]], window: int) -> dict[int, float]:
    """step -> half-width b of the band, from the losses of the baseline's seeds; empty for fewer than two."""
    if len(seeds) < 2:
        return {}
    smoothed = [smooth(losses, window) for losses in seeds]
    steps = [step for step in smoothed[0] if all(step in one for one in smoothed)]
    if not steps:
        return {}
    variances = [stdev(one[step] for one in smoothed) ** 2 for step in steps]
    half = max(window, len(steps) // (2 * _SPANS))
    band = {}
    for i, step in enumerate(steps):
        around = variances[max(0, i - half) : i + half + 1]
        band[step] = deviations(len(seeds)) * math.sqrt(2 * fmean(around))
    return band


@dataclass(frozen=True)
class Widest:
    """Where a gap is largest in proportion to the band: the step, the gap there, the band's half-width, and
    gap / band in magnitude.
    """

    step: int
    gap: float
    band: float
    share: float

    @property
    def inside(self) -> bool:
        return self.share <= 1


def widest(gaps: Mapping[int, float], band: Mapping[int, float]) -> Widest | None:
    """Where `gaps` come closest to leaving the band, or leave it furthest; None where they share no step."""
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

    @property
    def beside_zero(self) -> bool:
        return abs(self.mean) > self.half_width


def mean_difference(losses: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """The mean difference per step over the second half of the steps that both report, by batch means; None
    for fewer than two in a batch.
    """
    both = [
        loss - baseline[step]
        for step, loss in losses.items()
        if step in baseline and math.isfinite(loss) and math.isfinite(baseline[step])
    ]
    late = both[len(both) // 2 :]
    size = len(late) // BATCHES
    if size < 2:
        return None
    late = late[len(late) - size * BATCHES :]
    means = [fmean(late[i : i + size]) for i in range(0, len(late), size)]
    half_width = deviations(BATCHES) * stdev(means) / math.sqrt(BATCHES)
    return Interval(fmean(means), half_width)


def slope(smoothed: Mapping[int, float]) -> float:
    """Nats per step by which a smoothed loss changes over its second half: a least-squares line."""
    points = list(smoothed.items())[len(smoothed) // 2 :]
    if len(points) < 2:
        return 0.0
    x_mean, y_mean = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = math.fsum((x - x_mean) ** 2 for x, _ in points)
    return math.fsum((x - x_mean) * (y - y_mean) for x, y in points) / spread


def steps_behind(
    mean: Interval | None, smoothed: Mapping[int, float], baseline: Mapping[int, float]
) -> float | None:
    """How many steps earlier the baseline had a run's loss; negative: later. mean: of their differences.

    A small gap over the slope of the baseline, which is nearly a line over its second half. A gap that is
    worth more than half of that is looked up instead: when did the baseline have the loss that the run ends
    with? None where the baseline does not fall, or never had it.
    """
    falls = -slope(baseline)
    if mean is None or falls <= 0 or not smoothed:
        return None
    steps = mean.mean / falls
    last, known = max(smoothed), max(baseline) - min(baseline)
    if abs(steps) <= known / 4:
        return steps
    reached = first_below(baseline, smoothed[max(smoothed)])
    return None if steps < 0 or reached is None else float(last - reached)


def first_below(smoothed: Mapping[int, float], target: float) -> int | None:
    """The first step whose smoothed loss is at most `target`; None if it never is."""
    return next((step for step, loss in smoothed.items() if loss <= target), None)
