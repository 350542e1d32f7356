"""F2: the main comparison: bars with 95% intervals, seeds as dots, the blind baseline as a dashed line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from routevl.reporting.results import MAIN_METRIC, is_blind, read_items
from routevl.reporting.statistics import BOOTSTRAP_SEED, bootstrap_mean
from routevl.reporting.style import (
    BLIND_LINE,
    INK,
    SCORE_LABELS,
    SCORE_SCALE,
    TASK_LABELS,
    TEXT_WIDTH,
    figure_legend,
    horizontal_grid,
    in_order,
    routing_style,
    setting_label,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from routevl.reporting.figures.inputs import FigureInputs

_BAR, _GAP, _LEAST_SPAN = 1.0, 0.9, 5.0


def draw(inputs: FigureInputs) -> tuple[Figure, pandas.DataFrame]:
    """One panel per task, one group of bars per method and budget, one bar per routing function."""
    from matplotlib.figure import Figure

    data = scores(inputs)
    tasks = list(dict.fromkeys(data["task"]))
    figure = Figure(figsize=(TEXT_WIDTH if len(tasks) > 1 else TEXT_WIDTH * 0.6, 2.9), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        _draw_task(axes, data[data["task"] == task], task)
    seen = data[~data["blind"]]
    figure_legend(figure, in_order(seen["routing"]), "bar", bool(data["blind"].any()))
    return figure, data.drop(columns=["setting", "blind"])


def scores(inputs: FigureInputs) -> pandas.DataFrame:
    """One row per experiment: its score, the 95% bootstrap interval over test items, and each seed."""
    import pandas as pd

    rows = []
    for experiment, group in inputs.runs(files=("scores",)).groupby("experiment", sort=False):
        first = group.iloc[0]
        metric, scale = MAIN_METRIC[first["task"]], SCORE_SCALE[first["task"]]
        items = read_items(inputs.need("results"), list(group["run"]), metric)
        interval = bootstrap_mean(items.to_numpy(), BOOTSTRAP_SEED)
        rows.append(
            {
                "experiment": experiment,
                **{column: first[column] for column in ("task", "method", "routing", "prefix", "rank", "epochs")},
                "metric": SCORE_LABELS[first["task"]],
                "score": interval.estimate * scale,
                "ci_low": interval.low * scale,
                "ci_high": interval.high * scale,
                "n_seeds": len(group),
                "seed_scores": " ".join(f"{value * scale:.6g}" for value in group[metric]),
                "setting": first["setting"],
                "blind": is_blind(first),
            }
        )
    return pd.DataFrame(rows)


def _draw_task(axes: Axes, data: pandas.DataFrame, task: str) -> None:
    settings = list(dict.fromkeys(data.loc[~data["blind"], "setting"]))
    position, centres = 0.0, []
    for setting in settings:
        group = data[(data["setting"] == setting) & ~data["blind"]]
        places = [position + _BAR * index for index in range(len(group))]
        for place, row in zip(places, group.itertuples(), strict=True):
            _draw_bar(axes, place, row)
        centres.append((places[0] + places[-1]) / 2)
        position = places[-1] + _BAR + _GAP
    for row in data[data["blind"]].itertuples():
        axes.axhline(row.score, gapcolor="white", **(BLIND_LINE | {"zorder": 4}))  # in front of the bars
    labels = [setting_label(setting, settings).replace(", ", "\n", 1) for setting in settings]
    axes.set_xticks(centres, labels)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(bottom=0)
    last = max(position - _BAR - _GAP, 0.0)
    margin = max(0.9 * _BAR, (_LEAST_SPAN - last) / 2)  # a single bar does not fill the panel
    axes.set_xlim(-margin, last + margin)
    axes.set_ylabel(SCORE_LABELS[task])
    axes.set_title(TASK_LABELS[task])
    horizontal_grid(axes)


def _draw_bar(axes: Axes, place: float, row) -> None:
    style = routing_style(row.routing)
    axes.bar(place, row.score, 0.86 * _BAR, color=style.color, hatch=style.hatch, edgecolor="white", linewidth=0)
    below, above = row.score - row.ci_low, row.ci_high - row.score
    axes.errorbar(place, row.score, [[below], [above]], color=INK, linewidth=0.9, capsize=2, capthick=0.9, zorder=5)
    seeds = [float(value) for value in row.seed_scores.split()]
    if len(seeds) > 1:
        steps = [place + 0.14 + 0.2 * index / (len(seeds) - 1) for index in range(len(seeds))]
        axes.plot(
            steps,
            seeds,
            "o",
            color="white",
            markeredgecolor=INK,
            markeredgewidth=0.5,
            markersize=2.2,
            zorder=6,
        )
