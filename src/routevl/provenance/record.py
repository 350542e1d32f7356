"""Stage `record`: run a job's command and write its manifest."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from routevl.errors import RoutevlError
from routevl.files import read_json, sha256_of, write_json
from routevl.provenance.manifest import HASHES, Entry, Manifest, describe, digest_of, past_of, set_aside, write_manifest
from routevl.startup import MODULES_VARIABLE, PACKAGE
from routevl.surroundings import PYTHON_VARIABLES, variables_without

LOCK = Path("envs/requirements.lock")
DIST_INFO = re.compile(r"(.+)-([^-]+)\.dist-info")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl record`."""
    parser.add_argument("--manifest", required=True, type=Path, metavar="JSON", help="<results>/manifests/<rule>/<name>.json")
    parser.add_argument("--wildcards", nargs="*", default=[], metavar="NAME=VALUE", help="the job's wildcards")
    parser.add_argument("--inputs", nargs="*", default=[], type=Path, metavar="PATH", help="files and folders that it reads")
    parser.add_argument("--outputs", nargs="+", required=True, type=Path, metavar="PATH", help="files and folders that it writes")
    parser.add_argument("command", nargs="+", help="after --: the command")


def run(arguments: argparse.Namespace) -> None:
    """Run the command; write its manifest when it has succeeded, and one under manifests/.past when it has failed.

    Code, environment and inputs are those from before the command; what has changed when it is done is listed in the manifest.

    Exits with the command's status where it failed. Raises RoutevlError where it has not written an output.
    """
    path = arguments.manifest
    hashes = path.parents[1] / HASHES
    if path.exists():  # of an earlier execution of the same job
        set_aside(path)
    inputs, code, circumstances = [describe(entry, hashes) for entry in arguments.inputs], code_now(), environment()
    version_control = _version_control()
    started, clock = datetime.now(UTC), time.monotonic()
    status, usage, loaded = _run_command(arguments.command)
    ended, wall_seconds = datetime.now(UTC), time.monotonic() - clock
    changed = [*_changed_inputs(inputs, hashes), *_changed_code(code, loaded["own"]), *_changed(circumstances, environment())]
    options = options_of(arguments.command)
    seeds = [int(seed) for seed in options.get("seed", [])]
    record: Manifest = {
        "rule": path.parent.name,
        "wildcards": dict(wildcard.split("=", 1) for wildcard in arguments.wildcards),
        "command": arguments.command,
        "config": options,
        "seed": seeds[0] if len(seeds) == 1 else seeds or None,
        "inputs": inputs,
        "outputs": [],
        "code": {
            "version": version("routevl"),
            **version_control,
            "files": {name: code[name] for name in loaded["own"] if name in code},
        },
        "environment": {**circumstances, "loaded": _distributions(loaded["others"], circumstances, hashes)},
        "machine": _machine(),
        "started": started.isoformat(timespec="milliseconds"),
        "ended": ended.isoformat(timespec="milliseconds"),
        "wall_seconds": round(wall_seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_memory_mb": round(usage.ru_maxrss / 1024, 1),
        "exit_status": status,
        "changed": changed,
    }
    if status != 0:
        write_manifest(past_of(path, record["started"]), record)
        raise SystemExit(status)
    record["outputs"] = [describe(output, hashes) for output in arguments.outputs]
    write_manifest(path, record)
    if changed:
        print(f"changed while the job ran, so it does not stand: {', '.join(changed)}", file=sys.stderr, flush=True)


def _run_command(command: list[str]) -> tuple[int, Any, dict[str, list[str]]]:
    """Exit status, resource usage and loaded modules of a command; stop signals are passed on to it."""
    with tempfile.NamedTemporaryFile("r", prefix="routevl-modules-") as log:
        process = subprocess.Popen(command, env=variables_without(PYTHON_VARIABLES) | {MODULES_VARIABLE: log.name})
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: process.send_signal(number))
        _, wait_status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(wait_status)
        status = process.returncode if process.returncode >= 0 else 128 - process.returncode
        said = log.read() if status == 0 else ""  # else it may be half of it
        return status, usage, json.loads(said or '{"own": [], "others": []}')


def _changed_inputs(inputs: list[Entry], hashes: Path) -> Iterator[str]:
    for entry in inputs:
        try:
            same = describe(Path(entry["path"]), hashes)["sha256"] == entry["sha256"]
        except (RoutevlError, OSError):
            same = False
        if not same:
            yield entry["path"]


def _changed_code(before: dict[str, str], loaded: list[str]) -> list[str]:
    now = code_now()
    return [f"routevl/{name}" for name in loaded if before.get(name) != now.get(name)]


def _changed(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if before["lock"] != now["lock"]:
        yield str(LOCK)
    yield from sorted({name for name, _ in before["packages"].items() ^ now["packages"].items()})


def options_of(command: list[str]) -> dict[str, list[str]]:
    """The options of a command with their values."""
    options: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command:
        if word.startswith("--"):
            values = options.setdefault(word[2:], [])
        else:
            values.append(word)
    return options


def code_now() -> dict[str, str]:
    """The sha256 of each module of the package, by its path in it."""
    return {path.relative_to(PACKAGE).as_posix(): sha256_of(path) for path in PACKAGE.rglob("*.py")}


def _version_control() -> dict[str, Any]:
    """The package's commit, and whether tracked files differ from it; also in a checkout of another owner, which git refuses."""
    folder = PACKAGE.parents[1]
    git = ["git", "-C", str(folder), "-c", f"safe.directory={folder}"]
    changed = _output_of([*git, "status", "--porcelain", "--untracked-files=no"])
    return {"commit": _output_of([*git, "rev-parse", "HEAD"]), "dirty": None if changed is None else bool(changed)}


def environment() -> dict[str, Any]:
    """Python, the lock file and the environment's packages by the names of their folders, which are quick to list."""
    unseen = {folder for name in PYTHON_VARIABLES for folder in os.environ.get(name, "").split(os.pathsep)}  # by jobs
    folders = (Path(folder) for folder in reversed(sys.path) if folder not in unseen)  # of two, the first counts, as for imports
    found = (DIST_INFO.fullmatch(entry.name) for folder in folders for entry in folder.glob("*.dist-info"))
    packages = {_normalised(match[1]): match[2] for match in found if match}
    return {
        "python": platform.python_version(),
        "lock": sha256_of(LOCK) if LOCK.exists() else None,
        "packages": dict(sorted(packages.items())),
    }


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions(imported: list[str], circumstances: dict[str, Any], hashes: Path) -> list[str]:
    """The packages that imported names belong to. The list of all names takes a quarter of a second: it is kept."""
    if not imported:
        return []
    kept = hashes / f"packages-{digest_of(circumstances['packages'])[:32]}.json"
    try:
        owners = read_json(kept)
    except RoutevlError:
        owners = packages_distributions()
        write_json(kept, owners)
    found = {_normalised(package) for name in imported for package in owners.get(name, ())}
    return sorted(found & circumstances["packages"].keys())


def _machine() -> dict[str, Any]:
    gpus = _output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "", re.MULTILINE)
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu[1] if cpu else None,
        "cores": os.cpu_count() or 1,
        "gpus": gpus.splitlines() if gpus else [],
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def _output_of(command: list[str]) -> str | None:
    """What a command prints; None where it does not exist or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
