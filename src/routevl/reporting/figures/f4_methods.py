"""F4: score against trainable parameters, every method numbered at its point, with a key of the numbers below the panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator

from routevl.methods.table import FAMILIES, METHODS
from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.names import DAGGER, differing, full_name, in_words
from routevl.reporting.style import (
    BLIND_LABEL,
    BLIND_LINE,
    HALO,
    TEXT_WIDTH,
    apart,
    draw_interval,
    horizontal_grid,
    look,
    lower_legend,
    mixed,
)
from routevl.routing import ROUTING
from routevl.tasks.table import TASKS

_HEIGHT = 2.8  # inches, of a panel
_AROUND = 0.5  # inches, for each panel and the key: of titles, labels of axes and legends
_FONT = 6.5  # points, of numbers and of their key
_LINE = 0.135  # inches, of the key
_CHARACTER = 0.056  # inches, of the key
_BESIDE = 0.42  # inches, of what an entry of the key has beside its characters
_DARKER = -0.5  # than their family's colour are numbers
_MARKER = 3.2  # points, half the width that a marker takes
_NEAR = 11  # points: a number whose middle is no farther from its point needs no line to it
_DISTANCES = (0.5, 2, 4, 7, 11, 16, 22, 29, 37, 46)  # points, between a marker and its number
_DIRECTIONS = 16
_PER_POINT = 0.6  # how bad each point of distance is; a covered neighbour is 100
_ROUNDS = 8  # in which each number looks for a better place, given those of the others


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """One panel per task; error bars are 95% intervals, colours are the families of methods.

    A method has the same number in all panels. The data have a blind row's name and no number of it.
    """
    data = _numbered(inputs.scores())
    shown, blind = apart(data)
    tasks = list(dict.fromkeys(shown["task"]))
    key = shown.drop_duplicates("number").sort_values("number")
    columns = max(number for number in range(1, len(key) + 1) if number == 1 or _key_width(key, number) < TEXT_WIDTH)
    heights = [*[_HEIGHT] * len(tasks), _LINE * math.ceil(len(key) / columns)]
    figure = Figure(figsize=(TEXT_WIDTH, sum(heights) + _AROUND * len(heights)), layout="constrained")
    *panels, below = figure.subplots(len(heights), 1, height_ratios=heights)
    for task, axes in zip(tasks, panels, strict=True):
        _draw_task(axes, task, shown[shown["task"] == task], blind[blind["task"] == task])
    _draw_key(below, key, columns)
    seen = {METHODS[method].family for method in shown["method"]}
    handles = [Patch(color=color, label=family) for family, color in FAMILIES.items() if family in seen]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.4, handlelength=1.4)
    lower_legend(figure, data)
    figure.draw_without_rendering()  # numbers are placed where the points are on the page, which must not move again
    figure.set_layout_engine("none")
    for task, axes in zip(tasks, panels, strict=True):
        _number_points(axes, shown[shown["task"] == task], list(blind.loc[blind["task"] == task, "score"]))
    return figure, data


def _numbered(data: pd.DataFrame) -> pd.DataFrame:
    """Rows of `FigureInputs.scores` with their `name` and, of those that are compared, its `number`, in the order of METHODS."""
    shown, blind = (part.to_dict("records") for part in apart(data))
    methods, routings = list(METHODS), list(ROUTING)
    shown.sort(key=lambda row: (methods.index(row["method"]), routings.index(row["routing"])))
    names = {row["experiment"]: full_name(row, shown) for row in shown}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names.values()), start=1)}
    of_blind = {row["experiment"]: ", ".join(filter(None, [BLIND_LABEL, in_words(differing(row, blind))])) for row in blind}
    data.insert(0, "number", data["experiment"].map(names).map(numbers).astype("Int64"))
    data.insert(1, "name", data["experiment"].map(names | of_blind))
    return data


def _draw_task(axes: Axes, task: str, shown: pd.DataFrame, blind: pd.DataFrame) -> None:
    for row in shown.itertuples():
        own = look(row)
        draw_interval(axes, row.trainable_params, row, own.color, elinewidth=0.8, alpha=0.35, zorder=1.8)
        axes.plot(row.trainable_params, row.score, markersize=5, zorder=3, **own.points())
    for place, row in enumerate(blind.sort_values("score").itertuples()):
        axes.axhline(row.score, **BLIND_LINE)
        axes.annotate(
            row.name.replace(" (", "\n(").replace(", ", "\n") + (f" {DAGGER}" if row.n_not_learned else ""),
            (1, row.score), (4, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=_FONT,
            verticalalignment="center" if len(blind) == 1 else "bottom" if place else "top",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.05, y=0.06)
    few = shown["trainable_params"].max() < 50 * shown["trainable_params"].min()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if few else (1, 3)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    axes.set(title=TASKS[task].label, xlabel="trainable parameters", ylabel=TASKS[task].score)
    horizontal_grid(axes)


def _key_width(key: pd.DataFrame, columns: int) -> float:
    """How wide a key in so many columns is, in inches."""
    of_columns = np.array_split(key["name"].str.len(), columns)  # as a legend divides its entries
    return sum(_BESIDE + _CHARACTER * lengths.max() for lengths in of_columns)


def _draw_key(axes: Axes, key: pd.DataFrame, columns: int) -> None:
    """The numbers with their names, each with its marker; `key` has a row of each number."""
    axes.set_axis_off()
    handles = [Line2D([], [], label=f"{row.number}  {row.name}", markersize=5, **look(row).points()) for row in key.itertuples()]
    axes.legend(
        handles=handles, loc="upper center", ncols=columns, fontsize=_FONT, borderaxespad=0, borderpad=0, labelspacing=0.35,
        handlelength=1.0, handletextpad=0.4, columnspacing=1.2,
    )  # fmt: skip


def _number_points(axes: Axes, shown: pd.DataFrame, lines: Sequence[float]) -> None:
    """Write each point's number at the best free place around it; `lines` are the heights of horizontal lines."""
    pixels = axes.figure.dpi / 72  # per point
    points = axes.transData.transform(shown[["trainable_params", "score"]])
    texts = [f"{row.number}{DAGGER}" if row.n_not_learned else str(row.number) for row in shown.itertuples()]
    sizes = np.array([_size(axes, text) for text in texts])
    crowd = _Crowd(
        points / pixels, sizes / pixels, [axes.transData.transform((1, line))[1] / pixels for line in lines],
        axes.get_window_extent().get_points() / pixels,
    )  # fmt: skip
    for text, row, away in zip(texts, shown.itertuples(), crowd.places() - crowd.points, strict=True):
        color = mixed(FAMILIES[METHODS[row.method].family], _DARKER)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": _MARKER}
        axes.annotate(
            text, (row.trainable_params, row.score), tuple(away), textcoords="offset points", fontsize=_FONT, color=color,
            horizontalalignment="center", verticalalignment="center", zorder=4, path_effects=HALO,
            arrowprops=line if math.hypot(*away) > _NEAR else None,
        )  # fmt: skip


def _size(axes: Axes, text: str) -> tuple[float, float]:
    """Width and height of a number on the page, in pixels."""
    measured = axes.text(0, 0, text, fontsize=_FONT)
    box = measured.get_window_extent()
    measured.remove()
    return box.width, box.height


class _Crowd(NamedTuple):
    """The points of a panel, the sizes of their numbers, (n, 2) each, the heights of lines and the panel's lower left and upper
    right corners; all in points on the page."""

    points: np.ndarray
    sizes: np.ndarray
    lines: Sequence[float]
    frame: np.ndarray

    def places(self) -> np.ndarray:
        """The middles of the numbers, (n, 2): each in turn takes the best place, given those of the others."""
        angles = 2 * np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS
        distances = np.repeat(_DISTANCES, _DIRECTIONS)
        directions = np.tile(np.stack([np.cos(angles), np.sin(angles)], axis=1), (len(_DISTANCES), 1))
        choices = self.points[:, None] + directions * ((_MARKER + distances)[:, None] + self.sizes[:, None] / 2)
        chosen = choices[:, 0].copy()
        for number in [*range(len(chosen))] * _ROUNDS:
            bad = _PER_POINT * distances + self._badness(number, choices[number], chosen)
            chosen[number] = choices[number, bad.argmin()]
        return chosen

    def _badness(self, number: int, middles: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """How much a number and its leader would cover and cross of the others, of points, lines, and the panel's edge: at each
        of these middles, given those that the others have chosen."""
        point, size, others = self.points[number], self.sizes[number], np.arange(len(chosen)) != number
        points, places, sizes, marker = self.points[others], chosen[others], self.sizes[others], np.full(2, 2 * _MARKER)
        covered = _inside(middles, self.points, marker + size).sum(1) + _inside(middles, places, sizes + size).sum(1)
        covered += ~_inside(middles, self.frame.mean(0)[None], np.diff(self.frame, axis=0) - size)[:, 0]
        leaders, of_others = _along(point, middles), _along(points, places)
        crossed = _inside(leaders, points, marker).any(1).sum(1) + _inside(leaders, places, sizes).any(1).sum(1)
        crossed += _inside(of_others, middles, size).any(1).sum(0)
        crossed += _cross(point, middles[:, None], points, places).sum(1)
        on_lines = (np.abs(middles[:, 1:] - np.array(self.lines)) < size[1] / 2 + 0.5).sum(1)
        return 100 * covered + 20 * crossed + 8 * on_lines


def _inside(at: np.ndarray, middles: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether places, (..., 2), are in boxes of those middles and sizes, (k, 2): (..., k)."""
    return (np.abs(at[..., None, :] - middles) < sizes / 2).all(-1)


def _along(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Places along each of n lines, (n, 12, 2)."""
    return ends[:, None] + np.linspace(0, 1, 12)[:, None] * (starts - ends)[:, None]


def _cross(start: np.ndarray, end: np.ndarray, other_start: np.ndarray, other_end: np.ndarray) -> np.ndarray:
    """Whether lines between places, (..., 2), cross each other."""

    def left(first: np.ndarray, to: np.ndarray, place: np.ndarray) -> np.ndarray:
        along, across = to - first, place - first
        return along[..., 0] * across[..., 1] > along[..., 1] * across[..., 0]

    apart = left(start, end, other_start) != left(start, end, other_end)
    return apart & (left(other_start, other_end, start) != left(other_start, other_end, end))
