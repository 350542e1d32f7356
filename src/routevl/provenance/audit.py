"""Stage `audit`: whether an output, and all that it was made from, still stands; and the same output made again.

An output's manifest names its job's inputs; their manifests name theirs, down to raw data and downloads. The audit hashes all of
it anew, and compares code, packages and commands with those of now.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

from routevl.provenance.manifest import Entry, Manifest, describe, set_aside
from routevl.provenance.record import LOCK, code_now, environment, options_of
from routevl.provenance.records import Job, Plan, Planned, Records, is_inside, place, program, project_of, read_plan, snakemake
from routevl.provenance.rerun import rerun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl audit`."""
    parser.add_argument("path", type=Path, help="a file or folder under the results, or the whole results folder")
    parser.add_argument("--rerun", action="store_true", help="also make it again in a scratch folder and compare")
    parser.add_argument(
        "--retire", action="store_true", help="first set aside the manifests of jobs that the configuration lacks"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a tree")


def run(arguments: argparse.Namespace) -> None:
    """Print the lineage of a path with what is wrong with it; exit with status 1 where not everything stands or is made again."""
    path = Path(place(arguments.path))
    project, results = project_of(arguments.path)
    with chdir(project):  # that the paths of manifests are relative to
        plan = read_plan(results)
        records = Records(results, plan)
        if arguments.retire:
            for job in records.retired:
                set_aside(job.path)
            records = Records(results, plan)
        whole = path == Path(place(results))
        audit = Audit(records, plan)
        jobs = [*records.jobs, *lost_jobs(records, plan)] if whole else [records.job_of(path)]
        for job in jobs:
            audit.check(job)
        reruns = [rerun(job.manifest, results) for job in jobs if job.manifest] if arguments.rerun else []
        if arguments.json:
            found = {"stands": audit.stands, "jobs": audit.as_records(), "retired": [str(job.path) for job in records.retired]}
            print(json.dumps(found | {"reruns": reruns}, indent=1))
        else:
            print("\n".join(audit.lines(jobs)))
            for again in reruns:
                print(f"made again: {', '.join(again['outputs'])}: {again['verdict']}", *again["differences"], sep="\n  ")
        if not audit.stands or any(again["verdict"].startswith("different") for again in reruns):
            raise SystemExit(1)


def lost_jobs(records: Records, plan: Plan) -> list[Job]:
    """The configuration's jobs whose outputs are there, at least in part, without a manifest."""
    known = {place(job.path) for job in records.jobs}
    lost = [(planned, output) for key, planned in plan.items() if key not in known for output in planned.outputs]
    there = {planned.manifest: output for planned, output in lost if Path(output).exists()}
    return [Job(path, None, f"{output}: no manifest tells how it was made") for path, output in there.items()]


class Audit:
    """What is wrong with the jobs that have been checked: `problems`, by their manifests' paths."""

    def __init__(self, records: Records, plan: Plan) -> None:
        self.records, self.plan = records, plan
        self.problems: dict[Path, list[str]] = {}
        self._environment, self._code = environment(), code_now()
        self._snakemake = snakemake(records.results)

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
            maker = self.records.maker_of(entry["path"])
            if maker:
                self.check(maker)
                problems += _not_as_made(entry, maker)
                continue
            problems += _compare(entry)
            if is_inside(entry["path"], self.records.results):  # not raw data
                problems.append(f"{entry['path']}: no readable manifest tells how this input was made")
        problems += [f"{name}: was changed while the job ran" for name in job.manifest["changed"]]
        if planned := self.plan.get(place(job.path)):
            problems += self._stale(planned, job.manifest)
        else:
            problems.append("retired: the configuration has no such job now")

    def _stale(self, planned: Planned, then: Manifest) -> list[str]:
        """What is not as it was when the job ran: its command, the code, the lock, Python or the packages that it had loaded."""
        problems = []
        if planned.command != then["command"]:
            problems += _changed_options(then["command"], planned.command)
        for name, sha256 in then["code"]["files"].items():
            if self._code.get(name) != sha256:
                problems.append(f"the code of routevl/{name} is not what the job ran")
        before, now = then["environment"], self._environment
        if before["lock"] != now["lock"]:
            problems.append(f"{LOCK} is not what it was")
        versions = [(name, before["packages"].get(name), now["packages"].get(name)) for name in before["loaded"]]
        if changed := [(name, was, is_now) for name, was, is_now in versions if was != is_now]:
            (first, was, is_now), *others = changed
            more = f" and {len(others)} more packages" if others else ""
            problems.append(f"another environment: {first} {was} then, {is_now} now{more}")
        if before["python"] != now["python"]:
            problems.append(f"Python {before['python']} then, {now['python']} now")
        return [f"stale: {problem}" for problem in problems]

    def remedy(self, job: Job) -> list[str]:
        """The command that brings a job which does not stand up to date."""
        if planned := self.plan.get(place(job.path)):
            return [*self._snakemake, "--forcerun", planned.outputs[0]]
        return [program("routevl"), "audit", "--retire", str(self.records.results)]

    def as_records(self) -> list[dict[str, Any]]:
        """The jobs that have been checked as JSON, each with its outputs and problems."""
        return [
            {
                "manifest": str(job.path),
                "rule": job.path.parent.name,
                "outputs": job.outputs,
                "problems": self.problems[job.path],
                "remedy": shlex.join(self.remedy(job)) if self.problems[job.path] else None,
            }
            for job in [*self.records.jobs, *self.records.retired]
            if job.path in self.problems
        ]

    def lines(self, jobs: list[Job]) -> list[str]:
        """The lineage as a tree, and the verdict."""
        shown: set[Path] = set()
        lines = [line for job in jobs if job.path not in shown for line in self._tree(job, "", shown)]
        wrong = sum(map(bool, self.problems.values()))
        verdict = "everything stands" if self.stands else f"{wrong} of {len(self.problems)} jobs do not stand"
        unseen = [job.name for job in self.records.retired if job.path not in self.problems]
        retired = f"; retired, as the configuration has no such jobs now: {', '.join(unseen)} (--retire)" if unseen else ""
        return [*lines, f"{len(self.problems)} jobs checked: {verdict}{retired}"]

    def _tree(self, job: Job, indent: str, shown: set[Path]) -> Iterator[str]:
        if job.path in shown:
            yield f"{indent}{job.name}: as above"
            return
        shown.add(job.path)
        problems = self.problems[job.path]
        yield f"{indent}{job.name}: {'DOES NOT STAND' if problems else 'stands'}"
        yield from (f"{indent}  ! {problem}" for problem in problems)
        if problems:
            yield f"{indent}  > {shlex.join(self.remedy(job))}"
        paths = [entry["path"] for entry in job.manifest["inputs"]] if job.manifest else []
        makers = {path: self.records.maker_of(path) for path in paths}
        yield from (f"{indent}  {path} (given)" for path, maker in makers.items() if not maker)
        for maker in {maker.path: maker for maker in makers.values() if maker}.values():
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
    if any(place(output["path"]) == place(entry["path"]) and output["sha256"] == entry["sha256"] for output in made):
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
