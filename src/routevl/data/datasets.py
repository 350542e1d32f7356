"""The table of official data: files with their addresses and checksums."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from routevl.data.records import Format, check_unique
from routevl.errors import RoutevlError

URL = r"https?://[!-+\--~]+"  # printable ASCII but for the comma, which separates addresses
PATTERNS = {
    "dataset": ".+",
    "file": r"\w[\w.-]*\.(zip|json)",
    "folder": r"\w[\w.-]*",
    "urls": f"({URL}(,{URL})*)?",
    "checksum": "(sha256:[0-9a-f]{64})?",
    "bytes": "([1-9][0-9]{0,17})?",
    "licence": ".+",
    "terms": URL,
}
ROW = Format(
    f"a row of {', '.join(PATTERNS)}",
    {
        "additionalProperties": False,
        "required": list(PATTERNS),
        "properties": {column: {"type": "string", "pattern": f"^{pattern}$"} for column, pattern in PATTERNS.items()},
    },
)


class DataFile(NamedTuple):
    """One row of the table: a file, the folder that it is unpacked to, and its addresses, tried in their order.

    A file without addresses is given on request, as `terms` says. `checksum` is "sha256:<hexadecimal>", "" where it is not known,
    and `bytes` is None then.
    """

    dataset: str
    file: str
    folder: str
    urls: tuple[str, ...]
    checksum: str
    bytes: int | None
    licence: str
    terms: str


def read_datasets(path: str | Path) -> dict[str, DataFile]:
    """Read and check a tab-separated table of files; returns its rows by their file name.

    Raises:
        RoutevlError: the table is missing, has other columns or a wrong value, or names a file or folder twice.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, ValueError, csv.Error) as error:
        raise RoutevlError(f"{path}: not a readable table ({error})") from error
    for number, row in enumerate(rows, start=2):
        ROW.check(f"{path}: line {number}", row)
    for column in ("file", "folder"):
        check_unique(path, column, rows)
    return {row["file"]: _parse(row) for row in rows}


def _parse(row: dict[str, str]) -> DataFile:
    length = int(row["bytes"]) if row["bytes"] else None
    return DataFile(**row | {"urls": tuple(filter(None, row["urls"].split(","))), "bytes": length})
