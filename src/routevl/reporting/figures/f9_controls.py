"""F9: controls: what is left of routing's gain where something else than the image is routed."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from routevl.methods.table import METHODS
from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.names import DAGGER, differing, in_words
from routevl.reporting.results import gains
from routevl.reporting.statistics import Gain
from routevl.reporting.style import BLIND_LINE, MUTED, TEXT_WIDTH, apart, blind_label, draw_interval, look, lower_legend
from routevl.routing import ROUTING
from routevl.tasks.table import TASKS

_ROW = 0.24  # inches
_ROUTED = {  # what is routed -> how the figure calls it
    "image": "the image",
    "shuffled": "another image",
    "noise": "noise",
    "ones": "ones",
    "text": "the text itself",
}


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """One panel per task, one line per experiment: its score with its 95% interval, and in numbers the gain over its `versus`."""
    data = inputs.scores()
    found = gains(inputs.runs(), inputs.need("results"))
    scaled = [found.get(row.experiment, Gain()).absolute.times(TASKS[row.task].scale) for row in data.itertuples()]
    data = data.join(pd.DataFrame([gain.columns("gain", "gain_ci") for gain in scaled]))
    data["gain_shown"] = [gain.signed() for gain in scaled]
    shown, blind = apart(data)
    tasks = list(dict.fromkeys(shown["task"]))
    counts = [(shown["task"] == task).sum() for task in tasks]
    figure = Figure(figsize=(TEXT_WIDTH, _ROW * sum(counts) + 0.75 * len(tasks) + 0.5), layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False, height_ratios=counts).flat
    for task, axes in zip(tasks, panels, strict=True):
        _draw_task(axes, task, shown[shown["task"] == task], blind[blind["task"] == task])
    lower_legend(figure, data)
    return figure, data.drop(columns="gain_shown")


def _draw_task(axes: Axes, task: str, shown: pd.DataFrame, blind: pd.DataFrame) -> None:
    records = shown.to_dict("records")
    for place, row in enumerate(shown.itertuples()):
        own = look(row)
        axes.plot(row.score, place, markersize=5.5, zorder=3, **own.points())
        draw_interval(axes, place, row, own.color, horizontal=True, elinewidth=1.0)
        axes.annotate(
            row.gain_shown, (1, place), (6, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=7.5,
            verticalalignment="center", annotation_clip=False,
        )  # fmt: skip
    axes.annotate(
        "gain [95% interval]", (1, -1), (6, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=7.5,
        verticalalignment="center", annotation_clip=False, color=MUTED,
    )  # fmt: skip
    for row in blind.itertuples():
        axes.axvline(row.score, **BLIND_LINE)
        axes.annotate(
            blind_label(blind), (row.score, -1), (4, 0), textcoords="offset points", fontsize=7.5, verticalalignment="center",
            color=MUTED,
        )  # fmt: skip
    axes.set(title=TASKS[task].label, xlabel=TASKS[task].score, ylim=(len(shown) - 0.4, -1.3))
    axes.set_yticks(range(len(shown)), [_name(row, records) for row in records])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _name(row: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """What is routed in a row, and what else tells it apart."""
    details = differing(row, others, but=("routed_features",))
    if row["routing"] == "none":
        what = f"plain {METHODS[row['method']].label}"
    else:
        what = f"{ROUTING[row['routing']].label}: {_ROUTED[row['details']['routed_features']]}"
    return ", ".join(filter(None, [what, in_words(details)])) + (f" {DAGGER}" if row["n_not_learned"] else "")
