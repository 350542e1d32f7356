"""GQA-like questions about the demo world's scenes: open and yes/no ones, about attributes and relations, with GQA's types.

Each has one answer. That of a question which offers its answers is tossed before the question is built, so that its words do not
tell it. All randomness comes from the generators that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import numpy

from routevl.data.scenes import Scene, pick, toss
from routevl.data.shapes_language import (
    EXISTENCE_PATTERNS,
    RELATIONS,
    VALUES,
    Description,
    descriptions,
    referring,
    relations_between,
    with_article,
)

FIELDS = tuple(VALUES)
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
JOINED_PATTERNS = (("shape",), ("color",))


class GqaQuestion(NamedTuple):
    """A question with its one true answer, in a word or two and in a sentence, and GQA's types of it.

    `structural` is "query" (an open question), "verify", "choose", "logical" or "compare"; `semantic` is "attr" (attributes),
    "rel" (relations) or "obj" (what there is).
    """

    text: str
    answer: str
    full_answer: str
    structural: str
    semantic: str
    detailed: str


def gqa_questions(scene: Scene, generator: numpy.random.Generator, n: int) -> list[GqaQuestion]:
    """`n` different questions about a scene; `n` is 20 at most."""
    asked: dict[str, GqaQuestion] = {}
    while len(asked) < n:
        question = pick(generator, FAMILIES)(scene, generator)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())


def _value(field: str, value: str) -> str:
    """As it stands after "is": a shape has an article."""
    return with_article(value) if field == "shape" else value


def _yes_or_no(generator: numpy.random.Generator) -> str:
    return pick(generator, ("yes", "no"))


# ------------------------------------------------------------------------------------------ attributes


def _named_attribute(scene: Scene, generator: numpy.random.Generator) -> tuple[str, str, str, str] | None:
    """Words for a thing without one of its attributes, the field and value of that, and another value of the field."""
    field, thing = pick(generator, FIELDS), pick(generator, scene.things)
    words, value = referring(scene, thing, field, generator), getattr(thing, field)
    other = pick(generator, [option for option in VALUES[field] if option != value])
    return None if words is None else (words, field, value, other)


def _query_attribute(scene: Scene, generator: numpy.random.Generator) -> GqaQuestion | None:
    if (named := _named_attribute(scene, generator)) is None:
        return None
    words, field, value, _ = named
    full = f"{words} is {_value(field, value)}."
    return GqaQuestion(f"what {field} is {words}?", value, full, "query", "attr", "queryAttr")


def _verify_attribute(scene: Scene, generator: numpy.random.Generator) -> GqaQuestion | None:
    if (named := _named_attribute(scene, generator)) is None:
        return None
    words, field, value, other = named
    answer = _yes_or_no(generator)
    asked = _value(field, value if answer == "yes" else other)
    full = f"{answer}, {words} is {_value(field, value)}."
    return GqaQuestion(f"is {words} {asked}?", answer, full, "verify", "attr", "verifyAttr")


def _choose_attribute(scene: Scene, generator: numpy.random.Generator) -> GqaQuestion | None:
    if (named := _named_attribute(scene, generator)) is None:
        return None
    words, field, value, other = named
    offered = [_value(field, option) for option in ((value, other) if toss(generator) else (other, value))]
    full = f"{words} is {_value(field, value)}."
    return GqaQuestion(f"is {words} {' or '.join(offered)}?", value, full, "choose", "attr", "chooseAttr")


def _compare_attribute(scene: Scene, generator: numpy.random.Generator) -> GqaQuestion | None:
    field, answer = pick(generator, FIELDS), _yes_or_no(generator)
    pairs = [
        (first, second)
        for first, second in permutations(scene.things, 2)
        if (getattr(first, field) == getattr(second, field)) == (answer == "yes")
    ]
    if not pairs:
        return None
    names = [referring(scene, thing, field, generator) for thing in pick(generator, pairs)]
    if None in names:
        return None
    both = " and ".join(names)
    same = f"the same {field}" if answer == "yes" else f"different {field}s"
    return GqaQuestion(
        f"do {both} have the same {field}?", answer, f"{answer}, {both} have {same}.", "compare", "attr", "compareAttr"
    )


# ------------------------------------------------------------------------------------------- relations


def _query_relation(scene: Scene, generator: numpy.random.Generator) -> GqaQuestion | None:
    """Asks for an attribute of the only thing that stands in some relation to another."""
    reference, relation, field = pick(generator, scene.things), pick(generator, RELATIONS), pick(generator, FIELDS)
    related = [thing for thing in scene.things if relation in relations_between(thing, reference)]
    words = referring(scene, reference, None, generator)
    if len(related) != 1 or words is None:
        return None
    value, place = getattr(related[0], field), f"the thing {relation} {words}"
    full = f"{place} is {_value(field, value)}."
    return GqaQuestion(f"what {field} is {place}?", value, full, "query", "rel", "queryRel")


def _named_pair(scene: Scene, generator: numpy.random.Generator) -> tuple[str, str, str] | None:
    """Words for two things, and between them what relates the first to the second."""
    if len(scene.things) == 1:
        return None
    first, second = pick(generator, list(permutations(scene.things, 2)))
    relation = pick(generator, relations_between(first, second))
    names = [referring(scene, thing, None, generator) for thing in (first, second)]
    return None if None in names else (names[0], relation, names[1])


def _verify_relation(scene: Scene, generator: numpy.random.Generator) -> GqaQuestion | None:
    if (named := _named_pair(scene, generator)) is None:
        return None
    first, relation, second = named
    answer = _yes_or_no(generator)
    asked = relation if answer == "yes" else OPPOSITE[relation]
    full = f"{answer}, {first} is {relation} {second}."
    return GqaQuestion(f"is {first} {asked} {second}?", answer, full, "verify", "rel", "verifyRel")


def _choose_relation(scene: Scene, generator: numpy.random.Generator) -> GqaQuestion | None:
    if (named := _named_pair(scene, generator)) is None:
        return None
    first, relation, second = named
    offered = (relation, OPPOSITE[relation]) if toss(generator) else (OPPOSITE[relation], relation)
    full = f"{first} is {relation} {second}."
    return GqaQuestion(f"is {first} {' or '.join(offered)} {second}?", relation, full, "choose", "rel", "chooseRel")


# ------------------------------------------------------------------------------------- what there is


def _verify_existence(scene: Scene, generator: numpy.random.Generator) -> GqaQuestion:
    answer, pattern = _yes_or_no(generator), pick(generator, EXISTENCE_PATTERNS)
    options = [option for option in descriptions(pattern) if bool(option.count(scene)) == (answer == "yes")]
    words = pick(generator, options).words()
    full = f"yes, there is {with_article(words)}." if answer == "yes" else f"no, there is no {words}."
    return GqaQuestion(f"is there {with_article(words)}?", answer, full, "verify", "obj", "exist")


def _join_existences(scene: Scene, generator: numpy.random.Generator) -> GqaQuestion | None:
    """Asks whether there is one thing "and", or "or", another, where some such questions have the answer yes and others no."""
    word, pattern = pick(generator, ("and", "or")), pick(generator, JOINED_PATTERNS)
    holds = all if word == "and" else any
    pairs: dict[str, list[tuple[Description, ...]]] = {"yes": [], "no": []}
    for pair in permutations(descriptions(pattern), 2):
        pairs["yes" if holds(description.count(scene) for description in pair) else "no"].append(pair)
    if not all(pairs.values()):
        return None
    answer = _yes_or_no(generator)
    pair = pick(generator, pairs[answer])
    text = f"is there {f' {word} '.join(with_article(description.words()) for description in pair)}?"
    there = [with_article(description.words()) for description in pair if description.count(scene)]
    full = f"{answer}, there is {' and '.join(there) or 'neither'}."
    return GqaQuestion(text, answer, full, "logical", "obj", f"exist{word.title()}")


FAMILIES: tuple[Callable[[Scene, numpy.random.Generator], GqaQuestion | None], ...] = (
    _query_attribute,
    _query_attribute,
    _verify_attribute,
    _choose_attribute,
    _compare_attribute,
    _query_relation,
    _verify_relation,
    _choose_relation,
    _verify_existence,
    _join_existences,
)
