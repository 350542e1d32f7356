"""Wrong input: one clear line on stderr, exit status 2, nothing half-written."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallWorld, command_line, run_options, run_stage
from dry_runs import change_configuration, dry_run, expect_message

from routevl import cli

REPOSITORY = Path(__file__).parents[2]
Fails = Callable[..., str]


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Run `routevl <arguments>`, which must end as bad input does; returns the message."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["routevl", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        lines = capfd.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("routevl: error: ")] == lines[-1:]
        assert not any("Traceback" in line or line.startswith("usage:") for line in lines)
        return lines[-1].removeprefix("routevl: error: ")

    return run


@pytest.fixture
def train_fails(small_world: SmallWorld, tmp_path: Path, fails: Fails) -> Fails:
    """Train a small run with some options changed, which must fail and leave nothing; returns the message."""

    def run(task: str = "vqa", **changes: Any) -> str:
        message = fails("train", *train_command(small_world, tmp_path / "run", task, **changes))
        assert set(files_of(tmp_path / "run")) <= {"lock"}
        return message

    return run


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def train_command(world: SmallWorld, folder: Path, task: str, **changes: Any) -> list[str]:
    outputs = {name: folder / name for name in ("model", "predictions", "checkpoint")}
    return command_line(run_options(world, task, **changes) | outputs)


@pytest.fixture(scope="module")
def trained(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `predictions` of a small VQA run."""
    folder = tmp_path_factory.mktemp("trained")
    run_stage("train", *train_command(small_world, folder, "vqa", epochs=1))
    return folder


def predict_command(world: SmallWorld, trained: Path, output: Path, **changes: Any) -> list[str]:
    names = ("data", "features", "text_backbone", "vision_backbone")
    options = {name: value for name, value in run_options(world, "vqa").items() if name in names}
    return command_line(options | {"model": trained / "model", "predictions": output} | changes)


# ------------------------------------------------------------------------------------------------- options


def test_unknown_stage_and_no_stage(fails: Fails) -> None:
    assert "'trian'" in fails("trian")
    assert "stage" in fails()


@pytest.mark.parametrize("stage", list(cli.STAGES))
def test_unknown_option(fails: Fails, stage: str) -> None:
    """In every stage, whether or not its own options are complete; and abbreviations are unknown options."""
    assert fails(stage, "--use-routing", "yes")


def test_unknown_option_is_named(small_world: SmallWorld, tmp_path: Path, fails: Fails) -> None:
    command = train_command(small_world, tmp_path / "run", "vqa")
    assert "--use-routing" in fails("train", *command, "--use-routing", "yes")
    assert "--route" in fails("train", *command, "--route", "mul")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "prefix"}, "--method: invalid choice: 'prefix'"),
        (
            {"options": {"routing": "multiply"}},
            "settings: method lora: routing is 'multiply', expected one of none, mul, add, attn, expand",
        ),
        ({"options": {"visual_scale": "sigmoid"}}, "visual_scale is 'sigmoid', expected one of none, tanh, layer_norm"),
        ({"options": {"r": 0}}, "settings: method lora: r is 0, expected 1 or more"),
        ({"options": {"r": -4}}, "r is -4, expected 1 or more"),
        ({"options": {"r": "four"}}, "r is 'four', expected integer"),
        ({"options": {"r": 2.5}}, "r is '2.5', expected integer"),
        ({"options": {"lora_alpha": 0}}, "lora_alpha is 0.0, expected more than 0"),
        ({"options": {"lora_alpha": "nan"}}, "lora_alpha is nan, expected a finite number"),
        ({"options": {"lora_dropout": 1}}, "lora_dropout is 1.0, expected less than 1"),
        ({"options": {"rank": 4}}, "settings: method lora: no option 'rank' (there are r, routing, visual_scale"),
        ({"options": {"": 4}}, "--options: '=4' is not of the form key=value"),
        ({"options": "r"}, "--options: 'r' is not of the form key=value"),
        ({"method": "adapter", "options": {"lora_alpha": 4}}, "method adapter: no option 'lora_alpha'"),
        ({"method": "ia3", "options": {"r": 4}}, "method ia3: no option 'r' (there are target_modules, feedforward_modules)"),
        ({"method": "bitfit", "options": {"r": 4}}, "method bitfit: no option 'r' (there are none)"),
        ({"method": "dora", "options": {"use_dora": "no"}}, "in the method dora, it cannot be set"),
        ({"epochs": 0}, "settings: epochs is 0, expected 1 or more"),
        ({"epochs": 1.5}, "epochs is '1.5', expected integer"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"prediction_batch_size": 0}, "prediction_batch_size is 0, expected 1 or more"),
        ({"beams": 0}, "beams is 0, expected 1 or more"),
        ({"learning_rate": -1}, "learning_rate is -1.0, expected more than 0"),
        ({"learning_rate": "nan"}, "learning_rate is nan, expected a finite number"),
        ({"learning_rate": "inf"}, "learning_rate is inf, expected a finite number"),
        ({"warmup": -1}, "warmup is -1.0, expected 0 or more"),
        ({"warmup": "nan"}, "warmup is nan, expected a finite number"),
        ({"weight_decay": "nan"}, "weight_decay is nan, expected a finite number"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"seed": 2**32}, "seed is 4294967296, expected less than 4294967296"),
        ({"max_text_tokens": 2}, "max_text_tokens is 2, expected 3 or more"),
        ({"max_text_tokens": 4000}, "max_text_tokens 4000 is too large"),
        ({"max_new_tokens": 4000}, "max_new_tokens 4000 is too large"),
        ({"control": "zeros"}, "--control: invalid choice: 'zeros'"),
        ({"prefix": "maybe"}, "--prefix: invalid choice: 'maybe'"),
        ({"task": "retrieval"}, "--task: invalid choice: 'retrieval'"),
        ({"visual_tokens": "regions"}, "--visual-tokens: invalid choice: 'regions'"),
        ({"precision": "float16"}, "--precision: invalid choice: 'float16'"),
        ({"threads": 0}, "--threads: 0 is no integer of 1 or more"),
        ({"workers": -1}, "--workers: -1 is no integer of 0 or more"),
        ({"checkpoint_every": 0}, "--checkpoint-every: 0 is no"),
        ({"log_every": 0}, "--log-every: 0 is no"),
    ],
    ids=str,
)
def test_bad_option_of_train(
    small_world: SmallWorld, tmp_path: Path, fails: Fails, changes: dict[str, Any], expected: str
) -> None:
    task = "caption" if "max_new_tokens" in changes else "vqa"
    command = train_command(small_world, tmp_path / "run", task)
    assert expected in fails("train", *command, *command_line(changes))
    assert set(files_of(tmp_path / "run")) <= {"lock"}


# --------------------------------------------------------------------------------------------- inputs of training


@pytest.mark.parametrize("name", ["data", "features", "text_backbone", "vision_backbone"])
def test_missing_input_is_named(train_fails: Fails, tmp_path: Path, name: str) -> None:
    missing = tmp_path / "not" / "there"
    assert str(missing) in train_fails(**{name: missing})


@pytest.mark.parametrize(
    "kind", ["answers.json", "train/questions.json", "train/annotations.json", "val/questions.json", "test/questions.json"]
)
@pytest.mark.parametrize("damage", ["missing", "malformed", "another type", "truncated"])
def test_wrong_data_file_is_named(train_fails: Fails, small_world: SmallWorld, tmp_path: Path, kind: str, damage: str) -> None:
    data = shutil.copytree(small_world.data, tmp_path / "data")
    path = data / kind
    text = path.read_text()
    path.unlink()
    if damage != "missing":
        path.write_text({"malformed": "{'a': 1}", "another type": "17", "truncated": text[:-30]}[damage])
    assert str(path) in train_fails(data=data)


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_data_without_examples(train_fails: Fails, small_world: SmallWorld, tmp_path: Path, task: str) -> None:
    data = shutil.copytree(small_world.data, tmp_path / "data")
    for name, key in (("questions", "questions"), ("annotations", "annotations"), ("captions", "annotations")):
        path = data / "train" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: []}))
    assert "nothing to learn" in train_fails(task, data=data)


def test_empty_answer_vocabulary(train_fails: Fails, small_world: SmallWorld, tmp_path: Path) -> None:
    data = shutil.copytree(small_world.data, tmp_path / "data")
    (data / "answers.json").write_text("[]")
    assert "a list of at least one answer" in train_fails(data=data)


def test_features_of_another_backbone(train_fails: Fails, small_world: SmallWorld) -> None:
    message = train_fails(features=small_world.features[24])
    assert str(small_world.features[24]) in message
    assert "made by the backbone" in message


@pytest.mark.parametrize("lacking", ["train", "val", "test"])
def test_features_that_lack_a_split(train_fails: Fails, small_world: SmallWorld, tmp_path: Path, lacking: str) -> None:
    lists = [small_world.data / name / "images.json" for name in ("train", "val", "test") if name != lacking]
    shard = tmp_path / "features" / "shard-00000-of-00001.safetensors"
    run_stage("extract", "--images", *lists, "--backbone", small_world.vision[16], "--output", shard)
    run_stage("index-features", "--shards", shard, "--output", shard.parent / "index.json")
    assert "no features in" in train_fails(features=shard.parent)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_feature_shard(train_fails: Fails, small_world: SmallWorld, tmp_path: Path, damage: str) -> None:
    features = shutil.copytree(small_world.features[16], tmp_path / "features")
    shard = sorted(features.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    assert str(shard) in train_fails(features=features)


def test_text_backbone_of_the_wrong_kind(train_fails: Fails, small_world: SmallWorld) -> None:
    gpt2, roberta = small_world.text["caption"], small_world.text["vqa"]
    assert f"backbone {gpt2}: a gpt2 model; needs a bidirectional text encoder" in train_fails(text_backbone=gpt2)
    assert f"backbone {roberta}: a roberta model; needs a causal language model" in train_fails("caption", text_backbone=roberta)


def test_pickled_weights_are_refused(train_fails: Fails, small_world: SmallWorld, tmp_path: Path) -> None:
    folder = shutil.copytree(small_world.text["vqa"], tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = train_fails(text_backbone=folder)
    assert "no *.safetensors weights" in message
    assert "pytorch_model.bin" in message


def test_outputs_below_a_file(small_world: SmallWorld, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "file").touch()
    for name in ("model", "predictions", "checkpoint"):
        command = train_command(small_world, tmp_path / "run", "vqa", epochs=1)
        assert str(tmp_path / "file") in fails("train", *command, f"--{name}", tmp_path / "file" / "below")


# ---------------------------------------------------------------------------------------- predicting and comparing


def test_model_folder_that_is_none(small_world: SmallWorld, trained: Path, tmp_path: Path, fails: Fails) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "not there"):
        command = predict_command(small_world, trained, tmp_path / "predictions", model=folder)
        assert str(folder) in fails("predict", *command)
        assert str(folder) in fails("compare", trained / "model", folder)
    assert not (tmp_path / "predictions").exists()


def test_adapter_of_another_text_model(small_world: SmallWorld, trained: Path, tmp_path: Path, fails: Fails) -> None:
    other = shutil.copytree(small_world.text["vqa"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    message = fails("predict", *predict_command(small_world, trained, tmp_path / "predictions", text_backbone=other))
    assert "an adapter of another model: it was trained with the text_backbone of fingerprint" in message
    assert not (tmp_path / "predictions").exists()


def test_adapter_of_another_vision_model(small_world: SmallWorld, trained: Path, tmp_path: Path, fails: Fails) -> None:
    changes = {"features": small_world.features[24], "vision_backbone": small_world.vision[24]}
    message = fails("predict", *predict_command(small_world, trained, tmp_path / "predictions", **changes))
    assert "an adapter of another model: it was trained with the vision_backbone of fingerprint" in message


def test_adapter_of_another_answer_vocabulary(small_world: SmallWorld, trained: Path, tmp_path: Path, fails: Fails) -> None:
    """As long as its own, so that nothing else would notice."""
    data = shutil.copytree(small_world.data, tmp_path / "data")
    answers = json.loads((data / "answers.json").read_text())
    (data / "answers.json").write_text(json.dumps(answers[::-1]))
    message = fails("predict", *predict_command(small_world, trained, tmp_path / "predictions", data=data))
    assert "trained with the answers" in message
    assert str(data / "answers.json") in message


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "task.safetensors", "run.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "of another rank"])
def test_damaged_model_folder(
    small_world: SmallWorld, trained: Path, tmp_path: Path, fails: Fails, file: str, damage: str
) -> None:
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "truncated":
        (folder / file).write_bytes(content[: len(content) // 2])
    if damage == "of another rank":
        record = json.loads((trained / "model" / "run.json").read_text())
        record["settings"]["options"] |= {"r": 3}
        (folder / file).write_bytes(content)
        (folder / "run.json").write_text(json.dumps(record))
    assert str(folder) in fails("predict", *predict_command(small_world, trained, tmp_path / "predictions", model=folder))
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "task.safetensors", "training.jsonl", "last/state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_compare_with_a_damaged_model_folder(trained: Path, tmp_path: Path, fails: Fails, file: str, damage: str) -> None:
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "truncated":
        (folder / file).write_bytes(content[: len(content) // 2])
    assert str(folder) in fails("compare", trained / "model", folder)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"settings": {}, "inputs": {}}',
        '{"settings": [], "inputs": {}}',
        '{"settings": {"options": {}}, "inputs": {}}',
        '{"settings": {"method": [], "options": [1]}, "inputs": {}}',
    ],
)
def test_run_json_of_something_else(small_world: SmallWorld, trained: Path, tmp_path: Path, fails: Fails, content: str) -> None:
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    (folder / "run.json").write_text(content)
    message = fails("predict", *predict_command(small_world, trained, tmp_path / "predictions", model=folder))
    assert str(folder / "run.json") in message


def test_split_that_is_none(small_world: SmallWorld, trained: Path, tmp_path: Path, fails: Fails) -> None:
    command = predict_command(small_world, trained, tmp_path / "predictions", split="testt")
    assert str(small_world.data / "testt") in fails("predict", *command)


def test_startup_log_of_something_else(tmp_path: Path, fails: Fails) -> None:
    log = tmp_path / "log"
    for content in (None, "", "no JSON\n", "{}\n", "[]\n"):
        if content is not None:
            log.write_text(content)
        assert str(log) in fails("startup-report", "--log", log, "--wall-seconds", 1, "--cores", 1)
    log.write_text('{"stage": "train", "seconds": 1.0}\n')
    for name, value in (("--wall-seconds", 0), ("--cores", 0)):
        options = {"--wall-seconds": 1, "--cores": 1} | {name: value}
        assert name in fails("startup-report", "--log", log, *(word for pair in options.items() for word in pair))


# ------------------------------------------------------------------------------------------------- data and images


def test_annotations_that_name_a_missing_image(small_world: SmallWorld, tmp_path: Path, fails: Fails) -> None:
    world = shutil.copytree(small_world.root / "world", tmp_path / "world")
    image = sorted((world / "train" / "images").iterdir())[4]
    image.unlink()
    message = fails("prepare", "--sources", sources(world), "--minimum-answer-count", 1, "--output", tmp_path / "data")
    assert image.name in message
    assert "no such image" in message
    assert not (tmp_path / "data").exists()


def sources(world: Path) -> str:
    files = {name: f"{name}.json" for name in ("questions", "annotations", "captions")} | {"images": "images"}
    return json.dumps(
        [
            {"split": split, **{key: str(world / split / name) for key, name in files.items()}}
            for split in ("train", "val", "test")
        ]
    )


@pytest.mark.parametrize("damage", ["truncated", "missing", "text"])
def test_undecodable_image(small_world: SmallWorld, tmp_path: Path, fails: Fails, damage: str) -> None:
    images = json.loads((small_world.data / "val" / "images.json").read_text())
    image = tmp_path / "image.png"
    content = Path(images[2]["file_name"]).read_bytes()
    if damage != "missing":
        image.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"no image")
    images[2]["file_name"] = str(image)
    (tmp_path / "images.json").write_text(json.dumps(images))
    output = tmp_path / "features" / "shard-00000-of-00001.safetensors"
    backbone = small_world.vision[16]
    message = fails("extract", "--images", tmp_path / "images.json", "--backbone", backbone, "--output", output)
    assert str(image) in message
    assert str(images[2]["id"]) in message
    assert not output.exists()


def test_pickled_vision_backbone(small_world: SmallWorld, tmp_path: Path, fails: Fails) -> None:
    folder = shutil.copytree(small_world.vision[16], tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    images, output = small_world.data / "val" / "images.json", tmp_path / "shard.safetensors"
    message = fails("extract", "--images", images, "--backbone", folder, "--output", output)
    assert "no *.safetensors weights" in message
    assert not output.exists()


# ----------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many KiB."""
    mounted = []

    def mount(kibibytes: int) -> Path:
        folder = tmp_path / f"disk{kibibytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("only root can mount a small file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", ["model", "predictions", "checkpoint"])
def test_full_disk_in_training(
    small_world: SmallWorld, tmp_path: Path, fails: Fails, tiny_disk: Callable[[int], Path], name: str
) -> None:
    disk = tiny_disk(4)
    (disk / "filler").write_bytes(bytes(4096))
    command = train_command(small_world, tmp_path / "run", "vqa", epochs=1)
    message = fails("train", *command, f"--{name}", disk / name)
    assert str(disk / name) in message
    assert "No space left on device" in message
    assert set(files_of(disk)) <= {"filler", "lock"}
    assert (tmp_path / "run" / "model").exists() == (name == "predictions")
    if name != "checkpoint":  # nothing is lost: the run goes on from its checkpoint when there is room
        assert (tmp_path / "run" / "checkpoint" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("kibibytes", [4, 12, 40])
def test_full_disk_in_other_stages(
    small_world: SmallWorld, fails: Fails, tiny_disk: Callable[[int], Path], kibibytes: int
) -> None:
    disk = tiny_disk(kibibytes)
    world = ["--seed", 3, "--train-images", 50, "--val-images", 5, "--test-images", 6, "--image-size", 24]
    lists = [small_world.data / split / "images.json" for split in ("train", "val", "test")]
    toy = ["--seed", 1, "--epochs", 1, "--heads", 2, "--hidden-size", 16, "--layers", 1]
    stages = {
        "world": [*world, "--questions-per-image", 3, "--output", disk / "out"],
        "prepare": [
            "--sources", sources(small_world.root / "world"), "--minimum-answer-count", 1, "--output", disk / "out",
        ],
        "extract": [
            "--images", *lists, "--backbone", small_world.vision[24], "--output", disk / "out" / "shard.safetensors",
        ],
        "pretrain-text": [*toy, "--architecture", "gpt2", "--sentences", 8, "--vocabulary-size", 320, "--output", disk / "out"],
        "pretrain-vision": [*toy, "--images", 8, "--image-size", 24, "--patch-size", 12, "--output", disk / "out"],
    }  # fmt: skip
    for stage, options in stages.items():
        if stage == "extract" and kibibytes == 40:
            continue  # it fits
        message = fails(stage, *options)
        assert "No space left on device" in message, stage
        assert not [name for name in files_of(disk) if not name.startswith("chunk-")], stage
        for path in disk.iterdir():
            shutil.rmtree(path)


def test_full_device_for_the_standard_output(trained: Path) -> None:
    command = [sys.executable, "-c", "from routevl.cli import main; main()", "startup-report"]
    (trained / "log").write_text('{"stage": "train", "seconds": 1.0}\n')
    options = ["--log", trained / "log", "--wall-seconds", "1", "--cores", "1"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*command, *options], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("routevl: error: ")
    assert "No space left on device" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------------------- the workflow


def test_workflow_accepts_the_default_configuration(workflow: Path) -> None:
    status, output = dry_run(workflow)
    assert status == 0, output
    assert "rule train:" in output


PRUNED = {"by": "magnitude", "from": "roberta", "options": {"sparsity": 0.5}}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.routing_everywhere", True, "'routing_everywhere' was unexpected"),
        ("data.minimum_answer_counts", 9, "'minimum_answer_counts' was unexpected"),
        ("training.log_every", None, "'log_every' is a required property"),
        ("features.shards", "many", "'many' is not of type 'integer'"),
        ("runs.beam", 5, "configuration: runs: no setting 'beam' (there are control, "),
        ("runs.beams", 0, "configuration: runs: beams is 0, expected 1 or more"),
        ("runs.beams", None, "demo.tsv: experiment 'vqa_blind_r8_e8': the option beams is missing"),
        ("runs.gradient_checkpointing", "maybe", "runs: gradient_checkpointing is 'maybe', expected yes or no"),
        ("runs.epochs", 3, "configuration: runs: no setting 'epochs'"),
        ("tasks.vqa.batch_size", [8], "configuration: tasks.vqa: batch_size is [8], expected integer"),
        ("tasks.vqa.r", 4, "configuration: tasks.vqa: no setting 'r'"),
        ("tasks.retrieval", {}, "configuration: tasks: 'retrieval' is not one of vqa, caption"),
        ("tasks.caption", None, "task 'caption' is not one of multitask, vqa"),
        ("methods.lorra", {}, "configuration: methods: 'lorra' is not one of lora, adapter"),
        ("methods.lora.visual_scale", "sigmoid", "methods.lora: visual_scale is 'sigmoid', expected one of none, tanh"),
        ("methods.lora.activation", "gelu", "methods.lora: the method lora has no option 'activation'"),
        ("methods.lora.learning_rate", -1, "methods.lora: learning_rate is -1.0, expected more than 0"),
        ("methods.dora", {"use_dora": False}, "in the method dora, it cannot be set"),
        ("backbones.text.pruned.derive", PRUNED | {"by": "size"}, "by 'size' is not a derivation: choose one of magnitude"),
        ("backbones.text.pruned.derive", PRUNED | {"from": "bert"}, "pruned.derive: from 'bert' is none of backbones.text"),
        ("backbones.text.pruned.derive", PRUNED | {"from": "vit"}, "pruned.derive: from 'vit' is none of backbones.text"),
        ("backbones.text.pruned.derive", PRUNED | {"from": "pruned"}, "from 'pruned' leads back to itself"),
        ("backbones.text.roberta", {"derive": PRUNED}, "from 'roberta' leads back to itself"),
        ("backbones.text.pruned.derive", PRUNED | {"options": {}}, "magnitude: the option sparsity is missing"),
        ("backbones.text.pruned.derive", PRUNED | {"options": {"sparsity": 2}}, "sparsity is 2.0, expected less than 1"),
        ("backbones.text.pruned.derive", PRUNED | {"options": {"sparse": 0.5}}, "magnitude: no option 'sparse'"),
        ("backbones.text.pruned.derive", {"by": "magnitude"}, "backbones.text.pruned"),
        ("backbones.vision.gpt2.derive", PRUNED | {"from": "vit"}, "gpt2 names a text and a vision backbone"),
    ],
    ids=str,
)
def test_wrong_configuration(workflow: Path, key: str, value: Any, message: str) -> None:
    """One value changed; None: left out."""
    change_configuration(workflow, key, value)
    expect_message(workflow, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": "r=4 routing=multiply"}, "options: routing is 'multiply', expected one of none, mul, add, attn, expand"),
        ({"options": "r=0"}, "options: r is 0, expected 1 or more"),
        ({"options": "r=four"}, "options: r is 'four', expected integer"),
        ({"options": "r=4 rank=4"}, "the method lora has no option 'rank' (it has r, routing, visual_scale, target_"),
        ({"options": "r=4 activation=gelu"}, "the method lora has no option 'activation'"),
        ({"options": "r=4 r=8"}, "options: r is given twice"),
        ({"options": "r=4 mul"}, "options: 'mul' is not of the form key=value"),
        ({"options": "r=4 epochs=3"}, "the method lora has no option 'epochs'"),
        ({"options": "r=4 learning_rate=0"}, "options: learning_rate is 0.0, expected more than 0"),
        ({"options": "r=4 control=zeros"}, "options: control is 'zeros', expected one of none, noise, ones, shuffled"),
        ({"method": "prefix", "options": ""}, "method 'prefix' is not one of lora, adapter"),
        ({"method": "bitfit", "options": "r=4"}, "the method bitfit has no option 'r' (it has none)"),
        ({"method": "dora", "options": "use_dora=no"}, "in the method dora, it cannot be set"),
        (
            {"method": "prefix_tuning", "options": "gradient_checkpointing=yes"},
            "the method prefix_tuning refuses the setting gradient_checkpointing: ",
        ),
        (
            {"method": "lst", "options": "reduction=2"},
            "the method lst refuses the setting freeze_layer_norm=no: no gradient passes through the backbone",
        ),
        (
            {"method": "vfpt", "options": "", "prefix": "no"},
            "the method vfpt refuses the setting prefix=no: only by the prefix does the text model read",
        ),
        ({"versus": "nothing"}, "versus 'nothing' is no other experiment of the sheet"),
        ({"versus": "vqa_blind_r8_e8"}, "versus 'vqa_blind_r8_e8' is no other experiment of the sheet"),
        ({"versus": "caption_blind_r8_e2"}, "versus 'caption_blind_r8_e2' is an experiment of another task, caption"),
        ({"experiment": "vqa_lora_none_r8_e8"}, "two rows have the experiment name 'vqa_lora_none_r8_e8'"),
        ({"experiment": "vqa blind"}, "experiment 'vqa blind' is not of the form letters, digits, _, . and -"),
        ({"task": "retrieval"}, "task 'retrieval' is not one of vqa, caption"),
        ({"vision_backbone": "clip"}, "vision_backbone 'clip' is not one of vit"),
        ({"text_backbone": "bert"}, "text_backbone 'bert' is not one of roberta, gpt2"),
        ({"visual_tokens": "regions"}, "visual_tokens 'regions' is not one of pooled, patches"),
        ({"epochs": "0"}, "epochs '0' is not of the form 3, a whole number above zero"),
        ({"seeds": "1;2"}, "seeds '1;2' is not of the form 1,2,3"),
        ({"seeds": "1,1"}, "a seed stands twice in 1,1"),
        ({"seeds": f"1,{2**32}"}, "seed is 4294967296, expected less than 4294967296"),
        ({"prefix": "maybe"}, "prefix 'maybe' is not one of yes, no"),
        ({"feeds": "tables"}, "feeds 'tables' is not of the form T1,F2"),
        ({"dropout": "0.1"}, "an unknown or double column 'dropout'"),
        ({"seeds": None}, "no column 'seeds'"),
    ],
    ids=str,
)
def test_wrong_run_sheet(workflow: Path, changes: dict[str, str | None], message: str) -> None:
    """The first row changed; None: the column left out."""
    path = workflow / "config" / "experiments" / "demo.tsv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    rows[0] |= changes
    columns = [name for name in rows[0] if rows[0][name] is not None]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="1", extrasaction="ignore", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    expect_message(workflow, message, "config/experiments/demo.tsv: ")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As `routevl audit results | head` does."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("routevl")), "methods"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
