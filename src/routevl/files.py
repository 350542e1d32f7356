"""Reading and writing files: every output is written whole or not at all."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from routevl.errors import RoutevlError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Raises:
        RoutevlError: the file could not be written (a full disk, no permission); nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; put it in the place of `path` on success, remove it on failure.

    Raises:
        RoutevlError: the folder could not be written; what stood at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path, temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():  # some libraries write weights that nobody but their owner may read
                    file.chmod(file.stat().st_mode | 0o444 & ~_umask())
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Turn the operating system's errors into RoutevlErrors that name `path`; safetensors has them in its messages alone."""
    try:
        yield
    except RoutevlError as error:
        if str(temporary) not in str(error):
            raise
        raise RoutevlError(str(error).replace(str(temporary), str(path))) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not isinstance(error, OSError) and not number:
            raise
        reason = os.strerror(int(number[1])) if number else error.strerror or error
        raise RoutevlError(f"could not write {path}: {reason}") from error


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON (UTF-8, one-space indent, keys in the given order), whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, parse_float: Callable[[str], Any] = float) -> Any:
    """Read a JSON file, plain or gzip-compressed (by its first two bytes, whatever its name).

    Half a surrogate pair, which is no character and cannot be written again, becomes U+FFFD. Of a key that an object has twice
    the last value counts, as in the official tools.

    Args:
        parse_float: makes the value of a number with a fraction or an exponent, as in json.loads.

    Raises:
        RoutevlError: the file is missing, truncated, not JSON, or nested too deeply to be read.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        return json.loads(_whole_characters(text), parse_float=parse_float)
    except FileNotFoundError:
        raise RoutevlError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise RoutevlError(f"{path}: not a readable JSON file ({error})") from error


_SURROGATE, _ESCAPED_SURROGATE = re.compile("[\ud800-\udfff]"), re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|(u[dD][89a-fA-F][\da-fA-F]{2})|.)", re.DOTALL)


def _whole_characters(text: str) -> str:
    """JSON with U+FFFD for each half of a surrogate pair, whether it stands there as it is or as an escape."""
    if not text.isascii() and _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
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
        with open(path, "w", encoding="utf-8") as file:
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
