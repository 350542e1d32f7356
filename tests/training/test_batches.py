"""Batches of texts of about one length, what a step computes, several seeds in one process, and runs that learned nothing."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import SmallWorld, command_line, run_stage
from runs import Run, assert_same_outcome, batches_of_epoch, new_run, own_signals, probe

from routevl.errors import RoutevlError
from routevl.training.order import BATCHES_PER_POOL, grouped_by_length, share_of_padding, turns

REFERENCE = Path(os.environ.get("ROUTEVL_REFERENCE", "."))
needs_reference = pytest.mark.skipif(
    "ROUTEVL_REFERENCE" not in os.environ, reason="ROUTEVL_REFERENCE names no folder of reference data"
)


# ---------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (3, 4), (20, 4), (1003, 4), (1000, 7), (5000, 512)])
def test_grouping_takes_every_example_once(n: int, batch_size: int) -> None:
    lengths = numpy.random.default_rng(0).integers(3, 40, n)
    order = grouped_by_length(lengths, batch_size, numpy.random.default_rng(1))
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == grouped_by_length(lengths, batch_size, numpy.random.default_rng(1)).tolist()
    assert n < 4 or order.tolist() != grouped_by_length(lengths, batch_size, numpy.random.default_rng(2)).tolist()


def test_grouped_batches_are_alike_within_and_shuffled_among_themselves() -> None:
    lengths = numpy.random.default_rng(0).integers(3, 60, 8 * BATCHES_PER_POOL * 4)
    order = grouped_by_length(lengths, 8, numpy.random.default_rng(1))
    means, spans = zip(*((batch.mean(), batch.max() - batch.min()) for batch in lengths[order].reshape(-1, 8)), strict=True)
    assert max(spans) <= 8 and numpy.mean(spans) < 2
    assert abs(numpy.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25  # neighbours are no more alike than others


def test_share_of_padding_counts_what_batches_pad() -> None:
    lengths = numpy.array([2, 5, 5, 1, 4])
    batches = [numpy.array([0, 1]), numpy.array([2, 3]), numpy.array([4])]
    assert share_of_padding(lengths, batches) == pytest.approx(1 - 17 / (2 * 5 + 2 * 5 + 4))


def test_every_batch_has_its_turn_and_each_epoch_an_order_of_its_own() -> None:
    orders = [turns((5, 6, 2, 4), epoch) for epoch in range(5)]
    assert all(Counter(order) == {0: 5, 1: 6, 2: 2, 3: 4} for order in orders)
    assert len({tuple(order) for order in orders}) == 5 and orders[0] == turns((5, 6, 2, 4), 0)


@needs_reference
def test_data_sets_take_the_recorded_turns() -> None:
    with numpy.load(REFERENCE / "systems/clip_bart.npz") as tensors:
        for epoch in range(3):
            assert turns((5, 6, 2, 4), epoch) == tensors[f"task_order.epoch{epoch}"].tolist()


@needs_reference
@pytest.mark.parametrize("kind", ["captions", "questions"])
def test_real_texts_have_less_than_a_tenth_of_padding(kind: str) -> None:
    """At the paper's batch sizes; without grouping it is more than a third."""
    if kind == "captions":
        content = json.loads(gzip.decompress((REFERENCE / "coco/captions_val2017.json.gz").read_bytes()))
        texts, batch_size = [entry["caption"] for entry in content["annotations"]], 40
    else:
        content = json.loads(gzip.decompress((REFERENCE / "vqav2/questions_subset.json.gz").read_bytes()))
        texts, batch_size = [entry["question"] for entry in content["questions"]], 512
    lengths = numpy.array([len(text.split()) for text in texts])
    generator = numpy.random.default_rng(0)
    cut = range(batch_size, len(lengths), batch_size)
    assert share_of_padding(lengths, numpy.split(generator.permutation(len(lengths)), cut)) > 0.33
    assert share_of_padding(lengths, numpy.split(grouped_by_length(lengths, batch_size, generator), cut)) < 0.1


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_grouping_is_a_setting_that_changes_the_batches_and_is_recorded(
    small_world: SmallWorld, tmp_path: Path, task: str
) -> None:
    padding = {}
    for grouped in ("yes", "no"):
        run = new_run(small_world, tmp_path / grouped, task, group_by_length=grouped).train()
        assert json.loads((run.model / "run.json").read_text())["settings"]["group_by_length"] == (grouped == "yes")
        padding[grouped] = json.loads((run.model / "timing.json").read_text())["padding"]
        trainer = run.trainer()
        masks = [
            batch["attention_mask"] for epoch in range(trainer.settings.epochs) for batch in batches_of_epoch(trainer, epoch)
        ]
        of_epochs = numpy.array_split([[mask.numel(), mask.sum().item()] for mask in masks], trainer.settings.epochs)
        counted = [1 - sums[1] / sums[0] for sums in (numpy.sum(of_epoch, axis=0) for of_epoch in of_epochs)]
        assert padding[grouped] == pytest.approx(numpy.mean(counted), abs=1e-4)
    assert padding["yes"] < padding["no"]
    with pytest.raises(RoutevlError, match="differ, first in"):
        run_stage("compare", tmp_path / "yes" / "model", tmp_path / "no" / "model")


# ------------------------------------------------------------------------------------------------- work of a step


@pytest.mark.parametrize("prefix", ["yes", "no"])
def test_the_head_sees_only_what_is_learned_from(small_world: SmallWorld, tmp_path: Path, prefix: str) -> None:
    """Neither prefix, padding nor the last position: as many hidden states as there are tokens to predict."""
    trainer = new_run(small_world, tmp_path, "caption", prefix=prefix, max_text_tokens=60).trainer()
    batch = next(iter(batches_of_epoch(trainer)))
    seen: list[torch.Size] = []
    head = trainer.task.model.text_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    trainer.model(**batch)
    handle.remove()
    to_predict = int((batch["attention_mask"].sum(-1) - 1).sum())
    assert seen == [(1, to_predict, head.out_features)]
    assert to_predict < batch["input_ids"][:, 1:].numel()
    assert not head._forward_pre_hooks  # generation has logits everywhere again


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_compiled_layers_have_the_same_gradients(small_world: SmallWorld, tmp_path: Path, task: str) -> None:
    """On batches of several lengths; and a run with them is saved and loaded as others are."""
    run = new_run(small_world, tmp_path / "compiled", task, compile="yes")
    found = []
    for trainer in (new_run(small_world, tmp_path / "plain", task).trainer(), run.trainer()):
        layers = [m for m in trainer.task.model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
        assert len(layers) == trainer.settings.compile * trainer.task.model.text_model.config.num_hidden_layers
        trainer.model.eval()  # dropout is drawn differently
        for batch in batches_of_epoch(trainer):
            trainer.model(**batch)["loss"].backward()
        found.append([parameter.grad for parameter in trainer.optimisation.parameters])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    run.train()
    assert json.loads((run.model / "run.json").read_text())["settings"]["compile"] is True
    assert run.trainer().load_model(run.model)


# ----------------------------------------------------------------------------------------- several seeds in a process


def of_seeds(world: SmallWorld, folder: Path, task: str, seeds: list[int], **changes: Any) -> list[str]:
    """A command line that trains them in one process."""
    options = {**new_run(world, folder, task, **changes).options, "seed": seeds}
    for kind in ("model", "predictions", "checkpoint"):
        options[kind] = [str(folder / str(seed) / kind) for seed in seeds]
    return command_line(options)


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_seeds_of_one_process_end_in_the_bits_of_their_own(small_world: SmallWorld, tmp_path: Path, task: str) -> None:
    with own_signals():
        run_stage("train", *of_seeds(small_world, tmp_path / "together", task, [3, 1, 2]))
    for seed in (1, 2, 3):
        alone = new_run(small_world, tmp_path / f"alone{seed}", task, seed=seed).train()
        together = Run(tmp_path / "together" / str(seed), alone.options)
        assert_same_outcome(together, alone)
        assert not together.checkpoint.parent.exists()


def test_so_do_their_phases_before_training(small_world: SmallWorld, tmp_path: Path) -> None:
    seeds, method = [2, 1], {"method": "gradient_norm", "options": {"share": 0.02}}
    prepared = [tmp_path / f"{seed}.safetensors" for seed in seeds]
    options = {
        name: value for name, value in new_run(small_world, tmp_path, "vqa", **method).options.items() if name != "log_every"
    }
    of_each = {"seed": seeds, "output": prepared, "checkpoint": [tmp_path / f"{seed}.probe" for seed in seeds]}
    with own_signals():
        run_stage("probe", *command_line({**options, **of_each}))
        run_stage("train", *of_seeds(small_world, tmp_path / "together", "vqa", seeds, prepared=prepared, **method))
    assert prepared[0].read_bytes() != prepared[1].read_bytes()
    for seed, found in zip(seeds, prepared, strict=True):
        alone = new_run(small_world, tmp_path / f"alone{seed}", "vqa", seed=seed, **method)
        alone = alone.changed(prepared=probe(alone, tmp_path / f"alone{seed}.safetensors"))
        assert Path(alone.options["prepared"]).read_bytes() == found.read_bytes()
        assert_same_outcome(Run(tmp_path / "together" / str(seed), alone.options), alone.train())
        assert not (tmp_path / f"{seed}.probe").exists()


def test_a_job_of_several_seeds_goes_on_although_its_outputs_were_deleted(small_world: SmallWorld, tmp_path: Path) -> None:
    """Snakemake deletes all of them where one is not made: the checkpoints of finished seeds must outlive that."""
    words = of_seeds(small_world, tmp_path / "job", "vqa", [1, 2])
    second = Run(tmp_path / "job" / "2", {})
    second.checkpoint.parent.mkdir(parents=True)
    second.checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(RoutevlError, match="damaged checkpoint"), own_signals():
        run_stage("train", *words)
    first = Run(tmp_path / "job" / "1", new_run(small_world, tmp_path, "vqa", seed=1).options)
    kept = (first.model / "adapter_model.safetensors").read_bytes()
    for folder in (first.model, first.predictions):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
    second.checkpoint.unlink()
    with own_signals():
        run_stage("train", *words)
    assert (first.model / "adapter_model.safetensors").read_bytes() == kept
    assert (second.model / "run.json").exists() and not first.checkpoint.parent.exists()


def test_folders_and_seeds_must_be_equally_many(small_world: SmallWorld, tmp_path: Path) -> None:
    words = of_seeds(small_world, tmp_path, "vqa", [1, 2])
    words.insert(words.index("--seed") + 1, "7")
    with pytest.raises(RoutevlError, match="3 --seed, 2 --model, 2 --predictions, 2 --checkpoint: one for each run"):
        run_stage("train", *words)
    words = of_seeds(small_world, tmp_path, "vqa", [1, 2])
    words[words.index("--model") + 2] = words[words.index("--model") + 1]
    with pytest.raises(RoutevlError, match=r"--model (\S+) \1: each run needs one of its own"):
        run_stage("train", *words)


# ---------------------------------------------------------------------------------------------- learned, or nothing


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_a_run_that_learned_nothing_says_so(
    small_world: SmallWorld, tmp_path: Path, task: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = new_run(small_world, tmp_path / "nothing", task, learning_rate=1e-12).train()
    record = json.loads((run.model / "run.json").read_text())
    assert record["learned"] is False
    said = capfd.readouterr().out
    [(metric, constant)] = record["constant"].items()
    assert f"it has learned nothing: its best {metric} is " in said and f"a constant answer has {constant:.4f}" in said


def test_a_run_that_learned_says_nothing_of_it(
    small_world: SmallWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = new_run(small_world, tmp_path, "caption", method="full", epochs=8, learning_rate=0.005).train()
    assert json.loads((run.model / "run.json").read_text())["learned"] is True
    assert "learned nothing" not in capfd.readouterr().out


@pytest.mark.parametrize(("task", "values"), [("vqa", {39.0: False, 40.0: False, 40.03: False, 40.1: True}),
                                              ("caption", {4.1: False, 4.0: False, 3.997: False, 3.99: True})])  # fmt: skip
def test_learned_is_better_than_a_constant_answer_by_more_than_a_thousandth(
    small_world: SmallWorld, tmp_path: Path, task: str, values: dict[float, bool]
) -> None:
    trainer = new_run(small_world, tmp_path, task).trainer()
    trainer.constant = 40.0 if task == "vqa" else 4.0
    for value, learned in values.items():
        trainer.best_epoch = {trainer.task.selection[0]: value}
        assert trainer.learned is learned


def test_the_best_constant_answer_is_the_best_of_all(small_world: SmallWorld, tmp_path: Path) -> None:
    task = new_run(small_world, tmp_path, "vqa").trainer().task
    examples = task.examples("val")
    scores = torch.stack([row for start in range(len(examples)) for row in task.collate([examples[start]])["answer_scores"]])
    assert task.constant(examples) == pytest.approx(100 * scores.double().mean(0).max().item())


def test_the_unigram_loss_is_that_of_the_tokens_own_frequencies(small_world: SmallWorld, tmp_path: Path) -> None:
    task = new_run(small_world, tmp_path, "caption").trainer().task
    examples = task.examples("val")
    tokens = [token for ids in examples["token_ids"] for token in ids[1:]]
    loss = -sum(math.log(tokens.count(token) / len(tokens)) for token in tokens) / len(tokens)
    assert task.constant(examples) == pytest.approx(loss)
