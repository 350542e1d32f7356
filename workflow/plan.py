"""Print what a configuration would cost before anything is spent: jobs, GPU-hours, downloads and disk of every rule.

usage: python workflow/plan.py CONFIG

Counted are the jobs that Snakemake would still run. GPU-hours come from what finished runs of the same task and text backbone
took, else from the speeds in the configuration's `plan` section; sizes are computed from shapes. What needs a speed or a shape
that is not there is not counted, and the last line names it.
"""

from __future__ import annotations

import math
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

from routevl.backbones.skeleton import no_weights
from routevl.configuration import check_schema
from routevl.data.datasets import read_datasets
from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.methods.base import layer_norms
from routevl.settings import RunSettings
from routevl.sheet import Experiment, read_sheet, runs_of, settings_of
from routevl.tasks.table import TASKS

SCHEMA = Path(__file__).parent / "schemas/config.schema.yaml"
SNAKEMAKE = str(Path(sys.executable).with_name("snakemake"))
JOB = re.compile(r"^(?:local)?rule (\S+):\n((?:    .*\n)*)", re.MULTILINE)
WILDCARDS = re.compile(r"^    wildcards: (.*)$", re.MULTILINE)
BYTES = 4  # of a float32, as everything is stored
VOCABULARY = 50_000  # about RoBERTa's and GPT-2's
ANSWERS = 3129


@dataclass
class Cost:
    """What jobs need. Sizes are in bytes; `unknown` counts the jobs of which one of these is not known (NaN), and not counted."""

    jobs: int = 1
    gpu_hours: float = 0.0
    download: float = 0.0
    disk: float = 0.0
    unknown: int = 0

    def __post_init__(self) -> None:
        for name in ("gpu_hours", "download", "disk"):
            if math.isnan(getattr(self, name)):
                setattr(self, name, 0.0)
                self.unknown = 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class AnyScore(dict):
    """Stands in for what a method's phase before training would find: every parameter is as good as any other."""

    def __missing__(self, name: str) -> torch.Tensor:
        return torch.zeros((), device="cpu")


class Plan:
    """The cost of each job of a configuration.

    Attributes:
        lacking: keys of the configuration that were looked up in vain.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.lacking: dict[str, None] = {}
        self.runs = runs_of(read_sheet(config["experiments"]))
        self.trained: dict[str, int] = {}  # experiment without its routing function -> trainable parameters
        archives = read_datasets(config["data"]["downloads"]).values() if "downloads" in config["data"] else ()
        self.archives = {archive.file: math.nan if archive.bytes is None else archive.bytes for archive in archives}
        self.folders = {archive.folder: self.archives[archive.file] for archive in archives}
        self.measured = self._measured_speeds()

    def cost(self, rule: str, wildcards: dict[str, str]) -> Cost:
        """The cost of one job."""
        if rule == "download":
            size = self.archives[wildcards["file"]]
            return Cost(download=size, disk=size)
        if rule == "unpack":
            return Cost(disk=self.folders[wildcards["folder"]])  # photographs do not shrink in an archive
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

    def _size(self, *path: str) -> float:
        """A number of the section `plan`; NaN where it is not there."""
        section: Any = self.config.get("plan", {})
        for name in path:
            section = section.get(name, {})
        if section == {}:
            self.lacking[".".join(("plan", *path))] = None
            return math.nan
        return section

    def _shape(self, modality: str, name: str, key: str) -> float:
        """A size of a backbone; a derived one has those of its source, unless it has its own."""
        known, entry = self.config.get("plan", {}).get(modality, {}), self.config["backbones"][modality][name]
        derived = name not in known and "derive" in entry
        return self._shape(modality, entry["derive"]["from"], key) if derived else self._size(modality, name, key)

    def _backbone_params(self, name: str) -> float:
        modality = "text" if name in self.config["backbones"]["text"] else "vision"
        width = self._shape(modality, name, "width")
        embeddings = VOCABULARY * width if modality == "text" else 0
        return 12 * self._shape(modality, name, "layers") * width**2 + embeddings

    def _extraction(self, vision: str) -> Cost:
        images = self._size("images") / self.config["features"]["shards"]
        kinds = self.config["features"]["tokens"]
        tokens = ("pooled" in kinds) + (self._shape("vision", vision, "patches") if "patches" in kinds else 0)
        seconds = images / self._shape("vision", vision, "images_per_second")
        return Cost(gpu_hours=seconds / 3600, disk=BYTES * tokens * images * self._shape("vision", vision, "width"))

    def _training(self, experiment: Experiment) -> Cost:
        settings = settings_of(experiment, experiment.seeds[0], self.config)
        speed = self.measured.get((experiment.task, experiment.text_backbone))
        speed = speed or self._shape("text", experiment.text_backbone, "samples_per_second")
        examples = self._size("train_examples", experiment.task)
        if settings.max_train_examples is not None:
            examples = min(examples, settings.max_train_examples)
        weights = 2 * BYTES * self._trainable_params(experiment, settings)  # the best epoch's and the last's
        return Cost(gpu_hours=settings.epochs * examples / speed / 3600, disk=weights)

    def _trainable_params(self, experiment: Experiment, settings: RunSettings) -> float:
        """Counted on a model of the backbone's shape that has no memory."""
        layers, width = (self._shape("text", experiment.text_backbone, key) for key in ("layers", "width"))
        method = settings.new_method()
        sees_image = settings.prefix or method.uses_image
        visual_width = self._shape("vision", experiment.vision_backbone, "width") if sees_image else width
        if math.isnan(layers + width + visual_width):
            return math.nan
        options = {name: value for name, value in settings.options.items() if name != "routing"}  # has no parameters
        key = f"{experiment.text_backbone} {visual_width} {experiment.method} {options} {settings.freeze_layer_norm}"
        if key not in self.trained:
            encoder = TASKS[experiment.task].text_model == "encoder"
            sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 1}  # any number has as many
            with no_weights():
                model = RobertaModel(RobertaConfig(**sizes)) if encoder else GPT2LMHeadModel(GPT2Config(**sizes))
                norms = [] if settings.freeze_layer_norm else layer_norms(model)
                model = method.build(model.requires_grad_(False), AnyScore(), norms)
                projects = visual_width != width and method.visual_projection(model, visual_width) is None
            task = 2 * width**2 + 2 * width * ANSWERS if encoder else 0
            task += visual_width * width + width if projects else 0
            self.trained[key] = task + sum(p.numel() for p in model.parameters() if p.requires_grad)
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
        more = f"  ({cost.unknown} of them not in full)" if cost.unknown else ""
        lines.append(f"{name:16s} {cost.jobs:5d} {cost.gpu_hours:10.1f} {sizes}{more}")
    source = "of finished runs where there are some, else " if plan.measured else ""
    lines.append(f"GPU-hours: {source}from the speeds under `plan` in the configuration, without validation and prediction.")
    if plan.lacking:
        lines.append(f"Not counted is what needs a key that the configuration lacks: {', '.join(plan.lacking)}.")
    return "\n".join(lines)


def main() -> int:
    """Returns 2 where there is no plan to be made."""
    [config_file] = sys.argv[1:]
    try:
        if not Path(config_file).is_file():
            raise RoutevlError(f"{config_file}: no such file")
        jobs = jobs_to_run(config_file)
        config = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
        check_schema(config, yaml.safe_load(SCHEMA.read_text(encoding="utf-8")), config_file)
        print(report(config, jobs))
    except RoutevlError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
