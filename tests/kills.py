"""The kill matrix: every stage of a tiny DAG is killed at random moments, and must end as if nothing had happened.

    make test-kills N=1000 SEED=1        so many kills
    make test-kills ONLY=37 SEED=1       series 37 of that seed alone, in the same folder of results

The real workflow makes all results once, undisturbed. Its manifests say what each job ran. A *series* is one of these jobs,
alone, in a copy of all results from which its outputs are taken away: it is started and killed again and again, at moments drawn
uniformly over its undisturbed length, and then let end. Its processes are forked from one that has imported everything. After
each kill an output is whole or not there, and nothing says "Traceback". In the end

* every output is sha256-equal to the undisturbed one (timing.json, which holds measurements, excepted);
* nothing else is there, and no other file was touched (inode and time of change);
* nothing was done twice: with stop signals a run makes each of its optimiser steps once, with SIGKILL and a full disk it
  repeats at most `checkpoint_every` of them for each kill; a model that is there is left alone;
* a resumed training has made its first step within 5 s of its start: of the call of the command line, all modules imported;
  counted are seconds of the processor, since other processes may have it, and shown those of the clock too.

Beside the signals: a full disk (a tmpfs with less space than the job needs, or where none can be mounted a limit on the size of
files), a torn checkpoint, the whole workflow killed with its Snakemake, and a job that SLURM preempts, where a SLURM is running.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from kills_of_workflows import MEASUREMENTS, kill_slurm_jobs, kill_snakemake, slurm_is_running  # noqa: E402
from tiny_project import BIN, environment, make_project, row  # noqa: E402

EXPERIMENTS = [
    row("mul", "vqa", "routing=mul", feeds="T1,F2"),
    row("chosen", "vqa", "share=0.1 batches=2", method="gradient_norm", text_backbone="pruned", feeds="T7"),
    row("attn", "caption", "routing=attn", method="adapter", visual_tokens="patches", feeds="T2"),
]
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")
KINDS = (*SIGNALS, "full disk", "torn checkpoint", "Snakemake", "SLURM")
# negative: the signal came before its handler was there; 138: so it was with the command that was recorded
STATUS = {"SIGKILL": {-9}, "SIGTERM": {143, -15}, "SIGUSR1": {143, 138, -10}, "SIGINT": {130, -2}}
KEPT = ("results/manifests/.past", "results/manifests/.hashes")  # the recorder's: of jobs that failed, of what it has read
KILLS = 4  # of a series
RESUME_SECONDS = 5.0
PER_WORKFLOW_KILL = 100  # kills of single jobs


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


@dataclass
class Outcome:
    """What a series has done and found."""

    number: int
    stage: str
    kills: Counter = field(default_factory=Counter)
    checks: Counter = field(default_factory=Counter)
    resumed: list[tuple[float, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, name: str, fine: bool, words: Callable[[], object] = str) -> None:
        self.checks[name] += 1
        if not fine:
            self.wrong.append(f"{name}: {words()}")


# --------------------------------------------------------------------------------------- the undisturbed results


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
            stage += f" {'caption' if 'caption' in command else 'vqa'}"
        checkpoint = command[command.index("--checkpoint") + 1] if "--checkpoint" in command else ""
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


# --------------------------------------------------------------------------------------------------- one process


def import_everything() -> None:
    """What every stage imports, so that a forked process does its own work alone."""
    from routevl.cli import STAGES

    for name, _, _ in STAGES.values():
        importlib.import_module(name)
    for name in ("matplotlib.pyplot", "rocrate.rocrate", "timm", "peft", "pycocoevalcap.cider.cider", "routevl.tasks.vqa"):
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


# ---------------------------------------------------------------------------------------------------- one series


class Series:
    """A job in a copy of all results without its own, killed several times and let end."""

    lengths: dict[str, float] = {}  # of the undisturbed jobs, in seconds, as measured in this process

    def __init__(self, number: int, job: Job, kind: str, seed: int, reference: Path, folder: Path) -> None:
        self.job, self.kind, self.reference, self.folder = job, kind, reference, folder
        self.random = random.Random(f"{seed} {number}")
        self.outcome = Outcome(number, job.stage)
        self.project, self.notes = folder / "project", folder
        self.expected = digests_of(reference, job.outputs)
        self.killed = 0  # without a word, so that its steps since the last checkpoint are lost

    def run(self) -> Outcome:
        self.folder.mkdir(parents=True)
        try:
            with self.place():
                self.copy()
                if self.job.stage not in self.lengths:
                    self.finish()
                    self.remove_outputs()
                    begun = time.monotonic()  # a second time: the first one reads everything from the disk
                    end_of(start(self.job, self.project, self.notes))
                    self.lengths[self.job.stage] = time.monotonic() - begun
                    self.remove_outputs()
                {"full disk": self.fill_the_disk, "torn checkpoint": self.tear_the_checkpoint}.get(self.kind, self.kill)()
                self.finish()
        except Exception as error:
            self.outcome.wrong.append(f"the series fails: {type(error).__name__}: {error}")
        if self.outcome.wrong and (self.notes / "log").exists():
            self.outcome.wrong.append("the last process said: " + (self.notes / "log").read_text()[-1500:])
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.outcome

    @contextmanager
    def place(self) -> Iterator[None]:
        """For a full disk a file system of its own, where one can be mounted."""
        self.mounted = False
        self.project.mkdir()
        if self.kind == "full disk":
            mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "routevl-kills", str(self.project)]
            self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        try:
            yield
        finally:
            if self.mounted:
                subprocess.run(["umount", "--lazy", str(self.project)], check=True)

    def copy(self) -> None:
        copy = shutil.copy2 if self.mounted else os.link
        shutil.copytree(self.reference, self.project, copy_function=copy, symlinks=True, dirs_exist_ok=True)
        self.remove_outputs()
        self.before = stamps_of(self.project, self.job.outputs)

    def remove_outputs(self) -> None:
        for output in self.job.outputs:
            path = self.project / output
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (self.notes / "steps").write_bytes(b"")
        self.killed = 0

    # -- what is done to it

    def kill(self) -> None:
        number = getattr(signal, self.kind)
        for _ in range(KILLS):
            moment = self.random.random() * self.lengths[self.job.stage]
            whole_group, again = self.random.random() < 0.5, self.random.random() < 0.5
            step, models = self.step_of_checkpoint(), self.whole_outputs()
            process = start(self.job, self.project, self.notes)
            deadline = time.monotonic() + moment
            while process.exitcode is None and time.monotonic() < deadline:
                time.sleep(0.001)
            if process.exitcode is not None:  # too late: once more
                self.see("status", process.exitcode == 0, lambda status=process.exitcode: f"{status} before a kill")
                self.remove_outputs()
                continue
            tell(process.pid, number, whole_group or self.kind == "SIGKILL")
            if again and self.kind == "SIGINT":  # as `routevl record` does
                os.kill(process.pid, number)
            status = end_of(process)
            self.count()
            self.killed += self.kind == "SIGKILL"
            self.look_at(status, {0, *STATUS[self.kind]}, step, models)
            if status == 0:
                self.remove_outputs()

    def fill_the_disk(self) -> None:
        """Less space than the outputs need, or where no file system could be mounted files smaller than the largest output."""
        sizes = [(self.reference / name).stat().st_size for name in self.expected]
        for _ in range(KILLS):
            share, step, models = self.random.random(), self.step_of_checkpoint(), self.whole_outputs()
            if self.mounted:
                self.leave_space(int(share * sum(sizes)))
            process = start(self.job, self.project, self.notes, None if self.mounted else int(share * max(sizes)))
            status = end_of(process)
            if self.mounted:
                self.leave_space(None)
            if status == 0:  # it had space enough
                self.remove_outputs()
                continue
            self.count()
            self.killed += 1
            self.look_at(status, {2}, step, models)
            reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG)]
            lines = self.log().splitlines()
            last = lines[-1] if lines else ""
            named = last.startswith("routevl: error: ") and any(reason in last for reason in reasons)
            self.see("one line", named, lambda last=last: f"a full disk is told so: {last!r}")

    def leave_space(self, free: int | None) -> None:
        used = shutil.disk_usage(self.project).used
        size = 2**30 if free is None else (used + free) // 4096 * 4096  # whole pages
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.project)], check=True)

    def tear_the_checkpoint(self) -> None:
        path = self.project / self.job.checkpoint / "checkpoint.safetensors"
        for _ in range(KILLS):
            process = start(self.job, self.project, self.notes)
            time.sleep(self.random.random() * self.lengths[self.job.stage])
            if process.exitcode is None:
                tell(process.pid, signal.SIGKILL, group=True)
            if end_of(process) == 0:
                self.remove_outputs()
                continue
            self.killed = 10**6  # steps are made again
            if not path.exists():
                continue
            data = path.read_bytes()
            cut = self.random.randrange(len(data))
            path.write_bytes(self.random.choice([data[:cut], data[:cut] + bytes(len(data) - cut), bytes(len(data))]))
            if path.read_bytes() == data:
                continue
            self.count()
            status, log = end_of(start(self.job, self.project, self.notes)), self.log()
            self.see("status", status == 2, lambda status=status: f"{status} with a torn checkpoint")
            self.see("one line", "a damaged checkpoint" in log.splitlines()[-1], lambda log=log: log)
            path.unlink()

    # -- what is looked at

    def see(self, name: str, fine: bool, words: Callable[[], object]) -> None:
        self.outcome.check(name, fine, lambda: f"kill {sum(self.outcome.kills.values())} by {self.kind}: {words()}")

    def count(self) -> None:
        self.outcome.kills[self.kind] += 1

    def log(self) -> str:
        return (self.notes / "log").read_text(errors="replace")

    def look_at(self, status: int, expected: set[int], step: int, before: dict[str, Any]) -> None:
        """After a kill: how it ended, that its outputs are whole or absent, and that nothing was lost that was there."""
        self.see("status", status in expected, lambda: f"{status}, expected one of {sorted(expected)}: {self.log()[-500:]}")
        # a recorded command is a new interpreter, which may be told to stop before it is a stage
        ours = "Traceback" in self.log() and (self.job.stage != "record" or "in main" in self.log())
        self.see("no traceback", not ours, lambda: self.log()[-1500:])
        here = digests_of(self.project, self.job.outputs)
        other = sorted(name for name in here if here[name] != self.expected.get(name))
        self.see("whole or absent", not other, lambda: f"{other} after a kill")
        for output in self.job.outputs:
            names = [name for name in self.expected if name == output or name.startswith(f"{output}/")]
            there = [name for name in names if name in here]
            self.see("whole or absent", len(there) in (0, len(names)), lambda there=there: f"only {there} are there")
        if self.job.training:
            now = self.step_of_checkpoint()
            finished = bool(self.whole_outputs())
            self.see("nothing lost", finished or now >= step, lambda: f"the checkpoint was at step {step}, and is at {now}")
            kept = {name: stamp for name, stamp in self.whole_outputs().items() if name in before}
            self.see("done once", kept == before, lambda: f"finished outputs were made again: {before} then, {kept} now")
            self.note_resumption()
            if status in (130, 143):
                self.see("nothing lost", finished or now == self.steps() or self.killed, lambda: f"{now}, not {self.steps()}")

    def note_resumption(self) -> None:
        if "resuming from step" in self.log() and (self.notes / "first").exists():
            processor, clock = map(float, (self.notes / "first").read_text().split())
            self.outcome.resumed.append((processor, clock))
            self.see("resumed in time", processor <= RESUME_SECONDS, lambda: f"the first step after {processor:.1f} s")

    def step_of_checkpoint(self) -> int:
        from routevl.training.checkpoint import load_checkpoint

        path = self.project / self.job.checkpoint / "checkpoint.safetensors"
        return load_checkpoint(path)[1]["step"] if self.job.training and path.exists() else 0

    def steps(self) -> int:
        """How many optimiser steps all processes of the series have made together."""
        return (self.notes / "steps").stat().st_size

    def whole_outputs(self) -> dict[str, int]:
        """The inodes of a training's outputs that are there."""
        here = [output for output in self.job.outputs if self.job.training and (self.project / output).exists()]
        return {output: (self.project / output).stat().st_ino for output in here}

    def finish(self) -> None:
        """Let it end, and look at everything."""
        before = self.whole_outputs()
        status = end_of(start(self.job, self.project, self.notes))
        self.see("status", status == 0, lambda: f"{status} when let end: {self.log()[-1500:]}")
        here = digests_of(self.project, self.job.outputs)
        other = sorted(name for name in here.keys() | self.expected.keys() if here.get(name) != self.expected.get(name))
        self.see("sha256-equal", not other, lambda: f"{other} differ from the undisturbed ones")
        now = stamps_of(self.project, self.job.outputs)
        left = sorted(now.keys() - self.before.keys())
        folders = {p for p in self.project.rglob("*.tmp")} | {p for p in (self.project / "results").glob("checkpoints/*")}
        self.see("nothing left", not left and not folders, lambda: f"{left} {folders} are left")
        touched = sorted(name for name in self.before if now.get(name) != self.before[name])
        self.see("done once", not touched, lambda: f"{touched} were touched")
        if self.job.training:
            self.note_resumption()
            kept = {name: stamp for name, stamp in self.whole_outputs().items() if name in before}
            self.see("done once", kept == before, lambda: f"finished outputs were made again: {before} then, {kept} now")
            [model] = [Path(output) for output in self.job.outputs if "/models/" in output]
            total = json.loads((self.project / model / "timing.json").read_text())["steps"]
            every = int(self.job.command[self.job.command.index("--checkpoint-every") + 1])
            most = total + self.killed * every
            self.see("done once", total <= self.steps() <= most, lambda: f"{self.steps()} steps of {total}, at most {most}")


def run_series(*arguments: Any) -> Outcome:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of what is forked from here: until it has begun it is no stage
    return Series(*arguments).run()


# ------------------------------------------------------------------------------------------------------ the matrix


def cells(jobs: list[Job]) -> list[tuple[Job, str]]:
    """(job, kind of death), the stages and the kinds in turn; only a training has a checkpoint to tear."""
    kinds = [kind for kind in KINDS if kind not in ("Snakemake", "SLURM")]
    found = [(job, kinds[(place + turn) % len(kinds)]) for turn in range(len(kinds)) for place, job in enumerate(jobs)]
    return [(job, kind) for job, kind in found if job.training or kind != "torn checkpoint"]


def kill_single_jobs(count: int, seed: int, only: int | None, reference: Path, folder: Path, cores: int) -> list[Outcome]:
    """So many kills of single jobs, side by side on the cores."""
    jobs = jobs_of(reference)
    table = cells(jobs)
    outcomes: list[Outcome] = []
    numbers = iter(range(10**9) if only is None else [only])
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork")) as pool:
        running: set[Any] = set()
        while True:
            while len(running) < cores and sum(sum(outcome.kills.values()) for outcome in outcomes) < count:
                if (number := next(numbers, None)) is None:
                    break
                job, kind = table[number % len(table)]
                running.add(pool.submit(run_series, number, job, kind, seed, reference, folder / f"series-{number}"))
            if not running:
                return outcomes
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                outcomes.append(outcome := future.result())
                for words in outcome.wrong:
                    print(f"WRONG: seed {seed} number {outcome.number} ({outcome.stage}): {words}", flush=True)


def kill_workflow(name: str, work: Callable[..., None], count: int, seed: int, reference: Path, folder: Path) -> Outcome:
    """One of the parts that kill more than one job."""
    outcome = Outcome(-1, name)
    try:
        work(outcome, count, seed, reference, folder / name)
    except Exception as error:
        outcome.wrong.append(f"it fails: {type(error).__name__}: {error}")
    for words in outcome.wrong:
        print(f"WRONG: seed {seed} ({name}): {words}", flush=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    return outcome


def report(outcomes: list[Outcome], seconds: float) -> bool:
    """Print the table of kills, the checks and the times; whether everything was right."""
    kinds = [kind for kind in KINDS if any(outcome.kills[kind] for outcome in outcomes)]
    stages = sorted({outcome.stage for outcome in outcomes})
    wide = max(map(len, stages))
    print(f"\n{'stage':{wide}} " + " ".join(f"{kind:>{max(len(kind), 5)}}" for kind in [*kinds, "all"]))
    for stage in [*stages, "all"]:
        found = sum((outcome.kills for outcome in outcomes if stage in (outcome.stage, "all")), Counter())
        values = [*(found[kind] for kind in kinds), found.total()]
        print(f"{stage:{wide}} " + " ".join(f"{n:>{max(len(kind), 5)}}" for kind, n in zip([*kinds, "all"], values, strict=True)))
    print(f"\n{len(outcomes)} series, {seconds:.0f} s. Checks, each so often:")
    for name, count in sorted(sum((outcome.checks for outcome in outcomes), Counter()).items()):
        wrong = sum(words.startswith(f"{name}: ") for outcome in outcomes for words in outcome.wrong)
        print(f"  {name}: {count}, {wrong} of them wrong")
    if resumed := [seconds for outcome in outcomes for seconds in outcome.resumed]:
        print(f"{len(resumed)} resumed trainings made their first step after")
        for name, seconds in zip(("of the processor", "by the clock"), map(sorted, zip(*resumed, strict=True)), strict=True):
            print(f"  {seconds[len(seconds) // 2]:.2f} s (median), {seconds[-1]:.2f} s (longest) {name}")
    return not any(outcome.wrong for outcome in outcomes)


def main() -> int:
    """Returns 1 where anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=1000, help="how many kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="do this series alone")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where it works; kept, and what is there is used again")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="routevl-kills-") as temporary:
        folder = arguments.folder or Path(temporary)
        reference = folder / "reference"
        if not reference.exists():
            make_reference(folder / "making")
            (folder / "making").rename(reference)
        print(f"the undisturbed workflow: {time.monotonic() - begun:.0f} s", flush=True)
        import_everything()
        outcomes = kill_single_jobs(arguments.count, arguments.seed, arguments.only, reference, folder / "work", arguments.cores)
        if arguments.only is None and (kills := arguments.count // PER_WORKFLOW_KILL):
            where = (kills, arguments.seed, reference, folder / "work")
            outcomes.append(kill_workflow("the workflow", kill_snakemake, *where))
            if slurm_is_running():
                outcomes.append(kill_workflow("a job of SLURM", kill_slurm_jobs, *where))
            else:
                print("no SLURM is running: no job was preempted")
        fine = report(outcomes, time.monotonic() - begun)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
