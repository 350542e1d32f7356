"""Print what a configuration would cost before anything is spent: jobs, GPU-hours, downloads and disk of every rule.

usage: python workflow/plan.py CONFIG

Counted are the jobs that Snakemake would still run. GPU-hours come from what finished runs of the same task and text backbone
took, else from the speeds in the configuration's `plan` section; sizes are computed from shapes.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from routevl.data.datasets import read_datasets
from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.methods.base import layer_norms
from routevl.sheet import Experiment, read_sheet, runs_of, settings_of
from routevl.tasks.table import TASKS

SNAKEMAKE = str(Path(sys.executable).with_name("snakemake"))
JOB = re.compile(r"^(?:local)?rule (\S+):\n((?:    .*\n)*)", re.MULTILINE)
WILDCARDS = re.compile(r"^    wildcards: (.*)$", re.MULTILINE)
BYTES = 4  # of a float32, as everything is stored
VOCABULARY = 50_000  # about RoBERTa's and GPT-2's
ANSWERS = 3129


@dataclass
class Cost:
    """What jobs need. Sizes are in bytes; `unsized` counts the downloads whose size is not known."""

    jobs: int = 1
    gpu_hours: float = 0.0
    download: float = 0.0
    disk: float = 0.0
    unsized: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class AnyScore(dict):
    """Stands in for what a method's phase before training would find: every parameter is as good as any other."""

    def __missing__(self, name: str) -> torch.Tensor:
        return torch.zeros((), device="cpu")


class Plan:
    """The cost of each job of a configuration that has a `plan` section."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.sizes = config, config["plan"]
        self.runs = runs_of(read_sheet(config["experiments"]))
        self.trained: dict[str, int] = {}  # experiment without its routing function -> trainable parameters
        archives = read_datasets(config["data"]["downloads"]).values() if "downloads" in config["data"] else ()
        self.archives = {archive.file: archive.bytes for archive in archives}
        self.folders = {archive.folder: archive.bytes for archive in archives}
        self.measured = self._measured_speeds()

    def cost(self, rule: str, wildcards: dict[str, str]) -> Cost:
        """The cost of one job."""
        if rule == "download":
            size = self.archives[wildcards["file"]]
            return Cost(unsized=1) if size is None else Cost(download=size, disk=size)
        if rule == "unpack":
            size = self.folders[wildcards["folder"]]
            return Cost() if size is None else Cost(disk=size)  # photographs do not shrink in an archive
        if rule == "fetch_backbone":
            size = BYTES * self._backbone_params(wildcards["name"])
            return Cost(download=size, disk=2 * size)  # the hub's cache, and the folder that rules read
        if rule == "derive_backbone":
            return Cost(disk=BYTES * self._backbone_params(wildcards["derived"]))
        if rule == "extract":
            return self._extraction(wildcards["vision"])
        if rule == "train":
            return self._training(self.runs[wildcards["run"]][0])
        return Cost()

    def _shape(self, modality: str, name: str) -> dict[str, Any]:
        """The sizes of a backbone; a derived one has those of its source, unless it has its own."""
        shapes, entry = self.sizes[modality], self.config["backbones"][modality][name]
        return shapes[name] if name in shapes or "derive" not in entry else self._shape(modality, entry["derive"]["from"])

    def _backbone_params(self, name: str) -> float:
        modality = "text" if name in self.config["backbones"]["text"] else "vision"
        shape = self._shape(modality, name)
        embeddings = VOCABULARY * shape["width"] if modality == "text" else 0
        return 12 * shape["layers"] * shape["width"] ** 2 + embeddings

    def _extraction(self, vision: str) -> Cost:
        shape, images = self._shape("vision", vision), self.sizes["images"] / self.config["features"]["shards"]
        tokens = {"pooled": 1, "patches": shape["patches"]}
        stored = sum(tokens[name] for name in self.config["features"]["tokens"]) * images
        return Cost(gpu_hours=images / shape["images_per_second"] / 3600, disk=BYTES * stored * shape["width"])

    def _training(self, experiment: Experiment) -> Cost:
        speed = self.measured.get((experiment.task, experiment.text_backbone))
        speed = speed or self._shape("text", experiment.text_backbone)["samples_per_second"]
        seconds = experiment.epochs * self.sizes["train_examples"][experiment.task] / speed
        weights = 2 * BYTES * self._trainable_params(experiment)  # the best epoch's and the last's
        return Cost(gpu_hours=seconds / 3600, disk=weights)

    def _trainable_params(self, experiment: Experiment) -> int:
        """Counted on a model of the backbone's shape that has no memory."""
        settings = settings_of(experiment, experiment.seeds[0], self.config)
        options = {name: value for name, value in settings.options.items() if name != "routing"}  # has no parameters
        key = f"{experiment.text_backbone} {experiment.method} {options} {settings.freeze_layer_norm}"
        if key not in self.trained:
            shape, encoder = self._shape("text", experiment.text_backbone), TASKS[experiment.task].text_model == "encoder"
            width = shape["width"]
            sizes = {"hidden_size": width, "num_hidden_layers": shape["layers"], "num_attention_heads": width // 64}
            with torch.device("meta"):
                model = RobertaModel(RobertaConfig(**sizes)) if encoder else GPT2LMHeadModel(GPT2Config(**sizes))
                norms = [] if settings.freeze_layer_norm else layer_norms(model)
                model = settings.new_method().build(model.requires_grad_(False), AnyScore(), norms)
            head = 2 * width**2 + 2 * width * ANSWERS if encoder else 0
            self.trained[key] = head + sum(p.numel() for p in model.parameters() if p.requires_grad)
        return self.trained[key]

    def _measured_speeds(self) -> dict[tuple[str, str], float]:
        """Median samples per second of the finished runs, by task and text backbone."""
        speeds: dict[tuple[str, str], list[float]] = {}
        for run, (experiment, _) in self.runs.items():
            timing = Path(self.config["results"]) / "models" / run / "timing.json"
            if timing.exists():
                key = (experiment.task, experiment.text_backbone)
                speeds.setdefault(key, []).append(read_json(timing)["samples_per_second"])
        return {key: statistics.median(values) for key, values in speeds.items()}


def jobs_to_run(config_file: str) -> list[tuple[str, dict[str, str]]]:
    """(rule, wildcards) of each job that Snakemake would run. Raises RoutevlError with what it says against the configuration."""
    command = [SNAKEMAKE, "--dry-run", "--nocolor", "--cores", "1", f"--configfile={config_file}"]
    dry_run = subprocess.run(command, capture_output=True, text=True)
    if dry_run.returncode != 0:
        raise RoutevlError((dry_run.stdout + dry_run.stderr).strip())
    jobs = []
    for rule, details in JOB.findall(dry_run.stdout):
        wildcards = WILDCARDS.search(details)
        jobs.append((rule, dict(part.split("=", 1) for part in wildcards[1].split(", ")) if wildcards else {}))
    return jobs


def report(config: dict[str, Any], jobs: list[tuple[str, dict[str, str]]]) -> str:
    """The plan as a table, one line per rule and a last one for all."""
    plan = Plan(config)
    costs: dict[str, Cost] = {}
    for rule, wildcards in jobs:
        name = "score" if rule.startswith("score_") else rule
        costs[name] = costs.get(name, Cost(jobs=0)) + plan.cost(rule, wildcards)
    total = sum(costs.values(), Cost(jobs=0))
    lines = [f"{'rule':16s} {'jobs':>5s} {'GPU-hours':>10s} {'download GB':>12s} {'disk GB':>8s}"]
    for name, cost in [*costs.items(), ("total", total)]:
        sizes = f"{cost.download / 1e9:12.1f} {cost.disk / 1e9:8.1f}"
        unsized = f"  (and {cost.unsized} of unknown size)" if cost.unsized else ""
        lines.append(f"{name:16s} {cost.jobs:5d} {cost.gpu_hours:10.1f} {sizes}{unsized}")
    source = "of finished runs where there are some, else " if plan.measured else ""
    lines.append(f"GPU-hours: {source}from the speeds under `plan` in the configuration, without validation and prediction.")
    return "\n".join(lines)


def main() -> int:
    """Returns 2 where there is no plan to be made."""
    [config_file] = sys.argv[1:]
    try:
        if not Path(config_file).is_file():
            raise RoutevlError(f"{config_file}: no such file")
        jobs = jobs_to_run(config_file)
        config = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
        if "plan" not in config:
            raise RoutevlError(f"{config_file}: has no section `plan`, so sizes and speeds are not known; see config/README.md")
        print(report(config, jobs))
    except RoutevlError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
