"""Stage `headline`: what came out, in one screen of a terminal, read from the tables that the workflow made."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from routevl.methods.table import METHODS
from routevl.reporting import TABLES
from routevl.reporting.names import BACKBONES, plural
from routevl.reporting.rows import Row, gain_of, of_this_version, read_rows, score_of
from routevl.tasks.table import TASKS

LINES, WIDTH = 24, 100  # of the screen
_FOOT = 6  # lines below the tasks; each task has a head, and a blank line to the next
_VERDICTS = {1: "improves", 0: "no difference", -1: "harms"}
_TELLING = (*BACKBONES, "prefix", "rank", "epochs")  # columns that are shown where they differ


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl headline`."""
    parser.add_argument("--results", required=True, type=Path, metavar="FOLDER", help="results folder, with its tables")


def run(arguments: argparse.Namespace) -> None:
    """Print the scores, gains and verdicts of T1, T2 and T3, as far as they are there and fit, and where all else is.

    Raises RoutevlError where a table is not one of this version.
    """
    print("\n".join(headline(arguments.results)))


def headline(results: Path) -> list[str]:
    """The lines of the screen, LINES at most."""
    files = {name.partition("_")[2]: results / "tables" / f"{name}.csv" for name in TABLES}
    tables = {task: read_rows(file) for task, file in files.items() if task in TASKS and file.is_file()}
    most = (LINES + 1 - _FOOT) // max(1, len(tables)) - 2  # rows of a task
    lines, left_out, reasons = [], 0, Counter()
    for task, rows in tables.items():
        with of_this_version(files[task]):
            chosen = _most_telling(rows, most)
            lines += [*([""] if lines else []), *_section(task, chosen)]
        left_out += len(rows) - len(chosen)
        reasons.update(row["no_verdict"] for row in chosen if row["no_verdict"])
    if reasons:
        lines.append(f"no verdict: {', '.join(f'{reason} ({count})' for reason, count in reasons.items())}")
    if left_out:
        lines.append(f"and {plural(left_out, 'more experiment')} in the tables")
    report = results / "report.html"
    return [
        *lines,
        *([""] if lines else []),
        f"tables:  {results / 'tables'} (.md, .html, .tex, .csv)",
        f"figures: {results / 'figures'} (.png, .pdf, .svg, and the data drawn as .csv)",
        *([f"all of it in one page: {report}"] if report.exists() else []),
    ]


def _most_telling(rows: Sequence[Row], most: int) -> list[Row]:
    """As many rows, in their order: first those with a verdict and their baselines, then those that stand first."""
    judged = [row for row in rows if row["p_holm"]]
    named = {row[column] for row in judged for column in ("experiment", "versus")}
    ranked = sorted(range(len(rows)), key=lambda place: (rows[place]["experiment"] not in named, place))
    return [rows[place] for place in sorted(ranked[:most])]


def _section(task: str, rows: Sequence[Row]) -> list[str]:
    """A task's head and rows, in columns."""
    of = TASKS[task]
    telling = [column for column in _TELLING if len({row[column] for row in rows}) > 1]
    head = [of.score, "routing", *(column.replace("_backbone", "") for column in telling), "score", "gain [95% CI]", "verdict"]
    cells = [head]
    for row in rows:
        gain = gain_of(row, of)
        verdict = "" if not row["versus"] else "no verdict" if gain.no_verdict else _VERDICTS[gain.verdict]
        mark = "" if row["n_not_learned"] == "0" else " (learned nothing)"
        label = METHODS[row["method"]].label + mark
        cells.append(
            [label, row["routing"], *(row[column] for column in telling), score_of(row, of), gain.absolute.signed(1), verdict]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return [line[:WIDTH].rstrip() for line in lines]
