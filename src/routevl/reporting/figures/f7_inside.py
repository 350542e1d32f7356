"""F7: what routing does inside: how a bottleneck's vectors lie to the image's, and how many dimensions they fill, by layer."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.reporting.figures.inputs import FigureInputs, identity
from routevl.reporting.style import (
    MUTED,
    TEXT_WIDTH,
    figure_legend,
    horizontal_grid,
    look,
    lower_legend,
    mark_not_learned,
    setting_label,
    wrapped,
)
from routevl.tasks.table import TASKS

_MEASURES = {  # columns after routing, and before it where there is one -> what an axis calls them
    ("cosine_after", "cosine_before"): "cosine to $x_v$",
    ("cka_after", "cka_before"): "linear CKA with $x_v$",
    ("effective_rank_after", "effective_rank_before"): "effective rank",
    ("along_image", None): "share along $x_v$",
}
_CHARACTER = 0.066  # inches, of a title
_BEFORE = {"linestyle": (0, (1, 1.2)), "linewidth": 1.0}


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """A row of panels for each baseline with what is compared with it, a column for each measure that some run has.

    Means over seeds and over the bottlenecks of a layer: after routing with markers, before it dotted.
    """
    data = measurements(inputs)
    groups = data.drop_duplicates("root").to_dict("records")
    measures = {columns: label for columns, label in _MEASURES.items() if data[columns[0]].notna().any()}
    figure = Figure(figsize=(TEXT_WIDTH, 0.6 + 1.8 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), len(measures), squeeze=False, sharex=True, sharey="col")
    for row, group in zip(panels, groups, strict=True):
        chosen = data[data["root"] == group["root"]]
        for axes, (columns, label) in zip(row, measures.items(), strict=True):
            _draw_panel(axes, chosen, *columns)
            axes.set_ylabel(label)
        characters = int(TEXT_WIDTH / len(measures) / _CHARACTER)
        row[0].set_title(f"{TASKS[group['task']].label}, {wrapped(setting_label(group, groups), characters)}", fontsize=7.5)
    for axes in panels[-1]:
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    after, before = {"color": MUTED, "marker": "o"}, {"color": MUTED, **_BEFORE}
    handles = [Line2D([], [], label="after routing", **after), Line2D([], [], label="before it", **before)]
    figure.legend(handles=handles, loc="outside lower right", ncols=2)
    figure_legend(figure, data, "line")
    lower_legend(figure, data)
    return figure, data


def measurements(inputs: FigureInputs) -> pd.DataFrame:
    """One row per experiment and layer: the measures of `routevl inside`, means over seeds and bottlenecks."""
    rows: list[dict[str, Any]] = []
    for experiment, group in inputs.runs().groupby("experiment", sort=False):
        if group["routing"].iloc[0] == "none":
            raise RoutevlError(f"{inputs.experiments}: experiment {experiment} feeds F7, and it has no routing function")
        found = [_read(inputs, run) for run in group["run"]]
        layers = pd.concat(found).drop(columns=["module", "part"]).groupby("layer").mean()
        rows += [identity(group) | {"layer": layer} | values for layer, values in layers.to_dict("index").items()]
    return pd.DataFrame(rows)


def _read(inputs: FigureInputs, run: str) -> pd.DataFrame:
    path = inputs.need("results") / "inside" / f"{run}.json"
    record = read_json(path)
    if not (isinstance(record, dict) and record.get("bottlenecks")):
        raise RoutevlError(f"{path}: not what `routevl inside` writes")
    measures = [name for columns in _MEASURES for name in columns if name]
    return pd.DataFrame(record["bottlenecks"]).astype(dict.fromkeys(measures, float))


def _draw_panel(axes: Axes, data: pd.DataFrame, after: str, before: str | None) -> None:
    for _, line in data.groupby("experiment", sort=False):
        own = look(next(line.itertuples()))
        axes.plot(line["layer"], line[after], **own.points(line=True))
        last = line.iloc[-1]
        if last["n_not_learned"]:
            mark_not_learned(axes, last["layer"], last[after])
        if before:
            axes.plot(line["layer"], line[before], color=own.color, **_BEFORE)
    axes.margins(y=0.08)
    horizontal_grid(axes)
