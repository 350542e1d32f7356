"""The settings of one training run: everything, beside data and code, that decides its outcome."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from routevl.errors import RoutevlError

YES_NO = {"yes": True, "no": False}


def _setting(help: str, **options: Any) -> Any:
    return field(metadata={"help": help, **options})


@dataclass(frozen=True)
class RunSettings:
    """One run of the run sheet, together with its task's settings from the configuration file. All are required."""

    task: str = _setting("what is learned: vqa or caption", choices=("vqa", "caption"))
    method: str = _setting("PEFT method, a row of routevl.methods.METHODS: lora or adapter")
    routing: str = _setting("routing function, a row of routevl.routing.ROUTING: none, mul, add, attn or expand")
    rank: int = _setting("rank r of the bottleneck")
    alpha: float = _setting("LoRA's scaling is alpha / rank; adapters have none")
    prefix: bool = _setting("put the visual tokens before the text: yes or no")
    visual_tokens: str = _setting("which stored features are routed: pooled or patches", choices=("pooled", "patches"))
    visual_scale: str = _setting("parameter-free scaling of the routed features: none, tanh or layer_norm")
    freeze_layer_norm: bool = _setting("keep the text model's layer norms frozen: yes or no")
    epochs: int = _setting("passes over the training split")
    batch_size: int = _setting("examples per optimiser step, over all processes")
    prediction_batch_size: int = _setting("examples per batch in validation and prediction, in each process")
    learning_rate: float = _setting("peak learning rate of AdamW")
    warmup: float = _setting("linear warm-up: a fraction of all steps when below 1, else a number of steps")
    weight_decay: float = _setting("AdamW's weight decay")
    max_text_tokens: int = _setting("longer texts are cut here (special tokens included)")
    beams: int = _setting("beams of the beam search (captions)")
    max_new_tokens: int = _setting("longest generated caption, in tokens")
    precision: str = _setting("float32, or bfloat16 autocast", choices=("float32", "bfloat16"))
    gradient_checkpointing: bool = _setting("recompute activations in the backward pass to save memory: yes or no")
    seed: int = _setting("seed of initialisation, data order and dropout")

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size", "prediction_batch_size", "beams", "max_new_tokens"):
            if getattr(self, name) <= 0:
                raise RoutevlError(f"{name} must be a positive integer, not {getattr(self, name)}")
        if self.max_text_tokens < 3:  # two of them are special
            raise RoutevlError(f"max_text_tokens must be 3 or more, not {self.max_text_tokens}")
        for name in ("alpha", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise RoutevlError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RoutevlError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise RoutevlError(f"seed must be 0 or more and below 2**32, not {self.seed}")

    def warmup_steps(self, total_steps: int) -> int:
        """How many of the optimiser's `total_steps` are warm-up."""
        return round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)

    def as_record(self) -> dict[str, Any]:
        """The settings as a JSON object, in the order of the fields."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any], source: str) -> RunSettings:
        """The settings from a JSON object read from `source`; missing or unknown keys are a RoutevlError."""
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(record) ^ names):
            raise RoutevlError(f"{source}: settings lack or do not know {', '.join(unknown)}")
        return cls(**record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One required option per setting."""
    types = {"int": int, "float": float, "str": str, "bool": str}
    group = parser.add_argument_group("settings of the run")
    for f in fields(RunSettings):
        choices = tuple(YES_NO) if f.type == "bool" else f.metadata.get("choices")
        group.add_argument(
            "--" + f.name.replace("_", "-"), type=types[f.type], choices=choices, help=f.metadata["help"], required=True
        )


def from_arguments(arguments: argparse.Namespace) -> RunSettings:
    """The settings that `add_arguments`' options gave."""
    values = {f.name: getattr(arguments, f.name) for f in fields(RunSettings)}
    return RunSettings(**{name: YES_NO.get(v, v) if isinstance(v, str) else v for name, v in values.items()})
