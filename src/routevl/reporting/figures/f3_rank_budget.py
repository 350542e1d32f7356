"""F3: score against rank, one line per routing function, one panel per training budget."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from routevl.errors import RoutevlError
from routevl.methods.table import METHODS
from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.names import plural
from routevl.reporting.style import (
    BLIND_LINE,
    TEXT_WIDTH,
    apart,
    draw_interval,
    figure_legend,
    horizontal_grid,
    look,
    lower_legend,
    mark_not_learned,
)
from routevl.tasks.table import TASKS

_SIDE_STEP = 0.03  # sideways, of the width of a panel, so that intervals of equal rank stay apart


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """Rows of panels: task and method; columns: epochs. Error bars are 95% intervals."""
    data = inputs.scores()
    for experiment in data.loc[data["rank"].isna(), "experiment"]:
        raise RoutevlError(f"{inputs.experiments}: experiment {experiment} feeds F3, and its method has no rank")
    kinds = list(dict.fromkeys(zip(data["task"], data["method"], strict=True)))
    budgets = sorted(set(data["epochs"]))
    width = min(TEXT_WIDTH, 1.4 + 2.8 * len(budgets))
    figure = Figure(figsize=(width, 0.5 + 2.5 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(budgets), squeeze=False, sharey="row")
    for row, (task, method) in zip(panels, kinds, strict=True):
        chosen = data[(data["task"] == task) & (data["method"] == method)]
        ranks = sorted(set(apart(chosen)[0]["rank"]))
        for axes, epochs in zip(row, budgets, strict=True):
            _draw_panel(axes, chosen[chosen["epochs"] == epochs], ranks)
            axes.set_title(f"{METHODS[method].label}, {plural(epochs, 'training epoch')}")
        row[0].set_ylabel(TASKS[task].score)
    for axes in panels[-1]:
        axes.set_xlabel("rank of the bottleneck")
    figure_legend(figure, data, "line")
    lower_legend(figure, data)
    return figure, data


def _draw_panel(axes: Axes, data: pd.DataFrame, ranks: list[int]) -> None:
    shown, blind = apart(data)
    lines = [line.sort_values("rank") for _, line in shown.groupby(["routing", "variant"], sort=False)]
    for index, line in enumerate(lines):
        shift = _SIDE_STEP * len(ranks) * (index - (len(lines) - 1) / 2)
        places = [ranks.index(rank) + shift for rank in line["rank"]]
        own = look(next(line.itertuples()))
        for place, point in zip(places, line.itertuples(), strict=True):
            draw_interval(axes, place, point, own.color, elinewidth=1.1)
            if point.n_not_learned:
                mark_not_learned(axes, place, point.score)
        axes.plot(places, line["score"], **own.points(line=True))
    for score in blind["score"]:
        axes.axhline(score, **BLIND_LINE)
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlim(-0.4, len(ranks) - 0.6)
    axes.margins(y=0.08)
    horizontal_grid(axes)
