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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routevl.errors import RoutevlError
from routevl.files import read_json, sha256_of
from routevl.provenance.manifest import Manifest, describe, differing_files, manifest_paths, read_manifest
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
    """Print the lineage of a path with what is wrong with it.

    Raises:
        RoutevlError: the path is not there, or no manifest tells of it.
        SystemExit: with status 1 where not everything stands, or the rerun differs.
    """
    results = results_folder(arguments.path)
    records = Records(results)
    jobs = records.jobs() if arguments.path.resolve() == results.resolve() else [records.job_of(arguments.path)]
    audit = Audit(records)
    for job in jobs:
        audit.check(job)
    reruns = [rerun(job.manifest, results) for job in jobs if job.manifest] if arguments.rerun else []
    if arguments.json:
        print(json.dumps(audit.as_record() | {"reruns": reruns}, indent=1))
    else:
        print("\n".join(audit.lines(jobs)))
        for again in reruns:
            print(
                f"made again: {', '.join(again['outputs'])}: {again['verdict']}"
                + "".join(f"\n  {d}" for d in again["differences"])
            )
    if not audit.stands or any(again["verdict"].startswith("different") for again in reruns):
        raise SystemExit(1)


def results_folder(path: Path) -> Path:
    """The results folder that a path is in. Raises RoutevlError where none above it has manifests."""
    for folder in (path, *path.parents):
        if (folder / "manifests").is_dir():
            return folder
    raise RoutevlError(f"{path}: not in a folder of results that has manifests")


@dataclass
class Job:
    """One manifest; `manifest` is None where it could not be read, and `error` says why."""

    path: Path
    manifest: Manifest | None
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.path.parent.name} {self.path.stem}"


class Records:
    """All manifests of a results folder."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._jobs = [self._read(path) for path in manifest_paths(results)]
        self.makers = {output: job for job in self._jobs for output in _outputs_of(job)}

    def _read(self, path: Path) -> Job:
        try:
            return Job(path, read_manifest(path))
        except RoutevlError as error:
            return Job(path, None, str(error))

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


@dataclass
class Audit:
    """What is wrong with the jobs that have been checked, by their manifests' paths."""

    records: Records
    problems: dict[Path, list[str]] = field(default_factory=dict)
    order: list[Job] = field(default_factory=list)
    missing_manifests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._commands = planned_commands(self.records.results)
        self._environment = environment()
        self._code: dict[str, str | None] = {}

    @property
    def stands(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.problems.values())

    def check(self, job: Job) -> None:
        """Check a job and all that its inputs come from."""
        if job.path in self.problems:
            return
        self.order.append(job)
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
            if maker is None:
                problems += self._unmade(entry)
                continue
            self.check(maker)
            problems += _not_as_made(entry, maker)
        problems += self._stale(job)

    def _unmade(self, entry: dict[str, Any]) -> list[str]:
        """An input without a maker is raw data, unless it lies among the results: then its manifest is gone or broken."""
        problems = _compare(entry)
        if self.records.results.resolve() in Path(entry["path"]).resolve().parents:
            problems.append(f"{entry['path']}: no readable manifest tells how this input was made")
        return problems

    def _stale(self, job: Job) -> list[str]:
        """What is not as it was when the job ran: its command, the code, the lock or the installed packages."""
        then = job.manifest
        assert then is not None
        problems = []
        now = self._commands.get(str(job.path))
        if now is None:
            problems.append("stale: the configuration has no such job now")
        elif now != then["command"]:
            problems += [f"stale: {change}" for change in _changed_options(then["command"], now)]
        for name, sha256 in then["code"]["files"].items():
            if self._sha256_of_module(name) != sha256:
                problems.append(f"stale: the code of routevl/{name} is not what the job ran")
        lock = sha256_of(LOCK) if LOCK.exists() else None
        if lock != then["environment"]["lock"]:
            problems.append(f"stale: {LOCK} is not what it was")
        before, after = then["environment"]["packages"], self._environment["packages"]
        changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
        if changed:
            first = changed[0]
            more = f" and {len(changed) - 1} more packages" if len(changed) > 1 else ""
            problems.append(f"stale: another environment: {first} {before.get(first)} then, {after.get(first)} now{more}")
        if self._environment["python"] != then["environment"]["python"]:
            problems.append(f"stale: Python {then['environment']['python']} then, {self._environment['python']} now")
        return problems

    def _sha256_of_module(self, name: str) -> str | None:
        if name not in self._code:
            path = PACKAGE / name
            self._code[name] = sha256_of(path) if path.exists() else None
        return self._code[name]

    def as_record(self) -> dict[str, Any]:
        """The audit as JSON: each job with its outputs and problems, and the verdict."""
        jobs = [
            {
                "manifest": str(job.path),
                "rule": job.path.parent.name,
                "outputs": [entry["path"] for entry in job.manifest["outputs"]] if job.manifest else [],
                "problems": self.problems[job.path],
            }
            for job in self.order
        ]
        return {"stands": self.stands, "jobs": jobs}

    def lines(self, jobs: list[Job]) -> list[str]:
        """The lineage as a tree, and the verdict."""
        lines: list[str] = []
        shown: set[Path] = set()
        for job in jobs:
            if job.path not in shown:
                self._tree(job, "", shown, lines)
        wrong = sum(map(bool, self.problems.values()))
        verdict = "everything stands" if self.stands else f"{wrong} of {len(self.problems)} jobs do not stand"
        return [*lines, f"{len(self.problems)} jobs checked: {verdict}"]

    def _tree(self, job: Job, indent: str, shown: set[Path], lines: list[str]) -> None:
        again = job.path in shown
        shown.add(job.path)
        problems = self.problems[job.path]
        lines.append(f"{indent}{job.name}: " + ("as above" if again else "stands" if not problems else "DOES NOT STAND"))
        if again:
            return
        lines += [f"{indent}  ! {problem}" for problem in problems]
        if job.manifest is None:
            return
        makers = {entry["path"]: self.records.makers.get(entry["path"]) for entry in job.manifest["inputs"]}
        lines += [f"{indent}  {path} (given)" for path, maker in makers.items() if maker is None]
        for maker in {maker.path: maker for maker in makers.values() if maker}.values():
            self._tree(maker, indent + "  ", shown, lines)


def _outputs_of(job: Job) -> list[str]:
    """The outputs of a job, as far as can be told: also a manifest that was edited says what it was about."""
    try:
        return [str(entry["path"]) for entry in (job.manifest or read_json(job.path))["outputs"]]
    except (RoutevlError, KeyError, TypeError):
        return []


def _compare(entry: dict[str, Any]) -> list[str]:
    """How what is on the disk now differs from an entry of a manifest."""
    path = Path(entry["path"])
    if not path.exists():
        return [f"{path}: missing"]
    return differing_files(entry, describe(path))


def _not_as_made(entry: dict[str, Any], maker: Job) -> list[str]:
    """An input that its maker has made differently since."""
    if maker.manifest is None:
        return []
    [made] = [output for output in maker.manifest["outputs"] if output["path"] == entry["path"]]
    if made["sha256"] == entry["sha256"]:
        return []
    return [f"stale: {entry['path']} was read before {maker.name} made it as it is now"]


def _changed_options(then: list[str], now: list[str]) -> list[str]:
    before, after = options_of(then), options_of(now)
    names = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
    changes = [f"--{name} {_value(before, name)} then, {_value(after, name)} now" for name in names]
    return changes or ["the command is another one now"]


def _value(options: dict[str, list[str]], name: str) -> str:
    return shlex.join(options[name]) if name in options else "was not given"


def planned_commands(results: Path) -> dict[str, list[str]]:
    """Manifest -> command of every job of the configuration as it is now.

    Raises:
        RoutevlError: Snakemake cannot read the workflow or the configuration.
    """
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
