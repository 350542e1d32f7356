"""Means, standard deviations over seeds, and the paired bootstrap over test items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

RESAMPLES = 10_000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 20240311
_INDICES_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with the lower and upper end of its percentile interval, in the unit of the estimate."""

    estimate: float
    low: float
    high: float

    @property
    def verdict(self) -> int:
        """+1 when the whole interval lies above 0, -1 when it lies below, 0 when it contains 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Gain:
    """Gain over a baseline: `absolute` in the unit of the score, `relative` in percent of the baseline."""

    absolute: Interval
    relative: Interval


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (divisor n - 1) over seeds.

    With a single value the standard deviation is unknown, hence NaN (a blank in tables) and never 0.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))


def bootstrap_mean(scores: numpy.ndarray, seed: int, resamples: int = RESAMPLES, confidence: float = CONFIDENCE) -> Interval:
    """Percentile-bootstrap interval of the mean of `scores`.

    Args:
        scores: (items,) float, one score per test item (averaged over seeds).
        seed: of the resampling; the same seed gives the same interval.
        resamples: number of bootstrap samples, each of `items` items drawn with replacement.
        confidence: mass between the two ends of the interval.
    """
    means = _resampled_means(scores[None], seed, resamples)[0]
    return _percentile_interval(float(scores.mean()), means, confidence)


def paired_bootstrap(
    baseline: numpy.ndarray,
    system: numpy.ndarray,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Gain:
    """Gain of `system` over `baseline` with percentile-bootstrap intervals, paired by test item.

    Let b_i and s_i be the scores of item i = 1..N, each averaged over the seeds of its system. The gain is

        absolute  D = mean(s) - mean(b)              relative  R = 100 D / mean(b)

    A resample draws N items with replacement, the SAME items for both systems, and recomputes D and R; the
    interval runs from the (1 - confidence) / 2 to the (1 + confidence) / 2 quantile of these values (Efron's
    percentile interval; Koehn 2004 for paired resampling over test items). It tells how far the gain depends
    on which test items were drawn. It does not cover the choice of seeds, which the standard deviation over
    seeds shows, and it treats items as independent although questions may share an image.

    Args:
        baseline, system: (items,) float, in the same item order.
        seed, resamples, confidence: as in `bootstrap_mean`.

    Returns:
        Gain; `relative` is NaN throughout when the mean of the baseline is not positive.

    Raises:
        ValueError: the two arrays differ in shape, or are empty.
    """
    import numpy as np

    if baseline.shape != system.shape or baseline.size == 0:
        raise ValueError(f"paired scores need one shape and an item: {baseline.shape} against {system.shape}")
    baseline_means, system_means = _resampled_means(np.stack([baseline, system]), seed, resamples)
    baseline_mean, system_mean = float(baseline.mean()), float(system.mean())
    differences = system_means - baseline_means
    absolute = _percentile_interval(system_mean - baseline_mean, differences, confidence)
    if baseline_mean <= 0 or baseline_means.min() <= 0:
        return Gain(absolute, Interval(math.nan, math.nan, math.nan))
    relative = _percentile_interval(
        100 * (system_mean - baseline_mean) / baseline_mean, 100 * differences / baseline_means, confidence
    )
    return Gain(absolute, relative)


def _resampled_means(scores: numpy.ndarray, seed: int, resamples: int) -> numpy.ndarray:
    """Means of `scores` (systems, items) over resampled items: (systems, resamples) float64.

    Works through the resamples in chunks, so that memory does not grow with their number.
    """
    import numpy as np

    systems, items = scores.shape
    scores = np.asarray(scores, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty((systems, resamples))
    chunk = max(1, _INDICES_AT_ONCE // items)
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        drawn = generator.integers(0, items, size=(stop - start, items), dtype=np.int32)
        for system in range(systems):
            means[system, start:stop] = scores[system][drawn].mean(axis=1)
    return means


def _percentile_interval(estimate: float, resampled: numpy.ndarray, confidence: float) -> Interval:
    import numpy as np

    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))
