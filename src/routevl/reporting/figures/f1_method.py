"""F1: where the routing function sits, in LoRA and in the Adapter, and the five functions; needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from routevl.reporting.style import INK, MUTED, TEXT_WIDTH, routing_style

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from routevl.reporting.figures.inputs import FigureInputs

FORMULAS = (
    ("none", r"$x_t$", "plain LoRA or Adapter"),
    ("mul", r"$x_t \circ x^{\prime}_v$", r"$x^{\prime}_v$: repeated over text"),
    ("add", r"$x_t + x^{\prime}_v$", r"$x^{\prime}_v$: repeated over text"),
    ("attn", r"$x_t\,(x_v)^{\top} x_v$", "linear, no softmax"),
    ("expand", r"$x_t\, x^{\prime\prime}_v$", r"$x^{\prime\prime}_v$: $r$ copies, $r \times r$"),
)

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


def draw(inputs: FigureInputs) -> tuple[Figure, pandas.DataFrame]:
    """Left LoRA, middle Adapter, right the formulas; the data are the formulas."""
    import pandas as pd
    from matplotlib.figure import Figure

    figure = Figure(figsize=(TEXT_WIDTH, _HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, TEXT_WIDTH), ylim=(0, _HEIGHT))
    axes.set_axis_off()
    _draw_lora(axes, 0.08)
    _draw_adapter(axes, 2.72)
    _draw_formulas(axes, 4.94)
    return figure, pd.DataFrame(FORMULAS, columns=["routing", "formula", "note"])


def _draw_lora(axes: Axes, left: float) -> None:
    _title(axes, left, "a", "LoRA", "on the query and value projections")
    frozen, text = left + 0.28, left + 1.06
    bottom, top = _DOWN - _DOWN_HEIGHT / 2, _UP + _DOWN_HEIGHT / 2
    _rectangle(axes, frozen, (bottom + top) / 2, 0.50, top - bottom, "$W_0$", _FROZEN)
    _draw_bottleneck(axes, text)
    _arrow(axes, [(text, _ROUTE + _ROUTE_HEIGHT / 2), (text, _UP - _DOWN_HEIGHT / 2)])
    _text(axes, text + 0.08, _UP + 0.275, r"$\times\,\alpha / r$", horizontalalignment="left")
    _arrow(axes, [(text, _BRANCH), (frozen, _BRANCH), (frozen, bottom)], _TEXT_COLOR)
    _arrow(axes, [(frozen, top), (frozen, _SUM), (text - _SUM_RADIUS, _SUM)], _TEXT_COLOR)


def _draw_adapter(axes: Axes, left: float) -> None:
    _title(axes, left, "b", "Adapter", "after attention and feed-forward")
    residual, text = left + 0.16, left + 0.76
    _draw_bottleneck(axes, text)
    _arrow(axes, [(text, _ROUTE + _ROUTE_HEIGHT / 2), (text, _UP - _DOWN_HEIGHT / 2)])
    _rectangle(axes, text, _ACTIVATION, 0.36, 0.19, "act", _PARAMETER_FREE, rounding=0.07)
    _arrow(
        axes,
        [(text, _BRANCH), (residual, _BRANCH), (residual, _SUM), (text - _SUM_RADIUS, _SUM)],
        _TEXT_COLOR,
    )
    _text(axes, residual - 0.09, (_DOWN + _UP) / 2, "residual", rotation=90, color=MUTED)


def _draw_bottleneck(axes: Axes, text: float) -> None:
    """Both streams through one down-projection, the routing function, the up-projection and the sum."""
    image = text + _STREAMS
    for x, color, source, latent in (
        (text, _TEXT_COLOR, "text $x_H$", "$x_t$"),
        (image, _IMAGE_COLOR, "image $x_R$", "$x_v$"),
    ):
        _text(axes, x, _INPUT, source, color=color)
        _arrow(axes, [(x, _INPUT + 0.10), (x, _DOWN - _DOWN_HEIGHT / 2)], color)
        _arrow(axes, [(x, _DOWN + _DOWN_HEIGHT / 2), (x, _ROUTE - _ROUTE_HEIGHT / 2)], color)
        _text(axes, x + 0.07, (_DOWN + _ROUTE) / 2 + 0.01, latent, color=color, horizontalalignment="left")
        _trapezium(axes, x, _DOWN, _WIDE, _NARROW, r"$W_\mathrm{down}$")
    slant = (_WIDE + _NARROW) / 4
    tie = {"color": _TRAINED["edgecolor"], "linewidth": 1.0, "linestyle": (0, (1.6, 1.2))}
    axes.plot([text + slant, image - slant], [_DOWN, _DOWN], **tie)
    _text(axes, (text + image) / 2, _DOWN + 0.105, "shared", color=_TRAINED["edgecolor"], fontsize=7)
    width = _STREAMS + _NARROW + 0.14
    middle = (text + image) / 2
    _rectangle(axes, middle, _ROUTE, width, _ROUTE_HEIGHT, "route$(x_t,\\, x_v)$", _PARAMETER_FREE, rounding=0.09)
    _trapezium(axes, text, _UP, _NARROW, _WIDE, r"$W_\mathrm{up}$")
    _arrow(axes, [(text, _UP + _DOWN_HEIGHT / 2), (text, _SUM - _SUM_RADIUS)])
    _draw_sum(axes, text)


def _draw_sum(axes: Axes, x: float) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, _SUM), _SUM_RADIUS, facecolor="white", edgecolor=INK, linewidth=0.9, zorder=3))
    arm = 0.6 * _SUM_RADIUS
    axes.plot([x - arm, x + arm], [_SUM, _SUM], color=INK, linewidth=0.9, zorder=4)
    axes.plot([x, x], [_SUM - arm, _SUM + arm], color=INK, linewidth=0.9, zorder=4)
    _arrow(axes, [(x + _SUM_RADIUS, _SUM), (x + 0.42, _SUM)])
    _text(axes, x + 0.47, _SUM, "$h$", horizontalalignment="left")


def _draw_formulas(axes: Axes, left: float) -> None:
    _title(axes, left, "c", "Routing functions", "linear, no new parameters")
    for index, (routing, formula, note) in enumerate(FORMULAS):
        y = 2.72 - 0.355 * index
        style = routing_style(routing)
        axes.plot(left + 0.05, y, style.marker, color=style.color, markersize=5.5)
        _text(axes, left + 0.16, y, routing, horizontalalignment="left")
        _text(axes, left + 0.66, y + 0.055, formula, horizontalalignment="left", fontsize=9)
        _text(axes, left + 0.66, y - 0.095, note, horizontalalignment="left", fontsize=7, color=MUTED)
    _text(
        axes, left, 0.92, r"$x_t$: $L_t \times r$ (text),  $x_v$: $L_v \times r$ (image)",
        horizontalalignment="left", fontsize=7,
    )  # fmt: skip
    for y, look, name in (
        (0.66, _FROZEN, "frozen"),
        (0.47, _TRAINED, "trained"),
        (0.28, _PARAMETER_FREE, "no parameters"),
    ):
        _rectangle(axes, left + 0.10, y, 0.20, 0.11, "", look)
        _text(axes, left + 0.28, y, name, horizontalalignment="left", fontsize=7)
    for y, color, name in ((0.66, _TEXT_COLOR, "text"), (0.47, _IMAGE_COLOR, "image"), (0.28, INK, "both")):
        _arrow(axes, [(left + 1.16, y), (left + 1.40, y)], color)
        _text(axes, left + 1.47, y, name, horizontalalignment="left", fontsize=7)


def _title(axes: Axes, left: float, letter: str, title: str, subtitle: str) -> None:
    _text(axes, left, _TITLE, f"{letter}  {title}", horizontalalignment="left", fontsize=9, fontweight="bold")
    _text(axes, left, _SUBTITLE, subtitle, horizontalalignment="left", fontsize=7, color=MUTED)


def _text(axes: Axes, x: float, y: float, text: str, **options) -> None:
    centred = {
        "horizontalalignment": "center",
        "verticalalignment": "center_baseline",
        "fontsize": 8,
        "zorder": 5,
    }
    if "rotation" in options:
        centred["verticalalignment"] = "center"
    axes.text(x, y, text, **(centred | options))


def _rectangle(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    label: str,
    look: dict,
    rounding: float = 0.02,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - height / 2)
    box_style = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=box_style, linewidth=0.9, zorder=3, **look))
    _text(axes, x, y, label)


def _trapezium(axes: Axes, x: float, y: float, bottom: float, top: float, label: str) -> None:
    from matplotlib.patches import Polygon

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
