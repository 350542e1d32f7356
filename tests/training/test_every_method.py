"""Every method of the list in training: stopped and resumed to the same bits, predicted from its folder, in two processes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT_ARCHITECTURES, SmallWorld, command_line, run_stage
from runs import TASKS, Run, assert_same_outcome, contents, new_run, own_signals, probe, without_dropout
from test_several_processes import exit_statuses, start_processes

from routevl.methods.table import METHODS, free_options, method_class
from routevl.signals import EXIT_STOPPED

pytestmark = pytest.mark.slow
SMALL = {"vera": {"r": 8}, "fourierft": {"n_frequency": 20}, "compacter": {"r": 4}, "gradient_norm": {"share": 0.2, "batches": 2}}
SMALL |= {"lst": {"reduction": 2, "samples": 8, "dropout": 0.0}}
SMALL |= {"genft": {"h": 4, "dropout": 0.0}}
SMALL |= {"das": {"skipped": 1, "search_epochs": 2, "every": 2, "subsets": 2}}
SMALL |= {name: {"r": 2} for name in ("peft_lora", "lora_bias", "dora")}
SMALL |= {m: {"r": 2, "share": 0.1, "batches": 2, "dropout": 0.0, "drop_path": 0.0} for m in ("spt_lora", "spt_adapter")}
SMALL |= {"adapeft": {"r": 2, "share": 0.2, "batches": 4, "every": 2}}
SMALL |= {name: {"num_virtual_tokens": 3} for name in ("prompt_tuning", "prefix_tuning", "vpt", "vfpt")}
ROUTED = {"r": 2, "routing": "attn", "visual_scale": "tanh"}


def method_run(world: SmallWorld, root: Path, task: str, method: str, **changes: Any) -> Run:
    """A short run of a method, its phase before training included."""
    has_routing = "routing" in free_options(method)
    options = ROUTED if has_routing else SMALL.get(method, {})
    if "freeze_layer_norm=no" in method_class(method).refuses:
        changes |= {"freeze_layer_norm": "yes"}
    run = new_run(world, root, task, method=method, epochs=1, log_every=1, checkpoint_every=100, **changes)
    left_out = {"features"} if "pixels" in method_class(method).needs else set()
    run = Run(root, {name: value for name, value in run.options.items() if name not in left_out} | {"options": options})
    if method_class(method).prepares():
        run = run.changed(prepared=probe(run, root / "prepared.safetensors"))
    return run


def stop_after(run: Run, steps: int) -> None:
    """Train in this process and stop, with a checkpoint, after so many steps."""
    trainer = run.trainer()
    step = trainer._train_step

    def step_and_stop(*arguments: Any) -> None:
        step(*arguments)
        if trainer.step == steps:
            trainer.stop.number = signal.SIGTERM

    trainer._train_step = step_and_stop
    with own_signals(), pytest.raises(SystemExit) as stopped:
        trainer.fit()
    assert stopped.value.code == EXIT_STOPPED


@pytest.mark.parametrize("task", [*TASKS, "multitask"])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_it_ends_in_the_same_bits_and_predicts_from_its_folder(
    small_world: SmallWorld, tmp_path: Path, method: str, task: str
) -> None:
    refuses = method_class(method).refuses
    if refused := refuses.keys() & {task, TEXT_ARCHITECTURES[task]}:
        pytest.skip(refuses[min(refused)])
    whole = method_run(small_world, tmp_path / "whole", task, method).train()
    cut = method_run(small_world, tmp_path / "cut", task, method)
    stop_after(cut, 3)
    cut.train()
    assert_same_outcome(whole, cut)
    names = ("data", "features", "text_backbone", "vision_backbone")
    options = {name: whole.options[name] for name in names if name in whole.options}
    options |= {"model": cut.model, "predictions": tmp_path / "again"}
    run_stage("predict", *command_line(options))
    assert contents(tmp_path / "again") == contents(whole.predictions)


def test_two_processes_learn_what_one_learns(small_world: SmallWorld, tmp_path: Path) -> None:
    """Without dropout; a parameter may have no gradient in one of the processes, such as an embedding's row."""
    backbones = {task: without_dropout(small_world.text[task], tmp_path / task) for task in ("vqa", "multitask")}

    def run_in(folder: Path, method: str) -> Run:
        task = "multitask" if method_class(method).refuses.keys() & {"vqa", TEXT_ARCHITECTURES["vqa"]} else "vqa"
        return method_run(small_world, folder / method, task, method, text_backbone=backbones[task], learning_rate=0.002)

    alone = {method: run_in(tmp_path / "alone", method).train() for method in METHODS}
    together = {method: run_in(tmp_path / "together", method) for method in METHODS}

    def train_all() -> None:
        for run in together.values():  # not by the stage, whose end is the end of the process group
            trainer = run.trainer()
            trainer.fit()
            trainer.write_model(run.model)

    (tmp_path / "log").mkdir()
    status = exit_statuses(start_processes(Run(tmp_path / "log", {"options": {}}), 2, words=["train"], work=train_all))
    assert status == [0, 0], (tmp_path / "log" / "log").read_text()[-2000:]
    for method, run in together.items():
        for ours, theirs in zip(run.lines(), alone[method].lines(), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-2), method
