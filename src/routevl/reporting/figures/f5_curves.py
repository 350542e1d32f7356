"""F5: learning curves: validation score and training loss over steps, one line per routing function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.results import MAIN_METRIC, is_blind, read_training
from routevl.reporting.style import (
    BLIND_LINE,
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

_COLUMNS = 4
_LOSS_POINTS = 25  # the training loss is averaged within this many equal stretches of a run


def draw(inputs: FigureInputs) -> tuple[Figure, pandas.DataFrame]:
    """For each setting a pair of panels: the validation score above, the training loss below.

    Lines are means over seeds, bands run from the lowest to the highest seed.
    """
    from matplotlib.figure import Figure

    data = curves(inputs)
    settings = list(dict.fromkeys(data.loc[~data["blind"], "setting"])) or list(dict.fromkeys(data["setting"]))
    columns = min(_COLUMNS, len(settings))
    pairs = -(-len(settings) // columns)
    figure = Figure(figsize=(min(TEXT_WIDTH, 1.2 + 2.4 * columns), 0.4 + 3.4 * pairs), layout="constrained")
    panels = figure.subplots(2 * pairs, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    first_of_task: dict[str, tuple[Axes, Axes]] = {}
    for index, setting in enumerate(settings):
        row, column = 2 * (index // columns), index % columns
        pair = panels[row, column], panels[row + 1, column]
        _draw_setting(*pair, data, setting, settings)
        task = dict(setting)["task"]
        for axes, first in zip(pair, first_of_task.setdefault(task, pair), strict=True):
            if axes is not first:
                axes.sharey(first)
                first.autoscale_view()
                if column > 0:
                    axes.set_ylabel("")
    figure_legend(figure, in_order(data.loc[~data["blind"], "routing"]), "line", bool(data["blind"].any()))
    return figure, data.drop(columns=["setting", "blind"])


def curves(inputs: FigureInputs) -> pandas.DataFrame:
    """One row per experiment, quantity and step: mean, lowest and highest over seeds."""
    import pandas as pd

    parts = []
    for experiment, group in inputs.runs(files=()).groupby("experiment", sort=False):
        first = group.iloc[0]
        logs = [read_training(inputs.need("results"), run) for run in group["run"]]
        quantity, scale = _validation_quantity(logs[0].columns, first["task"])
        validation = _over_seeds([_validation(log, quantity) * scale for log in logs])
        loss = _over_seeds([_training_loss(log) for log in logs])
        for name, curve in ((quantity, validation), ("loss", loss)):
            part = curve.reset_index(names="step")
            part.insert(0, "quantity", name)
            part.insert(0, "n_seeds", len(group))
            for column in ("routing", "method", "task", "experiment"):
                part.insert(0, column, experiment if column == "experiment" else first[column])
            parts.append(part.assign(setting=[first["setting"]] * len(part), blind=is_blind(first)))
    return pd.concat(parts, ignore_index=True)


def _validation_quantity(columns: pandas.Index, task: str) -> tuple[str, float]:
    """The validated quantity to show and its scale: the task's main metric where logged, else the loss."""
    metric = f"val_{MAIN_METRIC[task]}"
    return (metric, SCORE_SCALE[task]) if metric in columns else ("val_loss", 1.0)


def _validation(log: pandas.DataFrame, quantity: str) -> pandas.Series:
    import pandas as pd

    if quantity not in log:
        return pd.Series(dtype="float64")
    return log.dropna(subset=[quantity]).set_index("step")[quantity].astype("float64")


def _training_loss(log: pandas.DataFrame) -> pandas.Series:
    import pandas as pd

    if "loss" not in log:
        return pd.Series(dtype="float64")
    log = log.dropna(subset=["loss"])
    stretch = (log["step"] * _LOSS_POINTS / log["step"].max()).round()
    means = log.groupby(stretch)[["step", "loss"]].mean()
    return means.set_index(means["step"].round())["loss"]


def _over_seeds(curves_of_seeds: list[pandas.Series]) -> pandas.DataFrame:
    import pandas as pd

    together = pd.concat(curves_of_seeds, axis=1).sort_index()
    return pd.DataFrame({"mean": together.mean(axis=1), "low": together.min(axis=1), "high": together.max(axis=1)})


def _draw_setting(above: Axes, below: Axes, data: pandas.DataFrame, setting: tuple, settings: list[tuple]) -> None:
    task = dict(setting)["task"]
    here = data[(data["setting"] == setting) | (data["blind"] & _blind_of(data, setting))]
    for axes, of_loss in ((above, False), (below, True)):
        axes.set_visible(True)
        chosen = here[(here["quantity"] == "loss") == of_loss]
        for (_, routing, blind), curve in chosen.groupby(["experiment", "routing", "blind"], sort=False):
            _draw_curve(axes, curve, routing, blind)
        axes.set_xlim(0, 1.06 * here["step"].max())
        horizontal_grid(axes)
    quantity = next((name for name in here["quantity"] if name != "loss"), "val_loss")
    validated = "validation loss" if quantity == "val_loss" else f"validation\n{SCORE_LABELS[task]}"
    above.set(ylabel=validated)
    above.tick_params(labelbottom=False)
    below.set(xlabel="optimiser step", ylabel="training loss")
    above.set_title(
        f"{TASK_LABELS[task]}, {setting_label(setting, settings)}".replace(", rank", "\nrank", 1),
        fontsize=7.5,
    )


def _blind_of(data: pandas.DataFrame, setting: tuple) -> pandas.Series:
    """Which rows share everything with `setting` but the prefix, which the blind baseline lacks."""
    rest = [pair for pair in setting if pair[0] != "prefix"]
    return data["setting"].map(lambda other: [pair for pair in other if pair[0] != "prefix"] == rest)


def _draw_curve(axes: Axes, curve: pandas.DataFrame, routing: str, blind: bool) -> None:
    if blind:
        axes.plot(curve["step"], curve["mean"], **BLIND_LINE)
        return
    style = routing_style(routing)
    marker = style.marker if len(curve) <= 12 else None
    axes.plot(
        curve["step"], curve["mean"], color=style.color, linestyle=style.line, marker=marker,
        markeredgecolor="white", markeredgewidth=0.5,
    )  # fmt: skip
    if curve["n_seeds"].iloc[0] > 1:
        axes.fill_between(curve["step"], curve["low"], curve["high"], color=style.color, alpha=0.18, linewidth=0)
