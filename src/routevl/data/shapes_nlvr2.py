"""NLVR2-like statements about pairs of the demo world's scenes, each true of half of the pairs that it is made about.

As in NLVR2 a statement is judged about several pairs of images: its words tell nothing of its label, and it can be asked whether
all judgements of it are right. All randomness comes from the generators that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy

from routevl.data.scenes import Scene, pick
from routevl.data.shapes_language import (
    EXISTENCE_PATTERNS,
    NUMBER_WORDS,
    RELATIONS,
    Description,
    Pattern,
    relations_between,
    said,
    with_article,
)

Pair = tuple[Scene, Scene]  # the left and the right one
SIDES = ("left", "right")
NUMBERS = (*NUMBER_WORDS, "four", "five", "six")
RELATED_PATTERNS: tuple[Pattern, ...] = ((), ("shape",), ("color",))
ATTEMPTS = 100  # at statements about some pairs, of which there may be no more


class Statement(NamedTuple):
    """What is said of a left and a right scene, in lower case and ending with a full stop, and whether that is so."""

    text: str
    holds: Callable[[Scene, Scene], bool]


def statements(pairs: Sequence[Pair], generator: numpy.random.Generator, n: int) -> list[Statement]:
    """`n` different statements, each true of just half of the pairs, an even number; fewer where they do not suffice for that."""
    made: dict[str, Statement] = {}
    for _ in range(ATTEMPTS):
        statement = pick(generator, FAMILIES)(pairs, generator)
        if 2 * sum(statement.holds(*pair) for pair in pairs) == len(pairs):
            made.setdefault(statement.text, statement)
        if len(made) == n:
            break
    return list(made.values())


def _described(
    pairs: Sequence[Pair], generator: numpy.random.Generator, patterns: Sequence[Pattern] = EXISTENCE_PATTERNS
) -> Description:
    """A description of something in one of the pairs."""
    return said(pick(generator, pick(generator, pick(generator, pairs)).things), pick(generator, patterns))


def _counted(number: int, description: Description) -> str:
    """For example "are two red things", after "there"."""
    verb = "is" if number == 1 else "are"
    return f"{verb} {NUMBERS[number]} {description.words(plural=number != 1)}"


# ------------------------------------------------------------------------------------------- one image


def _has(pairs: Sequence[Pair], generator: numpy.random.Generator) -> Statement:
    side, description = pick(generator, SIDES), _described(pairs, generator)
    return Statement(
        f"the {side} image has {with_article(description.words())}.",
        lambda *pair: description.count(pair[SIDES.index(side)]) > 0,
    )


def _has_so_many(pairs: Sequence[Pair], generator: numpy.random.Generator) -> Statement:
    side, number = pick(generator, SIDES), len(pick(generator, pick(generator, pairs)).things)
    return Statement(
        f"there {_counted(number, Description())} in the {side} image.",
        lambda *pair: len(pair[SIDES.index(side)].things) == number,
    )


def _is_related(pairs: Sequence[Pair], generator: numpy.random.Generator) -> Statement:
    side, relation = pick(generator, SIDES), pick(generator, RELATIONS)
    first, second = (_described(pairs, generator, RELATED_PATTERNS) for _ in range(2))

    def holds(*pair: Scene) -> bool:
        things = pair[SIDES.index(side)].things
        return any(
            relation in relations_between(thing, other)
            for thing in filter(first.matches, things)
            for other in filter(second.matches, things)
        )

    names = [with_article(description.words()) for description in (first, second)]
    return Statement(f"in the {side} image {names[0]} is {relation} {names[1]}.", holds)


# ----------------------------------------------------------------------------------------- both images


def _are_together(pairs: Sequence[Pair], generator: numpy.random.Generator) -> Statement:
    description = pick(generator, (Description(), _described(pairs, generator)))
    number = sum(map(description.count, pick(generator, pairs)))
    return Statement(
        f"there {_counted(number, description)} in the two images together.",
        lambda *pair: sum(map(description.count, pair)) == number,
    )


def _have(pairs: Sequence[Pair], generator: numpy.random.Generator) -> Statement:
    description = _described(pairs, generator)
    words = with_article(description.words())
    text, images = pick(generator, HAVING)
    return Statement(text.format(words), lambda *pair: sum(description.count(scene) > 0 for scene in pair) in images)


HAVING = (
    ("both images have {}.", (2,)),
    ("only one of the images has {}.", (1,)),
    ("at least one of the images has {}.", (1, 2)),
    ("none of the images has {}.", (0,)),
)


def _has_more(pairs: Sequence[Pair], generator: numpy.random.Generator) -> Statement:
    description = pick(generator, (Description(), _described(pairs, generator)))
    more, less = pick(generator, (SIDES, SIDES[::-1]))
    return Statement(
        f"the {more} image has more {description.words(plural=True)} than the {less} image.",
        lambda *pair: description.count(pair[SIDES.index(more)]) > description.count(pair[SIDES.index(less)]),
    )


FAMILIES: tuple[Callable[[Sequence[Pair], numpy.random.Generator], Statement], ...] = (
    _has,
    _has_so_many,
    _is_related,
    _are_together,
    _have,
    _has_more,
)
