"""Learning rates of single parts of a model, as multiples of the others'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from routevl.options import option

if TYPE_CHECKING:
    from routevl.tasks.base import VisionLanguageModel


@dataclass(frozen=True)
class RateOptions:
    """Options of a method that can train parts of a model at rates of their own."""

    head_rate: float | None = option(
        "learning rate of the task's head, as a multiple of the others'; `none`: theirs; METER's is 50", None, above=0
    )
    cross_modal_rate: float | None = option(
        "the same of what is trained in the two streams of a model like METER, but for the type embeddings; METER's is 5", None,
        above=0,
    )  # fmt: skip


def groups_by_rate(model: VisionLanguageModel, learning_rate: float, options: RateOptions) -> list[dict[str, Any]]:
    """As `Method.groups`, the parameters that have the learning rate itself first."""
    groups: dict[float, list[Any]] = {1.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_stream = options.cross_modal_rate if "cross_modal" in name else None
            rate = options.head_rate if name.startswith("head.") else of_stream
            groups.setdefault(rate or 1.0, []).append(parameter)
    return [{"params": parameters, "lr": rate * learning_rate} for rate, parameters in groups.items() if parameters]
