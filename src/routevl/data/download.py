"""Stages `download` and `unpack`: archives and JSON files of official data, listed in a table with addresses and checksums."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import zipfile
import zlib
from http.client import HTTPException
from math import ceil
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from routevl.data.datasets import DataFile, read_datasets
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, lock, sha256_of, write_json
from routevl.options import at_least
from routevl.progress import progress

MB = 10**6
RETRIES = 3  # of one address, after the last answer that brought the download further
FIRST_WAIT = 1.0  # seconds before an address is asked again, doubled with each failure
WORTH_ANOTHER_TRY = (408, 416, 425, 429)  # HTTP statuses, beside those from 500 on


def add_arguments_download(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `routevl download`."""
    _add_file_arguments(parser)
    parser.add_argument("--record", type=Path, required=True, help="where to write what was got, from where, as JSON")
    parser.add_argument(
        "--timeout", type=at_least(0.1, float), default=60, help="longest silence of a server in seconds (default: 60)"
    )


def run_download(arguments: argparse.Namespace) -> None:
    """Get a file, or verify the one that is there, and write {file, url, sha256, bytes, checksum, licence} to `--record`.

    "checksum" is "verified" (against the table), or "recorded" where the table has none: the first file's sha256 is then kept in
    <file>.sha256, and later files must agree with it.

    Raises:
        RoutevlError: the table is wrong, no address serves the file, the disk is full, or the file that is there is another.
    """
    entry = _read_entry(arguments)
    path = arguments.folder / entry.file
    with lock(path.with_name(f".{entry.file}.lock")):
        if path.exists():
            url = "placed by hand"
            try:
                sha256 = _verified_sha256(entry, path, path)
            except _WrongFile as error:
                raise RoutevlError(f"{path} is there, but {error}; put the right file there, or move this one away") from None
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
    parser.add_argument("--output", type=Path, required=True, help="folder of what is in the file, replaced as a whole")


def run_unpack(arguments: argparse.Namespace) -> None:
    """Unpack a zip archive as a whole, or nothing; a file that is none is the only one in the folder then.

    Raises:
        RoutevlError: the file is missing, an archive is damaged or encrypted, or it does not fit on the disk.
    """
    archive = arguments.folder / _read_entry(arguments).file
    if not archive.is_file():
        raise RoutevlError(f"{archive}: no such file (routevl download gets it)")
    if archive.suffix != ".zip":
        with atomic_folder(arguments.output, archive.name) as folder:
            _check_space(folder, f"copying {archive}", archive.stat().st_size)
            shutil.copyfile(archive, folder / archive.name)
        print(f"{archive}: copied to {arguments.output}")
        return
    try:
        with zipfile.ZipFile(archive) as opened, atomic_folder(arguments.output, _first_name(opened)) as folder:
            members = opened.infolist()
            _check_space(folder, f"unpacking {archive}", sum(member.file_size for member in members))
            for member in progress(members, len(members), f"unpacking {archive.name}"):
                opened.extract(member, folder)  # as a file or folder below it, whatever the member's name or kind
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise RoutevlError(f"{archive}: a damaged archive, or not a zip archive ({error})") from error
    print(f"{archive}: {sum(not member.is_dir() for member in members)} files unpacked to {arguments.output}")


def _first_name(archive: zipfile.ZipFile) -> str:
    """What is always in the archive's folder."""
    return next((part for name in archive.namelist() for part in name.split("/") if part not in ("", ".", "..")), ".")


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--datasets", type=Path, required=True, help="table of files with their addresses and checksums (tsv)")
    parser.add_argument("--file", required=True, help="which file of the table")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the downloaded files")


def _read_entry(arguments: argparse.Namespace) -> DataFile:
    files = read_datasets(arguments.datasets)
    if arguments.file not in files:
        raise RoutevlError(f"--file {arguments.file!r} is not in {arguments.datasets}, which has {', '.join(files)}")
    return files[arguments.file]


def _check_space(folder: Path, purpose: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RoutevlError(f"{folder}: {purpose} needs {needed / MB:,.0f} MB, but only {free / MB:,.0f} MB are free")


# -------------------------------------------------------------------------------------- downloading


class _WrongFile(RoutevlError):
    """A file is not the one that the table or an earlier download says."""


def _verified_sha256(entry: DataFile, file: Path, path: Path) -> str:
    """The sha256 of `file`, which is or will be `path`; kept beside it where no checksum is known."""
    if entry.bytes not in (None, file.stat().st_size):
        raise _WrongFile(f"it has {file.stat().st_size} bytes, expected {entry.bytes}")
    sha256 = sha256_of(file)
    expected = _expected_checksum(entry, path)
    if expected not in ("", f"sha256:{sha256}"):
        raise _WrongFile(f"its checksum is sha256:{sha256}, expected {expected}")
    if not expected:
        _checksum_file(path).write_text(f"{sha256}  {path.name}\n", encoding="utf-8")
    return sha256


def _expected_checksum(entry: DataFile, path: Path) -> str:
    """The table's checksum, or that of the first file there was; "" where neither is known."""
    recorded = _checksum_file(path)
    if entry.checksum or not recorded.exists():
        return entry.checksum
    return f"sha256:{recorded.read_text(encoding='utf-8').partition(' ')[0]}"


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _fetch(entry: DataFile, path: Path, timeout: float) -> tuple[str, str]:
    """Download to `path` from the first address that serves the right file; returns the address, and the sha256."""
    expected = _expected_checksum(entry, path) or "no checksum is known"
    if not entry.urls:
        raise RoutevlError(f"{entry.file} is given on request alone ({entry.terms}). Put it at {path} by hand ({expected})")
    part = path.with_name(f"{path.name}.part")
    if entry.bytes is not None:
        _check_space(path.parent, entry.file, entry.bytes - _size(part))
    reasons = []
    for url in entry.urls:
        try:
            sha256 = _download(entry, url, part, path, timeout)
        except (RoutevlError, OSError, HTTPException) as error:
            reasons.append(f"{url}: {error}")
            print(reasons[-1], file=sys.stderr, flush=True)
        else:
            os.replace(part, path)
            return url, sha256
    raise RoutevlError(f"{entry.file} could not be downloaded: {'; '.join(reasons)}. Put it at {path} by hand ({expected})")


def _download(entry: DataFile, url: str, part: Path, path: Path, timeout: float) -> str:
    """Complete `part` from one address, which is asked again while that brings it further; returns the sha256.

    What was there before may be of another version of the file. Then the checksum is wrong, and the address gets a second chance.
    """
    furthest, failures = _size(part), 0
    stale = furthest > 0
    while True:
        try:
            _receive(entry, url, part, timeout, resume=_expected_checksum(entry, path) != "")
            return _verified_sha256(entry, part, path)
        except _WrongFile:
            part.unlink()
            if not stale:
                raise
            furthest, stale = 0, False
        except (OSError, HTTPException) as error:
            status = error.code if isinstance(error, HTTPError) else 500
            if status == 416:  # no such range: the file has become shorter
                part.unlink()
            failures = 0 if _size(part) > furthest else failures + 1
            furthest = max(_size(part), furthest)
            if failures > RETRIES or not (status in WORTH_ANOTHER_TRY or status >= 500):
                raise
            wait = FIRST_WAIT * 2**failures
            print(f"{url}: {error}; asking again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)


def _receive(entry: DataFile, url: str, part: Path, timeout: float, resume: bool) -> None:
    """Ask once for what `part` lacks and append it, or for the whole file: only a checksum tells that parts belong together."""
    start = _size(part) if resume else 0
    if start and start == entry.bytes:
        return
    headers = {"User-Agent": "routevl"} | ({"Range": f"bytes={start}-"} if start else {})
    with urlopen(Request(url, headers=headers), timeout=timeout) as response:
        if response.status != 206:
            start = 0
        total = entry.bytes if response.length is None else start + response.length
        if entry.bytes not in (None, total):
            raise RoutevlError(f"the file has {total} bytes there, expected {entry.bytes}")
        with open(part, "ab" if start else "wb") as file:
            pieces = iter(lambda: response.read(MB), b"")
            file.writelines(progress(pieces, ceil(((total or start) - start) / MB), f"{entry.file} (MB)"))
    if _size(part) < (total or 0):
        raise ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
