"""F4: score against trainable parameters, every method named at its point."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.ticker import EngFormatter, LogLocator
from matplotlib.transforms import Bbox

from routevl.methods.table import FAMILIES, METHODS
from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.names import DAGGER, full_name
from routevl.reporting.style import (
    BLIND_LINE,
    HALO,
    MUTED,
    apart,
    blind_label,
    draw_interval,
    horizontal_grid,
    look,
    lower_legend,
    task_panels,
)

_NEAR = 8  # points: names that are no farther off need no line to their point
_DISTANCES = (4, 8, 13, 19, 26, 34, 43, 53, 64, 76)  # points, between a point and its name
_DIRECTIONS = 16
_ROUNDS = 3  # in which each name looks for a better place, given those of the others
_MARKER = 4  # points, half the width that a marker takes


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """One panel per task; error bars are 95% intervals, colours are the families of methods."""
    data = inputs.scores()
    shown, blind = apart(data)
    figure, panels = task_panels(shown, 4.2, stacked=True)
    for task, axes in panels.items():
        _draw_task(axes, shown[shown["task"] == task], blind[blind["task"] == task])
    seen = {METHODS[method].family for method in shown["method"]}
    handles = [Patch(color=color, label=family) for family, color in FAMILIES.items() if family in seen]
    if len(blind):
        handles.append(Line2D([], [], label=blind_label(blind), **BLIND_LINE))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), columnspacing=1.4, handlelength=1.4)
    lower_legend(figure, data)
    figure.draw_without_rendering()  # names are placed where the points are on the page, which must not move again
    figure.set_layout_engine("none")
    for task, axes in panels.items():
        _name_points(axes, shown[shown["task"] == task], blind.loc[blind["task"] == task, "score"])
    return figure, data


def _draw_task(axes: Axes, shown: pd.DataFrame, blind: pd.DataFrame) -> None:
    for row in shown.itertuples():
        own = look(row)
        draw_interval(axes, row.trainable_params, row, own.color, elinewidth=1.0)
        axes.plot(row.trainable_params, row.score, markersize=6, zorder=3, **own.points())
    for score in blind["score"]:
        axes.axhline(score, **BLIND_LINE)
    axes.set_xscale("log")
    axes.margins(x=0.3, y=0.12)
    few = shown["trainable_params"].max() < 100 * shown["trainable_params"].min()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    axes.set_xlabel("trainable parameters")
    horizontal_grid(axes)


def _name_points(axes: Axes, shown: pd.DataFrame, lines: Iterable[float]) -> None:
    """Write each point's name at the best free place around it; `lines` are the heights of horizontal lines."""
    pixels = axes.figure.dpi / 72  # per point
    at = {y: axes.transData.transform(shown[["trainable_params", y]]) for y in ("score", "ci_low", "ci_high")}
    half = _MARKER * pixels
    markers = [Bbox([point - half, point + half]) for point in at["score"]]
    bars = [Bbox([low - 1, high + 1]) for low, high in zip(at["ci_low"], at["ci_high"], strict=True)]
    left, right = axes.get_window_extent().intervalx
    bars += [Bbox([[left, y - 1], [right, y + 1]]) for _, y in axes.transData.transform([(1, line) for line in lines])]
    rows = shown.to_dict("records")
    texts = [full_name(row, rows) + (f" {DAGGER}" if row["n_not_learned"] else "") for row in rows]
    choices = [list(_places(axes, *point, pixels)) for point in zip(texts, at["score"], strict=True)]
    chosen = [places[0] for places in choices]
    for number in [*range(len(rows))] * _ROUNDS:
        rest = chosen[:number] + chosen[number + 1 :]
        around = (rest, markers, bars, axes.get_window_extent())
        chosen[number] = min(choices[number], key=lambda place, around=around: _badness(place, *around))
    line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": _MARKER}
    for text, row, place in zip(texts, rows, chosen, strict=True):
        start, end = place.leader.vertices
        axes.annotate(
            text, (row["trainable_params"], row["score"]), tuple((end - start) / pixels), textcoords="offset points", fontsize=7,
            horizontalalignment="center", verticalalignment="center", zorder=4, path_effects=HALO,
            arrowprops=line if place.distance > _NEAR else None,
        )  # fmt: skip


class _Place(NamedTuple):
    """Where a name may stand, in pixels, with the line from its point to its middle, and how far off it is, in points."""

    box: Bbox
    leader: Path
    distance: float


def _places(axes: Axes, text: str, point: np.ndarray, pixels: float) -> Iterator[_Place]:
    """Places for a name around its point, the nearest first."""
    measured = axes.text(0, 0, text, fontsize=7)
    size = np.array(measured.get_window_extent().size)
    measured.remove()
    for distance, direction in product(_DISTANCES, range(_DIRECTIONS)):
        angle = 2 * math.pi * direction / _DIRECTIONS
        middle = point + np.array([math.cos(angle), math.sin(angle)]) * (distance * pixels + size / 2)
        yield _Place(Bbox([middle - size / 2, middle + size / 2]), Path([point, middle]), distance)


def _badness(place: _Place, rest: Sequence[_Place], markers: Sequence[Bbox], bars: Sequence[Bbox], frame: Bbox) -> float:
    """How much a name and its leader cover and cross of the others, of points, bars, lines, and the panel's edge."""
    outside = not all(frame.contains(*corner) for corner in place.box.corners())
    covered = outside + place.box.count_overlaps([*markers, *(other.box for other in rest)])
    crossed = sum(place.leader.intersects_bbox(marker, filled=False) for marker in markers) - 1  # its own
    for other in rest:
        crossed += place.leader.intersects_bbox(other.box, filled=False) + other.leader.intersects_bbox(place.box, filled=False)
        crossed += place.leader.intersects_path(other.leader)
    return 0.2 * place.distance + 100 * covered + 20 * crossed + 8 * place.box.count_overlaps(bars)
