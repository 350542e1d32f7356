"""The demo world: images of one to three coloured shapes, with captions and questions that are true of them.

A scene is drawn at random and symmetrically: no shape, colour, size or place is more likely than another, and
a yes/no question is built after its answer has been tossed. So the words of a question say little about its
answer, and a model has to look at the image. All randomness comes from the generators that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy

if TYPE_CHECKING:
    from PIL.Image import Image

Option = TypeVar("Option")

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "big")
GRID = 3  # rows and columns

ATTRIBUTES_PER_CELL = len(SHAPES) + len(COLORS) + len(SIZES)
ATTRIBUTES = GRID * GRID * ATTRIBUTES_PER_CELL

SHARED_SHAPE, SHARED_COLOR = (
    0.3,
    0.3,
)  # chances to repeat an earlier thing's, so that counts above one are common
THINGS_PER_SCENE = (1, 2, 2, 3, 3)  # each equally likely

RGB = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 215, 30),
    "purple": (148, 60, 190),
    "orange": (245, 135, 15),
}
RADIUS = {"small": 0.078, "big": 0.125}  # of a circle, as a fraction of the image's side
POSITION_JITTER = 0.022  # at most, as a fraction of the side: no thing leaves its cell
SUPERSAMPLING = 3  # draws at three times the size and averages, for smooth edges


@dataclass(frozen=True)
class Thing:
    """One shape; `x` (rightwards) and `y` (downwards) are its centre as fractions of the image's side."""

    shape: str
    color: str
    size: str
    row: int
    column: int
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One to three things in different cells of the grid."""

    things: tuple[Thing, ...]


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
            noun = plural_of(noun)
        return " ".join(word for word in (self.size, self.color, noun) if word)


def plural_of(noun: str) -> str:
    """The plural of "thing" or of a shape."""
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(words: str) -> str:
    """`words` after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def pick(generator: numpy.random.Generator, options: Sequence[Option]) -> Option:
    """One of the options, each equally likely."""
    return options[int(generator.integers(len(options)))]


def toss(generator: numpy.random.Generator, chance: float = 0.5) -> bool:
    """True with the given chance."""
    return bool(generator.random() < chance)


# ----------------------------------------------------------------------------------------------------
# Scenes and images


def sample_scene(generator: numpy.random.Generator) -> Scene:
    """A random scene of one to three things in different cells."""
    things: list[Thing] = []
    cells = generator.permutation(GRID * GRID)
    for cell in cells[: pick(generator, THINGS_PER_SCENE)]:
        things.append(_sample_thing(generator, things, *divmod(int(cell), GRID)))
    return Scene(tuple(things))


def _sample_thing(generator: numpy.random.Generator, earlier: list[Thing], row: int, column: int) -> Thing:
    shape, color = pick(generator, SHAPES), pick(generator, COLORS)
    if earlier and toss(generator, SHARED_SHAPE):
        shape = pick(generator, earlier).shape
    if earlier and toss(generator, SHARED_COLOR):
        color = pick(generator, earlier).color
    shift_x, shift_y = generator.uniform(-POSITION_JITTER, POSITION_JITTER, 2)
    x, y = (column + 0.5) / GRID + shift_x, (row + 0.5) / GRID + shift_y
    return Thing(shape, color, pick(generator, SIZES), row, column, float(x), float(y))


def render(scene: Scene, image_size: int, generator: numpy.random.Generator) -> Image:
    """Draw a scene on a light grey, slightly noisy background, each thing in a slightly varied colour.

    Returns:
        an RGB image of `image_size` x `image_size` pixels.
    """
    from PIL import Image, ImageDraw

    background = int(generator.integers(205, 246))
    canvas = Image.new("RGB", (image_size * SUPERSAMPLING,) * 2, (background,) * 3)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing, image_size * SUPERSAMPLING, generator)
    pixels = numpy.asarray(canvas.reduce(SUPERSAMPLING), dtype=numpy.int16)
    noise = generator.integers(-8, 9, pixels.shape, dtype=numpy.int16)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(numpy.uint8))


def _draw_thing(draw, thing: Thing, side: int, generator: numpy.random.Generator) -> None:
    shift = generator.integers(-14, 15, 3)
    fill = tuple(int(value) for value in (numpy.array(RGB[thing.color]) + shift).clip(0, 255))
    radius = RADIUS[thing.size] * side * float(generator.uniform(0.95, 1.05))
    x, y = thing.x * side, thing.y * side
    for outline in _OUTLINES[thing.shape]:
        draw.polygon([(x + radius * right, y + radius * down) for right, down in outline], fill=fill)


def _rectangle(half_width: float, half_height: float) -> list[tuple[float, float]]:
    return [
        (-half_width, -half_height),
        (half_width, -half_height),
        (half_width, half_height),
        (-half_width, half_height),
    ]


# Outlines in units of the radius, right and down of the centre. All shapes are about as wide, so that a shape
# does not blur its size.
_ANGLES = numpy.linspace(0, 2 * numpy.pi, 40, endpoint=False)
_OUTLINES = {
    "circle": [list(zip(numpy.cos(_ANGLES).tolist(), numpy.sin(_ANGLES).tolist(), strict=True))],
    "square": [_rectangle(0.9, 0.9)],
    "triangle": [[(0, -1.0), (1.08, 0.85), (-1.08, 0.85)]],
    "cross": [_rectangle(1.05, 0.36), _rectangle(0.36, 1.05)],
}


def attributes(scene: Scene) -> numpy.ndarray:
    """What stands in every cell of the grid, as targets for pretraining a vision model on images alone.

    Returns:
        uint8 of shape (ATTRIBUTES,): for each cell in reading order a one-hot shape, colour and size in the
        order of SHAPES, COLORS and SIZES; all zero where the cell is empty.
    """
    targets = numpy.zeros((GRID, GRID, ATTRIBUTES_PER_CELL), dtype=numpy.uint8)
    for thing in scene.things:
        cell = targets[thing.row, thing.column]
        cell[SHAPES.index(thing.shape)] = 1
        cell[len(SHAPES) + COLORS.index(thing.color)] = 1
        cell[len(SHAPES) + len(COLORS) + SIZES.index(thing.size)] = 1
    return targets.reshape(-1)


# ----------------------------------------------------------------------------------------------------
# Captions

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
    holds = (
        first.column < second.column,
        first.column > second.column,
        first.row < second.row,
        first.row > second.row,
    )
    return [relation for relation, true in zip(RELATIONS, holds, strict=True) if true]


# ----------------------------------------------------------------------------------------------------
# Questions

Pattern = tuple[str, ...]

QUESTION_TYPES = (
    "what color is the", "what shape is", "what size is the", "what is", "how many", "is there a", "is there",
    "are there more", "is the",
)  # fmt: skip
MOST_QUESTIONS = 20  # different ones that every scene surely has
VALUES = {"size": SIZES, "color": COLORS, "shape": SHAPES}
PATTERNS: tuple[Pattern, ...] = (
    ("shape",), ("color",), ("size",), ("color", "shape"), ("size", "shape"), ("size", "color"),
    ("size", "color", "shape"),
)  # fmt: skip
EXISTENCE_PATTERNS: tuple[Pattern, ...] = (
    ("shape",), ("color",), ("color", "shape"), ("color", "shape"), ("size", "shape"), ("size", "color"),
)  # fmt: skip
COUNT_PATTERNS: tuple[Pattern, ...] = ((), ("shape",), ("shape",), ("color",), ("color",), ("size",))


def questions(scene: Scene, generator: numpy.random.Generator, n: int) -> list[Question]:
    """`n` different questions about a scene, none of them ambiguous.

    Raises:
        ValueError: `n` is not between 1 and MOST_QUESTIONS.
    """
    if not 1 <= n <= MOST_QUESTIONS:
        raise ValueError(f"questions for a scene: expected 1 to {MOST_QUESTIONS}, got {n}")
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


def _said(thing: Thing, pattern: Pattern) -> Description:
    return Description(**{field: getattr(thing, field) for field in pattern})


def _referring(scene: Scene, thing: Thing, hidden: str | None, generator: numpy.random.Generator) -> str | None:
    """Words that are true of `thing` alone and leave out its `hidden` attribute, or None."""
    unique = [
        description
        for description in (_said(thing, pattern) for pattern in PATTERNS if hidden not in pattern)
        if description.count(scene) == 1
    ]
    return "the " + pick(generator, unique).words() if unique else None


def _ask_attribute(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    field = pick(generator, ("color", "color", "shape", "size"))
    thing = pick(generator, scene.things)
    words = _referring(scene, thing, field, generator)
    return make_question(f"what {field} is {words}?", getattr(thing, field)) if words else None


def _ask_count(scene: Scene, generator: numpy.random.Generator) -> Question:
    pattern = pick(generator, COUNT_PATTERNS)
    by_count: dict[int, list[Description]] = {}
    for values in product(*(VALUES[field] for field in pattern)):
        description = Description(**dict(zip(pattern, values, strict=True)))
        by_count.setdefault(description.count(scene), []).append(description)
    count = pick(generator, sorted(by_count))
    words = pick(generator, by_count[count]).words(plural=True)
    return make_question(f"how many {words} are there?", str(count))


def _ask_existence(scene: Scene, generator: numpy.random.Generator) -> Question:
    pattern = pick(generator, EXISTENCE_PATTERNS)
    description = _said(pick(generator, scene.things), pattern)
    answer = pick(generator, ("yes", "no"))
    if answer == "no":
        description = pick(generator, _absent_neighbors(scene, description, pattern))
    return make_question(f"is there {with_article(description.words())}?", answer)


def _absent_neighbors(scene: Scene, description: Description, pattern: Pattern) -> list[Description]:
    """Descriptions that differ in one word and match nothing: a "no" that needs a close look."""
    changed = [description._replace(**{field: value}) for field in pattern for value in VALUES[field]]
    return [candidate for candidate in changed if candidate.count(scene) == 0]


def _ask_relation(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    if len(scene.things) == 1:
        return None
    return pick(generator, (_ask_whether_related, _ask_what_is_related))(scene, generator)


def _ask_whether_related(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    first, second = pick(generator, list(permutations(scene.things, 2)))
    answer = pick(generator, ("yes", "no"))
    relation = pick(generator, relations_between(*((first, second) if answer == "yes" else (second, first))))
    return _ask_about_pair(scene, first, second, relation, None, answer, generator)


def _ask_about_pair(
    scene: Scene,
    first: Thing,
    second: Thing,
    comparison: str,
    hidden: str | None,
    answer: str,
    generator: numpy.random.Generator,
) -> Question | None:
    names = [_referring(scene, thing, hidden, generator) for thing in (first, second)]
    return make_question(f"is {names[0]} {comparison} {names[1]}?", answer) if all(names) else None


def _ask_what_is_related(scene: Scene, generator: numpy.random.Generator) -> Question | None:
    """Asks for the shape or colour of the only thing that stands in some relation to another."""
    reference, relation = pick(generator, scene.things), pick(generator, RELATIONS)
    related = [thing for thing in scene.things if relation in relations_between(thing, reference)]
    words = _referring(scene, reference, None, generator)
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
    described = [Description(**{field: value}) for value in VALUES[field]]
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
    first, second = pick(generator, pairs)
    comparative = pick(generator, ("bigger", "smaller"))
    answer = "yes" if (first.size == "big") == (comparative == "bigger") else "no"
    return _ask_about_pair(scene, first, second, f"{comparative} than", "size", answer, generator)


FAMILIES: tuple[tuple[Callable[[Scene, numpy.random.Generator], Question | None], float], ...] = (
    (_ask_attribute, 0.32),
    (_ask_count, 0.16),
    (_ask_existence, 0.18),
    (_ask_relation, 0.22),
    (_ask_comparison, 0.12),
)
FAMILY_EDGES = numpy.cumsum([share for _, share in FAMILIES])[:-1]


def sentences(generator: numpy.random.Generator, n: int) -> list[str]:
    """`n` sentences about fresh scenes, captions and questions in equal parts, with no answers."""
    written = []
    for index in range(n):
        scene = sample_scene(generator)
        if index % 2:
            written.append(questions(scene, generator, 1)[0].text)
        else:
            written.append(_caption(scene, generator))
    return written
