"""The kill matrix beyond single jobs: the whole workflow with its Snakemake, and jobs that SLURM preempts."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from tiny_project import BIN, environment

MEASUREMENTS = ("timing.json",)  # different every time
NOT_COMPARED = ("manifests", "logs", "benchmarks", "again", "source")  # times, or not made by the workflow's default target
NAMES_NOT_COMPARED = (
    *MEASUREMENTS,
    "provenance.html",
    "report.html",
    "ro-crate-metadata.json",
    "ro-crate-preview.html",
    ".snakemake_timestamp",
)
TIMES = ("T6_cost", "T7_methods")  # tables that show them
LAST_KILL = 20.0  # seconds after Snakemake has chosen its first jobs
ENDS = ("SIGKILL", "SIGINT", "SIGTERM")  # the first two to all its processes, as the OOM killer and Ctrl-C; the last to Snakemake
SECONDS = 600


def kill_snakemake(outcome: Any, count: int, seed: str, reference: Path, folder: Path) -> None:
    """The whole workflow, killed so many times before it ends, and started again; what is found goes to `outcome`."""
    rng = random.Random(f"{seed} snakemake")
    project = copy_without_results(reference, folder)
    for number in range(count):
        before = finished_jobs(project)
        chosen = times_jobs_were_chosen(project)
        process = start_workflow(project)
        group = psutil.Process(process.pid)
        wait_until(lambda p=process, n=chosen: p.poll() is not None or times_jobs_were_chosen(project) > n)
        time.sleep(rng.uniform(0, LAST_KILL))
        name = ENDS[number % len(ENDS)]
        if process.poll() is not None:
            outcome.check("status", process.returncode == 0, lambda: (project / "output.log").read_text()[-3000:])
            break
        outcome.kills["Snakemake"] += 1
        children = group.children(recursive=True)
        if name == "SIGTERM":
            [child.terminate() for child in children if "snakemake" in " ".join(child.cmdline()[:2])]
        else:
            os.killpg(process.pid, getattr(signal, name))
        process.wait(SECONDS)
        psutil.wait_procs(children, SECONDS)
        check_kept(outcome, before, finished_jobs(project), 2 if name == "SIGKILL" else 0, name)
    before = finished_jobs(project)
    process = start_workflow(project)
    status = process.wait(SECONDS)
    said = (project / "output.log").read_text()
    outcome.check("status", status == 0, lambda: said[-3000:])
    check_kept(outcome, before, finished_jobs(project), 2, "the last kill")
    check_results(outcome, project, reference)


def copy_without_results(reference: Path, folder: Path) -> Path:
    ignored = shutil.ignore_patterns("results", "output.log")
    return Path(shutil.copytree(reference, folder / "project", ignore=ignored))


def start_workflow(project: Path) -> subprocess.Popen:
    """What `make demo` runs, in a process group of its own."""
    command = [sys.executable, "workflow/run.py", "results", "--cores", "2"]
    with open(project / "output.log", "a") as log:
        return subprocess.Popen(
            command, cwd=project, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def times_jobs_were_chosen(project: Path) -> int:
    """How often Snakemake has said so; a new one's first time is when it begins."""
    log = project / "results/logs/snakemake.log"
    return log.read_text().count("Select jobs to execute") if log.exists() else 0


def finished_jobs(project: Path) -> dict[str, tuple[int, ...]]:
    """Each job that has a manifest, and the times of change of its outputs."""
    found = {}
    for path in (project / "results/manifests").glob("[a-z]*/*.json"):
        outputs = [project / output["path"] for output in json.loads(path.read_text())["outputs"]]
        if all(output.exists() for output in outputs):
            found[f"{path.parent.name} {path.stem}"] = tuple(output.stat().st_mtime_ns for output in outputs)
    return found


def check_kept(outcome: Any, before: dict[str, Any], after: dict[str, Any], most: int, words: str) -> None:
    """Jobs that were done are not done again, but for those that Snakemake did not hear of before it died."""
    again = sorted(job for job, stamps in before.items() if after.get(job) != stamps)
    outcome.check("done once", len(again) <= most, lambda: f"after {words} done again: {again}")


def check_results(outcome: Any, project: Path, reference: Path) -> None:
    ours, theirs = compared_files(project / "results"), compared_files(reference / "results")
    other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    outcome.check("sha256-equal", not other, lambda: f"{other} differ from the undisturbed ones")
    left = [*(project / "results").rglob("*.tmp"), *(project / "results").glob("checkpoints/*")]
    outcome.check("nothing left", not left, lambda: f"{left} are left")


def compared_files(results: Path) -> dict[str, str]:
    return {
        str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in results.rglob("*")
        if path.is_file()
        and path.relative_to(results).parts[0] not in NOT_COMPARED
        and path.name not in NAMES_NOT_COMPARED
        and path.stem not in TIMES
    }


# ---------------------------------------------------------------------------------------------------------- SLURM


def slurm_is_running() -> bool:
    return bool(shutil.which("sinfo")) and "idle" in subprocess.run(["sinfo"], capture_output=True, text=True).stdout


def kill_slurm_jobs(outcome: Any, count: int, seed: str, reference: Path, folder: Path) -> None:
    """A training job, preempted so many times and submitted again.

    SLURM tells a job that it preempts to stop (SIGTERM to all its processes) and kills what is left; `scancel` does the same.
    """
    rng = random.Random(f"{seed} slurm")
    project = Path(shutil.copytree(reference, folder / "project"))
    [manifest] = [json.loads(path.read_text()) for path in (project / "results/manifests/train").glob("mul_*.json")]
    outputs = [project / output["path"] for output in manifest["outputs"]]
    for output in outputs:
        shutil.rmtree(output)
    checkpoint = project / manifest["command"][manifest["command"].index("--checkpoint") + 1] / "checkpoint.safetensors"
    for _ in range(count):
        job = submit(project, manifest["command"])
        told = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        wait_until(lambda job=job, told=told: checkpoint.exists() and checkpoint.stat().st_mtime_ns > told or state(job) == "")
        time.sleep(rng.uniform(0, 0.3))
        if not state(job):
            break
        outcome.kills["SLURM"] += 1
        subprocess.run(["scancel", job], check=True)
        wait_until(lambda job=job: state(job) == "")
        said = (project / "slurm.log").read_text()
        stopped = "told to stop" in said and "Traceback" not in said
        outcome.check("status", stopped or all(path.exists() for path in outputs), lambda said=said: said[-1500:])
    job = submit(project, manifest["command"])
    wait_until(lambda: state(job) == "")
    check_results(outcome, project, reference)


def submit(project: Path, command: list[str]) -> str:
    script = f"#!/bin/bash\nexec {BIN}/" + " ".join(command)
    options = ["--parsable", "--mem=2000", "--output=slurm.log", "--open-mode=truncate", "--no-requeue"]
    sbatch = subprocess.run(["sbatch", *options], input=script, cwd=project, capture_output=True, text=True, check=True)
    return sbatch.stdout.strip()


def state(job: str) -> str:
    """The state of a job in the queue; empty when it has left it."""
    return subprocess.run(["squeue", "--noheader", "--job", job, "--format=%T"], capture_output=True, text=True).stdout.strip()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
