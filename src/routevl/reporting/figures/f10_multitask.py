"""F10: multi-task learning: what each comparison gains in the average and in each data set."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from routevl.errors import RoutevlError
from routevl.reporting.figures.inputs import FigureInputs, identity
from routevl.reporting.names import DAGGER, full_name
from routevl.reporting.results import data_set_gains, gains
from routevl.reporting.statistics import NOT_LEARNED
from routevl.reporting.style import MUTED, TEXT_WIDTH, draw_interval, look, lower_legend, wrapped
from routevl.tasks.table import TASKS

_TASK = TASKS["multitask"]
_LINE = 0.15  # inches, of a name
_CHARACTERS = 30  # of a line of a name


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """A panel for the average and one for each data set; a line per experiment: its gain over its `versus`, with its interval."""
    data = measured_gains(inputs)
    rows = data.drop_duplicates("experiment").to_dict("records")
    names = [_name(row, rows) for row in rows]
    lines = sum(name.count("\n") + 1.6 for name in names)
    figure = Figure(figsize=(TEXT_WIDTH, _LINE * lines + 1.1), layout="constrained")
    panels = figure.subplots(1, len(_TASK.shown), sharey=True)
    for axes, (metric, heading) in zip(panels, _TASK.shown.items(), strict=True):
        _draw_panel(axes, data[data["metric"] == metric])
        axes.set_title(heading)
    panels[0].set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.4, -0.6))
    panels[len(panels) // 2].set_xlabel("gain in points (CIDEr × 100)")
    lower_legend(figure, data)
    return figure, data


def measured_gains(inputs: FigureInputs) -> pd.DataFrame:
    """One row per experiment with a `versus`, and metric: the gain with its 95% interval, and how sure it is.

    Raises RoutevlError where an experiment of another task feeds F10, or none that has a `versus`.
    """
    runs = inputs.runs()
    for experiment in runs.loc[runs["task"] != "multitask", "experiment"]:
        raise RoutevlError(f"{inputs.experiments}: experiment {experiment} feeds F10, which is about the task multitask alone")
    compared = runs[runs["versus"] != ""]
    if compared.empty:
        raise RoutevlError(f"{inputs.experiments}: no experiment that feeds F10 has a `versus`")
    results = inputs.need("results")
    found = {_TASK.metric: gains(compared, results), **data_set_gains(compared, results)}
    rows = []
    for experiment, group in compared.groupby("experiment", sort=False):
        for metric in _TASK.shown:
            gain = found[metric][experiment]
            measured = {"metric": metric, **gain.absolute.columns("gain", "ci"), "ci_over": gain.absolute.over}
            rows.append(identity(group) | measured | {"p": gain.p, "p_holm": gain.holm, "no_verdict": gain.no_verdict})
    return pd.DataFrame(rows)


def _name(row: dict, rows: list[dict]) -> str:
    """What a row is; over what it gains, where that is not its own method without a routing function; and why it has no gain."""
    name = full_name(row, rows)
    name = name if len(name) <= _CHARACTERS else wrapped(name, _CHARACTERS)
    over = "" if row["routing"] != "none" else f"\nover {row['versus']}"
    return name + over + (f"\n{DAGGER} {NOT_LEARNED}" if row["no_verdict"] == NOT_LEARNED else "")


def _draw_panel(axes: Axes, data: pd.DataFrame) -> None:
    axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
    for place, row in enumerate(data.itertuples()):
        if math.isnan(row.gain):
            continue
        own = look(row)
        draw_interval(axes, place, row, own.color, of="gain", horizontal=True, elinewidth=1.0)
        axes.plot(row.gain, place, markersize=5.5, zorder=3, **own.points())
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
