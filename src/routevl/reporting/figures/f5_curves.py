"""F5: learning curves: validation score and training loss over steps, one line per routing function."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from routevl.errors import RoutevlError
from routevl.reporting.figures.inputs import FigureInputs, identity
from routevl.reporting.style import (
    BLIND_LINE,
    TEXT_WIDTH,
    apart,
    figure_legend,
    horizontal_grid,
    look,
    lower_legend,
    mark_not_learned,
    setting_label,
    wrapped,
)
from routevl.tasks.table import TASKS

_OF_DATA_SETS = "val_score"  # of multi-task learning: a mean over the data sets, which for captions has no CIDEr
_COLUMNS = 4
_CHARACTER = 0.066  # inches, of a title
_LOG_FROM = 3.0  # so many times the lowest training loss, and the axis is logarithmic
_LOSS_POINTS = 25  # the training loss is averaged within this many equal stretches of a run
_MARKERS = 5  # along a curve of many points, and at other points than those of the next curve


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """For each baseline, with what is compared with it, a pair of panels: the validation score above, the training loss below.

    Lines are means over seeds, bands run from the lowest to the highest seed.
    """
    data = curves(inputs)
    shown, blind = apart(data)
    groups = shown.drop_duplicates("root").to_dict("records")
    columns = min(_COLUMNS, len(groups))
    pairs = -(-len(groups) // columns)
    figure = Figure(figsize=(min(TEXT_WIDTH, 1.2 + 2.4 * columns), 0.4 + 3.4 * pairs), layout="constrained")
    grid = figure.add_gridspec(2 * pairs, columns)
    first: dict[tuple[str, bool], Axes] = {}  # of each task and quantity, whose scale the others share
    for index, group in enumerate(groups):
        row, column = 2 * (index // columns), index % columns
        task = TASKS[group["task"]]
        here = pd.concat([shown[shown["root"] == group["root"]], blind[blind["task"] == group["task"]]])
        for of_loss in (False, True):
            model = first.get((group["task"], of_loss))
            axes = figure.add_subplot(grid[row + of_loss, column], sharey=model)
            first.setdefault((group["task"], of_loss), axes)
            chosen = here[(here["quantity"] == "loss") == of_loss]
            _draw_panel(axes, chosen)
            axes.set_xlim(0, 1.06 * here["step"].max())
            if of_loss:
                axes.set(xlabel="optimiser step", ylabel="training loss")
                losses = data.loc[(data["task"] == group["task"]) & (data["quantity"] == "loss"), "mean"]
                if losses.max() > _LOG_FROM * losses.min():  # the first steps would leave no room for all others
                    axes.set_yscale("log")
                    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    axes.yaxis.set_major_formatter("{x:g}")
                    axes.yaxis.set_minor_locator(NullLocator())
            else:
                characters = int((figure.get_figwidth() / columns - 0.35) / _CHARACTER)
                axes.set_title(f"{task.label}, {wrapped(setting_label(group, groups), characters)}", fontsize=7.5)
                known = {"val_loss": "validation loss", _OF_DATA_SETS: "validation score (%)"}
                axes.set_ylabel(known.get(chosen["quantity"].iloc[0], f"validation\n{task.score}"))
                axes.tick_params(labelbottom=False)
            if model and column > 0:
                axes.set_ylabel("")
    figure_legend(figure, data, "line")
    lower_legend(figure, data)
    return figure, data


def curves(inputs: FigureInputs) -> pd.DataFrame:
    """One row per experiment, quantity and step: mean, lowest and highest over seeds."""
    rows = []
    for _, group in inputs.runs().groupby("experiment", sort=False):
        task = TASKS[group["task"].iloc[0]]
        logs = [_read_log(inputs.need("results") / "models" / run / "training.jsonl") for run in group["run"]]
        scores = [name for name in (f"val_{task.metric}", _OF_DATA_SETS) if name in logs[0]]
        quantity, scale = (scores[0], task.scale) if scores else ("val_loss", 1.0)
        validation = [log.set_index("step")[quantity].dropna() * scale for log in logs]
        for name, of_seeds in ((quantity, validation), ("loss", [_training_loss(log) for log in logs])):
            together = pd.concat(of_seeds, axis=1).sort_index()
            curve = together.agg(["mean", "min", "max"], axis=1).set_axis(["mean", "low", "high"], axis=1)
            known = identity(group) | {"quantity": name}
            rows += [known | {"step": step} | values for step, values in curve.to_dict("index").items()]
    return pd.DataFrame(rows)


def _read_log(path: Path) -> pd.DataFrame:
    """One row per line, absent values NaN."""
    try:
        return pd.DataFrame(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    except ValueError as error:
        raise RoutevlError(f"{path}: not a readable training log ({error})") from None


def _training_loss(log: pd.DataFrame) -> pd.Series:
    log = log.dropna(subset=["loss"])
    stretch = (log["step"] * _LOSS_POINTS / log["step"].max()).round()
    means = log.groupby(stretch)[["step", "loss"]].mean()
    return means.set_index(means["step"].round())["loss"]


def _draw_panel(axes: Axes, data: pd.DataFrame) -> None:
    shown, blind = apart(data)
    for index, (_, curve) in enumerate(shown.groupby("experiment", sort=False)):
        own = look(next(curve.itertuples()))
        every = max(1, len(curve) // _MARKERS)
        axes.plot(curve["step"], curve["mean"], markevery=(index % every, every), **own.points(line=True))
        last = curve.iloc[-1]
        if last["n_not_learned"]:
            mark_not_learned(axes, last["step"], last["mean"])
        if last["n_seeds"] > 1:
            axes.fill_between(curve["step"], curve["low"], curve["high"], color=own.color, alpha=0.18, linewidth=0)
    for _, curve in blind.groupby("experiment", sort=False):
        axes.plot(curve["step"], curve["mean"], **BLIND_LINE)
    horizontal_grid(axes)
