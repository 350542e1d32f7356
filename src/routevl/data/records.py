"""File formats as JSON schemas, and the reading and writing of files in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from routevl.errors import RoutevlError
from routevl.files import read_json, read_json_lines
from routevl.options import parse_number

Record = dict[str, Any]

SPLITS = ("train", "val", "test")
INTEGER = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}  # what a tensor of ids can hold
STRING = {"type": "string"}


def object_of(*optional: str, **fields: Record) -> Record:
    """The schema of an object that has these fields, but for the optional ones, and may have others."""
    return {"type": "object", "required": [name for name in fields if name not in optional], "properties": fields}


def list_of(*optional: str, **fields: Record) -> Record:
    """The schema of a list of such objects."""
    return {"type": "array", "items": object_of(*optional, **fields)}


@dataclass(frozen=True)
class Format:
    """A format of JSON files by its schema; `name` says what such a file is, for messages."""

    name: str
    schema: Record

    @cached_property
    def _check(self) -> Callable[[Any], Any]:
        import fastjsonschema  # which compiles the schema to a function: the files have millions of entries

        return fastjsonschema.compile(self.schema)

    def check(self, place: str | Path, content: Any) -> Any:
        """Return `content`, or raise RoutevlError, which says where in `place` it does not fit."""
        from fastjsonschema import JsonSchemaValueException

        try:
            return self._check(content)
        except JsonSchemaValueException as error:
            raise RoutevlError(f"{place}: not {self.name}: {error.message}") from None

    def read(self, path: str | Path) -> Any:
        """Read a file as `read_json`, or raise RoutevlError where it is missing, not JSON or does not fit.

        3.0 is the integer 3, as in JSON Schema: an id that some tool wrote as a float is that id.
        """
        return self.check(path, read_json(path, parse_number))

    def read_lines(self, path: str | Path) -> list[Any]:
        """Read a file of one such value a line as `read_json_lines`; else as `read`. What does not fit is named by its line."""
        return [self.check(place, value) for place, value in read_json_lines(path, parse_number)]


def check_unique(place: str | Path, field: str, entries: Iterable[Record]) -> None:
    """Raise RoutevlError where two entries share the value of `field`."""
    seen: set[Any] = set()
    for entry in entries:
        if entry[field] in seen:
            raise RoutevlError(f"{place}: the {field} {entry[field]} is there twice")
        seen.add(entry[field])


def write_records(path: Path, content: Any) -> None:
    """Write JSON on one line, as the official files are, into a folder that is itself written whole or not at all."""
    write_lines(path, [content])


def write_lines(path: Path, contents: Iterable[Any]) -> None:
    """Write one JSON value a line; else as `write_records`."""
    path.write_text("".join(json.dumps(content, ensure_ascii=False) + "\n" for content in contents), encoding="utf-8")
