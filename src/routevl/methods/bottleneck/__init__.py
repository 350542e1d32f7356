"""What methods share that put bottlenecks into the text model as modules of its own; layer.py has the bottleneck itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routevl.methods.base import Method
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.backbones.structure import Structure


@dataclass(frozen=True)
class BottleneckOptions:
    """Options of every such method."""

    r: int | None = option("width of the bottlenecks; `none`: an eighth of the hidden states'", None, least=1)


class BottleneckMethod(Method):
    """A method whose bottlenecks stand beside the frozen modules whose outputs they change, which keep their names."""

    def adapt(self, text_model: nn.Module, parts: Structure) -> None:
        """Put the bottlenecks in."""
        raise NotImplementedError

    def norms(self, text_model: nn.Module, train_also: list[str]) -> list[str]:
        """Which of the layer norms that a run trains this method trains."""
        return train_also

    def rank(self, width: int) -> int:
        """The width of a bottleneck on hidden states of some width."""
        return self.options.r or max(1, width // 8)

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        from routevl.methods.bottleneck.layer import parts_of

        for name in self.norms(text_model, train_also):
            text_model.get_submodule(name).requires_grad_(True)
        self.adapt(text_model, parts_of(text_model))
        return text_model

    def part_of(self, name: str) -> str:
        return "method" if ".adapter." in name else "layer_norm"
