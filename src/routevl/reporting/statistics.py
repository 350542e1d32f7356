"""95% intervals over what is independent, images and above them seeds: of a mean, and of the gain of one system over another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

RESAMPLES = 10_000
TAILS = (0.025, 0.975)
LEVEL = 0.05  # at which a gain is significant
BOOTSTRAP_SEED = 20240311
MIN_SEEDS = 3  # from which on intervals cover seeds, and comparisons carry a verdict
FEW_SEEDS, NO_BASELINE = "fewer than three seeds", "the baseline scores next to nothing"
NOT_LEARNED = "a run of either side learned nothing"
NO_VERDICTS = FEW_SEEDS, NO_BASELINE, NOT_LEARNED
_INDICES_AT_ONCE = 2_000_000  # so that memory does not grow with the number of resamples


@dataclass(frozen=True)
class Interval:
    """An estimate with the lower and upper end of its 95% interval, in the unit of the estimate.

    `over` is what the interval covers: "images", "images and seeds", or "" where there is none.
    """

    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    over: str = ""

    def times(self, scale: float) -> Interval:
        """The same in another unit, or with -1 of the opposite quantity."""
        low, high = sorted((self.low * scale, self.high * scale))
        return Interval(self.estimate * scale, low, high, self.over)

    def signed(self, digits: int = 2) -> str:
        """It for readers, with its signs; "" where it is unknown."""
        known = math.isfinite(self.estimate)
        return f"{self.estimate:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]" if known else ""

    def columns(self, name: str, ends: str) -> dict[str, float]:
        """It as columns of a table: <name>, <ends>_low and <ends>_high."""
        return {name: self.estimate, f"{ends}_low": self.low, f"{ends}_high": self.high}


@dataclass(frozen=True)
class Gain:
    """Gain over a baseline. Where a run of either side learned nothing there is none: all numbers are NaN.

    Attributes:
        absolute: in the unit of the score.
        relative: in percent of the baseline; NaN where that scores next to nothing.
        p: two-sided, of no gain.
        holm: `p` corrected by `with_holm`; NaN where there is no verdict.
        no_verdict: why it carries no verdict; "" where it does.
    """

    absolute: Interval = Interval()
    relative: Interval = Interval()
    p: float = math.nan
    holm: float = math.nan
    no_verdict: str = ""

    @property
    def verdict(self) -> int:
        """+1 for an improvement and -1 for harm, significant after Holm's correction; 0 for neither, and for no verdict."""
        return int(math.copysign(1, self.absolute.estimate)) if self.holm < LEVEL else 0

    @property
    def word(self) -> str:
        """The verdict in a word or two; "" where there is none."""
        if self.no_verdict or math.isnan(self.absolute.estimate):
            return ""
        return {1: "better", -1: "worse", 0: "no difference"}[self.verdict]

    def tested(self, of: str = "") -> dict[str, float | str]:
        """What the csv of a table has of it beside its intervals; with `of` the columns' names begin."""
        columns = {"ci_over": self.absolute.over, "p": self.p, "p_holm": self.holm, "no_verdict": self.no_verdict}
        return {f"{of}{name}": value for name, value in columns.items()}


def mean_interval(scores: np.ndarray, images: np.ndarray, seed: int = BOOTSTRAP_SEED, resamples: int = RESAMPLES) -> Interval:
    """The mean score of a system with its interval.

    Args:
        scores: (seeds, items) float.
        images: (items,) of any dtype that sorts, the image of each item.
    """
    [drawn], over = _draws([scores], images, seed, resamples)
    return _interval(scores.mean(), drawn, over)


def paired_gain(
    baseline: np.ndarray,
    system: np.ndarray,
    images: np.ndarray,
    least: float,
    seed: int = BOOTSTRAP_SEED,
    resamples: int = RESAMPLES,
) -> Gain:
    """Gain of `system` over `baseline`, with intervals, paired by item.

    Let B and S be the mean scores over all seeds and items. The gain is

        absolute  D = S - B              relative  R = 100 D / B

    The intervals run from the 2.5% to the 97.5% quantile of D and R in the draws of (B, S) that `_draws` explains, and `p` is
    twice the share of draws of D beyond 0. D and R come from the same draws, so their intervals agree in whether they contain 0.

    Args:
        baseline, system: (seeds, items) float in the same order of items; the two may differ in their number of seeds.
        images: (items,) of any dtype that sorts, the image of each item.
        least: above 0; a baseline is next to zero where the lower end of its own interval is below it, and then there is neither
            a relative gain nor a verdict.
    """
    draws, over = _draws([baseline, system], images, seed, resamples)
    baseline_mean, difference, differences = baseline.mean(), system.mean() - baseline.mean(), draws[1] - draws[0]
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    gain = Gain(
        _interval(difference, differences, over),
        p=min(1.0, 2 * (beyond + 1) / (resamples + 1)),
        no_verdict="" if min(len(baseline), len(system)) >= MIN_SEEDS else FEW_SEEDS,
    )
    if _interval(baseline_mean, draws[0], over).low < least:
        return replace(gain, no_verdict=NO_BASELINE)
    # at most one draw in forty is below `least`; it keeps the sign of its difference
    relative = _interval(100 * difference / baseline_mean, 100 * differences / np.maximum(draws[0], least), over)
    return replace(gain, relative=relative)


def with_holm(gains: Mapping[str, Gain]) -> dict[str, Gain]:
    """The same with `holm`: Holm's (1979) step-down correction of `p` for the number of those gains that carry a verdict."""
    ranked = sorted((name for name, gain in gains.items() if not gain.no_verdict), key=lambda name: gains[name].p)
    corrected, least = dict(gains), 0.0
    for place, name in enumerate(ranked):
        least = max(least, min(1.0, (len(ranked) - place) * gains[name].p))
        corrected[name] = replace(gains[name], holm=least)
    return corrected


def _draws(systems: Sequence[np.ndarray], images: np.ndarray, seed: int, resamples: int) -> tuple[np.ndarray, str]:
    """What the means of one system or of two that are compared could have been, (systems, resamples) float64, and what was drawn.

    Inner level: a resample draws as many images as there are with replacement, each with all its items, the SAME images for all
    systems and seeds, and recomputes each system's mean.

    Outer level, where every system has MIN_SEEDS seeds: to draw from three seeds with replacement would be too narrow (a ninth of
    the resamples would hold one seed only). Each mean is moved by a normal number times the standard error of a mean over seeds,
    and all deviations are made as wide as Student's t, with Satterthwaite's degrees of freedom for the sum of the variances of
    both levels, as a variance over S seeds has S - 1 degrees of freedom.
    """
    _, places = np.unique(images, return_inverse=True)
    sizes = np.bincount(places)
    sums = [np.stack([np.bincount(places, weights=scores) for scores in system]) for system in systems]  # (seeds, images) each
    generator = np.random.default_rng(seed)
    draws = _resampled_means(np.stack([of.mean(axis=0) for of in sums]), sizes, generator, resamples)
    if min(map(len, systems)) < MIN_SEEDS:
        return draws, "images"
    variances = np.array([_seed_variance(of, sizes) for of in sums])
    if variances.any():
        of_images = np.var(draws[0] if len(draws) == 1 else draws[1] - draws[0])
        weights = sum(variance**2 / (len(of) - 1) for variance, of in zip(variances, sums, strict=True))
        freedom = (of_images + variances.sum()) ** 2 / weights
        deviations = draws + np.sqrt(variances)[:, None] * generator.standard_normal(draws.shape)
        means = np.array([[system.mean()] for system in systems])
        draws = means + (deviations - means) * np.sqrt(freedom / generator.chisquare(freedom, resamples))
    return draws, "images and seeds"


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Means over the items of resampled images, (systems, resamples), from sums (systems, images) and counts (images,)."""
    images, means = len(sizes), []
    chunk = max(1, _INDICES_AT_ONCE // images)
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, images, size=(min(chunk, resamples - start), images), dtype=np.int32)
        means.append([of[drawn].sum(axis=1) for of in sums] / sizes[drawn].sum(axis=1))
    return np.concatenate(means, axis=1)


def _seed_variance(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Variance of a mean over seeds that is the seeds' own, from sums (seeds, images) and counts (images,).

    Seeds also differ because each errs on other images. This part is taken off, as the images' level has it already.
    """
    seeds, images = sums.shape
    means = sums.sum(axis=1) / sizes.sum()
    off = (sums - means[:, None] * sizes) / sizes.mean()  # how far an image is above its seed's mean
    interaction = ((off - off.mean(axis=0)) ** 2).sum() / ((seeds - 1) * max(1, images - 1))
    return max(0.0, (means.var(ddof=1) - interaction / images) / seeds)


def _interval(estimate: float, draws: np.ndarray, over: str) -> Interval:
    return Interval(float(estimate), *map(float, np.quantile(draws, TAILS)), over)
