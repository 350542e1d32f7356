"""Stage `audit`: whether an output, and all that it was made from, still stands; and the same output made again.

An output's manifest names its job's inputs; their manifests name theirs, down to raw data and downloads. The audit hashes all of
it anew, and compares code, environment and commands with those of now.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routevl.errors import RoutevlError
from routevl.files import read_json, sha256_of
from routevl.provenance.manifest import Entry, Manifest, describe, manifest_paths, read_manifest
from routevl.provenance.record import LOCK, environment, options_of
from routevl.provenance.rerun import rerun
from routevl.startup import PACKAGE

CONFIG = "config.json"  # beside the manifests: which configuration files the workflow was run with
SHELL_COMMAND = re.compile(r"^Shell command: (routevl record .*) &> ", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl audit`."""
    parser.add_argument("path", type=Path, help="a file or folder under the results, or the whole results folder")
    parser.add_argument("--rerun", action="store_true", help="also make it again in a scratch folder and compare")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a tree")


def run(arguments: argparse.Namespace) -> None:
    """Print the lineage of a path with what is wrong with it; exit with status 1 where not everything stands or is made again."""
    results = results_folder(arguments.path)
    records = Records(results)
    jobs = records.jobs() if arguments.path.resolve() == results.resolve() else [records.job_of(arguments.path)]
    audit = Audit(records)
    for job in jobs:
        audit.check(job)
    reruns = [rerun(job.manifest, results) for job in jobs if job.manifest] if arguments.rerun else []
    if arguments.json:
        print(json.dumps({"stands": audit.stands, "jobs": audit.as_records(), "reruns": reruns}, indent=1))
    else:
        print("\n".join(audit.lines(jobs)))
        for again in reruns:
            print(f"made again: {', '.join(again['outputs'])}: {again['verdict']}", *again["differences"], sep="\n  ")
    if not audit.stands or any(again["verdict"].startswith("different") for again in reruns):
        raise SystemExit(1)


def results_folder(path: Path) -> Path:
    """The results folder that a path is in. Raises RoutevlError where none above it has manifests."""
    for folder in (path, *path.parents):
        if (folder / "manifests").is_dir():
            return folder
    raise RoutevlError(f"{path}: not in a folder of results that has manifests")


@dataclass(frozen=True)
class Job:
    """One manifest; `manifest` is None where it could not be read, and `error` says why."""

    path: Path
    manifest: Manifest | None
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.path.parent.name} {self.path.stem}"


class Records:
    """All manifests of a results folder; `makers`: output -> the job that made it."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._jobs = [_read(path) for path in manifest_paths(results)]
        self.makers = {output: job for job in self._jobs for output in _outputs_of(job)}

    def jobs(self) -> list[Job]:
        """All jobs. Raises RoutevlError where there are none."""
        if not self._jobs:
            raise RoutevlError(f"{self.results}/manifests: no manifests")
        return self._jobs

    def job_of(self, path: Path) -> Job:
        """The job that made a path. Raises RoutevlError where no manifest tells of it."""
        wanted = path.resolve()
        for output, job in self.makers.items():
            if Path(output).resolve() in (wanted, *wanted.parents):
                return job
        broken = "".join(f"; {job.error}" for job in self._jobs if job.error)
        raise RoutevlError(f"{path}: no manifest tells how it was made{broken}")


def _read(path: Path) -> Job:
    try:
        return Job(path, read_manifest(path))
    except RoutevlError as error:
        return Job(path, None, str(error))


def _outputs_of(job: Job) -> list[str]:
    """The outputs of a job, as far as can be told: also a manifest that was edited says what it was about."""
    try:
        return [str(entry["path"]) for entry in (job.manifest or read_json(job.path))["outputs"]]
    except (RoutevlError, KeyError, TypeError):
        return []


class Audit:
    """What is wrong with the jobs that have been checked: `problems`, by their manifests' paths."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.problems: dict[Path, list[str]] = {}
        self._commands = planned_commands(records.results)
        self._environment = environment()
        self._code = {path.relative_to(PACKAGE).as_posix(): sha256_of(path) for path in PACKAGE.rglob("*.py")}

    @property
    def stands(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.problems.values())

    def check(self, job: Job) -> None:
        """Check a job and all that its inputs come from."""
        if job.path in self.problems:
            return
        if job.manifest is None:
            self.problems[job.path] = [job.error]
            return
        problems = self.problems[job.path] = []
        if job.manifest["config"] != options_of(job.manifest["command"]):
            problems.append(f"{job.path}: its config is not what its command says")
        for entry in job.manifest["outputs"]:
            problems += _compare(entry)
        for entry in job.manifest["inputs"]:
            maker = self.records.makers.get(entry["path"])
            if maker:
                self.check(maker)
                problems += _not_as_made(entry, maker)
                continue
            problems += _compare(entry)
            if self.records.results.resolve() in Path(entry["path"]).resolve().parents:  # not raw data
                problems.append(f"{entry['path']}: no readable manifest tells how this input was made")
        problems += self._stale(job.path, job.manifest)

    def _stale(self, path: Path, then: Manifest) -> list[str]:
        """What is not as it was when the job ran: its command, the code, the lock or the installed packages."""
        problems = []
        command = self._commands.get(str(path))
        if command is None:
            problems.append("the configuration has no such job now")
        elif command != then["command"]:
            problems += _changed_options(then["command"], command)
        for name, sha256 in then["code"]["files"].items():
            if self._code.get(name) != sha256:
                problems.append(f"the code of routevl/{name} is not what the job ran")
        before, now = then["environment"], self._environment
        if before["lock"] != now["lock"]:
            problems.append(f"{LOCK} is not what it was")
        versions = [environment["packages"] for environment in (before, now)]
        changed = sorted({name for name, _ in versions[0].items() ^ versions[1].items()})
        if changed:
            first, *others = changed
            more = f" and {len(others)} more packages" if others else ""
            was, is_now = (packages.get(first) for packages in versions)
            problems.append(f"another environment: {first} {was} then, {is_now} now{more}")
        if before["python"] != now["python"]:
            problems.append(f"Python {before['python']} then, {now['python']} now")
        return [f"stale: {problem}" for problem in problems]

    def as_records(self) -> list[dict[str, Any]]:
        """The jobs that have been checked as JSON, each with its outputs and problems."""
        return [
            {
                "manifest": str(job.path),
                "rule": job.path.parent.name,
                "outputs": [entry["path"] for entry in job.manifest["outputs"]] if job.manifest else [],
                "problems": self.problems[job.path],
            }
            for job in self.records.jobs()
            if job.path in self.problems
        ]

    def lines(self, jobs: list[Job]) -> list[str]:
        """The lineage as a tree, and the verdict."""
        shown: set[Path] = set()
        lines = [line for job in jobs if job.path not in shown for line in self._tree(job, "", shown)]
        wrong = sum(map(bool, self.problems.values()))
        verdict = "everything stands" if self.stands else f"{wrong} of {len(self.problems)} jobs do not stand"
        return [*lines, f"{len(self.problems)} jobs checked: {verdict}"]

    def _tree(self, job: Job, indent: str, shown: set[Path]) -> Iterator[str]:
        if job.path in shown:
            yield f"{indent}{job.name}: as above"
            return
        shown.add(job.path)
        problems = self.problems[job.path]
        yield f"{indent}{job.name}: {'DOES NOT STAND' if problems else 'stands'}"
        yield from (f"{indent}  ! {problem}" for problem in problems)
        paths = [entry["path"] for entry in job.manifest["inputs"]] if job.manifest else []
        yield from (f"{indent}  {path} (given)" for path in paths if path not in self.records.makers)
        makers = [self.records.makers[path] for path in paths if path in self.records.makers]
        for maker in {maker.path: maker for maker in makers}.values():
            yield from self._tree(maker, indent + "  ", shown)


def _compare(entry: Entry) -> list[str]:
    """How what is on the disk now differs from an entry of a manifest: each file that is changed, missing or added."""
    path = Path(entry["path"])
    if not path.exists():
        return [f"{path}: missing"]
    now = describe(path)
    if now["sha256"] == entry["sha256"]:
        return []
    if "files" not in entry or "files" not in now:
        return [f"{path}: changed"]
    problems = []
    for name in sorted(entry["files"].keys() | now["files"].keys()):
        before, after = entry["files"].get(name), now["files"].get(name)
        if before != after:
            what = "missing" if after is None else "added" if before is None else "changed"
            problems.append(f"{path}/{name}: {what}")
    return problems


def _not_as_made(entry: Entry, maker: Job) -> list[str]:
    """An input that its maker has made differently since."""
    made = maker.manifest["outputs"] if maker.manifest else [entry]
    if any(output["path"] == entry["path"] and output["sha256"] == entry["sha256"] for output in made):
        return []
    return [f"stale: {entry['path']} was read before {maker.name} made it as it is now"]


def _changed_options(then: list[str], now: list[str]) -> list[str]:
    before, after = options_of(then), options_of(now)
    changes = []
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            was, is_now = (shlex.join(options[name]) if name in options else "was not given" for options in (before, after))
            changes.append(f"--{name} {was} then, {is_now} now")
    return changes or ["the command is another one now"]


def planned_commands(results: Path) -> dict[str, list[str]]:
    """Manifest -> command of every job of the configuration as it is now. Raises RoutevlError where Snakemake cannot tell."""
    used = read_json(results / "manifests" / CONFIG)
    snakemake = [str(Path(sys.executable).with_name("snakemake")), "--dry-run", "--forceall", "--printshellcmds", "--nocolor"]
    given = ["--configfile", *used["configfiles"]] if used["configfiles"] else []
    given += ["--config", *used["config"]] if used["config"] else []
    dry_run = subprocess.run([*snakemake, "--cores", "1", *given], capture_output=True, text=True)
    if dry_run.returncode != 0:
        raise RoutevlError(f"the workflow cannot be planned now: {(dry_run.stdout + dry_run.stderr).strip()[-500:]}")
    commands = {}
    for line in SHELL_COMMAND.findall(dry_run.stdout):
        words = shlex.split(line)
        commands[words[words.index("--manifest") + 1]] = words[words.index("--") + 1 :]
    return commands
