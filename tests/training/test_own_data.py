"""Data as people have it: new questions and images without answers, and a part of the training split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SmallWorld, command_line, run_stage
from runs import TASKS, Run, new_run
from tiny_project import PROJECT, row

from routevl.errors import RoutevlError
from routevl.sheet import COLUMNS


@pytest.fixture(scope="module")
def trained(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each task, of one epoch."""
    return {task: new_run(small_world, tmp_path_factory.mktemp(task), task, epochs=1).train() for task in TASKS}


# ---------------------------------------------------------------------------------------------- prediction


@pytest.fixture
def mine(small_world: SmallWorld, tmp_path: Path) -> Path:
    """A split of four images alone, beside the vocabulary."""
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    shutil.copy(small_world.data / "answers.json", folder.parent)
    images = json.loads((small_world.data / "test/images.json").read_text())[:4]
    (folder / "images.json").write_text(json.dumps([{"id": image["id"], "file_name": image["file_name"]} for image in images]))
    return folder


def predict(run: Run, split: Path) -> list[dict[str, Any]]:
    options = {name: run.options[name] for name in ("features", "text_backbone", "vision_backbone")}
    options |= {"data": split.parent, "split": split.name, "model": run.model, "predictions": split.parent / "predictions"}
    run_stage("predict", *command_line(options))
    return json.loads((split.parent / "predictions/results.json").read_text())


def test_h25_questions_without_annotations_are_answered(small_world: SmallWorld, trained: dict[str, Run], mine: Path) -> None:
    """As they are with annotations, which no prediction looks at."""
    image_ids = {image["id"] for image in json.loads((mine / "images.json").read_text())}
    questions = json.loads((small_world.data / "test/questions.json").read_text())["questions"]
    questions = [question for question in questions if question["image_id"] in image_ids]
    (mine / "questions.json").write_text(json.dumps({"questions": questions}))
    asked = {question["question_id"] for question in questions}
    expected = [answer for answer in trained["vqa"].results() if answer["question_id"] in asked]
    assert predict(trained["vqa"], mine) == expected and len(expected) == 12
    assert sorted(path.name for path in mine.iterdir()) == ["images.json", "questions.json"]


def test_h25_images_without_captions_are_captioned(trained: dict[str, Run], mine: Path) -> None:
    image_ids = [image["id"] for image in json.loads((mine / "images.json").read_text())]
    expected = [caption for caption in trained["caption"].results() if caption["image_id"] in image_ids]
    assert predict(trained["caption"], mine) == expected and len(expected) == 4
    captions = {"annotations": [{"id": 1, "image_id": image_ids[2], "caption": "a circle"}]}
    (mine / "captions.json").write_text(json.dumps(captions))
    assert predict(trained["caption"], mine) == expected[2:3]  # where some have captions, those are to be scored


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("vqa", "questions.json", None, "questions.json: no such file"),
        ("vqa", "questions.json", {"questions": []}, "questions.json: no questions, so nothing to answer"),
        ("vqa", "questions.json", {"questions": [{"question_id": 1, "image_id": 1}]}, "not a VQAv2 questions file"),
        ("caption", "images.json", [], "images.json: no images, so nothing to caption"),
        ("caption", "images.json", [{"id": "1"}], "images.json: not a list of images"),
    ],
)
def test_h25_a_split_with_nothing_to_predict(
    trained: dict[str, Run], mine: Path, task: str, file: str, content: Any, message: str
) -> None:
    if content is not None:
        (mine / file).write_text(json.dumps(content))
    with pytest.raises(RoutevlError, match=message):
        predict(trained[task], mine)


# ------------------------------------------------------------------------------------------------ training


def state(run: Run) -> dict[str, str]:
    """Digests of the last step's weights and optimiser."""
    return json.loads((run.model / "last/state.json").read_text())


def test_the_first_examples_of_the_training_split_alone(small_world: SmallWorld, tmp_path: Path) -> None:
    """As if the split had no others."""
    run = new_run(small_world, tmp_path / "few", "vqa", epochs=1).changed(max_train_examples=7).train()
    data = shutil.copytree(small_world.data, tmp_path / "data")
    for name in ("questions", "annotations"):
        content = json.loads((data / f"train/{name}.json").read_text())
        (data / f"train/{name}.json").write_text(json.dumps(content | {name: content[name][:7]}))
    short = new_run(small_world, tmp_path / "short", "vqa", epochs=1).changed(data=data).train()
    assert state(run) == state(short)
    assert run.lines()[-1]["step"] == 2  # batches of five
    assert json.loads((run.model / "run.json").read_text())["settings"]["max_train_examples"] == 7


@pytest.mark.parametrize("most", ["none", 10_000])
def test_all_examples_are_as_if_nothing_were_said(
    small_world: SmallWorld, trained: dict[str, Run], tmp_path: Path, most: str | int
) -> None:
    run = new_run(small_world, tmp_path, "vqa", epochs=1).changed(max_train_examples=most).train()
    assert state(run) == state(trained["vqa"])
    settings = [json.loads((r.model / "run.json").read_text())["settings"] for r in (run, trained["vqa"])]
    assert "max_train_examples" not in settings[1]  # nor is it in the record of an earlier version's run
    assert settings[0] == settings[1] | ({} if most == "none" else {"max_train_examples": most})


def test_h09_answers_are_all_that_is_learned_from(small_world: SmallWorld, trained: dict[str, Run], tmp_path: Path) -> None:
    """Annotations as OK-VQA's and VizWiz's: no usual answer, no types or others."""
    data = shutil.copytree(small_world.data, tmp_path / "data")
    for split in ("train", "val", "test"):
        content = json.loads((data / split / "annotations.json").read_text())
        for annotation in content["annotations"]:
            annotation["answer_type"] = "unanswerable"
            del annotation["multiple_choice_answer"], annotation["question_type"]
        (data / split / "annotations.json").write_text(json.dumps(content))
    run = new_run(small_world, tmp_path / "run", "vqa", epochs=1).changed(data=data).train()
    assert state(run) == state(trained["vqa"])


def test_numbers_of_the_command_line_are_read_as_people_write_them(
    small_world: SmallWorld, trained: dict[str, Run], tmp_path: Path
) -> None:
    numbers = {"epochs": "1.0", "batch_size": "5e0", "learning_rate": "2E-2", "threads": "1e0", "checkpoint_every": "0.3e1"}
    run = new_run(small_world, tmp_path, "vqa").changed(options={"r": "2.0"}, **numbers).train()
    records = [json.loads((r.model / "run.json").read_text()) for r in (run, trained["vqa"])]
    assert records[0]["settings"] == records[1]["settings"] and state(run) == state(trained["vqa"])
    for option in ({"epochs": "1.5"}, {"batch_size": "5e-1"}, {"options": {"r": "1e400"}}):
        with pytest.raises(RoutevlError, match="expected integer"):
            new_run(small_world, tmp_path / "wrong", "vqa").changed(**option).train()


# ---------------------------------------------------------------------------------------------- planning


@pytest.mark.parametrize("routing", ["mul", "none"])
def test_the_plan_counts_what_a_run_trains_the_visual_projection_too(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, routing: str
) -> None:
    """The method's own, or the task's."""
    monkeypatch.syspath_prepend(PROJECT / "workflow")
    import plan

    run = new_run(small_world, tmp_path / "run", "caption", epochs=1, options={"routing": routing}).train()
    record = json.loads((run.model / "run.json").read_text())
    assert record["trainable_params_by_part"]["visual_projection"] == 24 * 16 + 16
    options = "r=2 lora_alpha=4 visual_scale=tanh routing=" + routing
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text("\t".join(COLUMNS) + "\n" + row("one", "caption", options).replace("r=2 lora_alpha=2 ", "") + "\n")
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text()) | {"experiments": str(sheet), "results": str(tmp_path)}
    config["methods"] = {}
    config["plan"] = {"text": {"gpt2": {"layers": 2, "width": 16}}, "vision": {"vit": {"width": 24}}}
    planned = plan.Plan(config)
    assert planned.cost("train", {"run": "one_seed1"}).disk == 2 * 4 * record["trainable_params"]
    assert set(planned.lacking) == {
        "plan.train_examples.caption", "plan.val_examples.caption", "plan.test_items.caption",
        "plan.text.gpt2.samples_per_second", "plan.text.gpt2.predictions_per_second",
    }  # fmt: skip
