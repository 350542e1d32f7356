"""Several processes train and predict as one does: the same results, one set of files, one end for all of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import SmallWorld, command_line
from runs import (
    EPOCHS,
    TASKS,
    Run,
    assert_same_outcome,
    batches_of_epoch,
    contents,
    exit_status,
    leftovers,
    new_run,
    signal_at_call,
    start,
    without_dropout,
)
from torch import nn

from routevl import cli
from routevl.errors import RoutevlError
from routevl.signals import EXIT_STOPPED
from routevl.tasks.base import VisionLanguageModel
from routevl.training.checkpoint import load_checkpoint
from routevl.training.distributed import average

PROCESSES = 3  # sums of three depend on their order
SEVERAL_TASKS = {"multitask": "no", "mixed": "yes"}  # at once, by mixed_batches


def run_of(world: SmallWorld, root: Path, kind: str, **changes: Any) -> Run:
    """A small run of a task, or of several at once."""
    if kind in SEVERAL_TASKS:
        return new_run(world, root, "multitask", mixed_batches=SEVERAL_TASKS[kind], **changes)
    return new_run(world, root, kind, **changes)


def start_processes(
    run: Run, count: int = PROCESSES, words: list[str] | None = None, work: Callable[[], None] = cli.main, **sabotages: Any
) -> list[Any]:
    """`routevl train`, or the command line `words`, in `count` processes that belong together, without a launcher.

    `work` is done in place of the command line. `sabotages` are called in single processes before, by their names: process_0,
    process_1, ...
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def become(rank: int) -> Callable[[], None]:
        def become() -> None:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)  # of the tests' own process
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            sabotages.get(f"process_{rank}", lambda: None)()

        return become

    return [start(run, become(rank), words, work) for rank in range(count)]


def exit_statuses(processes: list[multiprocessing.Process]) -> list[int]:
    return [exit_status(process) for process in processes]


def finish(run: Run, count: int = PROCESSES) -> Run:
    assert exit_statuses(start_processes(run, count)) == [0] * count, (run.root / "log").read_text()
    return run


@pytest.fixture(scope="module", params=[*TASKS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SEVERAL_TASKS)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def baselines(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """An uninterrupted run of each kind that is asked for."""
    return cache(lambda kind: finish(run_of(small_world, tmp_path_factory.mktemp(kind), kind)))


@pytest.fixture
def baseline(baselines: Callable[[str], Run], kind: str) -> Run:
    return baselines(kind)


# ------------------------------------------------------------------------------------------------- as one process


def test_several_processes_learn_what_one_learns(small_world: SmallWorld, tmp_path: Path, kind: str) -> None:
    """Without dropout. The last batch has fewer examples than there are processes (vqa), or shares of other lengths; each batch
    of NLVR2 has fewer (multitask), and a share can have captions alone (mixed)."""
    backbone = without_dropout(run_of(small_world, tmp_path, kind).options["text_backbone"], tmp_path / "backbone")
    alone = run_of(small_world, tmp_path / "alone", kind, text_backbone=backbone, log_every=1).train()
    together = finish(run_of(small_world, tmp_path / "together", kind, text_backbone=backbone, log_every=1))
    for ours, theirs in zip(together.lines(), alone.lines(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert contents(together.predictions) == contents(alone.predictions)
    assert json.loads((together.model / "timing.json").read_text())["processes"] == PROCESSES
    assert not leftovers(together)


def test_each_process_has_its_own_dropout(small_world: SmallWorld, tmp_path: Path, kind: str) -> None:
    run = run_of(small_world, tmp_path, kind)
    exit_statuses(start_processes(run, process_1=signal_at_call(VisionLanguageModel, "text_inputs", 2, signal.SIGTERM)))
    tensors, record = load_checkpoint(run.checkpoint)
    states = {bytes(state.tolist()) for state in tensors["random/cpu"].chunk(PROCESSES)}
    assert len(states) == PROCESSES
    assert record["run"]["processes"] == PROCESSES


def test_prediction_in_several_processes_is_complete_and_in_order(baseline: Run, tmp_path: Path) -> None:
    names = ("data", "features", "text_backbone", "vision_backbone")
    options = {name: baseline.options[name] for name in names} | {"model": baseline.model, "predictions": tmp_path / "again"}
    for count in (2, PROCESSES):
        words = ["predict", *command_line(options)]
        assert exit_statuses(start_processes(Run(tmp_path, {}), count, words)) == [0] * count
        assert contents(tmp_path / "again") == contents(baseline.predictions)


@pytest.mark.parametrize("routing", ["none", "mul", "add", "attn", "expand"])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_every_trainable_parameter_gets_a_gradient(
    small_world: SmallWorld, tmp_path: Path, kind: str, method: str, routing: str
) -> None:
    """What processes average."""
    trainer = run_of(small_world, tmp_path, kind, method=method, options={"routing": routing}).trainer()
    batches = batches_of_epoch(trainer)
    trainer.model(**next(iter(batches)))["loss"].backward()
    assert all(parameter.grad is not None for parameter in trainer.optimisation.parameters)


def test_b24_gradients_that_some_process_lacks_count_as_zero_there_and_those_that_all_lack_stay_away(tmp_path: Path) -> None:
    """The processes have one and two examples, and the third has none, so that it does not count."""

    def average_three_parameters() -> None:
        accelerator = Accelerator(cpu=True)
        rank = accelerator.process_index
        everywhere, in_the_second, nowhere = parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
        everywhere.grad = torch.full((2, 2), [1.0, 4.0, 100.0][rank])
        if rank == 1:
            in_the_second.grad = torch.full((2, 2), 6.0)
        losses = {"loss": torch.tensor(float(rank)), "extra": torch.tensor(3.0)}
        losses = average(accelerator, parameters, losses, torch.tensor([1, 2, 1][rank]), examples=2)
        gradients = [None if p.grad is None else p.grad.unique().tolist() for p in parameters]
        found = {"gradients": gradients, "losses": {name: loss.item() for name, loss in losses.items()}}
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))

    assert exit_statuses(start_processes(Run(tmp_path, {}), words=[], work=average_three_parameters)) == [0] * PROCESSES
    for rank in range(PROCESSES):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["gradients"] == [[pytest.approx(3.0)], [pytest.approx(4.0)], None]
        assert found["losses"] == pytest.approx({"loss": 2 / 3, "extra": 3.0})


# ---------------------------------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize("stage", ["training", "validation"])
def test_stop_signal_to_one_process_stops_all(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, kind: str, stage: str
) -> None:
    run = run_of(small_world, tmp_path, kind)
    epoch = baseline.lines()[-1]["step"] // EPOCHS
    call = {"training": 3, "validation": epoch + 1}[stage]
    stop = signal_at_call(VisionLanguageModel, "text_inputs", call, signal.SIGTERM)
    assert exit_statuses(start_processes(run, process_1=stop)) == [EXIT_STOPPED] * PROCESSES
    assert "Traceback" not in (run.root / "log").read_text()
    assert load_checkpoint(run.checkpoint)[1]["step"] == min(call, epoch)
    assert_same_outcome(baseline, finish(run))


def test_stop_signal_in_prediction_leaves_the_checkpoint(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, kind: str
) -> None:
    """Here each process obeys for itself; the others cannot finish without it."""
    run = run_of(small_world, tmp_path, kind)
    stop = signal_at_call(type(run.trainer().task), "predict", 1, signal.SIGTERM)
    statuses = exit_statuses(start_processes(run, process_1=stop))
    assert statuses[1] == EXIT_STOPPED
    assert all(statuses)
    assert not run.predictions.exists()
    assert_same_outcome(baseline, finish(run))


def test_death_of_one_process_ends_the_others(small_world: SmallWorld, tmp_path: Path, baselines: Callable[[str], Run]) -> None:
    run = new_run(small_world, tmp_path, "vqa", checkpoint_every=1)
    for rank, call in ((0, 3), (2, 6)):
        sabotage = signal_at_call(VisionLanguageModel, "text_inputs", call, signal.SIGKILL)
        statuses = exit_statuses(start_processes(run, **{f"process_{rank}": sabotage}))
        assert statuses[rank] == -signal.SIGKILL
        assert all(statuses)
    assert_same_outcome(baselines("vqa"), finish(run))


def test_resuming_with_other_processes_is_refused(small_world: SmallWorld, tmp_path: Path) -> None:
    run = new_run(small_world, tmp_path, "vqa")
    exit_statuses(start_processes(run, process_1=signal_at_call(VisionLanguageModel, "text_inputs", 2, signal.SIGTERM)))
    with pytest.raises(RoutevlError, match=f"the unfinished run has processes {PROCESSES}, now it is 1: delete"):
        run.train()


def test_divergence_ends_all_processes(small_world: SmallWorld, tmp_path: Path, kind: str) -> None:
    run = run_of(small_world, tmp_path, kind, learning_rate=1e30, warmup=0)
    assert exit_statuses(start_processes(run)) == [2] * PROCESSES
    assert "training diverged" in (run.root / "log").read_text()
    assert not run.model.exists()


# ----------------------------------------------------------------------------------------------- started by torchrun


def test_more_processes_than_gpus_are_refused(small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(small_world, tmp_path, "vqa")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RoutevlError, match="3 processes: each needs a GPU of its own, but there are 2"):
        run.train()
    assert list(tmp_path.iterdir()) == []


def launch(run: Run, log: Path, **changes: Any) -> subprocess.Popen:
    """`routevl train` in two processes, started as the workflow starts them; what all of them say goes to the file `log`."""
    rules = (Path(__file__).parents[2] / "workflow/rules/common.smk").read_text()
    names: dict[str, Any] = {"config": {"training": {"gpus": 2}}}
    exec(rules[rules.index("\nPROCESSES =") :].partition("\n\n")[0], names)
    command = [*names["LAUNCH"].split(), "train", *run.changed(**changes).argv]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log.parent.mkdir(exist_ok=True)
    with open(log, "w") as file:
        return subprocess.Popen(command, env=os.environ | {"PATH": path}, stdout=file, stderr=file)


def launched_process(parent: subprocess.Popen, rank: int) -> psutil.Process:
    children = psutil.Process(parent.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.slow
def test_launched_processes_are_killed_told_to_stop_and_finished(small_world: SmallWorld, tmp_path: Path) -> None:
    baseline = finish(new_run(small_world, tmp_path / "baseline", "vqa"), 2)
    run = new_run(small_world, tmp_path / "launched", "vqa", workers=1, checkpoint_every=1)
    log = run.root / "log"

    def launch_and_wait_for_checkpoint() -> subprocess.Popen:
        before = run.checkpoint.stat().st_mtime_ns if run.checkpoint.exists() else 0
        parent = launch(run, log)
        while parent.poll() is None and not (run.checkpoint.exists() and run.checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.002)
        return parent

    def kill_one(parent: subprocess.Popen) -> None:
        launched_process(parent, 1).kill()

    def terminate_all(parent: subprocess.Popen) -> None:  # as SLURM does
        for process in [psutil.Process(parent.pid), *psutil.Process(parent.pid).children(recursive=True)]:
            process.terminate()

    def signal_the_launcher(parent: subprocess.Popen) -> None:  # as SLURM does before the time is over
        parent.send_signal(signal.SIGUSR1)

    def interrupt_the_launcher(parent: subprocess.Popen) -> None:  # Ctrl-C (b18)
        parent.send_signal(signal.SIGINT)

    for end in (kill_one, terminate_all, signal_the_launcher, interrupt_the_launcher):
        parent = launch_and_wait_for_checkpoint()
        told = time.monotonic()
        end(parent)
        assert parent.wait(60) != 0
        text = log.read_text()
        if end is kill_one:
            assert "SIGKILL" in text
        else:
            assert time.monotonic() - told < 15
            assert text.count("told to stop, checkpoint at step") == 1
        assert not run.model.exists()
    assert launch(run, log).wait(120) == 0
    assert log.read_text().count("resuming from step") == 1
    assert_same_outcome(baseline, run)


@pytest.mark.slow
def test_launched_processes_report_bad_input(small_world: SmallWorld, tmp_path: Path) -> None:
    run, log = new_run(small_world, tmp_path / "run", "vqa"), tmp_path / "log"
    assert launch(run, log, data=tmp_path / "nowhere").wait(120) != 0
    [line] = [line for line in log.read_text().splitlines() if "routevl: error: " in line]
    assert "nowhere" in line
    assert not run.model.exists()
