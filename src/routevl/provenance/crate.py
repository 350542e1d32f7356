"""Stage `crate`: the results as a Workflow Run RO-Crate, described by <results>/ro-crate-metadata.json.

The crate follows RO-Crate 1.1 and the Provenance Run Crate profile: the workflow with its steps and tools, and one action per
job, with what it read and wrote. All of that is in the manifests. A file that still is where a job left it is named by its path;
any other one (given, superseded, code) by its hash and name. What no manifest tells, as who started a job, is left out, and so
are names of machines and of folders outside the project.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
from collections.abc import Iterable
from contextlib import chdir
from dataclasses import dataclass
from mimetypes import MimeTypes
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from rocrate.model import ContextEntity
from rocrate.rocrate import ROCrate

from routevl.cli import STAGES
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, sha256_of, write_json
from routevl.provenance.manifest import PAST, Entry, Manifest, describe, digest_of, manifest_paths, read_manifest
from routevl.provenance.record import LOCK
from routevl.provenance.records import project_of
from routevl.startup import PACKAGE

METADATA = "ro-crate-metadata.json"
SNAKEFILE, WORKFLOW = "Snakefile", "workflow"  # of the project
SOURCE = "source"  # folder of the crate with a copy of both, for the workflow belongs to the crate
FILES_LISTED = 100  # a folder with more files is described by its digest, size and number of files alone
CITATION = PACKAGE.parents[1] / "CITATION.cff"
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
SHA256_TERM = "https://w3id.org/ro/terms/workflow-run#sha256"  # RO-Crate 1.1 has no term for it
COMPLETED, FAILED = "http://schema.org/CompletedActionStatus", "http://schema.org/FailedActionStatus"
# A path that leaves the folder that it is read from, at the beginning of a word or in the middle of JSON; no URL.
OUTSIDE = re.compile(r"""(?<![^"'=:,\[(])(?:file://)?(?:~|\.\.(?=/)|/(?!/))[^"']*""")
FORMATS = MimeTypes()  # the types that Python knows, and TEXTS: those of the machine differ
TEXTS = {".jsonl": "application/jsonl", ".lock": "text/plain", ".rst": "text/x-rst", ".smk": "text/plain", ".yaml": "text/yaml"}
FORMATS.types_map[True].update(TEXTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl crate`."""
    parser.add_argument("results", type=Path, help="folder of results that has manifests")


def run(arguments: argparse.Namespace) -> None:
    """Copy the workflow to <results>/source, and write <results>/ro-crate-metadata.json."""
    project, results = project_of(arguments.results)
    with chdir(project):
        jobs = read_jobs(results)
        for needed in (Path(SNAKEFILE), Path(WORKFLOW), CITATION):
            if not needed.exists():
                raise RoutevlError(f"{needed}: no such file or folder; a crate is made in the folder that the workflow runs in")
        with atomic_folder(results / SOURCE, SNAKEFILE) as copy:
            shutil.copy(SNAKEFILE, copy)
            shutil.copytree(WORKFLOW, copy / WORKFLOW, ignore=shutil.ignore_patterns("__pycache__"))
            metadata = Crate(results, jobs, {**describe(copy), "path": str(results / SOURCE)}).metadata()
        write_json(results / METADATA, metadata)


@dataclass
class Job:
    """One execution of a job of the workflow, all executions of which share its `name`, of rule and wildcards."""

    name: str
    manifest: Manifest
    current: bool  # the outputs on disk are this execution's; else it has failed, or has been superseded

    @property
    def identifier(self) -> str:
        return quote(f"{self.name}/{self.manifest['started']}", safe="/:+")

    @property
    def error(self) -> str | None:
        status = self.manifest["exit_status"]
        return f"{self.name}: exit status {status}" if status else None


def read_jobs(results: Path) -> list[Job]:
    """All executions that have manifests, by the time at which they started. Raises RoutevlError where there are none."""
    jobs = [Job(f"{path.parent.name}/{path.stem}", read_manifest(path), True) for path in manifest_paths(results)]
    for path in (results / "manifests" / PAST).glob("*/*.json"):
        stem, _, _ = path.stem.rpartition(".")  # <name>.<when it started>.json
        jobs.append(Job(f"{path.parent.name}/{stem}", read_manifest(path), False))
    if not jobs:
        raise RoutevlError(f"{results}/manifests: no manifests")
    return sorted(jobs, key=lambda job: (job.manifest["started"], job.name))


class Crate:
    """The description of a folder of results, from the manifests of its jobs and its copy of the workflow, `source`."""

    def __init__(self, results: Path, jobs: list[Job], source: Entry) -> None:
        self.crate = ROCrate(version="1.1")
        self.crate.metadata.extra_terms["sha256"] = SHA256_TERM
        self.results = Path(os.path.abspath(results))
        self.jobs = jobs
        self.citation = yaml.safe_load(CITATION.read_text(encoding="utf-8"))
        self.outputs = [entry for job in jobs if job.current for entry in job.manifest["outputs"]]
        self.present = {(entry["path"], entry["sha256"]) for entry in [source, *self.outputs]}
        self.workflow = self._workflow(source["files"][SNAKEFILE])
        self.source = self._data(source)

    def metadata(self) -> dict[str, Any]:
        """The metadata file's content."""
        tools = [self._tool(job.manifest) for job in self.jobs]
        steps = self._steps(tools)
        actions = [self._action(job, tool) for job, tool in zip(self.jobs, tools, strict=True)]
        controls = [self._control(job, action, steps) for job, action in zip(self.jobs, actions, strict=True)]
        run = self._workflow_run()
        self._organisation(run, controls)
        _set(self.workflow, step=list(steps.values()), hasPart=_unique(tools))
        parts = [self.source, *map(self._data, self.outputs)]
        _set(
            self.crate.root_dataset,
            name=f"Results of {self.citation['title']}",
            description="What the workflow has made, with every job that made it: its command, code, inputs and outputs.",
            datePublished=max(job.manifest["ended"] for job in self.jobs),
            license=self._license(),
            citation=self._paper(),
            conformsTo=[self._add(profile, "CreativeWork", name=name, version=profile.rpartition("/")[2])
                        for profile, name in PROFILES.items()],
            hasPart=_unique(part for part in parts if not part.id.startswith("#")),
            mentions=[run, *actions],
        )  # fmt: skip
        return self.crate.metadata.generate()

    # ------------------------------------------------------------------------------------ the workflow and its tools

    def _workflow(self, snakefile: dict[str, Any]) -> ContextEntity:
        properties = {
            "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"],
            "name": self.citation["title"],
            "description": self.citation["abstract"],
            "version": self.citation["version"],
            "conformsTo": {"@id": "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"},
            "encodingFormat": "text/plain",
            "contentSize": str(snakefile["bytes"]),
            "sha256": snakefile["sha256"],
        }
        workflow = self.crate.add_workflow(dest_path=f"{SOURCE}/{SNAKEFILE}", main=True, lang="snakemake", properties=properties)
        _set(workflow, license=self._license(), author=self._authors(self.citation["authors"]))
        return workflow

    def _steps(self, tools: list[ContextEntity]) -> dict[str, ContextEntity]:
        """One step per rule, in the order in which the first job of each started."""
        used: dict[str, list[ContextEntity]] = {}
        for job, tool in zip(self.jobs, tools, strict=True):
            used.setdefault(job.manifest["rule"], []).append(tool)
        steps = {}
        for position, (rule, tools_of_rule) in enumerate(used.items(), start=1):
            known = {"name": rule, "position": str(position), "workExample": _unique(tools_of_rule)}
            steps[rule] = self._add(f"#rule/{quote(rule)}", "HowToStep", **known)
        return steps

    def _tool(self, manifest: Manifest) -> ContextEntity:
        """The stage of the command line that a job ran, in one state of its code and environment."""
        program, stage = Path(manifest["command"][0]).name, self._public(manifest["command"][1])
        code, environment = manifest["code"], manifest["environment"]
        commit = f"+git.{code['commit']}{'.changed' if code['dirty'] else ''}" if code["commit"] else ""
        return self._add(
            f"#{quote(f'{program}-{stage}', safe='')}-{digest_of([code, environment])[:16]}",
            "SoftwareApplication",
            name=f"{program} {stage}",
            description=STAGES[stage][2] if stage in STAGES else None,
            softwareVersion=code["version"] + commit,
            hasPart=[self._source(PACKAGE / name, f"src/routevl/{name}", sha256) for name, sha256 in code["files"].items()],
            softwareRequirements=self._environment(environment),
        )

    def _environment(self, environment: dict[str, Any]) -> ContextEntity:
        lock = [self._source(LOCK, str(LOCK), environment["lock"])] if environment["lock"] else []
        return self._add(
            f"#environment-{digest_of(environment)[:16]}",
            "SoftwareApplication",
            name="Python environment",
            softwareVersion=environment["python"],
            url="https://www.python.org/",
            softwareRequirements=[*lock, *(f"{package} {version}" for package, version in environment["packages"].items())],
        )

    def _source(self, path: Path, name: str, sha256: str) -> ContextEntity:
        """A file of the project as a job used it; its size is known where it has not changed since."""
        unchanged = path.exists() and sha256_of(path) == sha256
        return self._file(f"#{sha256[:16]}/{quote(name)}", name, sha256, path.stat().st_size if unchanged else None)

    # ------------------------------------------------------------------------------------ what was done

    def _action(self, job: Job, tool: ContextEntity) -> ContextEntity:
        manifest = job.manifest
        return self._add(
            f"#job/{job.identifier}",
            "CreateAction",
            name=job.name,
            description=shlex.join(map(self._public, manifest["command"])),
            instrument=tool,
            object=_unique(map(self._data, manifest["inputs"])),
            result=_unique(map(self._data, manifest["outputs"])),
            startTime=manifest["started"],
            endTime=manifest["ended"],
            actionStatus=FAILED if job.error else COMPLETED,
            error=job.error,
        )

    def _workflow_run(self) -> ContextEntity:
        """All jobs as one execution of the workflow, from what was given to what is on disk."""
        current = [job for job in self.jobs if job.current]
        done = {job.name for job in current}
        errors = {job.name: job.error for job in self.jobs if job.error and job.name not in done}
        made = {entry["path"] for job in self.jobs for entry in job.manifest["outputs"]}
        given = [entry for job in current for entry in job.manifest["inputs"] if entry["path"] not in made]
        return self._add(
            "#workflow-run",
            "CreateAction",
            name="Run of the workflow",
            description=f"{len(self.jobs)} jobs",
            instrument=self.workflow,
            object=_unique(map(self._data, given)),
            result=_unique(map(self._data, self.outputs)),
            startTime=self.jobs[0].manifest["started"],
            endTime=max(job.manifest["ended"] for job in self.jobs),
            actionStatus=FAILED if errors else COMPLETED,
            error="; ".join(errors.values()) or None,
        )

    def _control(self, job: Job, action: ContextEntity, steps: dict[str, ContextEntity]) -> ContextEntity:
        """That a job was an execution of its rule: rules share tools."""
        known = {"name": f"control of {job.name}", "instrument": steps[job.manifest["rule"]], "object": action}
        return self._add(f"#control/{job.identifier}", "ControlAction", **known)

    def _organisation(self, run: ContextEntity, controls: list[ContextEntity]) -> None:
        versions = {job.manifest["environment"]["packages"].get("snakemake") for job in self.jobs}
        engine = self._add(
            "#snakemake",
            "SoftwareApplication",
            name="Snakemake",
            softwareVersion=sorted(filter(None, versions)),
            url="https://snakemake.readthedocs.io",
        )
        self._add("#snakemake-run", "OrganizeAction", name="Run of Snakemake", instrument=engine, object=controls, result=run)

    # ------------------------------------------------------------------------------------ files

    def _data(self, entry: Entry) -> ContextEntity:
        """A file or folder that a job read or wrote."""
        name, place = self._public_path(entry["path"]), Path(os.path.abspath(entry["path"]))
        if (entry["path"], entry["sha256"]) in self.present and self.results in place.parents:
            identifier = quote(place.relative_to(self.results).as_posix())
        else:
            identifier = f"#{entry['sha256'][:16]}/{quote(name)}"
        if "files" not in entry:
            return self._file(identifier, name, entry["sha256"], entry["bytes"])
        files = entry["files"] if len(entry["files"]) <= FILES_LISTED else {}
        return self._add(
            f"{identifier}/",
            "Dataset",
            name=f"{name}/",
            description=f"{len(entry['files'])} files; the identifier is the sha256 of their list, as the manifests have it",
            identifier=f"sha256:{entry['sha256']}",
            contentSize=str(entry["bytes"]),
            hasPart=[self._file(f"{identifier}/{quote(file)}", f"{name}/{file}", about["sha256"], about["bytes"])
                     for file, about in files.items()],
        )  # fmt: skip

    def _file(self, identifier: str, name: str, sha256: str, size: int | None) -> ContextEntity:
        kind, compression = FORMATS.guess_type(name)
        return self._add(
            identifier,
            "File",
            name=name,
            encodingFormat=f"application/{compression}" if compression else kind or "application/octet-stream",
            contentSize=None if size is None else str(size),
            sha256=sha256,
        )

    # ------------------------------------------------------------------------------------ licence and paper

    def _license(self) -> ContextEntity:
        name = self.citation["license"]
        return self._add(f"https://spdx.org/licenses/{name}", "CreativeWork", name=name)

    def _paper(self) -> ContextEntity:
        paper = self.citation["preferred-citation"]
        return self._add(
            f"https://doi.org/{paper['doi']}",
            "ScholarlyArticle",
            name=paper["title"],
            author=self._authors(paper["authors"]),
            datePublished=str(paper["year"]),
            url=paper["url"],
        )

    def _authors(self, authors: list[dict[str, str]]) -> list[ContextEntity]:
        """Persons, or the groups that CITATION.cff knows by one name."""
        entities = []
        for author in authors:
            kind = "Organization" if "name" in author else "Person"
            name = author.get("name") or f"{author['given-names']} {author['family-names']}"
            entities.append(self._add(author.get("orcid", f"#{quote(name)}"), kind, name=name))
        return entities

    # ------------------------------------------------------------------------------------ entities and names

    def _add(self, identifier: str, kind: str, /, **properties: Any) -> ContextEntity:
        """The entity of that identifier; it is added where the crate has none."""
        known = self.crate.get(identifier)
        if known is not None:
            return known
        entity = self.crate.add(ContextEntity(self.crate, identifier, {"@type": kind}))
        _set(entity, **properties)
        return entity

    def _public(self, word: str) -> str:
        """A word of a command, with paths outside the project named by their last part."""
        return OUTSIDE.sub(lambda match: self._public_path(match[0]), word)

    def _public_path(self, path: str) -> str:
        path = path.removeprefix("file://")
        place = Path(os.path.abspath(path))
        if not path.startswith("~"):
            if place.is_relative_to(Path.cwd()):
                return place.relative_to(Path.cwd()).as_posix()
            if place.is_relative_to(self.results):
                return place.relative_to(self.results.parent).as_posix()
        return Path(path).name


def _unique(entities: Iterable[ContextEntity]) -> list[ContextEntity]:
    return list({entity.id: entity for entity in entities}.values())


def _set(entity: ContextEntity, **properties: Any) -> None:
    """Set the properties that are known; a list of one is written as its element, which RO-Crate 1.1 asks for."""
    for name, value in properties.items():
        if value is not None and value != []:
            entity[name] = value[0] if isinstance(value, list) and len(value) == 1 else value
