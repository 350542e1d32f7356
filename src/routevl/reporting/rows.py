"""The csv of a table of scores, read again: its scores and gains in the units that readers see."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from routevl.errors import RoutevlError
from routevl.reporting.statistics import Gain, Interval
from routevl.tasks.table import TaskRow

Row = dict[str, str]


def read_rows(file: Path) -> list[Row]:
    """The rows of a table, each by its columns."""
    with open(file, encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


@contextmanager
def of_this_version(file: Path) -> Iterator[None]:
    """What the body reads are rows of this table. Raises RoutevlError where a column is missing or holds something else."""
    try:
        yield
    except RoutevlError:  # the body's own, which is a ValueError too
        raise
    except (KeyError, ValueError) as error:
        raise RoutevlError(f"{file}: not a table of this version ({error!r}): remove it and make it again") from error


def score_of(row: Row, task: TaskRow, metric: str = "") -> str:
    """The mean of a metric, the task's main one where none is given, and, of several seeds, the standard deviation."""
    mean, std = (_number(row[f"{metric or task.metric}_{part}"]) * task.scale for part in ("mean", "std"))
    return f"{mean:.1f}" + ("" if math.isnan(std) else f" ± {std:.1f}")


def gain_of(row: Row, task: TaskRow, column: str = "gain", ends: str = "gain_ci", of: str = "") -> Gain:
    """The gain in the task's main metric; `column` is that of its estimate; with `ends` and `of` the others' names begin."""
    interval = Interval(*(_number(row[name]) for name in (column, f"{ends}_low", f"{ends}_high")))
    return Gain(interval.times(task.scale), holm=_number(row[f"{of}p_holm"]), no_verdict=row[f"{of}no_verdict"])


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan
