"""F2: the main comparison: bars with 95% intervals, seeds as dots, the blind baseline as a dashed line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.style import (
    BLIND_LINE,
    INK,
    TEXT_WIDTH,
    apart,
    draw_interval,
    figure_legend,
    horizontal_grid,
    look,
    lower_legend,
    mark_not_learned,
    setting_label,
    task_panels,
    wrapped,
)

_BAR, _GAP, _LEAST_SPAN = 1.0, 0.9, 5.0
_CHARACTER = 0.056  # inches, of a label below the bars
_HEIGHT, _BESIDE = 2.9, 0.6  # inches: of a panel, and of what stands beside its axes


class _Layout(NamedTuple):
    """Where the bars of a panel stand, by groups, and the groups' labels; in units of the horizontal axis."""

    places: list[list[float]]
    middles: list[float]
    ends: tuple[float, float]
    labels: list[str]

    def characters(self, width: float) -> int:
        """How many characters have room up to the neighbouring label, in axes of so many inches."""
        inches = width / (self.ends[1] - self.ends[0])
        return int(min(np.diff(self.middles) * inches, default=width) / _CHARACTER)

    def has_room(self, width: float) -> bool:
        """Whether the parts of all labels, which stand below each other, do not reach into the neighbouring label."""
        return max(len(part) for label in self.labels for part in label.split(", ")) < self.characters(width)


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """One panel per task, one group of bars per baseline with what is compared with it.

    Two panels are side by side. Where the labels of the groups have no room there, they are below each other; where there is none
    there either, the labels stand upright.
    """
    data = inputs.scores()
    shown, blind = apart(data)
    layouts = {task: _layout(of_task) for task, of_task in shown.groupby("task", sort=False)}
    width = (TEXT_WIDTH / 2 if len(layouts) > 1 else 0.6 * TEXT_WIDTH) - _BESIDE
    if stacked := not all(layout.has_room(width) for layout in layouts.values()):
        width = TEXT_WIDTH - _BESIDE
    upright = not all(layout.has_room(width) for layout in layouts.values())
    longest = max(len(label) for layout in layouts.values() for label in layout.labels)
    figure, panels = task_panels(shown, _HEIGHT + upright * _CHARACTER * longest, stacked)
    for task, axes in panels.items():
        _draw_task(axes, shown[shown["task"] == task], layouts[task], blind.loc[blind["task"] == task, "score"])
        labels = [label if upright else wrapped(label, layouts[task].characters(width)) for label in layouts[task].labels]
        axes.set_xticks(layouts[task].middles, labels, rotation=90 if upright else 0)
        axes.tick_params(axis="x", length=0)
    figure_legend(figure, data, "bar")
    lower_legend(figure, data)
    return figure, data


def _layout(shown: pd.DataFrame) -> _Layout:
    groups = [group for _, group in shown.groupby("root", sort=False)]
    places, position = [], 0.0
    for group in groups:
        places.append([position + _BAR * index for index in range(len(group))])
        position = places[-1][-1] + _BAR + _GAP
    last = places[-1][-1]
    margin = max(0.9 * _BAR, (_LEAST_SPAN - last) / 2)  # a single bar does not fill the panel
    firsts = [group.iloc[0].to_dict() for group in groups]
    labels = [setting_label(first, firsts) for first in firsts]
    return _Layout(places, [(of[0] + of[-1]) / 2 for of in places], (-margin, last + margin), labels)


def _draw_task(axes: Axes, shown: pd.DataFrame, layout: _Layout, blind: Sequence[float]) -> None:
    for (_, group), places in zip(shown.groupby("root", sort=False), layout.places, strict=True):
        for place, row in zip(places, group.itertuples(), strict=True):
            _draw_bar(axes, place, row)
    for score in blind:
        axes.axhline(score, gapcolor="white", **(BLIND_LINE | {"zorder": 4}))  # in front of the bars
    axes.set(xlim=layout.ends, ylim=(0, None))
    horizontal_grid(axes)


def _draw_bar(axes: Axes, place: float, row: Any) -> None:
    axes.bar(place, row.score, 0.86 * _BAR, **look(row).bar())
    draw_interval(axes, place, row, INK, elinewidth=0.9, capsize=2, capthick=0.9, zorder=5)
    if row.n_not_learned:
        mark_not_learned(axes, place, row.score)
    seeds = [float(value) for value in row.seed_scores.split()]
    if len(seeds) > 1:
        dots = {"color": "white", "markeredgecolor": INK, "markeredgewidth": 0.5, "markersize": 2.2, "zorder": 6}
        axes.plot(np.linspace(place + 0.14, place + 0.34, len(seeds)), seeds, "o", **dots)
