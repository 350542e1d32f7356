"""AdaPEFT: of several small parts of a model those are trained whose training lowers the loss most, for their size."""

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

NORMS_ARE_CANDIDATES = "layer norms are among what is chosen from and trained only where they are chosen; set freeze_layer_norm"


class AdaPeft(Method):
    """Of every layer low-rank updates of query and value, the biases, and the norms, each a candidate. A probe before training
    measures the loss along the optimiser's steps, candidate by candidate, and a budget goes to the best for their size."""

    refuses: ClassVar[Mapping[str, str]] = {"freeze_layer_norm=no": NORMS_ARE_CANDIDATES}

    @dataclass(frozen=True)
    class Options:
        """Options of the probe, the choice and what is trained."""

        r: int = option("rank of the low-rank updates", 8, least=1)
        share: float = option("largest share of the text model's parameters that is trained", 0.005, above=0, most=1)
        batches: int = option("training steps of the probe; its authors': a tenth of all", 100, least=1)
        every: int = option("of these every so many-th is measured, by four forward passes for each candidate", 10, least=1)

    def prepare(self, task: Task, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The table of candidates, as `routevl.methods.adapeft.probe.table_of`."""
        from accelerate.utils import extract_model_from_parallel

        from routevl.methods.adapeft.candidates import partition, train
        from routevl.methods.adapeft.probe import measured, table_of

        text_model = task.model.text_model
        budget = self.budget(text_model)  # before anything is put in
        candidates = train(text_model.requires_grad_(False), partition(text_model), self.options.r)
        batches = islice(batches, self.options.batches)
        model = extract_model_from_parallel(task.model, keep_fp32_wrapper=False)  # autocast would round changes of the loss away
        fits = measured(model, batches, candidates, task.settings.learning_rate, self.options.every)
        return table_of(fits, {name: sum(p.numel() for p in of) for name, of in candidates.items()}, budget)

    def budget(self, text_model: nn.Module) -> float:
        return self.options.share * sum(parameter.numel() for parameter in text_model.parameters())

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        """See `Method.build`. Raises RoutevlError where modules are to be trained beside the choice, and as `parts_of`."""
        from routevl.methods.adapeft.candidates import partition, train
        from routevl.methods.adapeft.probe import SELECTED

        if train_also:
            raise RoutevlError(NORMS_ARE_CANDIDATES)
        train(text_model, {name: of for name, of in partition(text_model).items() if prepared[SELECTED + name]}, self.options.r)
        return text_model
