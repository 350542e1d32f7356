"""The bootstrap over test items: intervals of means, and of the gain of one system over another, paired by item."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
TAILS = (0.025, 0.975)
BOOTSTRAP_SEED = 20240311
_INDICES_AT_ONCE = 2_000_000  # so that memory does not grow with the number of resamples


@dataclass(frozen=True)
class Interval:
    """An estimate with the lower and upper end of its 95% interval, in the unit of the estimate."""

    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def verdict(self) -> int:
        """+1 when the whole interval lies above 0, -1 when it lies below, 0 when it contains 0."""
        return int(self.low > 0) - int(self.high < 0)

    def times(self, scale: float) -> Interval:
        """The same in another unit."""
        return Interval(self.estimate * scale, self.low * scale, self.high * scale)

    def columns(self, name: str, ends: str) -> dict[str, float]:
        """It as columns of a table: <name>, <ends>_low and <ends>_high."""
        return {name: self.estimate, f"{ends}_low": self.low, f"{ends}_high": self.high}


@dataclass(frozen=True)
class Gain:
    """Gain over a baseline: `absolute` in the unit of the score, `relative` in percent of the baseline."""

    absolute: Interval = Interval()
    relative: Interval = Interval()


def bootstrap_mean(scores: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Percentile-bootstrap interval of the mean of `scores`: (items,) float, one per test item (averaged over seeds)."""
    return _percentile_interval(scores.mean(), _resampled_means(scores[None], seed, resamples)[0])


def paired_bootstrap(baseline: np.ndarray, system: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Gain:
    """Gain of `system` over `baseline` with percentile-bootstrap intervals, paired by test item.

    Let b_i and s_i be the scores of item i = 1..N, each averaged over the seeds of its system. The gain is

        absolute  D = mean(s) - mean(b)              relative  R = 100 D / mean(b)

    A resample draws N items with replacement, the SAME items for both systems, and recomputes D and R; the interval runs from
    the 2.5% to the 97.5% quantile of these values (Efron's percentile interval; Koehn 2004 for paired resampling over test
    items). It tells how far the gain depends on which test items were drawn. It does not cover the choice of seeds, which the
    standard deviation over seeds shows, and it treats items as independent although questions may share an image.

    Args:
        baseline, system: (items,) float, in the same item order.

    Returns:
        Gain; `relative` is NaN throughout when the mean of the baseline is not positive.
    """
    baseline_means, system_means = _resampled_means(np.stack([baseline, system]), seed, resamples)
    baseline_mean, difference = baseline.mean(), system.mean() - baseline.mean()
    differences = system_means - baseline_means
    absolute = _percentile_interval(difference, differences)
    if baseline_mean <= 0 or baseline_means.min() <= 0:
        return Gain(absolute)
    return Gain(absolute, _percentile_interval(100 * difference / baseline_mean, 100 * differences / baseline_means))


def _resampled_means(scores: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of `scores` (systems, items) over resampled items: (systems, resamples) float64."""
    items = scores.shape[1]
    generator = np.random.default_rng(seed)
    chunk = max(1, _INDICES_AT_ONCE // items)
    means = []
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, items, size=(min(chunk, resamples - start), items), dtype=np.int32)
        means.append([system[drawn].mean(axis=1) for system in scores])
    return np.concatenate(means, axis=1)


def _percentile_interval(estimate: float, resampled: np.ndarray) -> Interval:
    return Interval(float(estimate), *map(float, np.quantile(resampled, TAILS)))
