"""Checks of lists of JSON records, shared by the readers of the official files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from routevl.errors import RoutevlError
from routevl.files import read_json

Record = dict[str, Any]

SPLITS = ("train", "val", "test")

_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def json_name(kind: type) -> str:
    """The JSON name of a Python type, for messages: `dict` gives "an object"."""
    return _JSON_NAMES.get(kind, "null")


def read_object(path: str | Path, description: str) -> Record:
    """Read a JSON file whose top level is an object.

    Raises:
        RoutevlError: the file is missing, not JSON, or holds anything but an object.
    """
    content = read_json(path)
    if type(content) is not dict:
        raise RoutevlError(f"{path}: expected {description} (an object), found {json_name(type(content))}")
    return content


def checked_records(path: str | Path, content: Record, key: str, fields: Mapping[str, type]) -> list[Record]:
    """The list under `key`, each entry an object that has `fields` with exactly these types.

    Raises:
        RoutevlError: names the file, and the index and field of the first entry that is wrong.
    """
    if key not in content:
        raise RoutevlError(f"{path}: expected the key {key!r}, found {sorted(content)}")
    entries = content[key]
    if type(entries) is not list:
        raise RoutevlError(f"{path}: {key!r} must be a list, found {json_name(type(entries))}")
    check_fields(path, key, entries, fields)
    return entries


def check_fields(path: str | Path, place: str, entries: Sequence[Any], fields: Mapping[str, type]) -> None:
    """Check that every entry is an object that has `fields` with exactly these types.

    Raises:
        RoutevlError: names the file, the place, and the index and field of the first entry that is wrong.
    """
    wanted = tuple(fields.items())
    for index, entry in enumerate(entries):
        if type(entry) is not dict:
            raise RoutevlError(f"{path}: {place}[{index}] must be an object, found {json_name(type(entry))}")
        for field, kind in wanted:
            if field not in entry:
                raise RoutevlError(f"{path}: {place}[{index}] lacks the key {field!r}")
            if type(entry[field]) is not kind:
                found = json_name(type(entry[field]))
                raise RoutevlError(f"{path}: {place}[{index}][{field!r}] must be {json_name(kind)}, found {found}")


def check_unique(path: str | Path, place: str, field: str, entries: Iterable[Record]) -> None:
    """Check that no two entries share the value of `field`.

    Raises:
        RoutevlError: names the file, the value and the index of its second use.
    """
    seen: set[Any] = set()
    for index, entry in enumerate(entries):
        if entry[field] in seen:
            raise RoutevlError(f"{path}: {place}[{index}] repeats the {field} {entry[field]}")
        seen.add(entry[field])


def write_records(path: Path, content: Any) -> None:
    """Write JSON on one line, as the official files are: indenting millions of records takes minutes.

    For files inside a folder that is itself written whole or not at all.
    """
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
