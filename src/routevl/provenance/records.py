"""The jobs of a folder of results, by their manifests; and the jobs that the configuration has now, by Snakemake."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.provenance.manifest import Manifest, manifest_paths, read_manifest
from routevl.surroundings import variables_for_snakemake

CONFIG = "config.json"  # beside the manifests: which configuration files the workflow was run with
SHELL_COMMAND = re.compile(r"^Shell command: (routevl record .*) &> ", re.MULTILINE)


@dataclass(frozen=True)
class Job:
    """One manifest; `manifest` is None where it could not be read, and `error` says why."""

    path: Path
    manifest: Manifest | None
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.path.parent.name} {self.path.stem}"

    @property
    def outputs(self) -> list[str]:
        """The paths of its outputs, as far as can be told: also a manifest that was edited says what it was about."""
        try:
            return [str(entry["path"]) for entry in (self.manifest or read_json(self.path))["outputs"]]
        except (RoutevlError, KeyError, TypeError):
            return []


@dataclass(frozen=True)
class Planned:
    """A job as the configuration has it now: where its manifest goes, what it writes, and its command."""

    manifest: Path
    outputs: list[str]
    command: list[str]


Plan = Mapping[str, Planned]  # by the places of the manifests


def place(path: str | Path) -> str:
    """Where a path leads, one for all its spellings: absolute or not, with `..`, through links."""
    return os.path.realpath(path)


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path leads to something in a folder, and not to the folder itself."""
    return Path(place(folder)) in Path(place(path)).parents


def project_of(path: Path) -> tuple[Path, Path]:
    """The folder of the project that a path's results belong to, absolute, and the results folder as its manifests spell it.

    Raises:
        RoutevlError: no folder above the path has manifests, or its project is elsewhere.
    """
    spelled, real = Path(os.path.abspath(path)), Path(place(path))
    folders = [spelled, *spelled.parents, real, *real.parents]
    results = next((folder for folder in folders if (folder / "manifests").is_dir()), None)
    if results is None:
        raise RoutevlError(f"{path}: not in a folder of results that has manifests")
    manifests = manifest_paths(results)
    if not manifests:
        raise RoutevlError(f"{results}/manifests: no manifests")
    for output in (Path(output) for manifest in manifests for output in Job(manifest, None).outputs):
        for project in (Path.cwd(), *results.parents, *real.parents):
            for folder in output.parents:
                if folder.name and place(project / folder) == place(results):
                    return project, folder
    raise RoutevlError(f"{path}: the manifests do not tell which project's results these are: go to its folder")


class Records:
    """All manifests of a results folder.

    Args:
        plan: the configuration's jobs now, which tell retired jobs apart; None: all are taken as the configuration's.

    Attributes:
        jobs: the jobs that the configuration has.
        retired: those that it has no more.
        makers: the place of each output -> the job that made it, retired ones last.
    """

    def __init__(self, results: Path, plan: Plan | None = None) -> None:
        self.results = results
        found = [_read(path) for path in manifest_paths(results)]
        if not found:
            raise RoutevlError(f"{results}/manifests: no manifests")
        elsewhere = [p.manifest for p in (plan or {}).values() if p.manifest.exists() and not is_inside(p.manifest, results)]
        found += [_read(path) for path in elsewhere]  # of downloads, which a rehearsal shares
        self.jobs = [job for job in found if plan is None or place(job.path) in plan]
        self.retired = [job for job in found if job not in self.jobs]
        self.makers = {place(output): job for job in [*self.retired, *self.jobs] for output in job.outputs}

    def maker_of(self, path: str | Path) -> Job | None:
        """The job that made exactly this path; None where no manifest tells."""
        return self.makers.get(place(path))

    def job_of(self, path: Path) -> Job:
        """The job that made a path, or the folder that it is in. Raises RoutevlError where no manifest tells of it."""
        wanted = Path(place(path))
        for folder in (wanted, *wanted.parents):
            if job := self.makers.get(str(folder)):
                return job
        broken = "".join(f"; {job.error}" for job in [*self.jobs, *self.retired] if job.error)
        raise RoutevlError(f"{path}: no manifest tells how it was made{broken}")


def _read(path: Path) -> Job:
    try:
        return Job(path, read_manifest(path))
    except RoutevlError as error:
        return Job(path, None, str(error))


def program(name: str) -> str:
    """A program of this environment, as it can be called from the working folder."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def snakemake(results: Path, *options: str) -> list[str]:
    """Snakemake's command line with the configuration that the workflow was last run with."""
    used = read_json(results / "manifests" / CONFIG)
    given = ["--configfile", *used["configfiles"]] if used["configfiles"] else []
    given += ["--config", *used["config"]] if used["config"] else []
    return [program("snakemake"), "--cores", "1", *options, *given]


def read_plan(results: Path) -> Plan:
    """Every job of the configuration as it is now. Raises RoutevlError where Snakemake cannot tell."""
    command = snakemake(results, "--dry-run", "--forceall", "--printshellcmds", "--nocolor")
    dry_run = subprocess.run(command, env=variables_for_snakemake(), capture_output=True, text=True)
    if dry_run.returncode != 0:
        raise RoutevlError(f"the workflow cannot be planned now: {(dry_run.stdout + dry_run.stderr).strip()[-500:]}")
    plan = {}
    for line in SHELL_COMMAND.findall(dry_run.stdout):
        words = shlex.split(line)
        manifest, outputs, end = words.index("--manifest") + 1, words.index("--outputs") + 1, words.index("--")
        plan[place(words[manifest])] = Planned(Path(words[manifest]), words[outputs:end], words[end + 1 :])
    return plan
