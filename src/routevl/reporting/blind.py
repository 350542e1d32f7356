"""Gains over the blind baseline: plain LoRA that never sees the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from routevl.methods.table import BASELINE, METHODS
from routevl.reporting.names import plural
from routevl.reporting.results import gains
from routevl.reporting.statistics import Gain


class OverBlind:
    """The gains of a table's experiments over their blind baselines (`against_blind`), where they have one.

    Attributes:
        baselines: experiment -> its baseline; "" where it has none.
        gains: experiment -> its gain, of those that have one.
    """

    def __init__(self, runs: pd.DataFrame, results: Path) -> None:
        beside = against_blind(runs)
        self.baselines = dict(zip(beside["experiment"], beside["versus"], strict=True))
        self.gains = gains(beside, results)

    def columns(self, experiment: str) -> dict[str, Any]:
        """What the csv has of them."""
        gain = self.gains.get(experiment, Gain())
        found = gain.absolute.columns("gain_vs_blind", "blind_ci") | gain.tested("blind_")
        return found | {"versus_blind": self.baselines[experiment]}

    def cells(self, experiment: str, scale: float) -> dict[str, str]:
        """The same for readers."""
        gain = self.gains.get(experiment, Gain())
        return {"Over blind [95% CI]": gain.absolute.times(scale).signed(), "Over blind: verdict": gain.word}

    def notes(self) -> list[str]:
        """What a gain over the blind baseline is, and which rows do not lie above it."""
        if not self.gains:
            return ["Over blind: empty, as no blind row of as many epochs feeds this table.", ""]
        known = {name: gain.absolute for name, gain in self.gains.items() if gain.absolute.signed()}
        below = [f"`{name}`" for name, interval in known.items() if interval.low <= 0]
        without = ", ".join(f"`{name}`" for name in self.gains if name not in known)
        rows = f"{plural(len(known), 'row')} with such a gain"
        sentences = [
            f"Over blind: gain over plain {METHODS[BASELINE].label} that never sees the image (in the csv `versus_blind`), in "
            "the same text backbone where a row of this table has that, else in the backbone of the task's first row, after as "
            "many epochs. Holm's correction is for these comparisons of the task alone.",
            f"Not above it, the interval not wholly above zero, {len(below)} of {rows}"
            + (f": {', '.join(below)}." if below else "."),
            f"Without one, as a run of either side learned nothing: {without}." if without else "",
        ]
        return [" ".join(filter(None, sentences)), ""]


def against_blind(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of `collect` with their blind baseline as `versus` and in `versus_runs`, so that `gains` are over it.

    That is the first plain BASELINE among these runs which never sees the image, of the same task, text backbone and epochs;
    where that backbone has none, of the backbone that the task's first row has. Where there is none either, and for the
    baselines themselves, `versus` is "".
    """
    baselines: dict[tuple[str, str, int], tuple[str, list[str]]] = {}  # by task, text backbone and epochs: name and runs
    plain = runs[runs["blind"] & (runs["method"] == BASELINE)]
    for (*place, experiment), group in plain.groupby(["task", "text_backbone", "epochs", "experiment"], sort=False):
        baselines.setdefault(tuple(place), (experiment, list(group["run"])))
    first = runs.drop_duplicates("task").set_index("task")["text_backbone"]
    themselves = {experiment for experiment, _ in baselines.values()}
    found = []
    for run in runs.itertuples():
        backbones = () if run.experiment in themselves else (run.text_backbone, first[run.task])
        candidates = (baselines.get((run.task, backbone, run.epochs)) for backbone in backbones)
        found.append(next(filter(None, candidates), ("", [])))
    return runs.assign(versus=[experiment for experiment, _ in found], versus_runs=[of for _, of in found])
