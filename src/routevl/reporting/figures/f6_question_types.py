"""F6: VQA accuracy by answer type and by question type, one dot per routing function."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from routevl.errors import RoutevlError
from routevl.metrics.score import ANSWER_TYPES
from routevl.reporting.figures.inputs import FigureInputs, identity
from routevl.reporting.style import (
    BLIND_TICK,
    FAINT,
    TEXT_WIDTH,
    apart,
    figure_legend,
    look,
    lower_legend,
    mark_not_learned,
    setting_label,
    wrapped,
)
from routevl.tasks.table import TASKS

_MOST_QUESTION_TYPES = 16
_COLUMNS = 4
_CHARACTER = 0.072  # inches, of a title
_SPREAD = 0.5  # of the distance between two types


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """A column per baseline with what is compared with it; above the answer types, below the most frequent question types, each
    where the annotations have some."""
    data = accuracies(inputs)
    shown, blind = apart(data)
    groups = shown.drop_duplicates("root").to_dict("records")
    labels = {kind: list(dict.fromkeys(data.loc[data["by"] == kind, "label"])) for kind in data["by"].unique()}
    heights = [len(names) for names in labels.values()]
    columns = min(_COLUMNS, len(groups))
    blocks = -(-len(groups) // columns)
    width = min(TEXT_WIDTH, 1.8 + 2.6 * columns)
    figure = Figure(figsize=(width, 0.5 + blocks * (0.8 + 0.24 * sum(heights))), layout="constrained")
    panels = figure.subplots(
        len(labels) * blocks, columns, squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": heights * blocks}
    )
    for number in range(columns * blocks):
        block, column = divmod(number, columns)
        those = panels[block * len(labels) : (block + 1) * len(labels), column]
        if number >= len(groups):
            for axes in those:
                axes.remove()
            continue
        chosen = shown[shown["root"] == groups[number]["root"]]
        for axes, (kind, names) in zip(those, labels.items(), strict=True):
            _draw_panel(axes, chosen[chosen["by"] == kind], blind[blind["by"] == kind], names)
            if column == 0:
                axes.set_ylabel(kind)
        characters = int((width - 1.2) / columns / _CHARACTER)
        those[0].set_title(wrapped(setting_label(groups[number], groups), characters))
        those[-1].tick_params(labelbottom=True)
        if number + columns >= len(groups):
            those[-1].set_xlabel(TASKS["vqa"].score)
    figure.align_ylabels(panels[:, 0])
    figure_legend(figure, data, "marker")
    lower_legend(figure, data)
    return figure, data.drop(columns="label")


def accuracies(inputs: FigureInputs) -> pd.DataFrame:
    """One row per experiment and type: accuracy (percent, mean over seeds) and the number of questions."""
    runs = inputs.runs()
    for experiment in runs.loc[runs["task"] != "vqa", "experiment"]:
        raise RoutevlError(f"{inputs.experiments}: experiment {experiment} feeds F6, which is about the task vqa alone")
    rows = []
    for _, group in runs.groupby("experiment", sort=False):
        shared, tables = identity(group), list(group["by_question_type"])
        for metric, label in ANSWER_TYPES.items():
            if group[metric].notna().all():
                rows.append(shared | {"by": "answer type", "type": label, "label": label, "accuracy": group[metric].mean()})
        for number, name in sorted((-entry["n"], name) for name, entry in tables[0].items())[:_MOST_QUESTION_TYPES]:
            accuracy = sum(table[name]["accuracy"] for table in tables) / len(tables)
            by = {"by": "question type", "type": name, "label": f"{name} ({-number:,})"}
            rows.append(shared | by | {"accuracy": accuracy, "n_questions": -number})
    if not rows:
        raise RoutevlError(f"{inputs.experiments}: F6 is about types of questions and answers, but the test split's have none")
    return pd.DataFrame(rows)


def _draw_panel(axes: Axes, shown: pd.DataFrame, blind: pd.DataFrame, names: list[str]) -> None:
    together = pd.concat([shown, blind])
    for place, name in enumerate(names):
        found = together.loc[together["label"] == name, "accuracy"]
        axes.plot([found.min(), found.max()], [place, place], color=FAINT, linewidth=1.2, zorder=1)
    for row in blind.itertuples():
        axes.plot(row.accuracy, names.index(row.label), zorder=3, **BLIND_TICK)
    experiments = list(dict.fromkeys(shown["experiment"]))
    for row in shown.itertuples():  # those of one type a little below each other, so that none hides another
        place = names.index(row.label) + _SPREAD * ((experiments.index(row.experiment) + 0.5) / len(experiments) - 0.5)
        axes.plot(row.accuracy, place, markersize=5, zorder=4, **look(row).points())
        if row.n_not_learned:
            mark_not_learned(axes, row.accuracy, place, (6, 0))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
