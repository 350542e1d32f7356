"""Training: killed runs go on to the same bits, the right epoch is kept, and the losses and predictions mean what they say."""

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
from conftest import SmallWorld, command_line, run_stage
from runs import (
    BATCH_SIZE,
    EPOCHS,
    STEPS,
    TASKS,
    Run,
    assert_same_outcome,
    batches_of_epoch,
    exit_status,
    leftovers,
    new_run,
    own_signals,
    signal_at_call,
    start,
    wait_for,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from routevl import cli
from routevl.errors import RoutevlError
from routevl.settings import RunSettings
from routevl.signals import EXIT_STOPPED, STOP_SIGNALS
from routevl.signals import exit_status as stopped_by
from routevl.tasks.base import VisionLanguageModel
from routevl.training.checkpoint import load_checkpoint, save_checkpoint
from routevl.training.flops import forward_flops
from routevl.training.order import epoch_batches
from routevl.training.predict import write_predictions
from routevl.training.trainer import Trainer


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def baselines(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """An uninterrupted run of each task."""
    return {task: new_run(small_world, tmp_path_factory.mktemp(task), task).train() for task in TASKS}


@pytest.fixture
def baseline(baselines: dict[str, Run], task: str) -> Run:
    return baselines[task]


# --------------------------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name
)
@pytest.mark.parametrize("workers", [0, 2])
def test_run_interrupted_again_and_again_ends_in_the_same_bits(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, task: str, workers: int, number: int
) -> None:
    """Interruptions at random forward passes, in training, validation and prediction, and while a file is renamed."""
    run = new_run(small_world, tmp_path, task, workers=workers)
    randomness = random.Random(f"{task} {workers} {number}")
    moments = [(VisionLanguageModel, "text_inputs", randomness.randint(4, 9)) for _ in range(4)] + [(os, "replace", 2)]
    randomness.shuffle(moments)
    expected = -number if number == signal.SIGKILL else stopped_by(number)
    interruptions = 0
    while (status := exit_status(start(run, signal_at_call(*moments[interruptions], number)))) != 0:
        assert status == expected
        assert not run.model.exists() or run.checkpoint.exists()
        interruptions += 1
        if interruptions == len(moments):
            assert exit_status(start(run)) == 0
            break
    assert interruptions >= 2
    assert "waiting for another process" not in (run.root / "log").read_text()  # the orphans of the killed one
    assert_same_outcome(baseline, run)
    if number != signal.SIGKILL:
        assert not leftovers(run)


@pytest.mark.parametrize("workers", [0, 2])
def test_run_killed_at_random_times_ends_in_the_same_bits(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, task: str, workers: int
) -> None:
    """By the clock, so that any line of the code may be the one that is not reached."""
    run = new_run(small_world, tmp_path, task, workers=workers, checkpoint_every=1)
    randomness = random.Random(f"{task} {workers}")
    for _ in range(4):
        process = start(run)
        time.sleep(randomness.uniform(0.3, 1.0))
        process.kill()
        if exit_status(process) == 0:
            break
    else:
        assert exit_status(start(run)) == 0
    assert_same_outcome(baseline, run)


def test_run_stopped_after_every_step_ends_in_the_same_bits(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, task: str
) -> None:
    run = new_run(small_world, tmp_path, task, checkpoint_every=10**6)
    for step in range(1, STEPS[task] + 1):
        with pytest.raises(SystemExit) as stopped:
            stop_at_first_step(run)
        assert stopped.value.code == EXIT_STOPPED
        assert json_of_checkpoint(run)["step"] == step
    assert_same_outcome(baseline, run.train())
    validated, predicted = timed(run)
    assert (validated, predicted) == timed(baseline)


def timed(run: Run) -> tuple[int, int]:
    """How many examples were validated and items predicted, of which timing.json tells how long it took."""
    training, prediction = (json.loads((folder / "timing.json").read_text()) for folder in (run.model, run.predictions))
    assert training["validation_seconds"] > 0 and prediction["prediction_seconds"] > 0
    assert prediction["peak_memory_mb"] >= training["peak_memory_mb"] > 0
    return training["validated"], prediction["predicted"]


def test_times_are_of_every_validation_and_prediction(baseline: Run, task: str) -> None:
    validated, predicted = timed(baseline)
    assert validated == EPOCHS * len(baseline.trainer().validation) and predicted == len(baseline.results())


def stop_at_first_step(run: Run) -> None:
    """Train in this process and pretend, in the middle of the first step, that a stop signal came."""
    trainer = run.trainer()
    step = trainer._train_step

    def step_and_stop(*arguments: Any) -> None:
        step(*arguments)
        trainer.stop.number = signal.SIGTERM

    trainer._train_step = step_and_stop
    with own_signals():
        trainer.fit()


def json_of_checkpoint(run: Run) -> dict[str, Any]:
    return load_checkpoint(run.checkpoint)[1]


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_stop_signal_to_the_whole_process_group_leaves_a_checkpoint(
    small_world: SmallWorld, tmp_path: Path, baselines: dict[str, Run], number: int
) -> None:
    """A cluster's scheduler signals the loader's workers too; they must not die before the checkpoint is written."""

    def sabotage() -> None:
        step = Trainer._train_step

        def wait_then_step(trainer: Trainer, *arguments: Any) -> None:
            if trainer.step == 4:
                (run.root / "waiting").touch()
                time.sleep(1)
            step(trainer, *arguments)

        Trainer._train_step = wait_then_step

    run = new_run(small_world, tmp_path, "vqa", workers=2)
    process = start(run, sabotage)
    wait_for(run.root / "waiting")
    os.killpg(process.pid, number)
    os.kill(process.pid, number)  # `routevl record` passes it on once more
    assert exit_status(process) == stopped_by(number)
    assert json_of_checkpoint(run)["step"] == 5
    assert "Traceback" not in (run.root / "log").read_text()
    assert exit_status(start(run)) == 0
    assert_same_outcome(baselines["vqa"], run)


@pytest.mark.parametrize("stage", ["validation", "prediction"])
def test_stop_signal_is_obeyed_at_once_in_long_stages(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, task: str, stage: str
) -> None:
    """Validation and prediction can take an hour: a job that is told to stop has seconds."""

    def sabotage() -> None:
        text_inputs, calls = VisionLanguageModel.text_inputs, []

        def slow_text_inputs(model: VisionLanguageModel, *arguments: Any) -> Any:
            if not model.training and (stage == "validation" or (run.root / "model").exists()):
                calls.append(stage)
                if len(calls) == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                assert len(calls) == 1, "went on after the stop signal"
            return text_inputs(model, *arguments)

        VisionLanguageModel.text_inputs = slow_text_inputs

    run = new_run(small_world, tmp_path, task)
    assert exit_status(start(run, sabotage)) == EXIT_STOPPED
    assert not run.predictions.exists()
    assert not leftovers(run)
    assert "Traceback" not in (run.root / "log").read_text()
    resumed_at = {"validation": STEPS[task] // EPOCHS, "prediction": STEPS[task]}[stage]
    assert json_of_checkpoint(run)["step"] == resumed_at
    assert exit_status(start(run)) == 0
    assert_same_outcome(baseline, run)


@pytest.mark.slow
def test_command_line_is_killed_told_to_stop_and_finished(
    small_world: SmallWorld, tmp_path: Path, baselines: dict[str, Run]
) -> None:
    """The same through new interpreters, as the workflow runs it."""
    run = new_run(small_world, tmp_path, "vqa", workers=2, checkpoint_every=1)

    def routevl() -> subprocess.Popen:
        command = [sys.executable, "-c", "from routevl.cli import main; main()", "train", *run.argv]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, EXIT_STOPPED)):
        process = routevl()
        before = run.checkpoint.stat().st_mtime_ns if run.checkpoint.exists() else 0
        while process.poll() is None and not (run.checkpoint.exists() and run.checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.002)
        told = time.monotonic()
        process.send_signal(number)
        assert process.wait(30) == status
        assert time.monotonic() - told < 10
    assert "checkpoint at step" in process.stderr.read()
    assert not run.model.exists()
    process = routevl()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert "resuming from step" in errors
    assert_same_outcome(baselines["vqa"], run)


def test_two_processes_do_not_train_one_run_at_once(small_world: SmallWorld, tmp_path: Path, baselines: dict[str, Run]) -> None:
    run = new_run(small_world, tmp_path, "vqa")
    processes = [start(run), start(run)]
    assert [exit_status(process) for process in processes] == [0, 0]
    assert_same_outcome(baselines["vqa"], run)
    assert "waiting for another process" in (run.root / "log").read_text()


# ----------------------------------------------------------------------------------- the same and not the same


@pytest.mark.parametrize("changes", [{}, {"workers": 2}, {"checkpoint_every": 1}], ids=str)
def test_repetition_gives_the_same_bits(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, task: str, changes: dict[str, Any]
) -> None:
    assert_same_outcome(baseline, new_run(small_world, tmp_path, task, **changes).train())


@pytest.mark.parametrize(
    "changes", [{"seed": 6}, {"options": {"routing": "add"}}, {"learning_rate": 0.021}, {"max_grad_norm": 0.001}], ids=str
)
def test_other_settings_give_other_bits(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, task: str, changes: dict[str, Any]
) -> None:
    other = new_run(small_world, tmp_path, task, **changes).train()
    with pytest.raises(RoutevlError, match="differ, first in"):
        run_stage("compare", baseline.model, other.model)


@pytest.mark.parametrize(("norm", "clipped"), [(0.001, 0.001), (1e6, None), ("none", None)])
def test_gradients_are_clipped_over_all_parameters_together(
    small_world: SmallWorld, tmp_path: Path, task: str, norm: float | str, clipped: float | None
) -> None:
    trainer = new_run(small_world, tmp_path, task, max_grad_norm=norm).trainer()
    batch = next(iter(batches_of_epoch(trainer)))
    trainer.model.train()
    trainer.model(**batch)["loss"].backward()
    parameters = trainer.optimisation.parameters
    free = torch.stack([parameter.grad.norm() for parameter in parameters]).norm().item()
    given: list[float] = []

    def instead_of_adamw() -> None:
        given.append(torch.stack([parameter.grad.norm() for parameter in parameters]).norm().item())

    trainer.optimisation.optimiser.step = instead_of_adamw
    trainer.optimisation.step()
    assert free > 0.01 and given == [pytest.approx(clipped or free, rel=1e-4)]
    settings = trainer.settings.as_record()
    assert settings["max_grad_norm"] == (None if norm == "none" else norm)
    assert RunSettings.from_record(settings, "run.json") == trainer.settings


def test_the_order_of_examples_is_a_function_of_seed_and_epoch(small_world: SmallWorld, tmp_path: Path, task: str) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        trainer = new_run(small_world, tmp_path / f"{seed}-{epoch}", task, seed=seed).trainer()
        return numpy.concatenate(epoch_batches(trainer.task, trainer.examples, epoch)).tolist()

    orders = [order(seed, epoch) for seed, epoch in ((5, 0), (5, 1), (6, 0), (6, 1), (5, 0))]
    assert orders[0] == orders[4] and all(sorted(o) == list(range(len(o))) for o in orders)
    assert len({tuple(o) for o in orders}) == 4


def test_compare_names_the_tensor_that_differs(tmp_path: Path, baseline: Run) -> None:
    """Whatever the state consists of: adapter, head or projection, optimiser, random generators, metrics."""
    state = json.loads((baseline.model / "last" / "state.json").read_text())
    kinds = ("parameter/", "optimiser/exp_avg/", "optimiser/exp_avg_sq/", "optimiser/step/", "random/cpu")
    chosen = [next(name for name in state if name.startswith(kind)) for kind in kinds]
    for number, name in enumerate(chosen):
        changed = shutil.copytree(baseline.model, tmp_path / str(number))
        (changed / "last" / "state.json").write_text(json.dumps(state | {name: state[name][::-1]}))
        expect_difference(baseline.model, changed, name)
    for file in ("adapter_model.safetensors", "task.safetensors"):
        changed = shutil.copytree(baseline.model, tmp_path / file)
        tensors = load_file(changed / file)
        if not tensors:
            continue
        name, tensor = sorted(tensors.items())[-1]
        tensor.view(-1).view(torch.int32)[-1] ^= 1  # one bit
        save_file(tensors, changed / file)
        expect_difference(baseline.model, changed, f"best/{file}/{name}")
    changed = shutil.copytree(baseline.model, tmp_path / "lines")
    lines = (changed / "training.jsonl").read_text().splitlines()
    (changed / "training.jsonl").write_text("\n".join([*lines[:2], lines[2].replace("0", "1", 1), *lines[3:]]))
    expect_difference(baseline.model, changed, "training.jsonl line 000003")


def expect_difference(first: Path, second: Path, name: str) -> None:
    with pytest.raises(RoutevlError) as difference:
        run_stage("compare", first, second)
    assert str(difference.value).endswith(f"differ, first in {name}")


def test_gradient_checkpointing_changes_nothing_but_memory(
    small_world: SmallWorld, tmp_path: Path, baseline: Run, task: str
) -> None:
    run = new_run(small_world, tmp_path, task, gradient_checkpointing="yes").train()
    for ours, theirs in zip(run.lines(), baseline.lines(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


# --------------------------------------------------------------------------------------- best and last epoch


@pytest.mark.parametrize("best", [1, 2, 3])
def test_model_folder_holds_the_best_epoch_and_last_the_last(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, best: int
) -> None:
    """By the task's own metric, and also when the run was stopped between the best epoch and the last."""
    metric, more_is_better = {"vqa": ("val_accuracy", True), "caption": ("val_loss", False)}[task]
    quality = {epoch: 50.0 + (10 if epoch == best else -epoch) for epoch in (1, 2, 3)}
    run = new_run(small_world, tmp_path, task, epochs=3, options={"routing": "attn"})
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def pretend(trainer: Trainer) -> dict[str, float]:
        epoch = trainer.step // trainer.batches_per_epoch
        weights[epoch] = {name: tensor.clone() for name, tensor in trainer.task.model.tensors().items()}
        value = quality[epoch] if more_is_better else 100 - quality[epoch]
        return {"val_loss": 1.0, metric: value}

    monkeypatch.setattr(Trainer, "_validate", pretend)
    for _ in range(STEPS[task] // EPOCHS * 2 + 2):
        with pytest.raises(SystemExit):
            stop_at_first_step(run)
    run.train()
    task_object = run.trainer().task
    assert json.loads((run.model / "run.json").read_text())["best_epoch"]["epoch"] == best
    for folder, epoch in ((run.model, best), (run.model / "last", 3)):
        task_object.model.load(folder)
        loaded = task_object.model.tensors()
        assert loaded.keys() == weights[epoch].keys()
        assert all(torch.equal(loaded[name], weights[epoch][name]) for name in loaded)


# ----------------------------------------------------------------------------------------- counts of parameters


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_counts_are_the_models_own_and_equal_for_all_routing_functions(
    small_world: SmallWorld, tmp_path: Path, task: str, method: str
) -> None:
    counts = []
    for routing in ("none", "mul", "add", "attn", "expand"):
        model = new_run(small_world, tmp_path, task, method=method, options={"routing": routing}).trainer().task.model
        counts.append(model.trainable_params_by_part())
        assert sum(counts[-1].values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert all(count == counts[0] for count in counts)
    assert counts[0]["layer_norm"] > 0
    assert (counts[0]["visual_projection"] > 0) == (task == "caption")


def test_run_json_counts_the_parameters(baseline: Run, task: str) -> None:
    record = json.loads((baseline.model / "run.json").read_text())
    task_object = baseline.trainer().task
    model = task_object.model
    assert record["trainable_params_by_part"] == model.trainable_params_by_part()
    assert record["trainable_params"] == sum(record["trainable_params_by_part"].values())
    assert record["total_params"] == sum(parameter.numel() for parameter in model.parameters())
    saved = load_file(baseline.model / "adapter_model.safetensors") | load_file(baseline.model / "task.safetensors")
    assert record["trainable_params"] == sum(tensor.numel() for tensor in saved.values())
    bottleneck = 2 * 2 * (16 + 16) * 2  # layers * (query and value) * (A and B) * rank
    assert record["trainable_params_by_part"]["method"] == bottleneck


def test_run_json_counts_the_flops_of_an_example_of_the_validation_split(baseline: Run, task: str) -> None:
    trainer = baseline.trainer()
    examples = trainer.validation.select(range(BATCH_SIZE[task])).with_format(None)
    batch = trainer.task.collate(list(examples))
    record = json.loads((baseline.model / "run.json").read_text())
    assert record["forward_flops"] == round(forward_flops(trainer.task.model, batch) / BATCH_SIZE[task]) > 0


# ------------------------------------------------------------------------------------------ what the model sees


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize(
    ("routing", "prefix", "sees"), [("none", "no", False), ("none", "yes", True), ("mul", "no", True), ("expand", "yes", True)]
)
def test_only_the_blind_model_ignores_the_image(
    small_world: SmallWorld, tmp_path: Path, task: str, routing: str, prefix: str, sees: bool, width: int
) -> None:
    run = new_run(small_world, tmp_path, task, options={"routing": routing}, prefix=prefix, width=width)
    trainer = run.trainer()
    batch = first_batch(trainer.task)
    model = randomised(trainer.task.model)
    permuted = {**batch, "image": batch["image"].roll(3, 0)}
    outputs = [losses_of(model, chosen) for chosen in (batch, permuted)]
    assert torch.equal(*outputs) != sees
    if sees:
        assert (outputs[0] - outputs[1]).abs().max() > 1e-4


def test_blind_runs_predictions_do_not_depend_on_the_features(small_world: SmallWorld, tmp_path: Path, task: str) -> None:
    """All images of the test split swapped: a blind run's predictions stay, a routed one's do not."""
    changed = {}
    for routing, prefix in (("none", "no"), ("attn", "yes")):
        run = new_run(small_world, tmp_path / routing, task, options={"routing": routing}, prefix=prefix, visual_tokens="patches")
        trainer = run.trainer()
        randomised(trainer.task.model)
        predictions = []
        for name in ("as they are", "reversed"):
            if name == "reversed":
                original = trainer.task.visual.of
                trainer.task.visual.of = lambda ids, original=original: -10 * original(ids)
            folder = tmp_path / routing / name
            write_predictions(trainer.task, trainer.accelerator, folder, trainer.to_predict, 0)
            predictions.append((folder / "results.json").read_bytes())
        changed[routing] = predictions[0] != predictions[1]
    assert changed == {"none": False, "attn": True}


def first_batch(task: Any, split: str = "train", size: int = 7) -> dict[str, torch.Tensor]:
    """Texts of several lengths and images, so that there is padding."""
    examples = task.examples(split)
    stride = len(examples) // size
    return task.collate([examples[index * stride] for index in range(size)])


def randomised(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model with trainable tensors moved far from where they start, where some bottlenecks do nothing."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.tensors().values():
        tensor += 0.5 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def losses_of(model: VisionLanguageModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch)["losses"]


# --------------------------------------------------------------------------------------------- losses and batches


@pytest.mark.parametrize("prefix", ["yes", "no"])
def test_caption_loss_is_over_the_first_token_and_eos_but_no_padding(
    small_world: SmallWorld, tmp_path: Path, prefix: str
) -> None:
    """Against one caption at a time, unpadded, with its targets written out."""
    task = new_run(small_world, tmp_path, "caption", prefix=prefix).trainer().task
    model = randomised(task.model)
    batch = first_batch(task)
    lengths = batch["attention_mask"].sum(-1)
    assert lengths.min() < lengths.max()
    with torch.no_grad():
        output = model(**batch)
        expected = []
        for row, length in enumerate(lengths.tolist()):
            ids = batch["input_ids"][row : row + 1, :length]
            assert ids[0, 0] == task.bos
            assert ids[0, -1] == task.tokenizer.eos_token_id
            inputs = model.text_inputs(ids, torch.ones_like(ids), batch["image"][row : row + 1])
            log_probabilities = model.text_model(**inputs).logits[0, -length:].log_softmax(-1)
            expected.append(-sum(log_probabilities[place - 1, ids[0, place]] for place in range(1, length)))
    assert output["tokens"].tolist() == [length - 1 for length in lengths.tolist()]
    torch.testing.assert_close(output["losses"], torch.stack(expected), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(output["loss"], sum(expected) / (lengths - 1).sum(), rtol=1e-5, atol=1e-5)


def test_vqa_loss_is_binary_cross_entropy_on_soft_scores(small_world: SmallWorld, tmp_path: Path) -> None:
    task = new_run(small_world, tmp_path, "vqa").trainer().task
    model = randomised(task.model)
    batch = first_batch(task)
    scores = batch.pop("answer_scores")
    with torch.no_grad():
        probabilities = model(**batch)["logits"].double().sigmoid()
        output = model(**batch, answer_scores=scores)
    expected = -(scores * probabilities.log() + (1 - scores) * (1 - probabilities).log()).sum(-1)
    torch.testing.assert_close(output["losses"].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output["loss"].double(), expected.mean(), rtol=1e-4, atol=1e-4)
    chosen = probabilities.argmax(-1)
    assert output["accuracies"].tolist() == [scores[row, answer] for row, answer in enumerate(chosen)]


@pytest.mark.parametrize("routing", ["none", "mul", "attn", "expand"])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_an_examples_outcome_does_not_depend_on_its_batch(
    small_world: SmallWorld, tmp_path: Path, task: str, routing: str, method: str
) -> None:
    run = new_run(small_world, tmp_path, task, method=method, options={"routing": routing}, visual_tokens="patches")
    task_object = run.trainer().task
    model = randomised(task_object.model)
    examples = list(task_object.examples("train"))[::6]
    together = losses_of(model, task_object.collate(examples))
    alone = torch.cat([losses_of(model, task_object.collate([example])) for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 5])
def test_a_caption_does_not_depend_on_its_batch(small_world: SmallWorld, tmp_path: Path, beams: int) -> None:
    """Beam search included: every beam sees the image of its own example."""
    run = new_run(small_world, tmp_path, "caption", beams=beams, visual_tokens="patches", options={"routing": "attn"})
    task = run.trainer().task
    model = randomised(task.model)
    items = list(task.to_predict("train"))
    together = task.predict(model, task.collate(items))
    alone = [entry for item in items for entry in task.predict(model, task.collate([item]))]
    assert together == alone
    assert len({entry["caption"] for entry in together}) > 3


# ------------------------------------------------------------------------------------------- the trained folder


def predict(run: Run, folder: Path, output: Path, **changes: Any) -> bytes:
    names = ("data", "features", "text_backbone", "vision_backbone", "workers")
    options = {name: run.options[name] for name in names} | {"model": folder, "predictions": output} | changes
    run_stage("predict", *command_line(options))
    return (output / "results.json").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_predict_reproduces_the_predictions(baseline: Run, tmp_path: Path, workers: int) -> None:
    expected = (baseline.predictions / "results.json").read_bytes()
    assert predict(baseline, baseline.model, tmp_path / "again", workers=workers) == expected


def test_ablations_are_predicted_as_they_were_trained(small_world: SmallWorld, tmp_path: Path, task: str) -> None:
    """Made anew of a run's folder: another image's features in the bottleneck, modules of other places, two W_down."""
    options = {"r": 4, "routing": "mul", "bottleneck": "split", "places": "both", "routed_features": "shuffled"}
    run = new_run(small_world, tmp_path, task, options=options).train()
    assert predict(run, run.model, tmp_path / "again") == (run.predictions / "results.json").read_bytes()


def test_predictions_are_one_per_item_of_the_split(small_world: SmallWorld, baseline: Run, task: str) -> None:
    folder = small_world.data / "test"
    if task == "vqa":
        questions = json.loads((folder / "questions.json").read_text())["questions"]
        assert [entry["question_id"] for entry in baseline.results()] == [question["question_id"] for question in questions]
    else:
        images = json.loads((folder / "images.json").read_text())
        assert [entry["image_id"] for entry in baseline.results()] == [image["id"] for image in images]


@pytest.mark.parametrize("folder", ["", "last"])
def test_adapter_folder_loads_with_plain_peft_on_the_unmodified_text_model(baseline: Run, task: str, folder: str) -> None:
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM

    auto = {"vqa": AutoModel, "caption": AutoModelForCausalLM}[task]
    text_model = auto.from_pretrained(baseline.options["text_backbone"])
    plain = PeftModel.from_pretrained(text_model, baseline.model / folder).eval()
    task_object = baseline.trainer().task
    task_object.model.load(baseline.model / folder)
    model = task_object.model.eval()
    batch = first_batch(task_object)
    inputs = model.text_inputs(batch["input_ids"], batch["attention_mask"], batch["image"])
    with torch.no_grad():
        ours, theirs = model.text_model(**inputs)[0], plain(**inputs)[0]
    assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------ what stops a resumption


@pytest.fixture
def unfinished(small_world: SmallWorld, tmp_path: Path) -> Iterator[Run]:
    """A run that was told to stop after its first step."""
    run = new_run(small_world, tmp_path, "vqa")
    with pytest.raises(SystemExit):
        stop_at_first_step(run)
    assert run.checkpoint.exists()
    yield run
    assert run.checkpoint.exists()
    assert not run.model.exists()
    assert not run.predictions.exists()


@pytest.mark.parametrize(
    "name, value", [("learning_rate", 0.5), ("seed", 6), ("options", {"routing": "add"}), ("epochs", 3), ("prefix", "no")]
)
def test_resuming_with_other_settings_is_refused(unfinished: Run, name: str, value: Any) -> None:
    other = unfinished.changed(**{name: value})
    before = unfinished.checkpoint.read_bytes()
    with pytest.raises(RoutevlError, match=f"the unfinished run has {name} .* delete .* to start again"):
        other.train()
    assert unfinished.checkpoint.read_bytes() == before


def test_resuming_on_another_backbone_is_refused(small_world: SmallWorld, unfinished: Run) -> None:
    changes = {"features": small_world.features[24], "vision_backbone": small_world.vision[24]}
    with pytest.raises(RoutevlError, match="the unfinished run has vision_backbone"):
        unfinished.changed(**changes).train()


def test_resuming_on_other_data_is_refused(small_world: SmallWorld, unfinished: Run, tmp_path: Path) -> None:
    data = shutil.copytree(small_world.data, tmp_path / "data")
    path = data / "train" / "questions.json"
    path.write_text(path.read_text().replace('"question": "', '"question": "well, '))
    with pytest.raises(RoutevlError, match="the unfinished run has data"):
        unfinished.changed(data=data).train()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * len(data)])
def test_damaged_checkpoint_is_refused(unfinished: Run, damage: Callable[[bytes], bytes]) -> None:
    unfinished.checkpoint.write_bytes(damage(unfinished.checkpoint.read_bytes()))
    with pytest.raises(RoutevlError, match="a damaged checkpoint .*; delete it to start the run again"):
        unfinished.train()


@pytest.mark.parametrize("lacking", ["record", "tensor", "key of the record"])
def test_incomplete_checkpoint_is_refused(unfinished: Run, lacking: str) -> None:
    tensors, record = load_checkpoint(unfinished.checkpoint)
    if lacking == "tensor":
        del tensors["random/cpu"]
    if lacking == "key of the record":
        del record["history"]
    if lacking == "record":
        save_file(tensors, unfinished.checkpoint)
    else:
        save_checkpoint(unfinished.checkpoint, tensors, record)
    with pytest.raises(RoutevlError, match="a damaged checkpoint"):
        unfinished.train()


# --------------------------------------------------------------------------------------------------- divergence


def test_diverged_training_says_so_and_leaves_no_model(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    run = new_run(small_world, tmp_path, task, learning_rate=1e30, warmup=0)
    monkeypatch.setattr(sys, "argv", ["routevl", "train", *run.argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("routevl: error: training diverged: ")
    assert "lower learning_rate" in message
    assert not run.model.exists()
    assert not run.predictions.exists()


def test_infinite_features_are_noticed(small_world: SmallWorld, tmp_path: Path, task: str) -> None:
    folder = shutil.copytree(small_world.features[16], tmp_path / "features")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        tensors["pooled"][0] = torch.inf
        with safe_open(shard, framework="pt") as file:
            save_file(tensors, shard, metadata=file.metadata())
    run = new_run(small_world, tmp_path, task, width=16, options={"visual_scale": "none"})
    with pytest.raises(RoutevlError, match="training diverged: "):
        run.changed(features=folder).train()
    assert not run.model.exists()
