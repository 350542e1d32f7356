"""What an epoch learns from: the order in which its batches take turns, and the answers that are its targets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy


def turns(batches: Sequence[int], epoch: int) -> list[int]:
    """Which data set each batch of an epoch is of, by its number, where data set n has `batches[n]`: the same for every seed."""
    order = [number for number, count in enumerate(batches) for _ in range(count)]
    random.Random(epoch).shuffle(order)
    return order[::-1]  # the original takes them from the end


def sampled_answer(scores: Mapping[str, float], seed: int, epoch: int, item: int) -> tuple[str, float]:
    """One of an item's answers, drawn in proportion to its score, with this score; an empty one with 0 where there is none.

    Args:
        scores: answer -> its score, above 0.
        seed, epoch, item: numbers from 0 on, of which the draw is a function.
    """
    if not scores:
        return "", 0.0
    answers, weights = zip(*sorted(scores.items()), strict=True)
    drawn = numpy.random.default_rng([seed, epoch, item]).choice(len(answers), p=numpy.divide(weights, sum(weights)))
    return answers[drawn], weights[drawn]
