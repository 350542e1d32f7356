"""The multi-task setting: items of four data sets, their batches, what is learned, validated and predicted, resumed and split."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import SmallWorld, command_line, run_stage
from runs import Run, assert_same_outcome, batches_of_epoch, exit_status, new_run, signal_at_call, start

from routevl.errors import RoutevlError
from routevl.signals import EXIT_STOPPED
from routevl.tasks.clip_bart.task import CAPTION, DATA_SETS, GQA, NAMES, NLVR2, VQA, _chosen
from routevl.training.optimisation import Optimisation
from routevl.training.order import data_loader, epoch_batches
from routevl.training.trainer import Trainer

MODES = ("no", "yes")  # of mixed_batches


def multitask(world: SmallWorld, root: Path, **changes: Any) -> Run:
    return new_run(world, root, "multitask", **changes)


@pytest.fixture(scope="module")
def trainer(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """One that no test trains with."""
    return multitask(small_world, tmp_path_factory.mktemp("trainer")).trainer()


@pytest.fixture(scope="module")
def finished(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {mixed: multitask(small_world, tmp_path_factory.mktemp("run"), mixed_batches=mixed).train() for mixed in MODES}


# ---------------------------------------------------------------------------------------------------------- items


def test_items_are_those_of_the_prepared_files_with_their_prompts(small_world: SmallWorld, tmp_path: Path) -> None:
    folder, task = small_world.data / "test", multitask(small_world, tmp_path, max_text_tokens=90).trainer().task
    examples, items = task.examples("test"), task.to_predict("test")
    decoded = task.tokenizer.batch_decode(examples["token_ids"][:], skip_special_tokens=True)
    texts = dict(zip(examples["key"], decoded, strict=True))
    for question in json.loads((folder / "questions.json").read_text())["questions"]:
        assert texts[str(question["question_id"])] == f"vqa: {question['question']}"
    for name, question in json.loads((folder / "gqa.json").read_text()).items():
        assert texts[name] == f"gqa: {question['question']}"
    statements = [json.loads(line) for line in (folder / "nlvr2.jsonl").read_text().splitlines()]
    images = dict(zip(items["key"], items["images"], strict=True))
    for statement in statements:
        assert texts[statement["identifier"]] == f"nlvr: {statement['sentence']}"
        assert images[statement["identifier"]] == statement["image_ids"]
    captions = json.loads((folder / "captions.json").read_text())["annotations"]
    assert Counter(examples["data_set"])[CAPTION] == len(captions)
    assert Counter(items["data_set"])[CAPTION] == len({caption["image_id"] for caption in captions})
    assert {texts[str(caption["image_id"])] for caption in captions} == {"caption: "}


def test_prompts_are_a_setting(small_world: SmallWorld, tmp_path: Path) -> None:
    task = multitask(small_world, tmp_path, task_prompts="no").trainer().task
    examples = task.examples("val")
    assert not any(
        text.startswith("vqa") for text in task.tokenizer.batch_decode(examples["token_ids"][:], skip_special_tokens=True)
    )
    start, end = task.tokenizer.bos_token_id, task.tokenizer.eos_token_id
    assert all(ids == [start, end] for ids, n in zip(examples["token_ids"], examples["data_set"], strict=True) if n == CAPTION)


def test_targets_are_answers_of_the_vocabulary_with_their_scores_and_are_cut(small_world: SmallWorld, trainer: Trainer) -> None:
    examples = trainer.examples
    vocabulary = set(json.loads((small_world.data / "answers.json").read_text()))
    for number, targets, scores in zip(examples["data_set"], examples["target_ids"], examples["scores"], strict=True):
        texts = trainer.task.tokenizer.batch_decode(targets, skip_special_tokens=True)
        if number == VQA:
            assert set(texts) <= vocabulary and all(0 < score <= 1 for score in scores) or (texts, scores) == ([""], [0.0])
            assert max(map(len, targets)) <= 10
        else:
            assert scores == [1.0] and (number != NLVR2 or texts[0] in ("true", "false"))


@pytest.mark.parametrize(("file", "content", "name"), [("gqa.json", {}, "gqa"), ("nlvr2.jsonl", None, "nlvr2")])
def test_a_data_set_without_items_is_an_error(
    small_world: SmallWorld, tmp_path: Path, file: str, content: Any, name: str
) -> None:
    data = tmp_path / "data"
    for path in small_world.data.rglob("*.json*"):
        target = data / path.relative_to(small_world.data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (data / "val" / file).write_text("" if content is None else "{}")
    with pytest.raises(RoutevlError, match=f"val: nothing of {name}, without which there is no multi-task learning"):
        multitask(small_world, tmp_path, data=data).trainer()


# -------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("mixed", MODES)
def test_an_epoch_has_every_item_once_in_batches_of_the_official_proportions(
    small_world: SmallWorld, tmp_path: Path, mixed: str
) -> None:
    trainer = multitask(small_world, tmp_path, mixed_batches=mixed, batch_size=12).trainer()
    numbers = numpy.array(trainer.examples["data_set"])
    for epoch in range(2):
        batches = epoch_batches(trainer.task, trainer.examples, epoch)
        assert sorted(numpy.concatenate(batches).tolist()) == list(range(len(numbers)))
        assert len(batches) == trainer.batches_per_epoch
        of_each = [Counter(numbers[batch].tolist()) for batch in batches]
        if mixed == "yes":
            assert max(map(len, of_each)) > 1 and {len(batch) for batch in batches[:-1]} == {12}
            continue
        assert all(len(batch) == 1 for batch in of_each)
        for number, size in {VQA: 12, GQA: 20, NLVR2: 4, CAPTION: 10}.items():
            sizes = [batch[number] for batch in of_each if number in batch]
            assert sizes[:-1] == [size] * (len(sizes) - 1) and sizes[-1] <= size


def test_answers_are_drawn_in_proportion_to_their_scores() -> None:
    draws = numpy.random.default_rng(0).random(6000)
    counts = Counter(_chosen([0.3, 0.9, 0.6], draw) for draw in draws)
    assert [counts[place] / len(draws) for place in range(3)] == pytest.approx([1 / 6, 1 / 2, 1 / 3], abs=0.02)
    assert _chosen([0.3, 0.9, 0.6], None) == 1
    assert _chosen([0.0], 0.7) == 0 and _chosen([1.0], 0.999999) == 0


def test_the_answer_of_an_item_is_a_function_of_seed_and_epoch(small_world: SmallWorld, tmp_path: Path, trainer: Trainer) -> None:
    other = multitask(small_world, tmp_path, seed=6).trainer()

    def draws(of: Trainer, epoch: int) -> list[float]:
        return of.task.of_epoch(of.examples, epoch)["draw"][:]

    assert draws(trainer, 0) == draws(trainer, 0)
    assert len({tuple(of) for of in (draws(trainer, 0), draws(trainer, 1), draws(other, 0))}) == 3


def test_a_batch_of_captions_has_a_loss_over_tokens_and_any_other_one_over_items(trainer: Trainer) -> None:
    model = trainer.model.eval()
    seen = set()
    for batch in batches_of_epoch(trainer):
        [number] = set(batch["task_id"].tolist())
        seen.add(number)
        with torch.inference_mode():
            output = model(**batch)
        if number == CAPTION:
            expected = output["losses"].sum() / output["tokens"].sum()
            assert "scores" not in batch and output["count"] == output["tokens"].sum()
        else:
            expected = (output["losses"] / output["tokens"] * batch["scores"]).mean()
            assert output["count"] == len(batch["scores"])
        assert output["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
        assert batch["image"].dim() == (4 if number == NLVR2 else 3)
    assert seen == {VQA, GQA, NLVR2, CAPTION}


def test_captions_alone_in_a_mixed_batch_count_as_items(small_world: SmallWorld, tmp_path: Path) -> None:
    """As one process's share of it may be, or its last few examples."""
    task = (trainer := multitask(small_world, tmp_path, mixed_batches="yes").trainer()).task
    captions = [example for example in trainer.examples if example["data_set"] == CAPTION][:3]
    output = trainer.model.eval()(**task.collate(captions))
    assert output["count"] == 3
    assert output["loss"].item() == pytest.approx((output["losses"] / output["tokens"]).mean().item(), rel=1e-6)


def test_an_item_does_not_depend_on_its_batch_mates(trainer: Trainer) -> None:
    """Not on texts of another length, nor on a pair of images beside one."""
    model, examples = trainer.model.eval(), trainer.validation
    chosen = [examples[int(members[0])] for members, _ in trainer.task.parts(examples)]
    with torch.inference_mode():
        together = model(**trainer.task.collate(chosen))
        alone = [model(**trainer.task.collate([example])) for example in chosen]
    for name in ("losses", "right", "decided"):
        torch.testing.assert_close(together[name], torch.cat([output[name] for output in alone]), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ validation


def test_validation_counts_what_decoding_would_give(small_world: SmallWorld, finished: dict[str, Run]) -> None:
    """Teacher forcing tells, token by token, whether greedy decoding gives the target."""
    trainer = finished["no"].trainer()
    trainer.task.model.load(finished["no"].model)
    task, model, examples = trainer.task, trainer.model.eval(), trainer.validation
    loader = data_loader(task, examples, trainer.accelerator, 0, batch_size=7)
    with torch.inference_mode():
        found = task.validate([{name: v for name, v in model(**batch).items() if v.dim()} for batch in loader])
    items = examples.remove_columns(["target_ids", "scores"])
    predicted: list[dict[str, Any]] = []
    for batch in data_loader(task, items, trainer.accelerator, 0, batch_size=7):
        predicted += task.predict(model, batch)
    earned: dict[str, list[float]] = {name: [] for name in NAMES}
    for example, entry in zip(examples, predicted, strict=True):
        best = _chosen(example["scores"], None)
        target = task.tokenizer.decode(example["target_ids"][best], skip_special_tokens=True)
        text = str(next(value for name, value in entry.items() if name in ("answer", "prediction", "label", "caption")))
        earned[entry["data_set"]].append(example["scores"][best] * (text.lower() == target))
    for name in ("vqa", "gqa", "nlvr2"):
        assert found[f"val_{name}"] == pytest.approx(100 * numpy.mean(earned[name]), abs=1e-4), name
    assert found["val_score"] == pytest.approx(numpy.mean([found[f"val_{name}"] for name in NAMES]))


def test_a_constant_answer_is_worth_what_is_counted_by_hand(trainer: Trainer) -> None:
    worth = []
    for number in range(len(NAMES)):
        of_this = trainer.validation.filter(lambda example, number=number: example["data_set"] == number)
        chosen = [_chosen(scores, None) for scores in of_this["scores"]]
        targets = [of_item[place] for of_item, place in zip(of_this["target_ids"], chosen, strict=True)]
        if number == CAPTION:
            tokens = [token for target in targets for token in target]
            worth.append(max(Counter(tokens).values()) / len(tokens))
            continue
        scores = [of_item[place] for of_item, place in zip(of_this["scores"], chosen, strict=True)]
        sums = {tuple(t): sum(s for s, other in zip(scores, targets, strict=True) if other == t) for t in targets}
        worth.append(max(sums.values()) / len(targets))
    assert trainer.constant == pytest.approx(100 * numpy.mean(worth))


def test_the_last_epoch_counts_where_it_is_chosen(small_world: SmallWorld, tmp_path: Path) -> None:
    """With a learning rate that first helps and then does harm, the best epoch is another than the last."""
    best, last = (
        multitask(small_world, tmp_path / selection, selection=selection, learning_rate=0.05, epochs=3).train()
        for selection in ("best", "last")
    )
    lines = [line for line in last.lines() if "val_score" in line]
    records = [json.loads((run.model / "run.json").read_text()) for run in (best, last)]
    assert records[1]["best_epoch"] == lines[-1]
    assert records[0]["best_epoch"] == max(lines, key=lambda line: line["val_score"])
    assert (last.model / "task.safetensors").read_bytes() == (last.model / "last" / "task.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------- predictions and runs


def test_predictions_are_official_files_that_the_scorers_read(
    small_world: SmallWorld, finished: dict[str, Run], tmp_path: Path
) -> None:
    run, folder = finished["no"], small_world.data / "test"
    assert run.results() == {name: data_set.file for name, data_set in DATA_SETS.items()}
    answers = json.loads((run.predictions / "vqa.json").read_text())
    questions = json.loads((folder / "questions.json").read_text())["questions"]
    assert [entry["question_id"] for entry in answers] == [question["question_id"] for question in questions]
    assert [e["questionId"] for e in json.loads((run.predictions / "gqa.json").read_text())] == [
        *json.loads((folder / "gqa.json").read_text())
    ]
    with open(run.predictions / "nlvr2.csv", newline="") as file:
        decisions = list(csv.reader(file))
    statements = [json.loads(line)["identifier"] for line in (folder / "nlvr2.jsonl").read_text().splitlines()]
    assert [identifier for identifier, _ in decisions] == statements and {label for _, label in decisions} <= {"True", "False"}
    captions = json.loads((run.predictions / "caption.json").read_text())
    assert {entry["image_id"] for entry in captions} == {
        image["id"] for image in json.loads((folder / "images.json").read_text())
    }
    of_run = {"task": "multitask", "split_folder": folder, "predictions": run.predictions, "output": tmp_path / "scores"}
    run_stage("score", *command_line(of_run))
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())["metrics"]
    assert metrics["average"] == pytest.approx(numpy.mean([metrics[name] for name in NAMES]))


@pytest.mark.parametrize("mixed", MODES)
def test_a_stopped_run_goes_on_to_the_same_bits(
    small_world: SmallWorld, tmp_path: Path, finished: dict[str, Run], mixed: str
) -> None:
    """Told to stop in the middle of the second epoch, with loaders of its own."""
    run = multitask(small_world, tmp_path, mixed_batches=mixed, workers=1)
    steps = run.trainer().batches_per_epoch
    assert exit_status(start(run, signal_at_call(Optimisation, "step", steps + 3, signal.SIGTERM))) == EXIT_STOPPED
    assert exit_status(start(run)) == 0
    assert_same_outcome(finished[mixed], run)


def test_phas_losses_are_added_and_logged(small_world: SmallWorld, tmp_path: Path) -> None:
    """Of mixed batches."""
    options = {"r": 2, "tasks": 4, "loss_weight": 0.5}
    run = multitask(small_world, tmp_path, method="pha", options=options, mixed_batches="yes").train()
    lines = [line for line in run.lines() if "loss" in line]
    assert lines and all(line["instance"] > 0 and line["prototype"] != 0 for line in lines)
    record = json.loads((run.model / "run.json").read_text())
    assert record["settings"]["options"] == options | {"temperature": 0.1} and record["trainable_params_by_part"]["method"] > 0


def test_a_split_without_answers_is_predicted(small_world: SmallWorld, tmp_path: Path, finished: dict[str, Run]) -> None:
    """Of the data sets that it has files of; without captions.json each image of the split has a caption."""
    run, data = finished["no"], tmp_path / "data"
    (data / "own").mkdir(parents=True)
    for name in ("images.json", "questions.json"):
        shutil.copy(small_world.data / "test" / name, data / "own")
    shutil.copy(small_world.data / "answers.json", data)
    options = {name: run.options[name] for name in ("features", "text_backbone", "vision_backbone")}
    folders = {"data": data, "split": "own", "model": run.model, "predictions": tmp_path / "predictions"}
    run_stage("predict", *command_line({**options, **folders}))
    for name, expected in (("vqa.json", None), ("caption.json", None), ("gqa.json", "[]"), ("nlvr2.csv", "")):
        found = (tmp_path / "predictions" / name).read_text()
        assert found.strip() == ((run.predictions / name).read_text().strip() if expected is None else expected)


def test_the_image_is_read_unless_the_run_is_blind(small_world: SmallWorld, tmp_path: Path) -> None:
    for prefix, sees in (("yes", True), ("no", False)):
        trainer = multitask(small_world, tmp_path / prefix, prefix=prefix, options={"routing": "none"}).trainer()
        batch = next(iter(batches_of_epoch(trainer)))
        model = trainer.model.eval()
        with torch.inference_mode():
            losses = model(**batch)["losses"], model(**batch | {"image": batch["image"] + 1})["losses"]
        assert torch.equal(*losses) != sees
