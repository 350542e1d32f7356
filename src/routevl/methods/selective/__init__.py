"""Methods that add nothing to the text model: they choose which of its own parameters are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from routevl.methods.base import Method
from routevl.methods.rates import RateOptions, groups_by_rate
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.tasks.base import Task, VisionLanguageModel


class Selective(Method):
    """The text model itself, with some of its parameters trained."""

    def chosen(self, parameters: Mapping[str, Tensor], prepared: Mapping[str, Tensor]) -> Collection[str]:
        """The names of the parameters to train, of those that are not trained anyway."""
        raise NotImplementedError

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        beside = [f"{module}.{name}" for module in train_also for name, _ in text_model.get_submodule(module).named_parameters()]
        self.also = set(beside)
        parameters = dict(text_model.named_parameters())
        chosen = set(self.chosen({n: p for n, p in parameters.items() if n not in self.also}, prepared))
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen or name in self.also)
        return text_model

    def part_of(self, name: str) -> str:
        return "layer_norm" if name in self.also else "method"


class Full(Selective):
    """All parameters."""

    Options = RateOptions

    def chosen(self, parameters: Mapping[str, Tensor], prepared: Mapping[str, Tensor]) -> Collection[str]:
        return parameters

    def groups(self, model: VisionLanguageModel, learning_rate: float) -> list[dict[str, Any]]:
        return groups_by_rate(model, learning_rate, self.options)


class FullBoth(Full):
    """All parameters, and those of the vision model."""

    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    refuses: ClassVar[Mapping[str, str]] = {"prefix=no": "then the text model does not read what the vision model gives"}

    def adapt_vision(self, vision_model: nn.Module) -> nn.Module:
        return vision_model.requires_grad_(True)


class BitFit(Selective):
    """All biases."""

    def chosen(self, parameters: Mapping[str, Tensor], prepared: Mapping[str, Tensor]) -> Collection[str]:
        return [name for name in parameters if name.rpartition(".")[2] == "bias"]


class GradientNorm(Selective):
    """The matrices and vectors with the largest gradients, found by a probe before training, as far as a budget goes.

    A baseline of methods that probe: the score of a parameter is the mean square of its entries' gradients, summed over batches.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the probe and the choice."""

        share: float = option("largest share of the text model's parameters that is trained", 0.02, above=0, most=1)
        batches: int = option("batches of the training split that the probe looks at", 16, least=1)

    def prepare(self, task: Task, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Name of each parameter of the text model -> its score, a scalar."""
        named = dict(task.model.text_model.named_parameters())
        scores = {name: parameter.new_zeros(()) for name, parameter in named.items()}
        task.model.train()
        for batch in islice(batches, self.options.batches):
            task.model.zero_grad()
            task.model(**batch)["loss"].backward()
            for name, parameter in named.items():
                if parameter.grad is not None:
                    scores[name] += parameter.grad.square().mean()
        return scores

    def chosen(self, parameters: Mapping[str, Tensor], prepared: Mapping[str, Tensor]) -> Collection[str]:
        budget = self.options.share * sum(parameter.numel() for parameter in parameters.values())
        names = []
        for name in sorted(parameters, key=lambda name: (-prepared[name].item(), name)):
            if parameters[name].numel() <= budget:
                names.append(name)
                budget -= parameters[name].numel()
        return names
