"""Published figures (config/published.csv): shown beside what was measured, never mixed with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from routevl.errors import RoutevlError

if TYPE_CHECKING:
    import pandas

COLUMNS = ("source", "table", "task", "setting", "method", "metric", "value", "std", "note")
CLAIM_METRIC = "relative_gain_percent"


def read_published(path: str | Path) -> pandas.DataFrame:
    """Read published.csv; `value` and `std` are float, NaN where the source gives none.

    Raises:
        RoutevlError: no such file, a missing column, or a value that is not a number.
    """
    import pandas as pd

    try:
        published = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise RoutevlError(f"{path}: no such file of published figures") from None
    except (OSError, ValueError) as error:
        raise RoutevlError(f"{path}: not a readable CSV file ({error})") from error
    missing = [column for column in COLUMNS if column not in published.columns]
    if missing:
        raise RoutevlError(f"{path}: the columns {', '.join(missing)} are missing")
    for column in ("value", "std"):
        try:
            published[column] = pd.to_numeric(published[column].replace("", None))
        except ValueError as error:
            raise RoutevlError(f"{path}: the column {column} holds something that is no number ({error})") from None
    return published


def published_score(published: pandas.DataFrame, row: pandas.Series, metric: str) -> float:
    """The published figure of an experiment, NaN when none is known.

    It counts only for the same backbones: `setting` is "<text_backbone> + <vision_backbone>" with the names
    of the experiments sheet, and `method` is "<method> <routing>", for example "lora attn".
    """
    setting = f"{row['text_backbone']} + {row['vision_backbone']}"
    found = published[
        (published["task"] == row["task"])
        & (published["setting"] == setting)
        & (published["method"] == f"{row['method']} {row['routing']}")
        & (published["metric"] == metric)
    ]
    return float(found["value"].iloc[0]) if len(found) else float("nan")


def claim(published: pandas.DataFrame, task: str) -> str:
    """The paper's claim for a task in one clause, "" when the file holds none."""
    found = published[(published["task"] == task) & (published["metric"] == CLAIM_METRIC)]
    return "; ".join(f"{row.note} ({row.setting})" for row in found.itertuples())
