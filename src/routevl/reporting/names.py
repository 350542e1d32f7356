"""How rows of `results.collect` are named for readers, and what tells them apart."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from routevl.methods.table import METHODS
from routevl.options import text_of, words_of
from routevl.routing import ROUTING

BACKBONES = ("text_backbone", "vision_backbone")


def plural(count: int, noun: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def backbones(row: Mapping[str, Any]) -> str:
    """A run's backbones in one name, which is also how published figures and claims name their setting."""
    return " + ".join(row[column] for column in BACKBONES)


def differing(row: Mapping[str, Any], others: Iterable[Mapping[str, Any]], but: Collection[str] = ()) -> dict[str, Any]:
    """Those of a row's `details`, name -> value, that vary among `others` of its task.

    Backbones are compared with all of these; settings and options with those of the same method, as each method may have its own.
    """
    of_task = [other for other in others if other["task"] == row["task"]]
    of_method = [other for other in of_task if other["method"] == row["method"]]
    return {
        name: value
        for name, value in row["details"].items()
        if name not in but and any(o["details"].get(name) != value for o in (of_task if name in BACKBONES else of_method))
    }


def in_words(details: Mapping[str, Any]) -> str:
    """Details as they stand in a sentence or legend: "rank 4, control noise"."""
    return ", ".join(f"{'rank' if name == 'r' else name.replace('_', ' ')} {text_of(value)}" for name, value in details.items())


def options_text(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    """Those of a row's options and settings that vary among the rows of a table and have no column of their own there."""
    return " ".join(words_of(differing(row, rows, but=("r", "epochs", "prefix", *BACKBONES))))


def full_name(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], but: Collection[str] = ()) -> str:
    """A row's method, its routing function, and all that else tells it apart among `rows` (records), but for some details."""
    name = METHODS[row["method"]].label
    if row["routing"] != "none":
        name += f" {ROUTING[row['routing']].label}"
    return ", ".join(filter(None, [name, in_words(differing(row, rows, but))]))
