"""The jobs of the kill matrix: the undisturbed results, what each job ran, and a job in a process that can be killed."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill_workflows import MEASUREMENTS
from tiny_project import BIN, environment, make_project, row

EXPERIMENTS = [
    row("mul", "vqa", "routing=mul learning_rate=tuned", feeds="T1,F2,F7"),
    row("chosen", "vqa", "share=0.1 batches=2", method="gradient_norm", text_backbone="pruned", feeds="T7"),
    row("attn", "caption", "routing=attn", method="adapter", visual_tokens="patches", feeds="T2"),
    row("none", "multitask", visual_tokens="grid", feeds="T3"),
    row("several", "multitask", "routing=add", versus="none", visual_tokens="grid", feeds="T3,F10"),
]
KEPT = ("results/manifests/.past", "results/manifests/.hashes")  # the recorder's: of jobs that failed, of what it has read


@dataclass(frozen=True)
class Job:
    """A job of the workflow: its stage's name, the command, the paths that it writes, those of them that the manifest knows."""

    stage: str
    command: list[str]
    outputs: list[str]
    checkpoint: str = ""

    @property
    def training(self) -> bool:
        return bool(self.checkpoint)


def make_reference(folder: Path) -> None:
    """The project with all its results, as the workflow makes them."""
    folder.mkdir(parents=True)
    make_project(folder, EXPERIMENTS)
    command = [sys.executable, "workflow/run.py", "results", "--cores", "2"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the undisturbed workflow fails:\n{done.stdout}{done.stderr}")
    shutil.rmtree(folder / ".snakemake")
    for name in ("logs", "benchmarks", "checkpoints"):
        shutil.rmtree(folder / "results" / name, ignore_errors=True)
    for stage in (predict_job(folder), crate_job()):
        subprocess.run([BIN / "routevl", *stage.command], cwd=folder, check=True, capture_output=True)


def jobs_of(project: Path) -> list[Job]:
    """The workflow's jobs by their manifests, beside a prediction, a crate, and a recorded job."""
    found = []
    for path in sorted((project / "results/manifests").glob("[a-z]*/*.json")):
        manifest = json.loads(path.read_text())
        stage, command = manifest["rule"], manifest["command"][1:]
        outputs = [output["path"] for output in manifest["outputs"]]
        if stage in ("train", "probe", "score"):
            stage += f" {command[command.index('--task') + 1]}"
        checkpoint = command[command.index("--checkpoint") + 1] if stage.startswith("train") else ""
        job = Job(stage, command, outputs, checkpoint)
        if stage == "index_features":
            relative = str(path.relative_to(project))
            words = ["record", "--manifest", relative, "--inputs", manifest["inputs"][0]["path"], "--outputs", *outputs, "--"]
            found.append(Job("record", [*words, "routevl", *command], [*outputs, relative]))
        found.append(job)
    # one of each stage
    return list({job.stage: job for job in [*found, predict_job(project), crate_job()]}.values())


def predict_job(project: Path) -> Job:
    [path] = (project / "results/manifests/train").glob("mul_*.json")
    command = json.loads(path.read_text())["command"]
    names = ("--data", "--features", "--text-backbone", "--vision-backbone", "--model")
    options = [word for name in names for word in (name, command[command.index(name) + 1])]
    return Job("predict", ["predict", *options, "--predictions", "results/again"], ["results/again"])


def crate_job() -> Job:
    outputs = ["results/ro-crate-metadata.json", "results/source", "results/ro-crate-preview.html"]
    return Job("crate", ["crate", "results"], outputs)


def files_of(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def digests_of(folder: Path, outputs: list[str]) -> dict[str, str]:
    """The sha256 of each file of the outputs, by its path; of manifests and measurements only that they are there."""
    found = {}
    for output in outputs:
        path = folder / output
        paths = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] if path.exists() else []
        for file in (file for file in paths if file.name != ".snakemake_timestamp"):
            measured = file.name in MEASUREMENTS or "manifests" in file.parts
            found[str(file.relative_to(folder))] = "" if measured else hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def stamps_of(folder: Path, but: list[str]) -> dict[str, tuple[int, int]]:
    """Inode and time of change of all files but those below some paths."""
    return {
        name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for name, path in files_of(folder).items()
        if not any(name == other or name.startswith(f"{other}/") for other in (*but, *KEPT))
    }


def import_everything() -> None:
    """What every stage imports, so that a forked process does its own work alone."""
    from routevl.cli import STAGES

    for name, _, _ in STAGES.values():
        importlib.import_module(name)
    tasks = ("routevl.tasks.vqa", "routevl.tasks.captioning", "routevl.tasks.clip_bart.task")
    for name in ("matplotlib.pyplot", "rocrate.rocrate", "timm", "peft", "pycocoevalcap.cider.cider", *tasks):
        importlib.import_module(name)


def start(job: Job, project: Path, notes: Path, limit: int | None = None) -> multiprocessing.Process:
    """Start a job in a process forked from this one, in a process group of its own.

    What it says goes to `notes`/log, a byte for each optimiser step to `notes`/steps, how long its first one took to
    `notes`/first.

    Args:
        limit: the most bytes that a file may have.
    """

    def main() -> None:
        os.setpgid(0, 0)
        begun = time.monotonic()
        log = os.open(notes / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(project)
        os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        sys.argv = ["routevl", *job.command]
        count_steps(notes, begun)
        from routevl import cli

        cli.main()

    (notes / "log").touch()
    (notes / "first").unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def count_steps(notes: Path, begun: float) -> None:
    from routevl.training.trainer import Trainer

    step, first = Trainer._train_step, []
    steps = os.open(notes / "steps", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def counted(trainer: Trainer, *arguments: Any) -> None:
        step(trainer, *arguments)
        os.write(steps, b".")
        if not first:
            first.append((notes / "first").write_text(f"{time.process_time()} {time.monotonic() - begun}"))

    Trainer._train_step = counted


def tell(process: int, number: int, group: bool) -> None:
    """Send a signal to a process, or to its whole group if it leads one already."""
    if group and os.getpgid(process) == process:
        os.killpg(process, number)
    else:
        os.kill(process, number)


def end_of(process: multiprocessing.Process, seconds: float = 240) -> int:
    """The exit status, or minus the signal; a process that does not end is killed, and said to have."""
    deadline = time.monotonic() + seconds
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.002)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return 1000
    return process.exitcode
