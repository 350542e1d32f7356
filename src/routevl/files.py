"""Reading and writing files: every output is written whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from routevl.errors import RoutevlError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path for a file; put it in the place of `path` on success, remove it on failure.

    Raises:
        RoutevlError: the file could not be written (a full disk, no permission); what stood at `path` is untouched.
    """
    path = Path(path)
    with _naming(path), _folder_beside(path) as folder:
        temporary = folder / path.name
        yield temporary
        _let_all_read(temporary)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)


@contextmanager
def atomic_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yield a temporary folder; put it in the place of `path` on success, remove it on failure.

    Args:
        marker: what always stands in such a folder, by which an earlier one is recognised (see `check_replaceable`).

    Raises:
        RoutevlError: the folder could not be written, or something else stands at `path`, which is untouched then. Where the
            earlier folder holds more than what is written, what is written is kept beside it.
    """
    path = Path(path)
    check_replaceable(path, marker)
    if path.is_symlink():
        path = path.resolve()
    with _naming(path), _folder_beside(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _let_all_read(file)
        _flush_all_to_disk(temporary)
        if not path.exists():
            os.replace(temporary, path)
        elif foreign := sorted(_names_in(path) - _names_in(temporary)):
            kept = path.parent / Path(tempfile.mkdtemp(prefix=f"{path.name}.new-", dir=path.parent)).name
            os.replace(temporary, kept)
            raise RoutevlError(f"{path} holds {foreign[0]} too, so it is not replaced; what was made is in {kept}")
        else:
            _exchange(temporary, path, folder / "aside")
        _flush_to_disk(path.parent)


def check_replaceable(path: str | Path, marker: str) -> None:
    """Raise RoutevlError where something stands at `path` that is neither an empty folder nor one that holds `marker`."""
    path = Path(path)
    if not path.is_dir():
        if os.path.lexists(path):
            raise RoutevlError(f"{path}: stands there and is no folder, so it is not replaced")
    elif not (path / marker).exists() and (names := sorted(_names_in(path))):
        raise RoutevlError(f"{path}: holds {names[0]} and no {marker}, so it is not of this stage and is not replaced")


def _names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder)) - {".snakemake_timestamp"}


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`. Its name is no other process's, on whatever node, and it is locked while this process
    lives: those of killed processes are known by having no lock, and are removed before the same path is written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start, end = f".{path.name}.", ".tmp"
    for name in os.listdir(path.parent):
        if name.startswith(start) and name.endswith(end):
            with _locked_folder(path.parent / name, fcntl.LOCK_NB) as held:
                if held:
                    shutil.rmtree(path.parent / name, ignore_errors=True)
    while True:
        folder = path.parent / f"{start}{secrets.token_hex(8)}{end}"  # known before it is there: a signal may come in between
        try:
            folder.mkdir(mode=0o700)
            with _locked_folder(folder):
                if folder.exists():  # else another process came between, and took it for one without a lock
                    yield folder
                    return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked_folder(folder: Path, how: int = 0) -> Iterator[bool]:
    """Hold a folder's lock while the body runs. Yields False where another process holds it (with LOCK_NB), where the folder has
    gone, or where the file system has no locks for folders."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | how)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(file)


def _exchange(new: Path, path: Path, aside: Path) -> None:
    """Put the folder `new` in the place of the folder `path`, in one step where the system can (Linux's RENAME_EXCHANGE); what
    stood there is then at `new`, else at `aside`."""
    rename, here, exchange = getattr(ctypes.CDLL(None), "renameat2", None), -100, 2
    if rename is None or rename(here, os.fsencode(new), here, os.fsencode(path), exchange) != 0:
        os.replace(path, aside)
        os.replace(new, path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into RoutevlErrors that name `path`. safetensors has them in its messages alone; of a
    full disk matplotlib makes an error of another kind on its way out."""
    try:
        yield
    except RoutevlError as error:
        temporary = re.escape(str(path.parent / f".{path.name}.")) + r"\w+\.tmp/" + re.escape(path.name)
        message = re.sub(temporary, lambda match: str(path), str(error))
        if message == str(error):
            raise
        raise RoutevlError(message) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        of_the_disk = next((cause for cause in _contexts(error) if getattr(cause, "errno", None) in DISK_ERRORS), None)
        if not isinstance(error, OSError) and not number and not of_the_disk:
            raise
        reason = os.strerror(int(number[1])) if number else (of_the_disk or error).strerror or error
        raise RoutevlError(f"could not write {path}: {reason}") from error


def _contexts(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the one while which it was raised, and so on."""
    while error:
        yield error
        error = error.__context__


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _let_all_read(file: Path) -> None:
    """Some libraries write weights that nobody but their owner may read."""
    file.chmod(file.stat().st_mode | 0o444 & ~_umask())


def _flush_to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of files where the file system can."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(file)


def _flush_all_to_disk(folder: Path) -> None:
    """Flush the file system of a folder: in one call, for a folder can have a hundred thousand files."""
    sync = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if sync is None:
        os.sync()
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        if sync(file) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(file)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON (UTF-8, one-space indent, keys in the given order), whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_text(path: str | Path, kind: str = "text") -> str:
    """The text of a file, plain or gzip-compressed (by its first two bytes, whatever its name), in UTF-8, UTF-16 or UTF-32.

    Half a surrogate pair, which is no character and cannot be written again, becomes U+FFFD.

    Args:
        kind: what messages call such a file.

    Raises:
        RoutevlError: the file is missing, truncated or no text.
    """
    with _reading(path, f"a readable {kind} file"):
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        if not text.isascii() and _SURROGATE.search(text):
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text


def read_json(path: str | Path, parse_float: Callable[[str], Any] = float) -> Any:
    """Read a JSON file as `read_text`. Of a key that an object has twice the last value counts, as in the official tools.

    Args:
        parse_float: makes the value of a number with a fraction or an exponent, as in json.loads.

    Raises:
        RoutevlError: the file is missing, truncated, not JSON, or nested too deeply to be read.
    """
    text = read_text(path, "JSON")
    with _reading(path, "a readable JSON file"):
        return json.loads(_whole_escapes(text), parse_float=parse_float)


def read_json_lines(path: str | Path, parse_float: Callable[[str], Any] = float) -> Iterator[tuple[str, Any]]:
    """Read a file of one JSON value a line, each as `read_json`; blank lines are left out.

    Yields:
        where a value stands, "<path>: line <number>", and the value.

    Raises:
        RoutevlError: the file is missing or truncated, or a line is not JSON.
    """
    for number, line in enumerate(read_text(path, "JSON").split("\n"), start=1):
        if line.strip():
            place = f"{path}: line {number}"
            with _reading(place, "readable JSON"):
                value = json.loads(_whole_escapes(line), parse_float=parse_float)
            yield place, value


@contextmanager
def _reading(place: str | Path, what: str) -> Iterator[None]:
    """Turn the errors of reading into RoutevlErrors that say that `place` is not `what`."""
    try:
        yield
    except FileNotFoundError:
        raise RoutevlError(f"{place}: no such file") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise RoutevlError(f"{place}: not {what} ({error})") from error


_SURROGATE, _ESCAPED_SURROGATE = re.compile("[\ud800-\udfff]"), re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|(u[dD][89a-fA-F][\da-fA-F]{2})|.)", re.DOTALL)


def _whole_escapes(text: str) -> str:
    """JSON with U+FFFD for each half of a surrogate pair that stands there as an escape."""
    if not _ESCAPED_SURROGATE.search(text):
        return text
    return _ESCAPE.sub(lambda escape: r"\ufffd" if escape[1] else escape[0], text)


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(path: str | Path) -> Iterator[IO[str]]:
    """Hold a lock file while the body runs; wait, with one line on stderr, while another process holds it.

    Yields the open file; the operating system frees the lock when all processes that hold it open have died, however.
    """
    while True:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
        except FileNotFoundError:  # who held the lock has just removed the folder
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that holds {path}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                yield file
                return


def _is_at(file: IO[str], path: str | Path) -> bool:
    """Whether an open file is still what stands at `path`: whoever held the lock may have deleted it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
