"""Stage `record`: run a job's command and write its manifest."""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from routevl.files import read_json, sha256_of
from routevl.provenance.manifest import HASHES, PAST, Manifest, describe, write_manifest
from routevl.startup import MODULES_VARIABLE, PACKAGE

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

    Exits with the command's status where it failed. Raises RoutevlError where it has not written an output.
    """
    path = arguments.manifest
    hashes = path.parents[1] / HASHES
    if path.exists():  # of an earlier execution of the same job
        superseded = _past(path, str(read_json(path).get("started", "")))
        superseded.parent.mkdir(parents=True, exist_ok=True)
        path.replace(superseded)
    inputs = [describe(entry, hashes) for entry in arguments.inputs]
    started, clock = datetime.now(UTC), time.monotonic()
    status, usage, modules = _run_command(arguments.command)
    ended, wall_seconds = datetime.now(UTC), time.monotonic() - clock
    options = options_of(arguments.command)
    record: Manifest = {
        "rule": path.parent.name,
        "wildcards": dict(wildcard.split("=", 1) for wildcard in arguments.wildcards),
        "command": arguments.command,
        "config": options,
        "seed": int(options["seed"][0]) if "seed" in options else None,
        "inputs": inputs,
        "outputs": [],
        "code": _code(modules),
        "environment": environment(),
        "machine": _machine(),
        "started": started.isoformat(timespec="milliseconds"),
        "ended": ended.isoformat(timespec="milliseconds"),
        "wall_seconds": round(wall_seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_memory_mb": round(usage.ru_maxrss / 1024, 1),
        "exit_status": status,
    }
    if status != 0:
        write_manifest(_past(path, record["started"]), record)
        raise SystemExit(status)
    record["outputs"] = [describe(output, hashes) for output in arguments.outputs]
    write_manifest(path, record)


def _past(path: Path, started: str) -> Path:
    """Where the manifest of a failed or superseded execution goes."""
    stamp = re.sub(r"[^0-9T]", "", started.split("+")[0])
    return path.parents[1] / PAST / path.parent.name / f"{path.stem}.{stamp}.json"


def _run_command(command: list[str]) -> tuple[int, Any, list[str]]:
    """Exit status, resource usage and loaded modules of a command; stop signals are passed on to it."""
    with tempfile.NamedTemporaryFile("r", prefix="routevl-modules-") as log:
        process = subprocess.Popen(command, env=os.environ | {MODULES_VARIABLE: log.name})
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: process.send_signal(number))
        _, wait_status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(wait_status)
        status = process.returncode if process.returncode >= 0 else 128 - process.returncode
        return status, usage, log.read().split()


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


def _code(modules: list[str]) -> dict[str, Any]:
    """The package's version and state, and the sha256 of the modules of it that were loaded."""
    git = ["git", "-C", str(PACKAGE.parents[1])]
    changed = _output_of([*git, "status", "--porcelain", "--untracked-files=no"])
    return {
        "version": version("routevl"),
        "commit": _output_of([*git, "rev-parse", "HEAD"]),
        "dirty": None if changed is None else bool(changed),
        "files": {name: sha256_of(PACKAGE / name) for name in sorted(modules)},
    }


def environment() -> dict[str, Any]:
    """Python, the lock file and the installed packages by the names of their folders, which are quick to list."""
    folders = (Path(folder) for folder in sys.path if folder.endswith("site-packages"))
    found = (DIST_INFO.fullmatch(entry.name) for folder in folders for entry in folder.glob("*.dist-info"))
    packages = {match[1].lower().replace("_", "-"): match[2] for match in found if match}
    return {
        "python": platform.python_version(),
        "lock": sha256_of(LOCK) if LOCK.exists() else None,
        "packages": dict(sorted(packages.items())),
    }


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
