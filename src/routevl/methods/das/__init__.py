"""DAS: layers that a task can do without are found by a search, and a bottleneck takes the place of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from routevl.methods.bottleneck import BottleneckMethod, BottleneckOptions
from routevl.methods.rates import RateOptions, groups_by_rate
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.backbones.structure import Structure
    from routevl.tasks.base import Task, VisionLanguageModel
    from routevl.training.prepared import Batches


class DAS(BottleneckMethod):
    """x + A(x) in place of a skipped layer, A(x) = U relu(D LN(x)); in the others A(x) beside each sub-layer, x what it reads."""

    @dataclass(frozen=True)
    class Options(RateOptions, BottleneckOptions):
        """Options of DAS and of its search."""

        skipped: int = option("layers that are skipped", 4, least=1)
        skip_width: int | None = option(
            "width of the bottleneck in a skipped layer's place; `none`: three eighths of the hidden states'", None, least=1
        )
        search_epochs: int = option("epochs of the search, which trains with other layers skipped at each step", 3, least=1)
        still_epochs: int = option("of these at the beginning in which no gate moves", 1, least=0)
        every: int = option("steps of the search between moves of the gates", 10, least=1)
        subsets: int = option("sets of skipped layers that are compared in a move of the gates", 3, least=2)
        reward_scale: float = option(
            "factor of the rewards, exp(-loss); of a loss of several units they are so small that gates hardly move", 1.0, above=0
        )

        def conflicts(self) -> Iterator[str]:
            """What is wrong with options that are right each by itself."""
            if self.still_epochs >= self.search_epochs:
                yield (
                    f"still_epochs is {self.still_epochs} of {self.search_epochs} search_epochs, so that gates would never move: "
                    "set fewer still_epochs"
                )

    def prepare(self, task: Task, batches: Batches) -> dict[str, Tensor]:
        """Name of each layer -> its gate, a scalar: see `routevl.methods.das.search.search`."""
        from routevl.backbones.skeleton import layers_in
        from routevl.methods.base import layer_norms
        from routevl.methods.bottleneck.layer import parts_of
        from routevl.methods.das.layer import put_beside
        from routevl.methods.das.search import search

        text_model, options = task.model.text_model.requires_grad_(False), self.options
        for name in [] if task.settings.freeze_layer_norm else layer_norms(text_model):
            text_model.get_submodule(name).requires_grad_(True)
        names = [*layers_in(text_model)]
        detours = put_beside(text_model, parts_of(text_model), names, names, self.rank, self.skip_rank)
        gates = search(task, batches, self.groups, list(detours.values()), options)
        return {name: gate.clone() for name, gate in zip(detours, gates, strict=True)}

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        """See `Method.build`. Raises RoutevlError as `chosen` and `put_beside`."""
        from routevl.backbones.skeleton import layers_in
        from routevl.methods.das.search import chosen

        names = [*layers_in(text_model)]
        self.without = {names[number] for number in chosen([prepared[name].item() for name in names], self.options.skipped)}
        return super().build(text_model, prepared, train_also)

    def norms(self, text_model: nn.Module, train_also: list[str]) -> list[str]:
        return [name for name in train_also if not any(name.startswith(f"{layer}.") for layer in self.without)]

    def adapt(self, text_model: nn.Module, parts: Structure) -> None:
        from routevl.backbones.skeleton import layers_in
        from routevl.methods.das.layer import put_beside, renumber

        kept = [name for name in layers_in(text_model) if name not in self.without]
        for detour in put_beside(text_model, parts, self.without, kept, self.rank, self.skip_rank).values():
            detour.skipped = detour.skip is not None
        renumber(text_model, self.without)

    def groups(self, model: VisionLanguageModel, learning_rate: float) -> list[dict[str, Any]]:
        return groups_by_rate(model, learning_rate, self.options)

    def skip_rank(self, width: int) -> int:
        """The width of a bottleneck in a layer's place, on hidden states of some width."""
        return self.options.skip_width or max(1, 3 * width // 8)
