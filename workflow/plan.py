"""Print what a configuration would cost before anything is spent: jobs, GPU-hours, downloads and disk of every rule.

usage: python workflow/plan.py CONFIG

Counted are the jobs that Snakemake would still run. GPU-hours come from what finished runs took, else from a rehearsal's, else
from the speeds in the configuration's `plan` section; sizes are computed from shapes. What needs a speed, a shape or a size that
is not there is not counted, and the last lines name it.
"""

from __future__ import annotations

import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from measurements import ESTIMATED, SOURCES, Measurements, Timing
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from routevl.backbones.co_attention import CoAttentionConfig, CoAttentionModel
from routevl.backbones.derivations import DERIVATIONS, read_options
from routevl.backbones.skeleton import no_weights
from routevl.configuration import check_schema, read_configuration
from routevl.data.datasets import read_datasets
from routevl.errors import RoutevlError
from routevl.features.grid import SIDE
from routevl.methods.base import layer_norms
from routevl.settings import RunSettings
from routevl.sheet import Experiment, read_sheet, runs_of, settings_of, trials_of
from routevl.slurm import SECTIONS, kind_of
from routevl.tasks.clip_bart.visual_embedding import VisualEmbedding, add_extra_tokens
from routevl.tasks.table import TASKS

SCHEMA = Path(__file__).parent / "schemas/config.schema.yaml"
SNAKEMAKE = str(Path(sys.executable).with_name("snakemake"))
JOB = re.compile(r"^(?:local)?rule (\S+):\n((?:    .*\n)*)", re.MULTILINE)
WILDCARDS = re.compile(r"^    wildcards: (.*)$", re.MULTILINE)
BYTES = 4  # of a float32, as everything is stored
VOCABULARY = 50_000  # about RoBERTa's and GPT-2's
ANSWERS = 3129


class Hours(NamedTuple):
    """GPU-hours of a part of a job, NaN where a speed is not known, and where the speed comes from."""

    part: str
    hours: float
    source: str


@dataclass
class Cost:
    """What jobs need. Sizes are in bytes; `unknown` counts the jobs of which one of these is not known (NaN), and not counted."""

    jobs: int = 1
    download: float = 0.0
    disk: float = 0.0
    unknown: int = 0
    hours: list[Hours] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any(map(math.isnan, (self.download, self.disk, *(entry.hours for entry in self.hours)))):
            self.unknown = self.unknown or 1
            self.download, self.disk = (0.0 if math.isnan(size) else size for size in (self.download, self.disk))
            self.hours = [entry for entry in self.hours if not math.isnan(entry.hours)]

    @property
    def gpu_hours(self) -> float:
        return sum(entry.hours for entry in self.hours)

    @property
    def sources(self) -> str:
        """Where the speeds come from."""
        return "+".join(source for source in SOURCES if any(source == entry.source for entry in self.hours)) or "-"

    def parts(self) -> dict[str, Cost]:
        """The hours of each part of the jobs."""
        return {part: Cost(hours=[e for e in self.hours if e.part == part]) for part in dict.fromkeys(e.part for e in self.hours)}

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
        unsized: archives of unknown size.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.lacking: dict[str, None] = {}
        self.unsized: dict[str, None] = {}
        experiments = read_sheet(config["experiments"])
        self.runs, self.trials = runs_of(experiments), trials_of(experiments, config)
        self.trained: dict[str, int] = {}  # experiment without its routing function -> trainable parameters
        archives = read_datasets(config["data"]["downloads"]).values() if "downloads" in config["data"] else ()
        self.archives = {archive.file: math.nan if archive.bytes is None else archive.bytes for archive in archives}
        self.folders = {archive.folder: self.archives[archive.file] for archive in archives}
        self.measured = Measurements(Path(config["results"]), experiments)

    def cost(self, rule: str, wildcards: dict[str, str]) -> Cost:
        """The cost of one job."""
        if rule == "download":
            size = self.archives[wildcards["file"]]
            if math.isnan(size):
                self.unsized[wildcards["file"]] = None
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
        if rule == "tune":
            cost = self._training(self.trials[wildcards["run"]][0])
            hours = [of for of in cost.hours if of.part != "prediction"] * len(self.config["tuning"]["factors"])
            return Cost(hours=hours)
        if kind_of(rule) == "train":
            if "run" in wildcards:
                return self._training(self.runs[wildcards["run"]][0])
            seeds = rule.removeprefix("train_seeds_").split("_")
            cost = self._training(self.runs[f"{wildcards['experiment']}_seed{seeds[0]}"][0])
            return replace(sum([cost] * len(seeds), Cost(jobs=0)), jobs=1, unknown=cost.unknown)
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
        tokens = sum(self._tokens(vision, kind) for kind in self.config["features"]["tokens"])
        source, seconds = self.measured.extraction(vision) or (
            ESTIMATED, 1 / self._shape("vision", vision, "images_per_second"),
        )  # fmt: skip
        disk = BYTES * tokens * images * self._shape("vision", vision, "width")
        return Cost(hours=[Hours("extraction", images * seconds / 3600, source)], disk=disk)

    def _tokens(self, vision: str, kind: str) -> float:
        """How many tokens of a kind an image has."""
        if kind == "pooled":
            return 1
        patches = self._shape("vision", vision, "patches")
        return {"patches": patches, "grid": min(patches, SIDE**2), "all": 1 + patches}[kind]

    def _training(self, experiment: Experiment) -> Cost:
        """The hours of all steps, of validation after each epoch, and of prediction; by what a step or an item took, else by the
        estimated speeds."""
        settings = settings_of(experiment, experiment.seeds[0], self.config)
        examples = self._size("train_examples", experiment.task)
        if settings.max_train_examples is not None:
            examples = min(examples, settings.max_train_examples)
        validated = settings.epochs * self._size("val_examples", experiment.task)
        predicted = self._size("test_items", experiment.task)
        longer = 1.0  # than with a prefix of one token, as the estimates have it
        if settings.prefix:
            text = settings.max_text_tokens
            longer = (text + self._tokens(experiment.vision_backbone, settings.visual_tokens)) / (text + 1)
        steps = settings.epochs * (examples if math.isnan(examples) else math.ceil(examples / settings.batch_size))

        def speed(key: str) -> float:
            return self._shape("text", experiment.text_backbone, key) / longer

        parts = (
            ("steps", steps, _seconds_of_a_step(settings.batch_size), lambda: settings.batch_size / speed("samples_per_second")),
            ("validation", validated, _seconds_of("validation_seconds", "validated"), lambda: 0.5 / speed("samples_per_second")),
            (
                "prediction",
                predicted,
                _seconds_of("prediction_seconds", "predicted"),
                lambda: 1 / speed("predictions_per_second"),
            ),
        )
        hours = []
        for part, count, measured, estimate in parts:
            source, seconds = self.measured.run(experiment, measured) or (ESTIMATED, estimate())
            hours.append(Hours(part, count * seconds / 3600, source))
        weights = 2 * BYTES * self._trainable_params(experiment, settings)  # the best epoch's and the last's
        return Cost(hours=hours, disk=weights)

    def _joins(self, name: str) -> Any:
        """The options of a text backbone's derivation that joins a vision model to it; None where it has none."""
        entry = self.config["backbones"]["text"][name].get("derive")
        if entry is None or not DERIVATIONS[entry["by"]].joins:
            return None
        return read_options(entry["by"], entry.get("options", {}), f"configuration: backbones.text.{name}.derive")

    def _trainable_params(self, experiment: Experiment, settings: RunSettings) -> float:
        """Counted on a model of the backbone's shape that has no memory."""
        layers, width = (self._shape("text", experiment.text_backbone, key) for key in ("layers", "width"))
        method, joins = settings.new_method(), self._joins(experiment.text_backbone)
        sees_image = method.uses_image or (settings.prefix and joins is None)  # beside the text, not in a stream of its own
        visual_width = self._shape("vision", experiment.vision_backbone, "width") if sees_image else width
        if math.isnan(layers + width + visual_width):
            return math.nan
        options = {name: value for name, value in settings.options.items() if name != "routing"}  # has no parameters
        key = f"{experiment.text_backbone} {visual_width} {experiment.method} {options} {settings.freeze_layer_norm}"
        if key not in self.trained:
            with no_weights():
                model = _text_model(TASKS[experiment.task].text_model, layers, width)
                if joins is not None:
                    model = _two_streams(model, self._shape("vision", experiment.vision_backbone, "width"), joins)
                    width = model.config.hidden_size
                norms = [] if settings.freeze_layer_norm else layer_norms(model)
                budget = method.budget(model)
                if budget is None:
                    model = method.build(model.requires_grad_(False), AnyScore(), norms)
                projects = visual_width != width and method.visual_projection(model, visual_width) is None
                embedding = VisualEmbedding(visual_width, nn.Embedding(1, width).requires_grad_(False))
            read = width if joins is None else 2 * width
            task = 2 * width * read + 2 * width * ANSWERS if experiment.task == "vqa" else 0
            if experiment.task == "multitask":
                task += sum(p.numel() for p in embedding.parameters() if p.requires_grad) if sees_image else 0
            else:
                task += visual_width * width + width if projects else 0
            own = sum(p.numel() for p in model.parameters() if p.requires_grad) if budget is None else round(budget)
            self.trained[key] = task + own
        return self.trained[key]


def _two_streams(model: PreTrainedModel, image_width: float, options: Any) -> PreTrainedModel:
    """A model of two streams with a text encoder's shape."""
    width = options.hidden_size or model.config.hidden_size
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": options.layers, "num_attention_heads": 1}
    return CoAttentionModel(CoAttentionConfig(model.config, image_width=round(image_width), **sizes))


def _text_model(kind: str, layers: int, width: int) -> PreTrainedModel:
    """A text model of some shape, with the usual vocabulary; one head, for any number of heads has as many parameters."""
    if kind == "encoder-decoder":
        sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
                 for name, value in {"layers": layers // 2, "attention_heads": 1, "ffn_dim": 4 * width}.items()}  # fmt: skip
        model = BartForConditionalGeneration(BartConfig(d_model=width, **sides))
        add_extra_tokens(model)
    else:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 1}
        model = RobertaModel(RobertaConfig(**sizes)) if kind == "encoder" else GPT2LMHeadModel(GPT2Config(**sizes))
    return model


def _seconds_of_a_step(batch_size: int) -> Callable[[Timing], float | None]:
    """GPU-seconds of an optimiser step with so many examples, from a run's timing."""

    def seconds(timing: Timing) -> float | None:
        if "step_ms_median" not in timing:
            return None
        return timing["step_ms_median"] / 1000 * timing["processes"] * batch_size / timing["batch_size"]

    return seconds


def _seconds_of(seconds: str, count: str) -> Callable[[Timing], float | None]:
    """GPU-seconds of an item, from a run's timing."""
    return lambda timing: timing[seconds] * timing["processes"] / timing[count] if timing.get(count) else None


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
        name = kind_of(rule)
        costs[name] = costs.get(name, Cost(jobs=0)) + plan.cost(rule, wildcards)
    total = sum(costs.values(), Cost(jobs=0))
    lines = [f"{'rule':16s} {'jobs':>5s} {'GPU-hours':>10s} {'download GB':>12s} {'disk GB':>8s}  speed"]
    for name, cost in [*costs.items(), ("total", total)]:
        sizes = f"{cost.download / 1e9:12.1f} {cost.disk / 1e9:8.1f}"
        more = f"  ({cost.unknown} of them not in full)" if cost.unknown else ""
        lines.append(f"{name:16s} {cost.jobs:5d} {cost.gpu_hours:10.1f} {sizes}  {cost.sources}{more}")
        parts = cost.parts() if name == "train" else {}
        lines += [f"  {part:14s} {'':5s} {of.gpu_hours:10.1f} {'':12s} {'':8s}  {of.sources}" for part, of in parts.items()]
    lines += memory_lines(plan)
    if found := plan.measured.every_run(lambda timing: timing.get("padding")):
        lines.append(f"Padding is {100 * statistics.median(found[1]):.0f}% of the text positions in training ({found[0]}).")
    lines.append(
        "Speeds are measured by finished runs, rehearsed (make rehearse), or estimated, under `plan` in the configuration."
    )
    lines.append(
        "Not in the hours is what jobs take to start, to probe and to derive; estimated validation is twice as fast as training."
    )
    if plan.unsized:
        lines.append(f"Not counted are archives without `bytes` in {config['data']['downloads']}: {', '.join(plan.unsized)}.")
    if plan.lacking:
        lines.append(f"Not counted is what needs a key that the configuration lacks: {', '.join(plan.lacking)}.")
    return "\n".join(lines)


def memory_lines(plan: Plan) -> list[str]:
    """The most memory that a process of each rule took, against what its jobs ask for; and what training took of a GPU."""
    lines = []
    for rule, section in SECTIONS.items():
        if found := plan.measured.memory(rule):
            source, peak = found
            asked = plan.config[section]["mem_mb"]
            lines.append(f"  {rule:14s} {peak:12.0f} of {asked} MB, {section}.mem_mb  {source}{' TOO LITTLE' * (peak > asked)}")
    if found := plan.measured.every_run(lambda timing: None if timing["device"] == "cpu" else timing["peak_memory_mb"]):
        lines.append(f"  {'train, GPU':14s} {max(found[1]):12.0f} MB  {found[0]}")
    return ["peak memory", *lines] if lines else []


def main() -> int:
    """Returns 2 where there is no plan to be made."""
    [config_file] = sys.argv[1:]
    try:
        config = read_configuration(config_file)
        jobs = jobs_to_run(config_file)
        check_schema(config, yaml.safe_load(SCHEMA.read_text(encoding="utf-8")), config_file)
        print(report(config, jobs))
    except RoutevlError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
