"""SPT: what is trained, and how, is where a task's gradients are large."""

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


NORMS_ARE_RANKED = "layer norms are ranked with all other weights and trained only where they are chosen; set freeze_layer_norm"


class Spt(Method):
    """Of the matrices with many of the largest squared gradients a low-rank update or an adapter, of the others these entries
    alone; norms and biases whole or by entries. A probe before training chooses, as far as a budget goes."""

    refuses: ClassVar[Mapping[str, str]] = {"freeze_layer_norm=no": NORMS_ARE_RANKED}

    @dataclass(frozen=True)
    class Options:
        """Options of the probe, the choice and what is trained."""

        kind: str = option(
            "what a matrix gets that is trained as a whole: low-rank matrices beside it (`lora`), or a bottleneck on its output "
            "(`adapter`)", choices=("lora", "adapter"),
        )  # fmt: skip
        r: int = option("rank of the low-rank matrices, width of the bottlenecks", 8, least=1)
        share: float = option("share of the text model's parameters that is trained, met approximately", 0.005, above=0, most=1)
        alpha: float = option(
            "a matrix is trained as a whole where its chosen entries times this are what that costs", 10.0, above=0
        )
        beta: float = option("a norm or bias is trained whole where its chosen entries times this are its length", 5.0, above=0)
        batches: int = option("batches of the training split that the probe looks at", 16, least=1)
        dropout: float = option("dropout before the down-projections", 0.1, least=0, below=1)
        drop_path: float = option("share of the examples that go without a matrix's update in training", 0.1, least=0, below=1)

    def prepare(self, task: Task, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is trained, as `routevl.methods.spt.choice.choice_of`."""
        from routevl.methods.gradients import squared_gradients
        from routevl.methods.spt.choice import choice_of, ranked

        text_model = task.model.text_model
        parts = ranked(text_model)  # refuses before the work
        task.model.train()
        squares = squared_gradients(task.model, islice(batches, self.options.batches))
        return choice_of(parts, squares, self.budget(text_model), self.options)

    def budget(self, text_model: nn.Module) -> float:
        return self.options.share * sum(parameter.numel() for parameter in text_model.parameters())

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        """See `Method.build`. Raises RoutevlError where modules are to be trained beside the choice, and as `train_chosen`."""
        from routevl.methods.spt.layer import train_chosen

        if train_also:
            raise RoutevlError(NORMS_ARE_RANKED)
        train_chosen(text_model, prepared, self.options)
        return text_model
