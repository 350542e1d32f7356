"""The state of training: what is saved, restored and deleted, whose run it is, what a stop signal and a second job find."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import SmallWorld
from runs import Run, assert_same_outcome, exit_status, new_run, own_signals, signal_at_call, start, wait_for
from torch import Tensor, nn

from routevl.backbones import pretrain
from routevl.errors import RoutevlError
from routevl.features import extract
from routevl.methods.base import Method
from routevl.signals import EXIT_INTERRUPTED, EXIT_STOPPED, Stopped, stop_signals_raise
from routevl.tasks.base import VisionLanguageModel
from routevl.training import optimisation, train, trainer
from routevl.training.checkpoint import load_checkpoint, restore_training_state, save_checkpoint, training_state
from routevl.training.clock import Clock
from routevl.training.optimisation import prepare_torch

KILL = signal_at_call(VisionLanguageModel, "text_inputs", 6, signal.SIGKILL)


@pytest.fixture(scope="module")
def baseline(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return new_run(small_world, tmp_path_factory.mktemp("baseline"), "vqa").train()


# ------------------------------------------------------------------------------------- whatever the optimiser, to the same bits

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, **_: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "sgd without momentum": lambda groups, **_: torch.optim.SGD(groups),
    "adagrad": lambda groups, **_: torch.optim.Adagrad(groups),
    "amsgrad": lambda groups, **_: torch.optim.AdamW(groups, amsgrad=True),
    "tensor for a rate": lambda groups, **_: torch.optim.AdamW([{**g, "lr": torch.tensor(g["lr"])} for g in groups]),
    "adafactor": lambda groups, **_: torch.optim.Adafactor(groups),
    "nadam": lambda groups, **_: torch.optim.NAdam(groups, decoupled_weight_decay=True),
    "rprop": lambda groups, **_: torch.optim.Rprop(groups),
    "double moments": lambda groups, **_: DoubleMomentum(groups),
    "lbfgs": lambda groups, **_: torch.optim.LBFGS([p for group in groups for p in group["params"]], lr=0.01, max_iter=2),
}


class DoubleMomentum(torch.optim.SGD):
    """Its state is of another type than its parameters, and holds more than tensors."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("history", []).append(float(parameter.grad.sum()))
                state["mean"] = state.get("mean", torch.zeros_like(parameter, dtype=torch.float64)) * 0.9 + parameter.grad
                parameter.data -= group["lr"] * state["mean"].float() * (1 + 1e-3 * len(state["history"]))


class Net(nn.Module):
    """Two layers with buffers of several types, and the interface of a VisionLanguageModel that a checkpoint reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("gate", torch.ones(3))
        self.register_buffer("mask", torch.tensor([True, True, False]))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64), persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


class Toy:
    """A model, its optimiser with two groups, and a step that draws from all random generators and moves the buffers."""

    def __init__(self, optimiser: str) -> None:
        self.model = Net()
        layers = ((self.model.first, 0.01), (self.model.second, 0.003))
        self.optimiser = OPTIMISERS[optimiser]([{"params": list(layer.parameters()), "lr": rate} for layer, rate in layers])
        for seeded in (torch.manual_seed, numpy.random.seed, random.seed):
            seeded(1)
        numpy.random.normal(), random.gauss(0, 1)  # one of a pair of variates each; the other is held back

    def step(self) -> None:
        model = self.model
        model.gate *= 0.9
        model.mask = model.mask.roll(1)
        model.pointer += 1
        noise = numpy.random.normal() + random.gauss(0, 1) + random.random()
        inputs = torch.randn(5, 4) + noise

        def loss() -> Tensor:
            self.optimiser.zero_grad()
            value = (model.second(model.first(inputs) * model.gate * model.mask) ** 2).sum() * 0.01
            value.backward()
            return value

        loss()
        self.optimiser.step(loss if isinstance(self.optimiser, torch.optim.LBFGS) else None)

    def state(self) -> dict[str, bytes]:
        tensors, record = training_state(self.model, self.optimiser)
        found = {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
        return found | {"record": json.dumps(record, sort_keys=True).encode()}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_b23_any_optimisers_state_buffers_and_all_generators_are_restored_to_the_same_bits(name: str, tmp_path: Path) -> None:
    toy = Toy(name)
    for _ in range(3):
        toy.step()
    save_checkpoint(tmp_path / "checkpoint", *training_state(toy.model, toy.optimiser))
    saved = toy.state()
    for _ in range(3):
        toy.step()
    again = Toy(name)
    restore_training_state(*load_checkpoint(tmp_path / "checkpoint"), again.model, again.optimiser)
    assert again.state() == saved
    for _ in range(3):
        again.step()
    assert again.state() == toy.state()
    assert {"buffer/gate", "buffer/mask", "buffer/pointer", "random/cpu", "random/numpy", "random/python"} <= saved.keys()


def test_b23_tensors_that_are_missing_too_many_or_other_are_named() -> None:
    toy = Toy("amsgrad")
    toy.step()
    tensors, record = training_state(toy.model, toy.optimiser)
    lost = "optimiser/max_exp_avg_sq/first.weight"
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != lost}, f"it lacks {lost}"),
        ({n: t for n, t in tensors.items() if n != "buffer/gate"}, "it lacks buffer/gate"),
        (tensors | {"parameter/third.weight": torch.zeros(1)}, "it has besides parameter/third.weight"),
        (tensors | {"parameter/first.bias": torch.zeros(1)}, r"parameter/first.bias is \(1,\) torch.float32, expected \(3,\)"),
        (tensors | {"buffer/pointer": torch.zeros(())}, r"buffer/pointer is \(\) torch.float32, expected \(\) torch.int64"),
    ):
        other = Toy("amsgrad")
        with pytest.raises(RoutevlError, match=message):
            restore_training_state(changed, record, other.model, other.optimiser)
    swapped = {**record, "groups": record["groups"][::-1]}
    with pytest.raises(RoutevlError, match="groups have other parameters"):
        restore_training_state(tensors, swapped, toy.model, toy.optimiser)
    toy.optimiser.state[toy.model.first.weight]["odd"] = object()
    with pytest.raises(RoutevlError, match="optimiser/odd/first.weight is a object: a checkpoint holds tensors"):
        training_state(toy.model, toy.optimiser)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "amsgrad", "adafactor"])
def test_b23_a_killed_run_with_another_optimiser_a_moving_buffer_and_other_generators_ends_in_the_same_bits(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The buffer is none of the method's tensors, and scales the embeddings by what numpy and Python draw."""
    monkeypatch.setattr(optimisation, "AdamW", OPTIMISERS[name])
    new = trainer.Trainer.__init__

    def with_buffer(self: trainer.Trainer, *arguments: Any) -> None:
        new(self, *arguments)
        model = self.task.model
        model.register_buffer("drift", torch.ones(()), persistent=False)
        text_inputs = model.text_inputs
        model.text_inputs = lambda *a: {n: v * model.drift if n == "inputs_embeds" else v for n, v in text_inputs(*a).items()}

    monkeypatch.setattr(trainer.Trainer, "__init__", with_buffer)

    def move(method: Method, trainer: trainer.Trainer) -> None:
        trainer.task.model.drift *= 1 + 0.1 * (numpy.random.rand() - random.random())

    monkeypatch.setattr(Method, "after_step", move)
    whole = new_run(small_world, tmp_path / "whole", "vqa").train()
    cut = new_run(small_world, tmp_path / "cut", "vqa")
    assert exit_status(start(cut, KILL)) == -signal.SIGKILL
    assert cut.checkpoint.exists()
    assert exit_status(start(cut)) == 0
    assert "resuming from step" in (cut.root / "log").read_text()
    assert_same_outcome(whole, cut)


def test_b23_a_page_of_the_checkpoint_that_never_reached_the_disk_is_noticed(small_world: SmallWorld, tmp_path: Path) -> None:
    run = new_run(small_world, tmp_path, "vqa")
    assert exit_status(start(run, KILL)) == -signal.SIGKILL
    data = run.checkpoint.read_bytes()
    run.checkpoint.write_bytes(data[:-256] + b"\0" * 256)
    with pytest.raises(RoutevlError, match="a damaged checkpoint .*its checksum is another.*; delete it to start the run again"):
        run.train()


# --------------------------------------------------------------------------------------------------------- whose run it is


def test_b27_resuming_with_other_threads_is_refused_and_the_run_records_them(
    small_world: SmallWorld, tmp_path: Path, baseline: Run
) -> None:
    run = new_run(small_world, tmp_path, "vqa")
    assert exit_status(start(run, KILL)) == -signal.SIGKILL
    with pytest.raises(RoutevlError, match="the unfinished run has threads 1, now it is 2: delete .* to start again"):
        run.changed(threads=2).train()
    tensors, record = load_checkpoint(run.checkpoint)
    for name in ("torch", "device"):
        save_checkpoint(run.checkpoint, tensors, record | {"run": record["run"] | {name: "another"}})
        with pytest.raises(RoutevlError, match=f"the unfinished run has {name} 'another', now it is"):
            run.train()
    assert json.loads((baseline.model / "run.json").read_text())["execution"] == {"processes": 1, "threads": 1}


# -------------------------------------------------------------------------------------------- what a second job finds


def stamps(run: Run) -> dict[str, tuple[int, int]]:
    files = [path for folder in (run.model, run.predictions) for path in folder.rglob("*")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_b19_a_job_that_waited_finds_the_finished_run(small_world: SmallWorld, tmp_path: Path, baseline: Run) -> None:
    run = new_run(small_world, tmp_path, "vqa")
    first = start(run)
    wait_for(run.checkpoint)
    second = start(run)
    assert exit_status(first) == 0
    before = stamps(run)
    assert exit_status(second) == 0
    assert stamps(run) == before
    log = (run.root / "log").read_text()
    assert "waiting for another process" in log and log.count("epoch 1/2") == 1
    assert f"train model: {run.model} and {run.predictions} are finished: delete them to train again" in log
    assert_same_outcome(baseline, run)


def test_b19_a_finished_model_is_predicted_from_and_not_trained_again(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the checkpoint is there still: it was killed in prediction."""
    run = new_run(small_world, tmp_path, "vqa")
    kill = signal_at_call(train, "write_predictions", 1, signal.SIGKILL)
    assert exit_status(start(run, kill)) == -signal.SIGKILL
    assert run.checkpoint.exists() and not run.predictions.exists()
    before = {path: stamp for path, stamp in stamps(run).items()}
    monkeypatch.setattr(trainer.Trainer, "fit", None)
    run.train()
    assert before.items() <= stamps(run).items()
    assert_same_outcome(baseline, run)
    shutil.rmtree(run.predictions)
    run.train()
    assert before.items() <= stamps(run).items()
    assert_same_outcome(baseline, run)


def test_b19_a_finished_model_of_other_threads_is_not_taken(small_world: SmallWorld, tmp_path: Path) -> None:
    run = new_run(small_world, tmp_path, "vqa").train()
    assert run.trainer().load_model(run.model)
    try:  # not trained: what is forked from a process that has computed with two threads can wait for them for ever
        assert not run.changed(threads=2).trainer().load_model(run.model)
    finally:
        torch.set_num_threads(1)


def test_b19_a_finished_model_of_other_settings_is_trained_again(small_world: SmallWorld, tmp_path: Path) -> None:
    """Killed after its model is written, it must not take the predictions of the one before for its own."""
    run = new_run(small_world, tmp_path, "vqa").train()
    other = run.changed(learning_rate=0.03)
    kill = signal_at_call(train, "write_predictions", 1, signal.SIGKILL)
    assert exit_status(start(other, kill)) == -signal.SIGKILL
    assert exit_status(start(other)) == 0
    assert "are finished" not in (run.root / "log").read_text()
    assert_same_outcome(other, Run(tmp_path / "apart", other.options).train())


def test_b19_a_finished_model_does_not_hide_the_checkpoint_of_another_run(small_world: SmallWorld, tmp_path: Path) -> None:
    run = new_run(small_world, tmp_path, "vqa").train()
    assert exit_status(start(run.changed(seed=6), KILL)) == -signal.SIGKILL
    with pytest.raises(RoutevlError, match="the unfinished run has seed 6, now it is 5: delete"):
        run.train()
    assert run.checkpoint.exists()


# ------------------------------------------------------------------------------------------------- what is deleted


def test_b05_a_users_folder_for_checkpoints_is_kept(small_world: SmallWorld, tmp_path: Path, baseline: Run) -> None:
    run = new_run(small_world, tmp_path, "vqa")
    folder = run.checkpoint.parent
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter.tex").write_text("years of work")
    (folder / ".checkpoint.safetensors.1.tmp").touch()  # of a process that was killed
    run.train()
    assert [path.name for path in folder.rglob("*")] == ["thesis", "chapter.tex"]


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


def routevl(*words: object, code: str = "") -> subprocess.Popen:
    """The command line in a process group of its own; `code` is run first."""
    own = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell may have had it ignored
    script = f"{own}\n{code}\nfrom routevl.cli import main; main()"
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_temporary(folder: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not any(path.name.endswith(".tmp") for path in folder.iterdir()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_b18_a_stage_ends_on_a_stop_signal_in_one_line_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    images = ("--train-images", 20000, "--val-images", 1, "--test-images", 1, "--image-size", 24, "--questions-per-image", 1)
    process = routevl("world", "--output", tmp_path / "world", "--seed", 1, *images)
    wait_for_temporary(tmp_path, process)
    os.killpg(process.pid, number)
    os.kill(process.pid, number)  # twice, as under `routevl record`
    output = process.communicate(timeout=60)
    assert process.returncode == (EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED)
    assert output == ("", f"routevl: error: world: stopped by {signal.Signals(number).name}\n")
    assert list(tmp_path.iterdir()) == []


def test_b18_a_recorded_stage_ends_so_too_when_the_terminal_and_the_recorder_send_ctrl_c(tmp_path: Path) -> None:
    output, manifest = tmp_path / "world", tmp_path / "manifests/world/world.json"
    images = ("--train-images", 20000, "--val-images", 1, "--test-images", 1, "--image-size", 24, "--questions-per-image", 1)
    inner = [Path(sys.executable).with_name("routevl"), "world", "--output", output, "--seed", 1, *images]
    process = routevl("record", "--manifest", manifest, "--outputs", output, "--", *inner)
    wait_for_temporary(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_INTERRUPTED
    assert errors == "routevl: error: world: stopped by SIGINT\n"
    assert not output.exists() and not any(path.name.endswith(".tmp") for path in tmp_path.iterdir())


def test_b18_loaders_of_another_stage_leave_the_word_to_it(small_world: SmallWorld, tmp_path: Path) -> None:
    """They get Ctrl-C too."""

    def sabotage() -> None:
        def wait(*arguments: Any) -> None:
            (tmp_path / "waiting").touch()
            time.sleep(60)

        extract._encode_batch = wait

    images = small_world.data / "test/images.json"
    words = ["extract", "--images", images, "--backbone", small_world.vision[16], "--shard", 0, "--shards", 1, "--workers", 2]
    run = Run(tmp_path, {})
    process = start(run, sabotage, [*map(str, words), "--batch-size", "1", "--output", str(tmp_path / "shard.safetensors")])
    wait_for(tmp_path / "waiting")
    os.killpg(process.pid, signal.SIGINT)
    assert exit_status(process) == EXIT_INTERRUPTED
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("extract: ")]
    assert lines == ["routevl: error: extract: stopped by SIGINT"]


def test_b18_a_stop_signal_that_a_library_makes_an_error_of_is_one_still() -> None:
    """As numpy does while it is imported."""
    with own_signals(), pytest.raises(Stopped) as stopped, stop_signals_raise():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("PyCapsule_Import could not import module datetime") from None
    assert stopped.value.args == (signal.SIGTERM,)


def test_b18_a_stop_signal_during_imports_is_one_line() -> None:
    slow = """
import sys, time
class Slow:
    def find_spec(self, name, *others):
        if name == "routevl.training.train":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())"""
    process = routevl("train", code=slow)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "routevl: error: train: stopped by SIGINT\n"
    assert process.returncode == EXIT_INTERRUPTED


def test_b18_a_job_that_a_shell_lets_ignore_ctrl_c_ignores_it() -> None:
    with own_signals():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with stop_signals_raise():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------------------------------------- and the clock


def test_b14_pretraining_and_training_make_torch_ready_in_one_way() -> None:
    assert pretrain.prepare_torch is trainer.prepare_torch is prepare_torch
    torch.utils.deterministic.fill_uninitialized_memory = True
    prepare_torch(1)
    assert not torch.utils.deterministic.fill_uninitialized_memory and torch.are_deterministic_algorithms_enabled()


def test_b21_a_step_on_a_gpu_is_timed_by_the_gpus_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work is queued in an instant: the wall clock would see that alone."""

    class Event:
        times: Iterator[float] = iter([0.0, 250.0, 250.0, 750.0])

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(Event.times)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda"))
    for _ in range(2):
        clock.start()
        clock.stop(samples=8)
    record = clock.as_record()
    assert (record["seconds"], record["step_seconds"], record["samples"]) == (0.75, [0.25, 0.5], 16)
    resumed = Clock(torch.device("cuda"), **clock.as_record())
    assert resumed.as_record() == clock.as_record()
