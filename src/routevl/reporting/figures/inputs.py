"""What a figure may read, with a clear error for what it needs and was not given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from routevl.errors import RoutevlError
from routevl.reporting.results import INTERNAL, collect, read_items
from routevl.reporting.statistics import mean_interval
from routevl.tasks.table import TASKS

_IDENTITY = ["experiment", "task", "method", "routing", "versus", "prefix", "rank", "epochs", "learning_rates_tried", *INTERNAL]


@dataclass(frozen=True)
class FigureInputs:
    """The command line of stage `figure`: the figure's name and the folders to read."""

    name: str
    experiments: Path | None = None
    results: Path | None = None
    data: Path | None = None

    def runs(self) -> pd.DataFrame:
        """The runs that feed this figure, one a row."""
        return collect(self.need("experiments"), self.need("results"), self.name.split("_")[0])

    def scores(self) -> pd.DataFrame:
        """One row per experiment: its score for readers, its 95% interval and what that is over, and each seed."""
        rows = []
        for _, group in self.runs().groupby("experiment", sort=False):
            task = TASKS[group["task"].iloc[0]]
            items = read_items(self.need("results"), list(group["run"]), task.metric)
            interval = mean_interval(items.to_numpy().T, items.index.get_level_values("image"))
            measured = {
                "trainable_params": group["trainable_params"].iloc[0],
                "metric": task.score,
                **interval.times(task.scale).columns("score", "ci"),
                "ci_over": interval.over,
                "seed_scores": " ".join(f"{value * task.scale:.6g}" for value in group[task.metric]),
            }
            rows.append(identity(group) | measured)
        return pd.DataFrame(rows)

    def need(self, option: str) -> Path:
        """A path of the command line, or a RoutevlError that says which option is missing."""
        path = getattr(self, option)
        if path is None:
            raise RoutevlError(f"figure {self.name} needs --{option}")
        return path


def identity(group: pd.DataFrame) -> dict[str, Any]:
    """What every figure's data say of an experiment, from its rows of `results.collect`."""
    return group.iloc[0][_IDENTITY].to_dict() | {"n_seeds": len(group), "n_not_learned": (~group["learned"]).sum()}
