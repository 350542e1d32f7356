"""Manifests, results/manifests/<rule>/<wildcards>.json: one job's command, inputs, outputs, code, environment and machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from routevl.errors import RoutevlError
from routevl.files import read_json, sha256_of, write_json

SCHEMA = Path(__file__).with_name("manifest.schema.json")
PAST = ".past"  # in the folder of manifests: those of failed jobs, and of jobs that were done again
HASHES = ".hashes"  # in the folder of manifests: what has been hashed before

Manifest = dict[str, Any]
Entry = dict[str, Any]


def describe(path: Path, known: Path | None = None) -> Entry:
    """A file's or folder's bytes and sha256 as a manifest holds them.

    Args:
        known: folder that remembers hashes by path, size and time of change; None hashes everything.

    Raises:
        RoutevlError: there is no such file or folder.
    """
    if not path.exists():
        raise RoutevlError(f"{path}: no such file or folder")
    memory = known / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json" if known else None
    before = read_json(memory) if memory and memory.exists() else {}
    hashed: dict[str, list[Any]] = {}
    for file, name in _files_of(path):
        status = file.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        remembered = before.get(name, [None, None, None])
        hashed[name] = [*stamp, remembered[2] if remembered[:2] == stamp else sha256_of(file)]
    if memory and hashed != before:
        write_json(memory, hashed)
    if not path.is_dir():
        size, _, sha256 = hashed["."]
        return {"path": str(path), "bytes": size, "sha256": sha256}
    files = {name: {"bytes": size, "sha256": sha256} for name, (size, _, sha256) in hashed.items()}
    total = sum(file["bytes"] for file in files.values())
    return {"path": str(path), "bytes": total, "sha256": digest_of(files), "files": files}


def _files_of(path: Path) -> Iterator[tuple[Path, str]]:
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file() and file.name != ".snakemake_timestamp"):
            yield file, file.relative_to(path).as_posix()
    else:
        yield path, "."


def digest_of(value: Any) -> str:
    """sha256 (hexadecimal) of a JSON value, the same for any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest with its own digest, whole or not at all."""
    write_json(path, {**manifest, "digest": digest_of(manifest)})


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        RoutevlError: it is missing, does not fit the schema, or is not as it was written.
    """
    from fastjsonschema import JsonSchemaValueException

    manifest = read_json(path)
    try:
        _schema()(manifest)
    except JsonSchemaValueException as error:
        raise RoutevlError(f"{path}: not a manifest: {error.message}") from None
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    if digest_of(rest) != manifest["digest"]:
        raise RoutevlError(f"{path}: was changed after it had been written")
    return manifest


@cache
def _schema() -> Callable[[Any], Any]:
    """The schema as a compiled function: manifests have thousands of entries, over which jsonschema takes seconds."""
    import fastjsonschema

    return fastjsonschema.compile(read_json(SCHEMA))


def manifest_paths(results: Path) -> list[Path]:
    """The manifests of a results folder, without those of failed and superseded jobs."""
    return sorted(path for path in (results / "manifests").glob("*/*.json") if not path.parent.name.startswith("."))


def differing_files(then: Entry, now: Entry) -> list[str]:
    """Each file of an entry that is changed, missing or added, with what is wrong with it; nothing where both are equal."""
    if then["sha256"] == now["sha256"]:
        return []
    if "files" not in then or "files" not in now:
        return [f"{then['path']}: changed"]
    problems = []
    for name in sorted(then["files"].keys() | now["files"].keys()):
        before, after = then["files"].get(name), now["files"].get(name)
        if before != after:
            what = "missing" if after is None else "added" if before is None else "changed"
            problems.append(f"{then['path']}/{name}: {what}")
    return problems
