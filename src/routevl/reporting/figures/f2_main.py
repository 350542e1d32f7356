"""F2: the main comparison: bars with 95% intervals, seeds as dots, the blind baseline as a dashed line."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.style import (
    BLIND_LINE,
    INK,
    apart,
    draw_interval,
    figure_legend,
    horizontal_grid,
    interval_legend,
    look,
    setting_label,
    task_panels,
)

_BAR, _GAP, _LEAST_SPAN = 1.0, 0.9, 5.0
_CHARACTER = 0.062  # inches, of a label below the bars
_FEWEST_CHARACTERS = 10  # labels with less room stand upright, in a figure that is higher
_HEIGHT, _TALL = 2.9, 4.2


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """One panel per task, one group of bars per baseline with what is compared with it."""
    data = inputs.scores()
    figure, panels = task_panels(data, _HEIGHT)
    for task, axes in panels.items():
        _draw_task(axes, data[data["task"] == task], figure.get_figwidth() / len(panels) - 0.6)
    figure_legend(figure, data, "bar")
    interval_legend(figure, apart(data)[0])
    return figure, data


def _draw_task(axes: Axes, data: pd.DataFrame, width: float) -> None:
    """`width`: of the axes in inches, about."""
    shown, blind = apart(data)
    position, middles = 0.0, []
    for _, group in shown.groupby("root", sort=False):
        places = [position + _BAR * index for index in range(len(group))]
        for place, row in zip(places, group.itertuples(), strict=True):
            _draw_bar(axes, place, row)
        middles.append((places[0] + places[-1]) / 2)
        position = places[-1] + _BAR + _GAP
    for score in blind["score"]:
        axes.axhline(score, gapcolor="white", **(BLIND_LINE | {"zorder": 4}))  # in front of the bars
    last = position - _BAR - _GAP
    margin = max(0.9 * _BAR, (_LEAST_SPAN - last) / 2)  # a single bar does not fill the panel
    axes.set(xlim=(-margin, last + margin), ylim=(0, None))
    horizontal_grid(axes)
    groups = shown.drop_duplicates("root").to_dict("records")
    labels = [setting_label(group, groups) for group in groups]
    inches = width / (last + 2 * margin)  # of a bar
    characters = int(min(np.diff(middles) * inches, default=width) / _CHARACTER)  # up to the neighbouring label
    if characters >= _FEWEST_CHARACTERS:
        axes.set_xticks(middles, [_wrapped(label, characters) for label in labels])
    else:
        axes.set_xticks(middles, labels, rotation=90)
        axes.figure.set_figheight(_TALL)
    axes.tick_params(axis="x", length=0)


def _wrapped(label: str, characters: int) -> str:
    """The method on a line of its own, then the rest, broken at commas alone."""
    method, *rest = (part.replace(" ", "\N{NO-BREAK SPACE}") for part in label.split(", "))
    return "\n".join([method, *textwrap.wrap(", ".join(rest), characters, break_long_words=False)])


def _draw_bar(axes: Axes, place: float, row: Any) -> None:
    axes.bar(place, row.score, 0.86 * _BAR, **look(row).bar())
    draw_interval(axes, place, row, INK, elinewidth=0.9, capsize=2, capthick=0.9, zorder=5)
    seeds = [float(value) for value in row.seed_scores.split()]
    if len(seeds) > 1:
        dots = {"color": "white", "markeredgecolor": INK, "markeredgewidth": 0.5, "markersize": 2.2, "zorder": 6}
        axes.plot(np.linspace(place + 0.14, place + 0.34, len(seeds)), seeds, "o", **dots)
