"""F1: where the routing function sits, in LoRA and in the Adapter, and the functions; needs no results."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon

from routevl.methods.table import FAMILIES, METHODS
from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.style import INK, MUTED, TEXT_WIDTH, mixed
from routevl.routing import without_ablations

# All places and sizes are inches on the page, so that everything lines up at the printed size.
_HEIGHT = 3.3
_INPUT, _BRANCH, _DOWN, _ROUTE, _ACTIVATION, _UP, _SUM = 0.20, 0.46, 0.94, 1.56, 1.93, 2.31, 2.76
_TITLE, _SUBTITLE = 3.18, 3.03
_STREAMS = 0.93  # between the text and the image stream
_DOWN_HEIGHT, _ROUTE_HEIGHT, _WIDE, _NARROW = 0.36, 0.29, 0.78, 0.40
_SUM_RADIUS = 0.075

_TEXT_COLOR, _IMAGE_COLOR = "#0072B2", "#D55E00"
_FROZEN = {"facecolor": "#E9E9E9", "edgecolor": "#7A7A7A"}
_TRAINED = {"facecolor": "#FBE6BF", "edgecolor": "#A86F00"}
_PARAMETER_FREE = {"facecolor": "#D5EEE5", "edgecolor": "#00734F"}


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """Left LoRA, middle Adapter, right the formulas; the data are the formulas."""
    figure = Figure(figsize=(TEXT_WIDTH, _HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, TEXT_WIDTH), ylim=(0, _HEIGHT))
    axes.set_axis_off()
    _draw_lora(axes, 0.08)
    _draw_adapter(axes, 2.72)
    _draw_formulas(axes, 4.94)
    functions = without_ablations().items()
    return figure, pd.DataFrame([{"routing": name, "formula": row.formula, "note": row.note} for name, row in functions])


def _draw_lora(axes: Axes, left: float) -> None:
    _title(axes, left, "a", "LoRA", "on the query and value projections")
    frozen, text = left + 0.28, left + 1.06
    bottom, top = _DOWN - _DOWN_HEIGHT / 2, _UP + _DOWN_HEIGHT / 2
    _rectangle(axes, frozen, (bottom + top) / 2, 0.50, top - bottom, "$W_0$", _FROZEN)
    _draw_bottleneck(axes, text)
    _text(axes, text + 0.08, _UP + 0.275, r"$\times\,\alpha / r$", ha="left")
    _arrow(axes, [(text, _BRANCH), (frozen, _BRANCH), (frozen, bottom)], _TEXT_COLOR)
    _arrow(axes, [(frozen, top), (frozen, _SUM), (text - _SUM_RADIUS, _SUM)], _TEXT_COLOR)


def _draw_adapter(axes: Axes, left: float) -> None:
    _title(axes, left, "b", "Adapter", "after attention and feed-forward")
    residual, text = left + 0.16, left + 0.76
    _draw_bottleneck(axes, text)
    _rectangle(axes, text, _ACTIVATION, 0.36, 0.19, "act", _PARAMETER_FREE, rounding=0.07)
    _arrow(axes, [(text, _BRANCH), (residual, _BRANCH), (residual, _SUM), (text - _SUM_RADIUS, _SUM)], _TEXT_COLOR)
    _text(axes, residual - 0.09, (_DOWN + _UP) / 2, "residual", rotation=90, va="center", color=MUTED)


def _draw_bottleneck(axes: Axes, text: float) -> None:
    """Both streams through one down-projection, the routing function, the up-projection and the sum."""
    image = text + _STREAMS
    streams = (text, _TEXT_COLOR, "text $x_H$", "$x_t$"), (image, _IMAGE_COLOR, "image $x_R$", "$x_v$")
    for x, color, source, latent in streams:
        _text(axes, x, _INPUT, source, color=color)
        _arrow(axes, [(x, _INPUT + 0.10), (x, _DOWN - _DOWN_HEIGHT / 2)], color)
        _arrow(axes, [(x, _DOWN + _DOWN_HEIGHT / 2), (x, _ROUTE - _ROUTE_HEIGHT / 2)], color)
        _text(axes, x + 0.07, (_DOWN + _ROUTE) / 2 + 0.01, latent, color=color, ha="left")
        _trapezium(axes, x, _DOWN, _WIDE, _NARROW, r"$W_\mathrm{down}$")
    slant = (_WIDE + _NARROW) / 4
    tie = {"color": _TRAINED["edgecolor"], "linewidth": 1.0, "linestyle": (0, (1.6, 1.2))}
    axes.plot([text + slant, image - slant], [_DOWN, _DOWN], **tie)
    _text(axes, (text + image) / 2, _DOWN + 0.105, "shared", color=_TRAINED["edgecolor"], fontsize=7)
    width, label = _STREAMS + _NARROW + 0.14, "route$(x_t,\\, x_v)$"
    _rectangle(axes, (text + image) / 2, _ROUTE, width, _ROUTE_HEIGHT, label, _PARAMETER_FREE, rounding=0.09)
    _arrow(axes, [(text, _ROUTE + _ROUTE_HEIGHT / 2), (text, _UP - _DOWN_HEIGHT / 2)])
    _trapezium(axes, text, _UP, _NARROW, _WIDE, r"$W_\mathrm{up}$")
    _arrow(axes, [(text, _UP + _DOWN_HEIGHT / 2), (text, _SUM - _SUM_RADIUS)])
    axes.add_patch(Circle((text, _SUM), _SUM_RADIUS, facecolor="white", edgecolor=INK, linewidth=0.9, zorder=3))
    arm = 0.6 * _SUM_RADIUS
    axes.plot([text - arm, text + arm], [_SUM, _SUM], color=INK, linewidth=0.9, zorder=4)
    axes.plot([text, text], [_SUM - arm, _SUM + arm], color=INK, linewidth=0.9, zorder=4)
    _arrow(axes, [(text + _SUM_RADIUS, _SUM), (text + 0.42, _SUM)])
    _text(axes, text + 0.47, _SUM, "$h$", ha="left")


def _draw_formulas(axes: Axes, left: float) -> None:
    _title(axes, left, "c", "Routing functions", "linear, no new parameters")
    functions = without_ablations()
    for index, (name, routing) in enumerate(functions.items()):
        y = 2.72 - 1.775 / len(functions) * index
        for x, method in ((left + 0.05, "lora"), (left + 0.18, "adapter")):
            color = mixed(FAMILIES[METHODS[method].family], routing.shade)
            axes.plot(x, y, routing.marker, color=color, markersize=5.5)
        _text(axes, left + 0.30, y, name, ha="left")
        _text(axes, left + 0.80, y + 0.055, routing.formula, ha="left", fontsize=9)
        _text(axes, left + 0.80, y - 0.095, routing.note, ha="left", fontsize=7, color=MUTED)
    _text(axes, left, 0.92, r"$x_t$: $L_t \times r$ (text),  $x_v$: $L_v \times r$ (image)", ha="left", fontsize=7)
    for y, look, name in ((0.66, _FROZEN, "frozen"), (0.47, _TRAINED, "trained"), (0.28, _PARAMETER_FREE, "no parameters")):
        _rectangle(axes, left + 0.10, y, 0.20, 0.11, "", look)
        _text(axes, left + 0.28, y, name, ha="left", fontsize=7)
    for y, color, name in ((0.66, _TEXT_COLOR, "text"), (0.47, _IMAGE_COLOR, "image"), (0.28, INK, "both")):
        _arrow(axes, [(left + 1.16, y), (left + 1.40, y)], color)
        _text(axes, left + 1.47, y, name, ha="left", fontsize=7)


def _title(axes: Axes, left: float, letter: str, title: str, subtitle: str) -> None:
    _text(axes, left, _TITLE, f"{letter}  {title}", ha="left", fontsize=9, fontweight="bold")
    _text(axes, left, _SUBTITLE, subtitle, ha="left", fontsize=7, color=MUTED)


def _text(axes: Axes, x: float, y: float, text: str, **options) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center_baseline", "fontsize": 8, "zorder": 5, **options})


def _rectangle(
    axes: Axes, x: float, y: float, width: float, height: float, label: str, look: dict, rounding: float = 0.02
) -> None:
    corner = (x - width / 2, y - height / 2)
    box_style = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=box_style, linewidth=0.9, zorder=3, **look))
    _text(axes, x, y, label)


def _trapezium(axes: Axes, x: float, y: float, bottom: float, top: float, label: str) -> None:
    low, high = y - _DOWN_HEIGHT / 2, y + _DOWN_HEIGHT / 2
    corners = [(x - bottom / 2, low), (x + bottom / 2, low), (x + top / 2, high), (x - top / 2, high)]
    axes.add_patch(Polygon(corners, closed=True, linewidth=0.9, joinstyle="round", zorder=3, **_TRAINED))
    _text(axes, x, y, label)


def _arrow(axes: Axes, points: list[tuple[float, float]], color: str = INK) -> None:
    """A line through `points` with square corners and an arrow head at its end."""
    xs, ys = zip(*points, strict=True)
    if len(points) > 2:
        axes.plot(xs[:-1], ys[:-1], color=color, linewidth=1.1, solid_joinstyle="miter", zorder=2)
    axes.annotate(
        "", xy=points[-1], xytext=points[-2], zorder=2,
        arrowprops={
            "arrowstyle": "-|>,head_length=0.32,head_width=0.15", "color": color, "linewidth": 1.1,
            "shrinkA": 0, "shrinkB": 0, "joinstyle": "miter",
        },
    )  # fmt: skip
