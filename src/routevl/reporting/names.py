"""How rows of `results.collect` are named for readers, and what tells them apart."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from routevl.methods.table import METHODS
from routevl.options import text_of
from routevl.routing import ROUTING
from routevl.settings import COLUMNS, SHARED_SETTINGS

DAGGER = "†"  # marks what has a run that learned nothing
BACKBONES = ("text_backbone", "vision_backbone")
_SETTINGS = (*COLUMNS, *SHARED_SETTINGS)  # which runs of every method have


def plural(count: int, noun: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def backbones(row: Mapping[str, Any]) -> str:
    """A run's backbones in one name, which is also how published figures and claims name their setting."""
    return " + ".join(row[column] for column in BACKBONES)


def choices(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's `details`, name -> value, but for a learning rate that was tuned, which is a result."""
    tuned = row["learning_rates_tried"] > 1
    return {name: value for name, value in row["details"].items() if not (tuned and name == "learning_rate")}


def differing(row: Mapping[str, Any], others: Iterable[Mapping[str, Any]], but: Collection[str] = ()) -> dict[str, Any]:
    """Those of a row's `choices` that vary among it and `others` of its task, but for those that others imply.

    Backbones are compared with all of these, and one that more than half of them have goes without saying; settings and options
    with those of the same method, as each method may have its own. Where LoRA's alpha is the rank in all rows, the rank implies
    it. `but`: what the reader is told anyway, "routing" or details.
    """
    of_task = list({other["experiment"]: other for other in (row, *others) if other["task"] == row["task"]}.values())
    known = [(other, {"routing": other["routing"]} | choices(other)) for other in of_task]
    of_method = [(other, chosen) for other, chosen in known if other["method"] == row["method"]]
    found: dict[str, Any] = {}
    for name, value in choices(row).items():
        implied: dict[tuple, Any] = {}
        for _, chosen in known if name in BACKBONES else of_method:
            told = tuple(chosen.get(other) for other in (*but, *found))
            if implied.setdefault(told, chosen.get(name)) != chosen.get(name):
                found[name] = value
                break
    usual = {name for name in BACKBONES if 2 * sum(chosen[name] == row["details"][name] for _, chosen in known) > len(known)}
    return {name: value for name, value in found.items() if name not in usual.union(but)}


def in_words(details: Mapping[str, Any]) -> str:
    """Details as they stand in a sentence or legend: "rank 4, control noise"; backbones by their name alone."""
    named = ((heading_of(name).lower(), text_of(value)) for name, value in details.items() if name not in BACKBONES)
    of_backbones = (value for name, value in details.items() if name in BACKBONES)
    return ", ".join([*of_backbones, *map(" ".join, named)])


def setting_cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Every setting and option of each row as a cell of a table, by heading: "" where the row's method has no such option.

    Those that no row has, as they are none everywhere, are left out.
    """
    names = list(dict.fromkeys(name for row in rows for name in row["details"] if name not in BACKBONES))
    names.sort(key=lambda name: (name != "r", name in _SETTINGS))  # the options first, the rank before them
    known = {(row["method"], name) for row in rows for name in row["details"]}

    def cell(row: Mapping[str, Any], name: str) -> str:
        has = name in _SETTINGS or (row["method"], name) in known
        return text_of(row["details"].get(name)) if has else ""

    return [{"Backbones": backbones(row)} | {heading_of(name): cell(row, name) for name in names} for row in rows]


def heading_of(name: str) -> str:
    """A setting or option as the heading of a column: "Rank", "Learning rate"."""
    return "Rank" if name == "r" else name.replace("_", " ").capitalize()


def full_name(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    """A row's method, its routing function, and all that else tells it apart among `rows` (records)."""
    name = METHODS[row["method"]].label
    if row["routing"] != "none":
        name += f" {ROUTING[row['routing']].label}"
    return ", ".join(filter(None, [name, in_words(differing(row, rows, but=("routing",)))]))
