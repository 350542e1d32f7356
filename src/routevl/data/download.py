"""Stages `download` and `unpack`: archives of official data, listed in a table with addresses and checksums."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import stat
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse
from math import ceil
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from routevl.errors import RoutevlError
from routevl.files import atomic_file, atomic_folder, lock, read_json, sha256_of, write_json
from routevl.progress import progress

URL = r"https?://[!-+\--~]+"  # printable ASCII but for the comma, which separates addresses
COLUMNS = {  # column -> what its values look like, and how to say so
    "dataset": (r".+", "a name"),
    "file": (r"\w[\w.-]*\.zip", "a file name that ends in .zip"),
    "folder": (r"\w[\w.-]*", "a folder name"),
    "urls": (rf"{URL}(,{URL})*", "one or more http or https addresses, separated by commas"),
    "checksum": (r"(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})?", "sha256:<64 hexadecimal digits>, md5:<32> or nothing"),
    "bytes": (r"([1-9][0-9]*)?", "a number of bytes or nothing"),
    "licence": (r".+", "a licence"),
    "terms": (URL, "an http or https address"),
}
MB = 10**6
LONGEST_TIMEOUT = 3600
RETRIES = 3  # of one address, after the last answer that brought the download further
FIRST_WAIT = 1.0  # seconds before an address is asked again, doubled with each failure
WORTH_ANOTHER_TRY = (408, 416, 425, 429)  # HTTP statuses, beside those from 500 on


def add_arguments_download(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `routevl download`."""
    _add_file_arguments(parser)
    parser.add_argument("--record", type=Path, required=True, help="where to write what was got, from where, as JSON")
    parser.add_argument("--timeout", type=float, default=60, help="longest silence of a server in seconds (default: 60)")


def run_download(arguments: argparse.Namespace) -> None:
    """Get a file, or verify the one that is there, and write {file, url, sha256, bytes, checksum, licence} to `--record`.

    "checksum" is "verified" (against the table), or "recorded" where the table has none: the first file's sha256 is then kept in
    <file>.sha256, and later files must agree with it.

    Raises:
        RoutevlError: the table is wrong, no address serves the file, the disk is full, or the file that is there is another.
    """
    if not 0 < arguments.timeout <= LONGEST_TIMEOUT:
        raise RoutevlError(f"--timeout: expected more than 0 and at most {LONGEST_TIMEOUT} seconds, got {arguments.timeout}")
    entry = _read_entry(arguments)
    path = arguments.folder / entry.file
    with lock(path.with_name(f".{entry.file}.lock")):
        if path.exists():
            url, sha256 = "placed by hand", _verify_placed(entry, path)
        else:
            url, sha256 = _fetch(entry, path, arguments.timeout)
    record = {
        "file": entry.file,
        "url": url,
        "sha256": sha256,
        "bytes": path.stat().st_size,
        "checksum": "verified" if entry.checksum else "recorded",
        "licence": entry.licence,
    }
    write_json(arguments.record, record)
    print(f"{path}: {record['bytes']} bytes, checksum {record['checksum']}, {url}; licence: {entry.licence}, {entry.terms}")


def add_arguments_unpack(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `routevl unpack`."""
    _add_file_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of what is in the archive, replaced as a whole")


def run_unpack(arguments: argparse.Namespace) -> None:
    """Unpack a zip archive as a whole, or nothing.

    Raises:
        RoutevlError: the archive is missing, damaged or encrypted, or has a member that is not a plain file or folder inside it.
    """
    archive = arguments.folder / _read_entry(arguments).file
    if not archive.is_file():
        raise RoutevlError(f"{archive}: no such file (routevl download gets it)")
    with atomic_folder(arguments.output) as folder:
        n_files = _extract(archive, folder)
    print(f"{archive}: {n_files} files unpacked to {arguments.output}")


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--datasets", type=Path, required=True, help="table of files with their addresses and checksums (tsv)")
    parser.add_argument("--file", required=True, help="which file of the table")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the downloaded files")


# ----------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class DataFile:
    """One row of the table.

    Attributes:
        folder: name of the folder that the file is unpacked to.
        urls: addresses, tried in this order.
        checksum: "sha256:<hexadecimal>" or "md5:<hexadecimal>", "" where none is known.
        bytes: length of the file, None where it is not known.
        terms: address of the licence or of the terms of use.
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
    """Read and check a table of files.

    Returns:
        the rows by their file name.

    Raises:
        RoutevlError: the table is missing, has other columns or a wrong value, or names a file or folder twice.
    """
    try:
        rows = [line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise RoutevlError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RoutevlError(f"{path}: not a readable table ({error})") from error
    if not rows or rows[0] != list(COLUMNS):
        found = ", ".join(rows[0]) if rows else "nothing"
        raise RoutevlError(f"{path}: expected the tab-separated columns {', '.join(COLUMNS)}; found {found}")
    files: dict[str, DataFile] = {}
    for number, row in enumerate(rows[1:], start=2):
        entry = _parse_row(f"{path}: line {number}", row)
        for other in files.values():
            for column in ("file", "folder"):
                if getattr(other, column) == getattr(entry, column):
                    raise RoutevlError(f"{path}: line {number} repeats the {column} {getattr(entry, column)}")
        files[entry.file] = entry
    return files


def _parse_row(place: str, row: list[str]) -> DataFile:
    if len(row) != len(COLUMNS):
        raise RoutevlError(f"{place}: expected {len(COLUMNS)} tab-separated values, found {len(row)}")
    values = dict(zip(COLUMNS, row, strict=True))
    for column, (form, description) in COLUMNS.items():
        if not re.fullmatch(form, values[column]):
            raise RoutevlError(f"{place}: {column} must be {description}, found {values[column]!r}")
    length = int(values["bytes"]) if values["bytes"] else None
    return DataFile(**values | {"urls": tuple(values["urls"].split(",")), "bytes": length})


def _read_entry(arguments: argparse.Namespace) -> DataFile:
    files = read_datasets(arguments.datasets)
    if arguments.file not in files:
        raise RoutevlError(f"--file {arguments.file!r} is not in {arguments.datasets}, which has {', '.join(files)}")
    return files[arguments.file]


# ----------------------------------------------------------------------------------------------------
# Verifying


class _WrongFile(Exception):
    """A file is not the one that the table or an earlier download says."""


def _verify_placed(entry: DataFile, path: Path) -> str:
    try:
        return _verified_sha256(entry, path, path)
    except _WrongFile as error:
        raise RoutevlError(f"{path} is there, but {error}; put the right file there, or move this one away") from None


def _verified_sha256(entry: DataFile, file: Path, path: Path) -> str:
    """The sha256 of `file`, which is or will be `path`; kept beside it where no checksum is known."""
    length = file.stat().st_size
    if entry.bytes not in (None, length):
        raise _WrongFile(f"it has {length} bytes, expected {entry.bytes}")
    expected = _expected_checksum(entry, path)
    sha256 = sha256_of(file)
    found = f"md5:{_md5_of(file)}" if expected.startswith("md5:") else f"sha256:{sha256}"
    if expected not in ("", found):
        raise _WrongFile(f"its checksum is {found}, expected {expected}")
    if not expected:
        with atomic_file(_checksum_file(path)) as temporary:
            temporary.write_text(f"{sha256}  {path.name}\n", encoding="utf-8")
    return sha256


def _expected_checksum(entry: DataFile, path: Path) -> str:
    """The table's checksum, or that of the first file there was; "" where neither is known."""
    recorded = _checksum_file(path)
    if entry.checksum or not recorded.exists():
        return entry.checksum
    line = recorded.read_text(encoding="utf-8", errors="replace")
    if not re.match(r"[0-9a-f]{64} ", line):
        raise RoutevlError(f"{recorded}: expected a line as sha256sum writes it, found {line[:80]!r}")
    return f"sha256:{line[:64]}"


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _md5_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _check_space(folder: Path, purpose: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RoutevlError(f"{folder}: {purpose} needs {needed / MB:,.0f} MB, but only {free / MB:,.0f} MB are free")


# ----------------------------------------------------------------------------------------------------
# Downloading


class _Unavailable(Exception):
    """An address does not serve the file."""


class _Interrupted(_Unavailable):
    """An address does not serve the file, but may if it is asked again."""


@dataclass(frozen=True)
class _Version:
    """Which version of a file a server sends: its strong ETag or else its date, None where it gives neither; and the length."""

    validator: str | None
    bytes: int


def _fetch(entry: DataFile, path: Path, timeout: float) -> tuple[str, str]:
    """Download to `path` from the first address that serves the right file; what a failed try got so far is kept.

    Returns:
        the address, and the sha256.
    """
    part = path.with_name(f"{path.name}.part")
    if entry.bytes is not None:
        _check_space(path.parent, entry.file, entry.bytes - (part.stat().st_size if part.exists() else 0))
    reasons = []
    for url in entry.urls:
        try:
            _download(entry, url, part, timeout)
            sha256 = _verified_sha256(entry, part, path)
        except (_Unavailable, _WrongFile) as error:
            if isinstance(error, _WrongFile):
                _discard(part)
            reasons.append(f"{url}: {error}")
            print(reasons[-1], file=sys.stderr, flush=True)
        else:
            os.replace(part, path)
            _discard(part)
            return url, sha256
    expected = _expected_checksum(entry, path) or "no checksum is known"
    raise RoutevlError(f"{entry.file} could not be downloaded: {'; '.join(reasons)}. Put it at {path} by hand ({expected})")


def _download(entry: DataFile, url: str, part: Path, timeout: float) -> None:
    """Bring `part` to its full length from one address, which is asked again while that brings it further."""
    furthest, failures = _partial(part)[0], 0
    while True:
        try:
            return _receive(entry, url, part, timeout)
        except _Interrupted as error:
            length = _partial(part)[0]
            failures = 0 if length > furthest else failures + 1
            furthest = max(length, furthest)
            if failures > RETRIES:
                raise
            wait = FIRST_WAIT * 2**failures
            print(f"{url}: {error}; asking again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)


def _receive(entry: DataFile, url: str, part: Path, timeout: float) -> None:
    """Ask once for what `part` lacks and append it; begin again where the server does not go on with the same version."""
    length, version = _partial(part)
    if version is not None and length == version.bytes:
        return
    ranged = {"Range": f"bytes={length}-", "If-Range": version.validator} if version is not None and length else {}
    with _open(url, ranged, part, timeout) as response:
        served = _version(response, entry)
        if response.status != 206:
            length = 0
            part.write_bytes(b"")
            write_json(_version_file(part), asdict(served))
        elif served != version or not str(response.headers["Content-Range"]).startswith(f"bytes {length}-"):
            _discard(part)
            raise _Interrupted("the file has changed there")
        _append(response, part, f"{entry.file} (MB)", served.bytes - length)
    if part.stat().st_size < served.bytes:
        raise _Interrupted(f"the connection ended after {part.stat().st_size} of {served.bytes} bytes")


def _open(url: str, ranged: dict[str, str], part: Path, timeout: float) -> HTTPResponse:
    headers = {"User-Agent": "routevl", "Accept-Encoding": "identity"} | ranged
    try:
        return urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code == 416:  # no such range: the file has become shorter
            _discard(part)
        kind = _Interrupted if error.code in WORTH_ANOTHER_TRY or error.code >= 500 else _Unavailable
        raise kind(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise _Interrupted(_reason(error)) from error


def _version(response: HTTPResponse, entry: DataFile) -> _Version:
    headers = response.headers
    etag = headers["ETag"]
    validator = etag if etag and not etag.startswith("W/") else headers["Last-Modified"]
    total = str(headers["Content-Range"]).rpartition("/")[2] if response.status == 206 else headers["Content-Length"]
    length = int(total) if total and total.isdecimal() else entry.bytes
    if length is None:
        raise _Unavailable("the server does not say how long the file is")
    if entry.bytes not in (None, length):
        raise _Unavailable(f"the file has {length} bytes there, expected {entry.bytes}")
    return _Version(validator, length)


def _append(response: HTTPResponse, part: Path, description: str, n_bytes: int) -> None:
    try:
        with open(part, "ab") as file:
            for _ in progress(_copy(response, file), ceil(n_bytes / MB), description):
                pass
    except OSError as error:
        raise RoutevlError(f"could not write {part}: {error.strerror}") from error


def _copy(response: HTTPResponse, file: IO[bytes]) -> Iterator[None]:
    """Copy the body to the file, each piece as soon as it comes; yields after each MB."""
    waiting = 0
    while piece := _read(response):
        file.write(piece)
        waiting += len(piece)
        while waiting >= MB:
            waiting -= MB
            yield


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(MB)
    except (OSError, HTTPException) as error:
        raise _Interrupted(_reason(error)) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", error)) or type(error).__name__


def _partial(part: Path) -> tuple[int, _Version | None]:
    """How many bytes of which version are there; none where the rest could not be told from another version's."""
    if not (part.is_file() and _version_file(part).is_file()):
        return 0, None
    version = _Version(**read_json(_version_file(part)))
    return (part.stat().st_size, version) if version.validator else (0, None)


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------
# Unpacking


def _extract(archive: Path, folder: Path) -> int:
    """Extract all members under `folder`; returns how many are files."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            _check_members(archive, members)
            _check_space(folder, f"unpacking {archive}", sum(member.file_size for member in members))
            for member in progress(members, len(members), f"unpacking {archive.name}"):
                opened.extract(member, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise RoutevlError(f"{archive}: a damaged archive, or not a zip archive ({error})") from error
    return sum(not member.is_dir() for member in members)


def _check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Every member is a plain file or folder with a place of its own inside the archive."""
    places = set()
    for member in members:
        place = PurePosixPath(member.orig_filename)
        if place.is_absolute() or not place.parts or ".." in place.parts or re.search(r"^[A-Za-z]:|[\\\0]", member.orig_filename):
            raise RoutevlError(f"{archive}: the member {member.orig_filename!r} would leave the folder; nothing was unpacked")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise RoutevlError(f"{archive}: the member {member.orig_filename!r} is a link or device; nothing was unpacked")
        if member.flag_bits & 1:
            raise RoutevlError(f"{archive}: the member {member.orig_filename!r} is encrypted")
        if place in places:
            raise RoutevlError(f"{archive}: the member {member.orig_filename!r} is there twice")
        places.add(place)
