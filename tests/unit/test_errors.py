"""Wrong input: one clear line on stderr, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallWorld, command_line, run_options, run_stage

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
        ({"routing": "multiply"}, "routing 'multiply' is not a routing function: choose one of none, mul, add, attn, expand"),
        ({"method": "prefix_tuning"}, "method 'prefix_tuning' is not a method: choose one of lora, adapter"),
        ({"visual_scale": "sigmoid"}, "visual_scale 'sigmoid' is none of none, tanh, layer_norm"),
        ({"rank": 0}, "rank must be a positive integer, not 0"),
        ({"rank": -4}, "rank must be a positive integer, not -4"),
        ({"rank": "four"}, "--rank: invalid int value: 'four'"),
        ({"rank": 2.5}, "--rank: invalid int value: '2.5'"),
        ({"alpha": 0}, "alpha must be positive"),
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"prediction_batch_size": 0}, "prediction_batch_size must be a positive integer"),
        ({"beams": 0}, "beams must be a positive integer"),
        ({"learning_rate": -1}, "learning_rate must be positive"),
        ({"learning_rate": "nan"}, "learning_rate must be positive"),
        ({"learning_rate": "inf"}, "learning_rate must be positive"),
        ({"warmup": -1}, "warmup"),
        ({"warmup": "nan"}, "warmup"),
        ({"weight_decay": "nan"}, "weight_decay"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"max_text_tokens": 2}, "max_text_tokens"),
        ({"max_text_tokens": 4000}, "max_text_tokens"),
        ({"max_new_tokens": 4000}, "max_new_tokens"),
        ({"prefix": "maybe"}, "--prefix: invalid choice: 'maybe'"),
        ({"task": "retrieval"}, "--task: invalid choice: 'retrieval'"),
        ({"visual_tokens": "regions"}, "--visual-tokens: invalid choice: 'regions'"),
        ({"precision": "float16"}, "--precision: invalid choice: 'float16'"),
        ({"threads": 0}, "--threads 0"),
        ({"workers": -1}, "--workers -1"),
        ({"checkpoint_every": 0}, "--checkpoint-every 0"),
        ({"log_every": 0}, "--log-every 0"),
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
    assert "vqa needs a bidirectional text encoder" in train_fails(text_backbone=small_world.text["caption"])
    assert "caption needs a causal language model" in train_fails("caption", text_backbone=small_world.text["vqa"])


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
        record["settings"] |= {"rank": 3}
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


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": {}, "inputs": {}}', '{"settings": [], "inputs": {}}'])
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


def dry_run(folder: Path, *options: str) -> tuple[int, str]:
    command = [Path(sys.executable).with_name("snakemake"), "--dry-run", "--quiet", "all", "--cores", "1"]
    where = ["--snakefile", REPOSITORY / "Snakefile", "--directory", folder]
    ended = subprocess.run([*command, *where, *options], capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    """A folder to run the workflow in, with the configuration in it."""
    shutil.copytree(REPOSITORY / "config", tmp_path / "config")
    return tmp_path


def test_workflow_accepts_the_default_configuration(workflow: Path) -> None:
    status, output = dry_run(workflow)
    assert status == 0, output


@pytest.mark.parametrize(
    ("text", "replacement", "named"),
    [
        ("training:\n", "training:\n  routing_everywhere: true\n", "routing_everywhere"),
        ("minimum_answer_count:", "minimum_answer_counts:", "minimum_answer_counts"),
        ("  log_every: 10\n", "", "log_every"),
        ("shards: 2", "shards: many", "many"),
    ],
)
def test_wrong_configuration(workflow: Path, text: str, replacement: str, named: str) -> None:
    path = workflow / "config" / "config.yaml"
    content = path.read_text()
    assert text in content
    path.write_text(content.replace(text, replacement))
    expect_message(workflow, named)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("routing", "multiply", "multiply"),
        ("method", "prefix_tuning", "prefix_tuning"),
        ("rank", "0", "rank"),
        ("rank", "-4", "rank"),
        ("seeds", "1;2", "1;2"),
        ("prefix", "maybe", "maybe"),
        ("vision_backbone", "clip", "clip"),
        (None, "dropout", "dropout"),
    ],
)
def test_wrong_run_sheet(workflow: Path, column: str | None, value: str, named: str) -> None:
    path = workflow / "config" / "experiments" / "demo.tsv"
    header, first, *rest = [line.split("\t") for line in path.read_text().splitlines()]
    if column is None:
        header, first, rest = [*header, value], [*first, "1"], [[*row, "1"] for row in rest]
    else:
        first[header.index(column)] = value
    path.write_text("".join("\t".join(row) + "\n" for row in (header, first, *rest)))
    expect_message(workflow, named)


def expect_message(workflow: Path, named: str) -> None:
    """One message that names what is wrong, not a traceback, and nothing written."""
    before = {path for path in workflow.rglob("*") if ".snakemake" not in path.parts}
    status, output = dry_run(workflow)
    assert status != 0
    assert named in output
    assert "Traceback" not in output
    assert {path for path in workflow.rglob("*") if ".snakemake" not in path.parts} == before
