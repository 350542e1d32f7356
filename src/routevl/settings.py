"""The settings of one training run: everything, beside data and code, that decides its outcome."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from routevl.errors import RoutevlError
from routevl.features.index import TOKENS
from routevl.methods.base import Method
from routevl.methods.table import METHODS, new_method
from routevl.options import check_value, describe, option, read, read_words
from routevl.tasks.table import TASKS

CONTROLS = ("none", "noise", "ones", "shuffled")
COLUMNS = ("task", "method", "epochs", "prefix", "visual_tokens")  # settings that are columns of the run sheet


@dataclass(frozen=True, kw_only=True)
class _Settings:
    task: str = option("what is learned", choices=TASKS)
    method: str = option("fine-tuning method (`routevl methods` lists them)", choices=METHODS)
    prefix: bool = option("whether the visual tokens also stand before the text")
    visual_tokens: str = option("which stored features are used", choices=TOKENS)
    control: str = option(
        "what stands in for the image: `none` (the image itself), `noise`, `ones`, or `shuffled`, another image's features",
        "none", choices=CONTROLS,
    )  # fmt: skip
    freeze_layer_norm: bool = option("keep the text model's layer norms frozen; else they are trained beside the method")
    epochs: int = option("passes over the training split", least=1)
    max_train_examples: int | None = option(
        "learn from the first so many examples of the training split alone, in its order; `none`: from all, as where there are "
        "fewer", None, least=1,
    )  # fmt: skip
    batch_size: int = option("examples per optimiser step, over all processes", least=1)
    group_by_length: bool = option("texts of a training batch are about equally long, which saves padding", True)
    mixed_batches: bool = option(
        "multi-task: a training batch is drawn from all data sets together; else each is of one, and they take turns", False
    )
    task_prompts: bool = option("multi-task: a text begins with the name of its data set", True)
    selection: str = option(
        "which weights are kept and predict: those of the epoch that is `best` in validation, or of the `last` one", "best",
        choices=("best", "last"),
    )  # fmt: skip
    prediction_batch_size: int = option("examples per batch in validation and prediction, in each process", least=1)
    learning_rate: float = option("peak learning rate of AdamW; it then falls linearly to zero", above=0)
    warmup: float = option("linear warm-up: a fraction of all steps when below 1, else a number of steps", least=0)
    weight_decay: float = option("AdamW's weight decay", least=0)
    max_grad_norm: float | None = option(
        "gradients are clipped to this norm, over all trained parameters together and over all processes; `none`: they are not",
        1.0, above=0,
    )  # fmt: skip
    max_text_tokens: int = option("longer texts are cut here, special tokens included", least=3)
    beams: int = option("beams of the caption search", least=1)
    max_new_tokens: int = option("longest generated caption, in tokens", least=1)
    precision: str = option("`float32`, or `bfloat16` autocast", choices=("float32", "bfloat16"))
    gradient_checkpointing: bool = option("recompute activations in the backward pass to save memory")
    compile: bool = option("compile the text model's layers in training (torch.compile), which is for GPUs", False)
    seed: int = option("seed of initialisation, data order and dropout", least=0, below=2**32)


@dataclass(frozen=True, kw_only=True)
class RunSettings(_Settings):
    """One run of the run sheet with all its settings. `options` are the method's, typed, but for those that it fixes."""

    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "options of the method, as key=value"})

    def new_method(self) -> Method:
        """The run's method with its options."""
        return new_method(self.method, self.options, "options")

    def warmup_steps(self, total_steps: int) -> int:
        """How many of the optimiser's `total_steps` are warm-up."""
        return round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)

    def as_record(self) -> dict[str, Any]:
        """The settings as a JSON object, without those, and options, that are none by default: so it outlives a new one."""
        record = asdict(self)
        record["options"] = {name: value for name, value in record["options"].items() if value is not None}
        none_by_default = {f.name for f in fields(self) if f.default is None}
        return {name: value for name, value in record.items() if value is not None or name not in none_by_default}

    @classmethod
    def read(cls, values: Mapping[str, Any], options: Mapping[str, Any], where: str) -> RunSettings:
        """The settings from values by name and the method's options, typed or as text.

        Raises:
            RoutevlError: an unknown, missing or wrong setting or option; the line starts with `where`.
        """
        settings = read(_Settings, values, where)
        typed = asdict(new_method(settings.method, options, where).options)
        return cls(**asdict(settings), options={k: v for k, v in typed.items() if k not in METHODS[settings.method].fixed})

    @classmethod
    def from_record(cls, record: Mapping[str, Any], source: str) -> RunSettings:
        """The settings from a JSON object read from `source`."""
        values, options = {name: value for name, value in record.items() if name != "options"}, record.get("options")
        if not isinstance(options, dict):
            raise RoutevlError(f"{source}: settings: options is {options!r}, expected an object")
        return cls.read(values, options, f"{source}: settings")


# Settings that are no columns: they stand in the configuration's `runs`, `tasks` and `methods`, or among a row's options.
SHARED_SETTINGS = tuple(f.name for f in fields(_Settings) if f.name not in (*COLUMNS, "seed"))


def check_setting(name: str, value: Any, where: str) -> None:
    """Raise RoutevlError where a shared setting, typed or text, is unknown or wrong."""
    if name not in SHARED_SETTINGS:
        raise RoutevlError(f"{where}: no setting {name!r} (there are {', '.join(SHARED_SETTINGS)})")
    check_value(_Settings, name, value, where)


def shared_setting_records() -> list[dict[str, Any]]:
    """What documents say of the shared settings (`routevl.options.describe`)."""
    return [entry for entry in describe(_Settings) if entry["name"] in SHARED_SETTINGS]


def add_arguments(parser: argparse.ArgumentParser, several: str = "") -> None:
    """One option per setting, and the method's. That of the setting `several` takes more than one value, one for each run."""
    group = parser.add_argument_group("settings of the run")
    for f in fields(_Settings):
        choices = f.metadata["choices"] or (("yes", "no") if f.type == "bool" else None)
        given = {"required": True} if f.default is MISSING else {"default": f.default}
        given |= {"nargs": "+"} if f.name == several else {}
        group.add_argument("--" + f.name.replace("_", "-"), choices=choices, help=f.metadata["help"], **given)
    group.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="options of the method (routevl methods)")


def from_arguments(arguments: argparse.Namespace) -> RunSettings:
    """The settings that `add_arguments`' options gave."""
    values = {f.name: getattr(arguments, f.name) for f in fields(_Settings)}
    return RunSettings.read(values, read_words(arguments.options, "--options"), "settings")
