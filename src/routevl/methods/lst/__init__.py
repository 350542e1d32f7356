"""Ladder side-tuning: a narrow network beside a frozen backbone, through which no gradient passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from routevl.errors import RoutevlError
from routevl.methods.base import Method
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.tasks.base import Task

NORMS_STAY_FROZEN = "no gradient passes through the backbone, so that its layer norms cannot be trained; set freeze_layer_norm"


class Lst(Method):
    """s ← μ_i s + (1 - μ_i) D_i h_i, then layer i of a side network that is narrower by `reduction`; the backbone reads the text
    alone."""

    refuses: ClassVar[Mapping[str, str]] = {
        "co_attention": "its side network has one stream",
        "gradient_checkpointing": "the backbone keeps no activations for the backward pass, and the side network's are small",
        "freeze_layer_norm=no": NORMS_STAY_FROZEN,
    }

    @dataclass(frozen=True)
    class Options:
        """Options of ladder side-tuning."""

        reduction: int = option("the backbone's widths are so many times the side network's", 4, least=2)
        importance: str = option(
            "which rows of the backbone's matrices the side network starts from: those with the largest squared `gradient` over "
            "training examples, or the largest `magnitude`", "gradient", choices=("gradient", "magnitude"),
        )  # fmt: skip
        samples: int = option("training examples that the gradients are of", 1024, least=1)
        dropout: float = option("dropout on the visual tokens, and before the up-projection", 0.1, least=0, below=1)

    def prepare(self, task: Task, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """How good the rows of the backbone's matrices are to start from, as `routevl.methods.lst.cut.row_scores`."""
        from routevl.methods.gradients import squared_gradients
        from routevl.methods.lst.cut import row_scores
        from routevl.methods.lst.ladder import side_config

        text_model = task.model.text_model
        side_config(text_model.config, self.options.reduction)  # refuses before the work
        if self.options.importance == "gradient":
            task.model.eval()
            importance = squared_gradients(task.model, islice(_examples(batches), self.options.samples))
        else:
            importance = {name: parameter.detach().abs() for name, parameter in text_model.named_parameters()}
        return row_scores(text_model, importance, self.options.reduction)

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        """See `Method.build`. Raises RoutevlError where modules of the backbone are to be trained, and as `side_config`."""
        from routevl.methods.lst.ladder import put_beside

        if train_also:
            raise RoutevlError(NORMS_STAY_FROZEN)
        return put_beside(text_model, prepared, self.options.reduction, self.options.dropout)

    def beside(self, inputs: Mapping[str, Tensor], visual: Tensor | None) -> dict[str, Tensor]:
        return {} if visual is None else {"visual_tokens": visual}


def _examples(batches: Iterable[dict[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    """The examples of batches, each as a batch of one."""
    for batch in batches:
        for place in range(len(next(iter(batch.values())))):
            yield {name: tensor[place : place + 1] for name, tensor in batch.items()}
