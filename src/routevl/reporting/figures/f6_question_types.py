"""F6: VQA accuracy by answer type and by question type, one dot per routing function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from routevl.errors import RoutevlError
from routevl.reporting.results import is_blind
from routevl.reporting.style import (
    BLIND_TICK,
    FAINT,
    TEXT_WIDTH,
    figure_legend,
    in_order,
    routing_style,
    setting_label,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from routevl.reporting.figures.inputs import FigureInputs

_ANSWER_TYPES = {"yes_no": "yes/no", "number": "number", "other": "other"}
_MOST_QUESTION_TYPES = 16


def draw(inputs: FigureInputs) -> tuple[Figure, pandas.DataFrame]:
    """Columns: method and budget; above the answer types, below the most frequent question types."""
    from matplotlib.figure import Figure

    data = accuracies(inputs)
    settings = list(dict.fromkeys(data.loc[~data["blind"], "setting"])) or list(dict.fromkeys(data["setting"]))
    labels = {kind: list(dict.fromkeys(data.loc[data["by"] == kind, "label"])) for kind in ("answer type", "question type")}
    heights = [len(names) for names in labels.values()]
    figure = Figure(figsize=(min(TEXT_WIDTH, 1.8 + 2.6 * len(settings)), 1.3 + 0.21 * sum(heights)), layout="constrained")
    panels = figure.subplots(2, len(settings), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": heights})
    for column, setting in enumerate(settings):
        chosen = data[(data["setting"] == setting) | data["blind"]]
        for axes, (kind, names) in zip(panels[:, column], labels.items(), strict=True):
            _draw_panel(axes, chosen[chosen["by"] == kind], names)
        panels[0, column].set_title(setting_label(setting, settings))
        panels[1, column].set_xlabel("VQA accuracy (%)")
    for axes, kind in zip(panels[:, 0], labels, strict=True):
        axes.set_ylabel(kind)
    figure.align_ylabels(panels[:, 0])
    figure_legend(figure, in_order(data.loc[~data["blind"], "routing"]), "marker", bool(data["blind"].any()))
    return figure, data.drop(columns=["setting", "blind", "label"])


def accuracies(inputs: FigureInputs) -> pandas.DataFrame:
    """One row per experiment and type: accuracy (percent, mean over seeds) and the number of questions."""
    import pandas as pd

    runs = inputs.runs(files=("scores",))
    runs = runs[runs["task"] == "vqa"]
    if runs.empty:
        raise RoutevlError(f"{inputs.experiments}: no vqa experiment feeds F6")
    rows = []
    for experiment, group in runs.groupby("experiment", sort=False):
        first = group.iloc[0]
        shared = {
            "experiment": experiment,
            **{column: first[column] for column in ("method", "routing", "prefix", "rank", "epochs")},
            "n_seeds": len(group), "setting": first["setting"], "blind": is_blind(first),
        }  # fmt: skip
        for metric, label in _ANSWER_TYPES.items():
            if group[metric].notna().all():
                rows.append(shared | {"by": "answer type", "type": label, "label": label, "accuracy": group[metric].mean()})
        for question_type, n, accuracy in _by_question_type(group):
            label = f"{question_type} ({n:,})"
            rows.append(
                shared
                | {
                    "by": "question type",
                    "type": question_type,
                    "label": label,
                    "accuracy": accuracy,
                    "n_questions": n,
                }
            )
    return pd.DataFrame(rows)


def _by_question_type(group: pandas.DataFrame) -> list[tuple[str, int, float]]:
    """(question type, questions, mean accuracy over seeds) of the most frequent types, in this order."""
    if "by_question_type" not in group or not all(isinstance(table, dict) for table in group["by_question_type"]):
        raise RoutevlError(f'scores/{group["run"].iloc[0]}/metrics.json: "by_question_type" is missing')
    tables = list(group["by_question_type"])
    if any(table.keys() != tables[0].keys() for table in tables):
        raise RoutevlError(f"{group['experiment'].iloc[0]}: its seeds were scored on different question types")
    counts = sorted((-entry["n"], name) for name, entry in tables[0].items())
    return [
        (name, -n, sum(table[name]["accuracy"] for table in tables) / len(tables)) for n, name in counts[:_MOST_QUESTION_TYPES]
    ]


def _draw_panel(axes: Axes, data: pandas.DataFrame, names: list[str]) -> None:
    for place, name in enumerate(names):
        accuracies_here = data.loc[data["label"] == name, "accuracy"]
        axes.plot(
            [accuracies_here.min(), accuracies_here.max()],
            [place, place],
            color=FAINT,
            linewidth=1.2,
            zorder=1,
        )
    for row in data.itertuples():
        place = names.index(row.label)
        if row.blind:
            axes.plot(row.accuracy, place, zorder=3, **BLIND_TICK)
            continue
        style = routing_style(row.routing)
        axes.plot(
            row.accuracy, place, style.marker, color=style.color, markersize=5.5,
            markeredgecolor="white", markeredgewidth=0.5, zorder=4,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
