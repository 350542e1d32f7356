"""A copy of the project with a tiny configuration, for the tests that run the real workflow: its Snakefile, rules and code."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
COLUMNS = (
    "experiment task text_backbone vision_backbone method routing rank alpha epochs prefix visual_tokens seeds feeds".split()
)


def make_project(folder: Path, experiments: list[str]) -> Path:
    """Copy the workflow into `folder`, with a tiny configuration as its default.

    Args:
        experiments: the lines of the run sheet, with spaces between their columns.
    """
    copy_project(folder)
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    (folder / "config/config.yaml").write_text(yaml.safe_dump(_tiny(config)))
    rows = ["\t".join(COLUMNS), *("\t".join(row.split()) for row in experiments)]
    (folder / "config/experiments/tiny.tsv").write_text("\n".join(rows) + "\n")
    return folder


def copy_project(folder: Path) -> None:
    """Copy what the workflow consists of, but for its installed code."""
    shutil.copy(PROJECT / "Snakefile", folder)
    for name in ("workflow", "config", "envs"):
        shutil.copytree(PROJECT / name, folder / name)


def _tiny(config: dict) -> dict:
    """The demo's configuration with everything small."""
    config |= {"experiments": "config/experiments/tiny.tsv"}
    config["world"] |= {"train_images": 60, "val_images": 12, "test_images": 16, "questions_per_image": 2}
    config["data"]["minimum_answer_count"] = 2
    for entry in config["backbones"]["text"].values():
        entry["pretrain"] |= {"sentences": 300, "epochs": 1, "hidden_size": 32, "layers": 1, "heads": 2}
    config["backbones"]["vision"]["vit"]["pretrain"] |= {"images": 100, "epochs": 1, "hidden_size": 32, "layers": 1, "heads": 2}
    config["runs"] |= {"beams": 2, "max_new_tokens": 6}
    config["training"] |= {"checkpoint_every": 2, "log_every": 1}
    for task in config["tasks"].values():
        task["batch_size"] = 8
    return config


def environment() -> dict[str, str]:
    """The variables that the workflow runs with."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
