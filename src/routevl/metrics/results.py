"""Reading result files in the official formats of VQAv2 and COCO captions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from routevl.data.records import INTEGER, STRING, Format, check_unique, list_of
from routevl.errors import RoutevlError


def remarked(remarks: Sequence[str]) -> dict[str, list[str]]:
    """What a report says beside its scores about what they cannot tell: `remarks`, where there are any."""
    return {"remarks": list(remarks)} if remarks else {}


def read_results(
    path: str | Path, id_field: str, text_field: str, expected: Collection[int], subset: bool = False
) -> dict[int, str]:
    """Read a list of results: [{"question_id": int, "answer": str}] or [{"image_id": int, "caption": str}].

    Args:
        expected: ids of the items; each must have one result, or at most one where `subset` is set.

    Returns:
        id to text, in the order of the file.

    Raises:
        RoutevlError: the file is missing or malformed, an id is there twice, unknown or missing.
    """
    entries = Format("a list of results", list_of(**{id_field: INTEGER, text_field: STRING})).read(path)
    check_unique(path, id_field, entries)
    results = {entry[id_field]: entry[text_field] for entry in entries}
    known = set(expected)
    unknown = [identifier for identifier in results if identifier not in known]
    if unknown:
        raise RoutevlError(
            f"{path}: {len(unknown)} of {len(results)} results have an unknown {id_field}, the first "
            f"{unknown[0]}; are these the results of another split?"
        )
    missing = [identifier for identifier in expected if identifier not in results]
    if missing and not subset:
        raise RoutevlError(
            f"{path}: no result for {len(missing)} of {len(expected)} items, the first with the {id_field} "
            f"{missing[0]}; every item of the split must have one"
        )
    return results
