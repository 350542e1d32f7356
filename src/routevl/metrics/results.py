"""Reading result files in the official formats of VQAv2 and COCO captions."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from routevl.data.records import check_fields, check_unique, json_name
from routevl.errors import RoutevlError
from routevl.files import read_json


def read_results(path: str | Path, id_field: str, text_field: str) -> dict[int, str]:
    """Read a list of results: [{"question_id": int, "answer": str}] or [{"image_id": int, "caption": str}].

    Args:
        path: a JSON file, plain or gzip-compressed.
        id_field: "question_id" or "image_id".
        text_field: "answer" or "caption".

    Returns:
        id to text, in the order of the file.

    Raises:
        RoutevlError: the file is missing, not JSON or not a list, an entry lacks a key or has it with another
            type, or an id is there twice.
    """
    entries = read_json(path)
    if type(entries) is not list:
        raise RoutevlError(f"{path}: expected a list of results, found {json_name(type(entries))}")
    check_fields(path, "results", entries, {id_field: int, text_field: str})
    check_unique(path, "results", id_field, entries)
    return {entry[id_field]: entry[text_field] for entry in entries}


def check_known(path: str | Path, id_field: str, found: Collection[int], expected: Collection[int]) -> None:
    """Check that there is no result for an id outside `expected`.

    Raises:
        RoutevlError: names the file, how many ids are unknown, and the first of them.
    """
    expected = set(expected)
    unknown = [identifier for identifier in found if identifier not in expected]
    if unknown:
        raise RoutevlError(
            f"{path}: {len(unknown)} of {len(found)} results have an unknown {id_field}, the first "
            f"{unknown[0]}; are these the results of another split?"
        )


def check_complete(path: str | Path, id_field: str, found: Collection[int], expected: Collection[int]) -> None:
    """Check that there is a result for every id of `expected`.

    Raises:
        RoutevlError: names the file, how many results are missing, and the first missing id.
    """
    found = set(found)
    missing = [identifier for identifier in expected if identifier not in found]
    if missing:
        raise RoutevlError(
            f"{path}: no result for {len(missing)} of {len(expected)} items, the first with the {id_field} "
            f"{missing[0]}; every item of the split must have one"
        )
