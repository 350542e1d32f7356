"""F3: score against rank, one line per routing function, one panel per training budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from routevl.reporting.figures.f2_main import scores
from routevl.reporting.style import (
    BLIND_LINE,
    METHOD_LABELS,
    SCORE_LABELS,
    TEXT_WIDTH,
    figure_legend,
    horizontal_grid,
    in_order,
    plural,
    routing_style,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from routevl.reporting.figures.inputs import FigureInputs

_SIDE_STEP = 0.04  # sideways, in units of one tick, so that intervals of equal rank stay apart


def draw(inputs: FigureInputs) -> tuple[Figure, pandas.DataFrame]:
    """Rows of panels: task and method; columns: epochs. Error bars are 95% intervals over test items."""
    from matplotlib.figure import Figure

    data = scores(inputs)
    kinds = list(dict.fromkeys(zip(data["task"], data["method"], strict=True)))
    budgets = sorted(set(data["epochs"]))
    width = min(TEXT_WIDTH, 1.4 + 2.8 * len(budgets))
    figure = Figure(figsize=(width, 0.5 + 2.5 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(budgets), squeeze=False, sharey="row")
    for row, (task, method) in zip(panels, kinds, strict=True):
        chosen = data[(data["task"] == task) & (data["method"] == method)]
        ranks = sorted(set(chosen["rank"]))
        for axes, epochs in zip(row, budgets, strict=True):
            _draw_panel(axes, chosen[chosen["epochs"] == epochs], ranks)
            axes.set_title(f"{METHOD_LABELS.get(method, method)}, {plural(epochs, 'training epoch')}")
        row[0].set_ylabel(SCORE_LABELS[task])
    for axes in panels[-1]:
        axes.set_xlabel("rank of the bottleneck")
    figure_legend(figure, in_order(data.loc[~data["blind"], "routing"]), "line", bool(data["blind"].any()))
    return figure, data.drop(columns=["setting", "blind"])


def _draw_panel(axes: Axes, data: pandas.DataFrame, ranks: list[int]) -> None:
    routings = in_order(data.loc[~data["blind"], "routing"])
    for index, routing in enumerate(routings):
        line = data[(data["routing"] == routing) & ~data["blind"]].sort_values("rank")
        shift = _SIDE_STEP * (index - (len(routings) - 1) / 2)
        places = [ranks.index(rank) + shift for rank in line["rank"]]
        spread = [line["score"] - line["ci_low"], line["ci_high"] - line["score"]]
        style = routing_style(routing)
        axes.errorbar(places, line["score"], spread, fmt="none", ecolor=style.color, elinewidth=1.1)
        axes.plot(places, line["score"], color=style.color, linestyle=style.line, marker=style.marker)
    for score in data.loc[data["blind"], "score"]:
        axes.axhline(score, **BLIND_LINE)
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlim(-0.4, len(ranks) - 0.6)
    axes.margins(y=0.08)
    horizontal_grid(axes)
