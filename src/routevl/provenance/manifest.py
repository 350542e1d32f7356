"""Manifests, results/manifests/<rule>/<wildcards>.json: one job's command, inputs, outputs, code, environment and machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from routevl.errors import RoutevlError
from routevl.files import read_json, sha256_of, write_json

SCHEMA = Path(__file__).with_name("manifest.schema.json")
PAST = ".past"  # in the folder of manifests: those of failed and retired jobs, and of jobs that were done again
HASHES = ".hashes"  # in the folder of manifests: what has been hashed before

Manifest = dict[str, Any]
Entry = dict[str, Any]


def describe(path: Path, known: Path | None = None) -> Entry:
    """A file's or folder's bytes and sha256 as a manifest holds them.

    `known` is a folder that remembers hashes by path, size, inode and times of change; None hashes everything.
    """
    if not path.exists():
        raise RoutevlError(f"{path}: no such file or folder")
    memory = known / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json" if known else None
    before = _remembered(memory) if memory else {}
    files = [file for file in path.rglob("*") if file.is_file() and file.name != ".snakemake_timestamp"]
    hashed: dict[str, list[Any]] = {}
    for file in sorted(files) if path.is_dir() else [path]:
        name, status = file.relative_to(path).as_posix(), file.stat()
        # of a file that was swapped for one of equal size and time, the time of the swap is another, and the inode
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        *stamp_before, sha256 = before.get(name, [None])
        hashed[name] = [*stamp, sha256 if stamp_before == stamp else sha256_of(file)]
    if memory and hashed != before:
        write_json(memory, hashed)
    if not path.is_dir():
        size, *_, sha256 = hashed["."]
        return {"path": str(path), "bytes": size, "sha256": sha256}
    described = {name: {"bytes": size, "sha256": sha256} for name, (size, *_, sha256) in hashed.items()}
    total = sum(size for size, *_ in hashed.values())
    return {"path": str(path), "bytes": total, "sha256": digest_of(described), "files": described}


def _remembered(memory: Path) -> dict[str, list[Any]]:
    """What was hashed before; nothing where the file is not there, torn, or of another form."""
    try:
        before = read_json(memory)
    except RoutevlError:
        return {}
    whole = isinstance(before, dict) and all(isinstance(entry, list) and entry for entry in before.values())
    return before if whole else {}


def digest_of(value: Any) -> str:
    """sha256 (hexadecimal) of a JSON value, the same for any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def set_aside(path: Path) -> None:
    """Move a job's manifest to the past, readable or not."""
    try:
        started = str(read_json(path)["started"])
    except (RoutevlError, KeyError, TypeError):
        started = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="milliseconds")
    past = past_of(path, started)
    past.parent.mkdir(parents=True, exist_ok=True)
    path.replace(past)


def past_of(path: Path, started: str) -> Path:
    """Where the manifest of a failed, superseded or retired execution goes."""
    stamp = re.sub(r"[^0-9T]", "", started.split("+")[0])
    return path.parents[1] / PAST / path.parent.name / f"{path.stem}.{stamp}.json"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest with its own digest, whole or not at all."""
    write_json(path, {**manifest, "digest": digest_of(manifest)})


def read_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises RoutevlError where it is missing, does not fit the schema, or is not as it was written."""
    manifest = read_json(path)
    try:
        _schema()(manifest)
    except ValueError as error:
        raise RoutevlError(f"{path}: not a manifest: {error}") from None
    digest = manifest.pop("digest")
    if digest_of(manifest) != digest:
        raise RoutevlError(f"{path}: was changed after it had been written")
    return {**manifest, "digest": digest}


@cache
def _schema() -> Callable[[Any], Any]:
    """The schema as a compiled function: manifests have thousands of entries, over which jsonschema takes seconds."""
    import fastjsonschema  # here, as `routevl record` runs with every job and reads no manifest

    return fastjsonschema.compile(read_json(SCHEMA))


def manifest_paths(results: Path) -> list[Path]:
    """The manifests of a results folder, without those of failed and superseded jobs."""
    return sorted(path for path in (results / "manifests").glob("*/*.json") if not path.parent.name.startswith("."))
