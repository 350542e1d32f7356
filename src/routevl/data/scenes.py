"""The demo world's scenes: one to three coloured shapes, and images of them.

A scene is drawn at random and symmetrically: no shape, colour, size or place is more likely than another. All randomness comes
from the generators that the caller passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy
from PIL import Image, ImageDraw

Option = TypeVar("Option")

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "big")
GRID = 3  # rows and columns

ATTRIBUTES_PER_CELL = len(SHAPES) + len(COLORS) + len(SIZES)
ATTRIBUTES = GRID * GRID * ATTRIBUTES_PER_CELL

SHARED_SHAPE, SHARED_COLOR = 0.3, 0.3  # chances to repeat an earlier thing's, so that counts above one are common
THINGS_PER_SCENE = (1, 1, 1, 2, 2, 3)  # each equally likely

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
    """Things in different cells of the grid."""

    things: tuple[Thing, ...]


def pick(generator: numpy.random.Generator, options: Sequence[Option]) -> Option:
    """One of the options, each equally likely."""
    return options[int(generator.integers(len(options)))]


def toss(generator: numpy.random.Generator, chance: float = 0.5) -> bool:
    """True with the given chance."""
    return bool(generator.random() < chance)


def sample_scene(generator: numpy.random.Generator, numbers: Sequence[int] = THINGS_PER_SCENE) -> Scene:
    """A random scene of things in different cells; how many of them is one of `numbers`, each equally likely."""
    things: list[Thing] = []
    cells = generator.permutation(GRID * GRID)
    for cell in cells[: pick(generator, numbers)]:
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


def render(scene: Scene, image_size: int, generator: numpy.random.Generator) -> Image.Image:
    """Draw a scene on a light grey, slightly noisy background, each thing in a slightly varied colour.

    Returns:
        an RGB image of `image_size` x `image_size` pixels.
    """
    background = int(generator.integers(205, 246))
    canvas = Image.new("RGB", (image_size * SUPERSAMPLING,) * 2, (background,) * 3)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing, image_size * SUPERSAMPLING, generator)
    pixels = numpy.asarray(canvas.reduce(SUPERSAMPLING), dtype=numpy.int16)
    noise = generator.integers(-8, 9, pixels.shape, dtype=numpy.int16)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(numpy.uint8))


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: int, generator: numpy.random.Generator) -> None:
    shift = generator.integers(-14, 15, 3)
    fill = tuple(int(value) for value in (numpy.array(RGB[thing.color]) + shift).clip(0, 255))
    radius = RADIUS[thing.size] * side * float(generator.uniform(0.95, 1.05))
    x, y = thing.x * side, thing.y * side
    for outline in _OUTLINES[thing.shape]:
        draw.polygon([(x + radius * right, y + radius * down) for right, down in outline], fill=fill)


def _rectangle(x: float, y: float) -> list[tuple[float, float]]:
    return [(-x, -y), (x, -y), (x, y), (-x, y)]


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
