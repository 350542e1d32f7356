"""One series of the kill matrix: a job that is killed again and again, let end, and looked at after each kill."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kill_jobs import Job, digests_of, end_of, stamps_of, start, tell

# negative: the signal came before its handler was there; 138: so it was with the command that was recorded
STATUS = {"SIGKILL": {-9}, "SIGTERM": {143, -15}, "SIGUSR1": {143, 138, -10}, "SIGINT": {130, -2}}
KILLS = 4  # of a series
RESUME_SECONDS = 5.0


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
            while process.exitcode is None and not path.exists():
                time.sleep(0.001)
            time.sleep(self.random.random() * self.lengths[self.job.stage] / 2)
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
