"""Intervals and gains: against direct computations, and in worlds whose true gain is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from routevl.reporting.statistics import FEW_SEEDS, NO_BASELINE, TAILS, Gain, Interval, mean_interval, paired_gain, with_holm

LEAST = 1.0
GAIN, QUESTIONS = 3.0, 5  # of a world: the true gain, and questions per image


def ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def test_intervals_over_images_agree_with_a_direct_computation():
    """Images with one to four questions, one seed."""
    generator = np.random.default_rng(0)
    images = generator.permutation(np.repeat(np.arange(20), 1 + np.arange(20) % 4))
    baseline = generator.random((1, len(images))) + 1
    system = baseline + generator.normal(0.1, 0.2, baseline.shape)
    gain = paired_gain(baseline, system, images, least=0.1, seed=3, resamples=400)
    drawn = np.random.default_rng(3).integers(0, 20, size=(400, 20), dtype=np.int32)
    questions = [np.concatenate([np.flatnonzero(images == image) for image in chosen]) for chosen in drawn]
    means = np.array([[scores[0, chosen].mean() for chosen in questions] for scores in (baseline, system)])
    assert gain.absolute.estimate == pytest.approx(system.mean() - baseline.mean())
    assert ends(gain.absolute) == pytest.approx(np.quantile(means[1] - means[0], TAILS))
    assert gain.relative.estimate == pytest.approx(100 * (system.mean() / baseline.mean() - 1))
    assert ends(gain.relative) == pytest.approx(np.quantile(100 * (means[1] / means[0] - 1), TAILS))
    assert ends(mean_interval(system, images, seed=3, resamples=400)) == pytest.approx(np.quantile(means[1], TAILS))
    assert gain.absolute.over == gain.relative.over == "images"


def test_intervals_over_seeds_agree_with_welch_where_images_do_not_differ():
    """Two systems with 3 and 4 seeds, each seed with one score on all images; the quantile of t is that of its tables."""
    baseline, system = np.array([50.0, 52.0, 57.0]), np.array([58.0, 59.0, 61.0, 66.0])
    images = np.arange(30)
    gain = paired_gain(*(np.outer(means, np.ones(30)) for means in (baseline, system)), images, LEAST, resamples=200_000)
    variances = [means.var(ddof=1) / len(means) for means in (baseline, system)]
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    assert freedom == pytest.approx(4.42, abs=0.01)
    half = 2.676 * math.sqrt(sum(variances))  # between 2.776 at 4 and 2.571 at 5 degrees of freedom
    assert ends(gain.absolute) == pytest.approx([8 - half, 8 + half], abs=0.15)
    assert gain.absolute.over == "images and seeds"


class Truth(NamedTuple):
    """A world: standard deviations of the effects of seeds, of images on the gain, and of seeds on single questions."""

    seed: float
    image: float
    question: float


WORLDS = {"images": Truth(0.2, 8, 4), "both": Truth(1, 8, 4), "seeds": Truth(5, 8, 4), "questions": Truth(0.2, 2, 20)}


def experiments(truth: Truth, seeds: int, count: int, images: int = 100) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`count` times new images and new seeds: baseline, system, (seeds, items) each, and the image of each item.

    All questions of an image share its difficulty, and what it adds to each system.
    """
    generator = np.random.default_rng(13)
    image = np.repeat(np.arange(images), QUESTIONS)
    for _ in range(count):
        difficulty = generator.normal(0, 10, images)[image] + generator.normal(0, 12, len(image))
        systems = []
        for mean in (50, 50 + GAIN):
            own = mean + difficulty + generator.normal(0, truth.image, images)[image]
            of_seed = generator.normal(0, truth.seed, (seeds, 1)) + generator.normal(0, truth.question, (seeds, len(image)))
            systems.append(own + of_seed)
        yield *systems, image


def drawn_seeds(baseline: np.ndarray, system: np.ndarray, images: np.ndarray, seed: int, resamples: int) -> list[float]:
    """The two-level percentile bootstrap: images, and of each system as many seeds as it has, drawn with replacement."""
    generator, count = np.random.default_rng(seed), len(images) // QUESTIONS
    of_images = generator.multinomial(count, np.full(count, 1 / count), resamples) / count
    means = []
    for scores in (baseline, system):
        of_seeds = generator.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), resamples) / len(scores)
        by_image = scores.reshape(len(scores), count, QUESTIONS).mean(axis=2)
        means.append((of_images @ by_image.T * of_seeds).sum(axis=1))
    return list(np.quantile(means[1] - means[0], TAILS))


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_b13_intervals_over_images_and_seeds_cover_the_truth(world):
    """In 93% to 97% of 600 repetitions with new images and three new seeds, whatever differs most. Means, with which nothing is
    decided, may be a little narrower: where seeds differ most, 2 degrees of freedom are not known well enough."""
    gains, means = [], []
    for trial, (baseline, system, images) in enumerate(experiments(WORLDS[world], 3, 600)):
        low, high = ends(paired_gain(baseline, system, images, LEAST, trial, resamples=600).absolute)
        gains.append(low <= GAIN <= high)
        for truth, scores in ((50, baseline), (50 + GAIN, system)):
            low, high = ends(mean_interval(scores, images, trial, resamples=600))
            means.append(low <= truth <= high)
    assert 0.93 <= np.mean(gains) <= 0.97
    assert 0.92 <= np.mean(means) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "questions", "seeds_drawn"),
    [("images", 0.63, 0.92), ("both", 0.52, 0.91), ("seeds", 0.19, 0.83), ("questions", 0.91, 0.99)],
)
def test_b13_intervals_over_questions_alone_and_over_three_seeds_drawn_anew_do_not(world, questions, seeds_drawn):
    """The two that were not chosen, in 300 repetitions.

    Before, questions were drawn as if they were independent, their scores averaged over seeds. Such intervals covered the true
    gain in 63% of repetitions where little but images differs, and from 19% (where seeds differ most) to 91% elsewhere. A
    two-level percentile bootstrap, which draws three seeds with replacement, covers it in 83% to 99%: too narrow where seeds
    differ, and too wide where they err on different questions, which both of its levels have.
    """
    by_questions, by_seeds = [], []
    for trial, (baseline, system, images) in enumerate(experiments(WORLDS[world], 3, 300)):
        over_seeds = (scores.mean(axis=0, keepdims=True) for scores in (baseline, system))
        low, high = ends(paired_gain(*over_seeds, np.arange(len(images)), LEAST, trial, resamples=400).absolute)
        by_questions.append(low <= GAIN <= high)
        low, high = drawn_seeds(baseline, system, images, trial, resamples=400)
        by_seeds.append(low <= GAIN <= high)
    assert (np.mean(by_questions), np.mean(by_seeds)) == pytest.approx((questions, seeds_drawn), abs=0.01)


def test_an_interval_of_fewer_than_three_seeds_is_that_of_their_mean_over_images():
    """And so it is where one side alone has three."""
    baseline, system, images = next(experiments(WORLDS["seeds"], 3, 1))
    two, mean = baseline[:2], baseline[:2].mean(axis=0, keepdims=True)
    assert mean_interval(two, images) == mean_interval(mean, images)
    assert (mean_interval(two, images).over, mean_interval(baseline, images).over) == ("images", "images and seeds")
    gain = paired_gain(baseline, system[:1], images, LEAST)
    assert (gain.absolute.over, gain.no_verdict, with_holm({"": gain})[""].verdict) == ("images", FEW_SEEDS, 0)


def test_pairing_uses_the_same_images_for_both_systems_and_all_seeds():
    """A constant gain on very different items has an interval of no width."""
    baseline = np.random.default_rng(1).random(200) * 100 + 1
    images, seeds = np.repeat(np.arange(40), 5), np.ones((3, 1))
    interval = paired_gain(baseline * seeds, (baseline + 5) * seeds, images, LEAST, resamples=200).absolute
    assert [*ends(interval), interval.over] == [pytest.approx(5), pytest.approx(5), "images and seeds"]


def test_intervals_depend_on_their_seed_only():
    scores, images = np.random.default_rng(2).random((3, 100)), np.arange(100)
    first = mean_interval(scores, images, seed=1, resamples=300)
    assert mean_interval(scores, images, seed=1, resamples=300) == first
    assert mean_interval(scores, images, seed=2, resamples=300) != first


@pytest.mark.parametrize("score", [0.0, 1e-6, 0.9])
def test_over_a_baseline_next_to_zero_there_is_neither_a_relative_gain_nor_a_verdict(score):
    images = np.arange(10)
    gain = paired_gain(np.full((3, 10), score), np.full((3, 10), 50.0), images, LEAST, resamples=50)
    gain = with_holm({"": gain})[""]
    assert math.isnan(gain.relative.estimate) and gain.absolute.estimate == pytest.approx(50 - score)
    assert (gain.no_verdict, gain.verdict) == (NO_BASELINE, 0)


def test_absolute_and_relative_intervals_agree_about_zero():
    """Also where three seeds differ so much that some draws of the baseline are below zero."""
    agreed = []
    for trial, (baseline, system, images) in enumerate(experiments(Truth(4, 8, 4), 3, 60, images=20)):
        gain = paired_gain(baseline - 40, system - 40, images, LEAST, trial, resamples=2000)
        if math.isfinite(gain.relative.estimate):
            agreed.append([np.sign(end) for end in ends(gain.absolute)] == [np.sign(end) for end in ends(gain.relative)])
    assert len(agreed) > 10 and all(agreed)


def test_holm_s_correction():
    """The textbook's example: 0.01, 0.04, 0.03 and 0.005 become 0.03, 0.06, 0.06 and 0.02. What has no verdict does not count."""
    gains = {name: Gain(Interval(-1.0), p=p) for name, p in zip("abcd", (0.01, 0.04, 0.03, 0.005), strict=True)}
    corrected = with_holm(gains | {"e": Gain(Interval(2.0), p=0.001, no_verdict=FEW_SEEDS)})
    assert list(corrected) == list("abcde")
    assert [gain.holm for gain in corrected.values()] == pytest.approx([0.03, 0.06, 0.06, 0.02, math.nan], nan_ok=True)
    assert [gain.verdict for gain in corrected.values()] == [-1, 0, 0, -1, 0]
