"""Reading result files in the official formats, and accuracies of groups of their items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from routevl.data.records import INTEGER, STRING, Format, Record, check_unique, list_of
from routevl.errors import RoutevlError


class GroupAccuracy(NamedTuple):
    """Accuracy of a group of items in percent, and their number."""

    accuracy: float
    n: int


def mean(accuracies: Collection[float]) -> GroupAccuracy:
    """The accuracy of one or more items."""
    return GroupAccuracy(sum(accuracies) / len(accuracies), len(accuracies))


def mean_by_group(accuracies: Iterable[tuple[str, float]]) -> dict[str, GroupAccuracy]:
    """The accuracies of items by their group, from (group, accuracy) of each; the groups in alphabetical order."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, accuracy in accuracies:
        groups[group].append(accuracy)
    return {group: mean(groups[group]) for group in sorted(groups)}


def rounded(groups: dict[str, GroupAccuracy]) -> dict[str, float]:
    """What a report says of groups: their accuracies with two decimals."""
    return {name: round(group.accuracy, 2) for name, group in groups.items()}


def remarked(remarks: Sequence[str]) -> dict[str, list[str]]:
    """What a report says beside its scores about what they cannot tell: `remarks`, where there are any."""
    return {"remarks": list(remarks)} if remarks else {}


def read_results(
    path: str | Path,
    id_field: str,
    text_field: str,
    expected: Collection[Any],
    optional: Collection[Any] = (),
    ids: Record = INTEGER,
) -> dict[Any, str]:
    """Read a list of results, such as [{"question_id": int, "answer": str}].

    Args:
        expected, optional: as of `results_by_id`.
        ids: the schema of an id.

    Returns:
        id to text, in the order of the file.

    Raises:
        RoutevlError: the file is missing or malformed; or as `results_by_id`.
    """
    entries = Format("a list of results", list_of(**{id_field: ids, text_field: STRING})).read(path)
    return results_by_id(path, id_field, text_field, entries, expected, optional)


def results_by_id(
    path: str | Path,
    id_field: str,
    result_field: str,
    entries: Sequence[Record],
    expected: Collection[Any],
    optional: Collection[Any] = (),
) -> dict[Any, Any]:
    """The results of a file by their ids, in its order.

    Args:
        expected: ids of the items that must have one result.
        optional: ids of those that may have one.

    Raises:
        RoutevlError: an id is there twice, unknown or missing.
    """
    check_unique(path, id_field, entries)
    results = {entry[id_field]: entry[result_field] for entry in entries}
    known = {*expected, *optional}
    unknown = [identifier for identifier in results if identifier not in known]
    if unknown:
        raise RoutevlError(
            f"{path}: {len(unknown)} of {len(results)} results have an unknown {id_field}, the first "
            f"{unknown[0]}; are these the results of another split?"
        )
    missing = [identifier for identifier in expected if identifier not in results]
    if missing:
        raise RoutevlError(
            f"{path}: no result for {len(missing)} of {len(expected)} items, the first with the {id_field} "
            f"{missing[0]}; every item of the split must have one"
        )
    return results
