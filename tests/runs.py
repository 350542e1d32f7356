"""Training runs of the small world for the tests: started in processes of their own, interrupted, compared."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallWorld, command_line, run_options, run_stage

from routevl import cli
from routevl.settings import from_arguments
from routevl.signals import STOP_SIGNALS
from routevl.training import train
from routevl.training.distributed import new_accelerator
from routevl.training.order import epoch_batches, training_batches
from routevl.training.trainer import Trainer

TASKS = ("vqa", "caption")
VISION_WIDTH = {"vqa": 16, "caption": 24, "multitask": 16}  # captioning then has a visual projection
BATCH_SIZE = {"vqa": 5, "caption": 7, "multitask": 8}  # does not divide the number of examples
EPOCHS = 2
STEPS = {"vqa": EPOCHS * 8, "caption": EPOCHS * 9}


@contextmanager
def own_signals() -> Iterator[None]:
    """Give this process its handlers of stop signals back, which training in it replaces."""
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(STOP_SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def interrupted_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, stopped: int, killed: int) -> list[str]:
    """Let this process get SIGTERM in the call of a method that has the number `stopped`, counted from 1, and a MemoryError in
    the one that has `killed`. Returns the list of its calls, which grows."""
    method, calls = getattr(owner, name), []

    def counted(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == killed:
            raise MemoryError
        return method(*arguments)

    monkeypatch.setattr(owner, name, counted)
    return calls


@dataclass(frozen=True)
class Run:
    """The folders of one training run and its command line."""

    root: Path
    options: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint" / "checkpoint.safetensors"

    @property
    def argv(self) -> list[str]:
        folders = {"model": self.model, "predictions": self.predictions, "checkpoint": self.checkpoint.parent}
        return command_line({**self.options, **folders})

    def train(self) -> Run:
        """Train in this process, to the end."""
        with own_signals():
            run_stage("train", *self.argv)
        return self

    def trainer(self) -> Trainer:
        """A trainer of this run, in this process."""
        parser = argparse.ArgumentParser()
        train.add_arguments(parser)
        [arguments] = train.runs_in(parser.parse_args(self.argv))
        settings = from_arguments(arguments)
        return Trainer(settings, arguments, new_accelerator(settings))

    def changed(self, options: Mapping[str, Any] | None = None, **changes: Any) -> Run:
        """The same folders with some settings, or options of the method, changed."""
        return Run(self.root, {**self.options, **changes, "options": {**self.options["options"], **(options or {})}})

    def results(self) -> list[dict[str, Any]]:
        return json.loads((self.predictions / "results.json").read_text())

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.model / "training.jsonl").read_text().splitlines()]


def probe(run: Run, output: Path) -> Path:
    """`routevl probe` with a run's settings, in this process."""
    with own_signals():
        run_stage("probe", *probe_words(run, output))
    return output


def probe_words(run: Run, output: Path) -> list[str]:
    """Its options; its checkpoint is where the run's is later."""
    options = {name: value for name, value in run.options.items() if name not in ("log_every", "prepared")}
    return command_line(options | {"output": output, "checkpoint": run.checkpoint.parent})


def new_run(world: SmallWorld, root: Path, task: str, **changes: Any) -> Run:
    """A small run of `task`, with some options changed; the captioning runs have a visual projection."""
    return Run(root, run_options(world, task, **{"width": VISION_WIDTH[task], "batch_size": BATCH_SIZE[task], **changes}))


def without_dropout(backbone: Path, folder: Path) -> Path:
    """A copy of a text backbone that learns alike in any number of processes."""
    shutil.copytree(backbone, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {name: 0.0 for name in config if name.endswith(("dropout_prob", "pdrop", "dropout"))}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def batches_of_epoch(trainer: Trainer, epoch: int = 0) -> Any:
    """The batches that a trainer's epoch learns from."""
    batches = epoch_batches(trainer.task, trainer.examples, epoch)
    return training_batches(trainer.task, trainer.task.of_epoch(trainer.examples, epoch), trainer.accelerator, 0, batches)


def start(
    run: Run, sabotage: Callable[[], None] = lambda: None, words: list[str] | None = None, work: Callable[[], None] = cli.main
) -> multiprocessing.Process:
    """`routevl train`, or the command line `words`, in a process forked from this one, which has everything imported already.

    `sabotage` is called there first; `work` is done in place of the command line. The process leads a process group; what it says
    goes to `run.root`/log.
    """

    def main() -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told the tests to ignore it
        run.root.mkdir(parents=True, exist_ok=True)
        log = os.open(run.root / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["routevl", *(words or ["train", *run.argv])]
        sabotage()
        work()

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def wait_for(path: Path, seconds: float = 60) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.002)


def exit_status(process: multiprocessing.Process, seconds: float = 60) -> int:
    """Wait for the end; the exit status, or minus the signal that ended the process.

    `process.join` would also wait for the loaders of a killed process, which take seconds to see that they are orphans.
    """
    end = time.monotonic() + seconds
    while process.exitcode is None:
        assert time.monotonic() < end, "the process did not end"
        time.sleep(0.005)
    return process.exitcode


def signal_at_call(owner: Any, name: str, count: int, number: int) -> Callable[[], None]:
    """A sabotage: the process sends itself a signal when `owner`.`name` is called for the `count`-th time."""

    def sabotage() -> None:
        original, calls = getattr(owner, name), []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == count:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    return sabotage


def assert_same_outcome(first: Run, second: Run) -> None:
    """Bit-equal runs by `routevl compare`, and byte-equal files: weights, records, metrics and predictions."""
    run_stage("compare", first.model, second.model)
    for folders in ((first.model, second.model), (first.predictions, second.predictions)):
        ours, theirs = map(contents, folders)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []
    assert not first.checkpoint.parent.exists()
    assert not second.checkpoint.parent.exists()


def outcome(folder: Path) -> list[Path]:
    """The files that are the same in every repetition, in folders too."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != "timing.json")


def contents(folder: Path) -> dict[Path, bytes]:
    """What is in these files."""
    return {name: (folder / name).read_bytes() for name in outcome(folder)}


def leftovers(run: Run) -> list[str]:
    """Temporary files and folders that stayed behind."""
    return [str(path) for path in run.root.rglob("*.tmp")]
