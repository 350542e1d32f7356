"""A small world for the tests: data, toy backbones and features, made once by the package's own stages."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_project import PROJECT

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: more threads only make toys slower
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DROPOUT = 0.1  # of the toy text models, so that training depends on the random generators


def run_stage(stage: str, *options: object) -> None:
    """Run a stage in this process, as `routevl <stage> <options>` does but with its exceptions."""
    from routevl.cli import STAGES

    name, suffix, _ = STAGES[stage]
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    getattr(module, "add_arguments" + suffix)(parser)
    getattr(module, "run" + suffix)(parser.parse_args([str(option) for option in options]))


def command_line(options: dict[str, Any]) -> list[str]:
    """Options by their names in Python -> words of a command line; a mapping becomes words key=value, a list several."""
    words = []
    for name, value in options.items():
        values = [f"{key}={entry}" for key, entry in value.items()] if isinstance(value, dict) else value
        values = values if isinstance(values, list) else [values]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


@dataclass(frozen=True)
class SmallWorld:
    """Where everything is that a run starts from.

    Attributes:
        root: folder of all of it; `root/world` is in the official formats.
        data: prepared data.
        text: toy text backbone of each task, with dropout, of width 16.
        vision: toy vision backbones by their width: 16 is that of the text models, 24 needs a visual projection.
        features: stored features, of all kinds of tokens, by the width of their backbone.
    """

    root: Path
    data: Path
    text: dict[str, Path]
    vision: dict[int, Path]
    features: dict[int, Path]


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """Twelve training, five validation and six test images with all that training needs."""
    root = tmp_path_factory.mktemp("small")
    data = root / "data"
    images = ("--train-images", 12, "--val-images", 5, "--test-images", 6)
    run_stage("world", "--output", root / "world", "--seed", 3, *images, "--image-size", 24, "--questions-per-image", 3)
    files = {name: f"{name}.json" for name in ("questions", "annotations", "captions")}
    files |= {"images": "images", "gqa": "gqa_questions.json", "nlvr2": "nlvr2.jsonl"}
    sources = [
        {"split": split, **{name: str(root / "world" / split / file) for name, file in files.items()}}
        for split in ("train", "val", "test")
    ]
    run_stage("prepare", "--sources", json.dumps(sources), "--minimum-answer-count", 1, "--output", data)
    text = {task: _text_backbone(root / architecture, architecture) for task, architecture in TEXT_ARCHITECTURES.items()}
    vision = {width: _vision_backbone(root / f"vit{width}", width) for width in (16, 24)}
    features = {width: _features(data, backbone, root / f"features{width}") for width, backbone in vision.items()}
    return SmallWorld(root, data, text, vision, features)


TEXT_ARCHITECTURES = {"vqa": "roberta", "caption": "gpt2", "multitask": "bart"}
TOY = ("--seed", 1, "--epochs", 1, "--heads", 2, "--batch-size", 8)


def _text_backbone(folder: Path, architecture: str) -> Path:
    run_stage(
        "pretrain-text", *TOY, "--architecture", architecture, "--sentences", 40, "--vocabulary-size", 320,
        "--hidden-size", 16, "--layers", 2, "--output", folder,
    )  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config |= {name: DROPOUT for name in config if name.endswith(("dropout_prob", "pdrop")) or name == "dropout"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _vision_backbone(folder: Path, width: int) -> Path:
    run_stage(
        "pretrain-vision", *TOY, "--images", 8, "--image-size", 24, "--patch-size", 12, "--hidden-size", width,
        "--layers", 1, "--output", folder,
    )  # fmt: skip
    return folder


def _features(data: Path, backbone: Path, folder: Path) -> Path:
    lists = [data / split / "images.json" for split in ("train", "val", "test")]
    shards = [folder / f"shard-{shard:05d}-of-00002.safetensors" for shard in range(2)]
    for shard, path in enumerate(shards):
        run_stage("extract", "--images", *lists, "--backbone", backbone, "--shard", shard, "--shards", 2, "--output", path)
    run_stage("index-features", "--shards", *shards, "--output", folder / "index.json")
    return folder


METHOD_OPTIONS = {  # of the small runs; other methods have none
    "lora": {"r": 2, "lora_alpha": 4, "routing": "mul", "visual_scale": "tanh"},
    "adapter": {"r": 2, "routing": "mul", "visual_scale": "tanh"},
}


def run_options(
    world: SmallWorld, task: str, width: int = 16, options: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """The options of a small training run, but for its folders, with some of them changed.

    Args:
        width: which vision backbone; its features need a visual projection unless this is 16.
        options: of the method, beside or in place of those in METHOD_OPTIONS.
    """
    settings = {
        "data": world.data,
        "features": world.features[width],
        "text_backbone": world.text[task],
        "vision_backbone": world.vision[width],
        "checkpoint_every": 3,
        "log_every": 2,
        "threads": 1,
        "workers": 0,
        "task": task,
        "method": "lora",
        "prefix": "yes",
        "visual_tokens": "grid" if task == "multitask" else "pooled",
        "control": "none",
        "freeze_layer_norm": "no",
        "epochs": 2,
        "batch_size": 5,
        "group_by_length": "yes",
        "mixed_batches": "no",
        "task_prompts": "yes",
        "selection": "best",
        "prediction_batch_size": 4,
        "learning_rate": 0.02,
        "warmup": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "max_text_tokens": 20,
        "beams": 2,
        "max_new_tokens": 8,
        "precision": "float32",
        "gradient_checkpointing": "no",
        "compile": "no",
        "seed": 5,
    }
    assert set(changes) <= {*settings, "prepared"}
    settings |= changes
    return settings | {"options": {**METHOD_OPTIONS.get(settings["method"], {}), **(options or {})}}


@pytest.fixture(scope="session")
def snakemake_imported() -> None:
    """What Snakemake and the workflow import late is imported here, and not again in each process that is forked."""
    import pandas  # noqa: F401
    import smart_open  # noqa: F401
    from snakemake.cli import get_argument_parser

    get_argument_parser()  # with its plugins


@pytest.fixture
def workflow(snakemake_imported: None, tmp_path: Path) -> Path:
    """A folder to run the workflow in, with the configuration in it."""
    shutil.copytree(PROJECT / "config", tmp_path / "config")
    return tmp_path
