"""What is said of the demo world's scenes: captions and questions that are true of them.

The words of a question say little about its answer, so that a model has to look at the image: most yes/no questions are built
after their answer has been tossed. As in real photographs, some questions need one thing of the image, others several, and what
they name with what. All randomness comes from the generators that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product
from typing import NamedTuple

import numpy

from routevl.data.scenes import COLORS, SHAPES, SIZES, Scene, Thing, pick, sample_scene, toss


@dataclass(frozen=True)
class Question:
    """A question with its one true answer; the types are VQAv2's, `question_type` the leading words."""

    text: str
    answer: str
    answer_type: str
    question_type: str


class Description(NamedTuple):
    """What is said of a thing; None is left unsaid."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def matches(self, thing: Thing) -> bool:
        """Whether all that is said is true of `thing`."""
        return self.size in (None, thing.size) and self.color in (None, thing.color) and self.shape in (None, thing.shape)

    def count(self, scene: Scene) -> int:
        """The number of things in the scene that match."""
        return sum(map(self.matches, scene.things))

    def words(self, plural: bool = False) -> str:
        """The noun phrase without an article: "small red circle", "blue things"."""
        noun = self.shape or "thing"
        if plural:
            noun += "es" if noun.endswith("s") else "s"
        return " ".join(word for word in (self.size, self.color, noun) if word)


def with_article(words: str) -> str:
    """`words` after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ----------------------------------------------------------------------------------------- captions

PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the center", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)
OPENINGS = ("", "", "there is ", "an image of ", "a picture with ", "we can see ")
NUMBER_WORDS = ("no", "one", "two", "three")
RELATIONS = ("left of", "right of", "above", "below")


def captions(scene: Scene, generator: numpy.random.Generator, n: int = 5) -> list[str]:
    """`n` true captions of a scene, in lower case, ending with a full stop; different ones if possible."""
    written: list[str] = []
    for attempt in range(10 * n):
        caption = _caption(scene, generator)
        if caption not in written or attempt >= 9 * n:
            written.append(caption)
        if len(written) == n:
            break
    return written


def _caption(scene: Scene, generator: numpy.random.Generator) -> str:
    say_size = toss(generator, 0.7)
    things = [scene.things[index] for index in generator.permutation(len(scene.things))]
    kind = generator.random()
    if kind < 0.35:
        return pick(generator, OPENINGS) + _join([_placed(thing, say_size) for thing in things]) + "."
    if kind < 0.65 and len(things) > 1:
        return _relation_caption(things, say_size, generator)
    listed = _join(_grouped(things, say_size))
    if kind < 0.8 and len(things) > 1:
        return f"{NUMBER_WORDS[len(things)]} shapes: {listed}."
    return pick(generator, OPENINGS) + listed + "."


def _describe(thing: Thing, say_size: bool) -> Description:
    return Description(thing.size if say_size else None, thing.color, thing.shape)


def _placed(thing: Thing, say_size: bool) -> str:
    return f"{with_article(_describe(thing, say_size).words())} {PLACES[thing.row][thing.column]}"


def _grouped(things: list[Thing], say_size: bool) -> list[str]:
    """The things as noun phrases, equal ones counted together: ["two red circles", "a blue square"]."""
    described = [_describe(thing, say_size) for thing in things]
    phrases = []
    for description in dict.fromkeys(described):
        count = described.count(description)
        many = f"{NUMBER_WORDS[count]} {description.words(plural=True)}"
        phrases.append(with_article(description.words()) if count == 1 else many)
    return phrases


def _relation_caption(things: list[Thing], say_size: bool, generator: numpy.random.Generator) -> str:
    first, second = things[:2]
    relation = pick(generator, relations_between(first, second))
    verb = pick(generator, ("is ", ""))
    subject, other = (with_article(_describe(thing, say_size).words()) for thing in (first, second))
    rest = "".join(f", and {_placed(thing, say_size)}" for thing in things[2:])
    return f"{subject} {verb}{relation} {other}{rest}."


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def relations_between(first: Thing, second: Thing) -> list[str]:
    """The words of RELATIONS that hold of `first` to `second`, by their columns and rows."""
    right, down = first.column - second.column, first.row - second.row
    holds = (right < 0, right > 0, down < 0, down > 0)
    return [relation for relation, true in zip(RELATIONS, holds, strict=True) if true]


# ---------------------------------------------------------------------------------------- questions

Pattern = tuple[str, ...]

QUESTION_TYPES = (
    "what color is the", "what shape is", "what size is the", "what is", "how many", "is there a", "is there",
    "are there more", "are there", "is the",
)  # fmt: skip
MOST_QUESTIONS = 20  # different ones that every scene surely has
VALUES = {"size": SIZES, "color": COLORS, "shape": SHAPES}
PATTERNS: tuple[Pattern, ...] = (
    (), ("shape",), ("color",), ("size",), ("color", "shape"), ("size", "shape"), ("size", "color"),
    ("size", "color", "shape"),
)  # fmt: skip
EXISTENCE_PATTERNS: tuple[Pattern, ...] = (("shape",), ("color",), ("color", "shape"))
COUNT_PATTERNS: tuple[Pattern, ...] = ((), (), ("shape",), ("color",))
NUMBER_QUESTIONS = ("is there one thing?", "are there two things?", "are there three things?")


def questions(scene: Scene, generator: numpy.random.Generator, n: int) -> list[Question]:
    """`n` different questions about a scene, none of them ambiguous; `n` is MOST_QUESTIONS at most."""
    asked: dict[str, Question] = {}
    while len(asked) < n:
        family = FAMILIES[int(numpy.searchsorted(FAMILY_EDGES, generator.random(), side="right"))][0]
        question = family(scene, generator)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())


def make_question(text: str, answer: str) -> Question:
    """A question with its types: `question_type` is the longest of QUESTION_TYPES that `text` begins with."""
    leading = [words for words in QUESTION_TYPES if text.startswith(words + " ")]
    answer_type = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    return Question(text, answer, answer_type, max(leading, key=len))


def said(thing: Thing, pattern: Pattern) -> Description:
    """What is said of a thing when the attributes of the pattern are named."""
    return Description(**{field: getattr(thing, field) for field in pattern})


def descriptions(pattern: Pattern) -> list[Description]:
    """All that name just the attributes of the pattern."""
    return [Description(**dict(zip(pattern, values, strict=True))) for values in product(*(VALUES[field] for field in pattern))]


def referring(scene: Scene, thing: Thing, hidden: str | None, generator: numpy.random.Generator) -> str | None:
    """Words that are true of `thing` alone and leave out its `hidden` attribute, or None."""
    descriptions = [said(thing, pattern) for pattern in PATTERNS if hidden not in pattern]
    unique = [description for description in descriptions if description.count(scene) == 1]
    return "the " + pick(generator, unique).words() if unique else None


def _ask_attribute(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    field = pick(generator, ("color", "color", "shape", "size"))
    thing = pick(generator, scene.things)
    words = referring(scene, thing, field, generator)
    return make_question(f"what {field} is {words}?", getattr(thing, field)) if words else None


def _ask_count(scene: Scene, generator: numpy.random.Generator) -> Question:
    pattern = pick(generator, COUNT_PATTERNS)
    by_count: dict[int, list[Description]] = {}
    for description in descriptions(pattern):
        by_count.setdefault(description.count(scene), []).append(description)
    count = pick(generator, sorted(by_count))
    words = pick(generator, by_count[count]).words(plural=True)
    return make_question(f"how many {words} are there?", str(count))


def _ask_existence(scene: Scene, generator: numpy.random.Generator) -> Question:
    """Some descriptions are true of a thing of the scene, the others drawn at random, and true where chance has it."""
    pattern = pick(generator, EXISTENCE_PATTERNS)
    description = said(pick(generator, scene.things), pattern)
    if toss(generator, 0.6):  # so that about half of the answers are yes
        description = Description(**{field: pick(generator, VALUES[field]) for field in pattern})
    return make_question(f"is there {with_article(description.words())}?", "yes" if description.count(scene) else "no")


def _ask_whether_so_many(scene: Scene, generator: numpy.random.Generator) -> Question:
    answer, number = pick(generator, ("yes", "no")), len(scene.things)
    if answer == "no":
        number = pick(generator, [other for other in range(1, len(NUMBER_QUESTIONS) + 1) if other != number])
    return make_question(NUMBER_QUESTIONS[number - 1], answer)


def _ask_relation(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    if len(scene.things) == 1:
        return None
    return pick(generator, (_ask_whether_related, _ask_what_is_related))(scene, generator)


def _ask_whether_related(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    pair = pick(generator, list(permutations(scene.things, 2)))
    answer = pick(generator, ("yes", "no"))
    relation = pick(generator, relations_between(*(pair if answer == "yes" else pair[::-1])))
    return _ask_about_pair(scene, pair, relation, None, answer, generator)


def _ask_about_pair(
    scene: Scene, pair: tuple[Thing, Thing], comparison: str, hidden: str | None, answer: str, generator: numpy.random.Generator
) -> Question | None:
    names = [referring(scene, thing, hidden, generator) for thing in pair]
    return make_question(f"is {names[0]} {comparison} {names[1]}?", answer) if all(names) else None


def _ask_what_is_related(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    """Asks for the shape or colour of the only thing that stands in some relation to another."""
    reference, relation = pick(generator, scene.things), pick(generator, RELATIONS)
    related = [thing for thing in scene.things if relation in relations_between(thing, reference)]
    words = referring(scene, reference, None, generator)
    if len(related) != 1 or words is None:
        return None
    text, field = pick(generator, (("what is", "shape"), ("what shape is", "shape"), ("what color is the thing", "color")))
    return make_question(f"{text} {relation} {words}?", getattr(related[0], field))


def _ask_comparison(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    return pick(generator, (_ask_which_are_more, _ask_which_is_bigger))(scene, generator)


def _ask_which_are_more(scene: Scene, generator: numpy.random.Generator) -> Question:
    """The answer is "no" when there are equally many; at least one of the two kinds is present."""
    field = pick(generator, ("shape", "color"))
    answer = pick(generator, ("yes", "no"))
    described = descriptions((field,))
    counts = {description: description.count(scene) for description in described}
    pairs = [
        (first, second)
        for first, second in permutations(described, 2)
        if counts[first] + counts[second] and (counts[first] > counts[second]) == (answer == "yes")
    ]
    first, second = (description.words(plural=True) for description in pick(generator, pairs))
    return make_question(f"are there more {first} than {second}?", answer)


def _ask_which_is_bigger(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    pairs = [(first, second) for first, second in permutations(scene.things, 2) if first.size != second.size]
    if not pairs:
        return None
    pair = pick(generator, pairs)
    comparative = pick(generator, ("bigger", "smaller"))
    answer = "yes" if (pair[0].size == "big") == (comparative == "bigger") else "no"
    return _ask_about_pair(scene, pair, f"{comparative} than", "size", answer, generator)


FAMILIES: tuple[tuple[Callable[[Scene, numpy.random.Generator], Question | None], float], ...] = (
    (_ask_attribute, 0.40),
    (_ask_count, 0.15),
    (_ask_existence, 0.20),
    (_ask_whether_so_many, 0.15),
    (_ask_relation, 0.05),
    (_ask_comparison, 0.05),
)
FAMILY_EDGES = numpy.cumsum([share for _, share in FAMILIES])[:-1]


def sentences(generator: numpy.random.Generator, n: int) -> list[str]:
    """`n` sentences about fresh scenes, captions and questions in equal parts, with no answers."""
    written = []
    for index in range(n):
        scene = sample_scene(generator)
        written.append(questions(scene, generator, 1)[0].text if index % 2 else _caption(scene, generator))
    return written
