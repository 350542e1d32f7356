"""A copy of the project with a tiny configuration, for the tests that run the real workflow: its Snakefile, rules and code."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import yaml

from routevl.sheet import COLUMNS

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DEFAULTS = {  # of the rows of the run sheet
    "vision_backbone": "vit", "method": "lora", "options": "", "versus": "", "epochs": "1", "prefix": "yes",
    "visual_tokens": "pooled", "seeds": "1", "feeds": "",
}  # fmt: skip


def row(experiment: str, task: str, options: str = "", **columns: str) -> str:
    """A line of the run sheet; LoRA has rank 2 beside the given options."""
    values = DEFAULTS | {"text_backbone": {"vqa": "roberta", "caption": "gpt2", "multitask": "bart"}[task]} | columns
    rank = {"lora": "r=2 lora_alpha=2", "adapter": "r=2"}.get(values["method"], "")
    values |= {"experiment": experiment, "task": task, "options": f"{rank} {options}".strip()}
    return "\t".join(values[name] for name in COLUMNS)


def make_project(folder: Path, experiments: list[str]) -> Path:
    """Copy the workflow into `folder`, with a tiny configuration as its default.

    Args:
        experiments: the lines of the run sheet, as `row` makes them.
    """
    copy_project(folder)
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    (folder / "config/config.yaml").write_text(yaml.safe_dump(_tiny(config)))
    (folder / "config/experiments/tiny.tsv").write_text("\n".join(["\t".join(COLUMNS), *experiments]) + "\n")
    return folder


def copy_project(folder: Path) -> None:
    """Copy what the workflow consists of, but for its installed code."""
    shutil.copy(PROJECT / "Snakefile", folder)
    for name in ("workflow", "profiles", "config", "envs"):
        shutil.copytree(PROJECT / name, folder / name)


def _tiny(config: dict) -> dict:
    """The demo's configuration with everything small."""
    config |= {"experiments": "config/experiments/tiny.tsv"}
    config["world"] |= {"train_images": 60, "val_images": 12, "test_images": 16, "questions_per_image": 2}
    config["data"]["minimum_answer_count"] = 2
    for entry in config["backbones"]["text"].values():
        if "pretrain" in entry:
            entry["pretrain"] |= {"sentences": 300, "epochs": 1, "hidden_size": 32, "layers": 1, "heads": 2}
    pruned = {"by": "magnitude", "from": "roberta", "options": {"sparsity": 0.5}}
    config["backbones"]["text"]["pruned"] = {"derive": pruned}
    config["backbones"]["vision"]["vit"]["pretrain"] |= {"images": 100, "epochs": 1, "hidden_size": 32, "layers": 1, "heads": 2}
    config["runs"] |= {"beams": 2, "max_new_tokens": 6}
    config["training"] |= {"checkpoint_every": 2, "log_every": 1}
    for task in config["tasks"].values():
        task["batch_size"] = 8
    return config


def environment() -> dict[str, str]:
    """The variables that the workflow runs with."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
