"""Bottleneck adapters with a routing function between their two projections (paper, equation 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routevl.methods.routed import RoutedMethod, RoutedOptions, places_option
from routevl.options import option

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


class Adapter(RoutedMethod):
    """h = [x_H +] act(route(x_t, x_v)) W_up, after the attention and the feed-forward output of every layer."""

    @dataclass(frozen=True)
    class Options(RoutedOptions):
        """Options of the Adapter."""

        activation: str = option("non-linearity in the bottleneck, by its name in transformers", "gelu")
        residual: bool = option("add x_H to the adapter's output, so that it starts as the identity", True)
        places: str = places_option("both", "the output of the attention", "that of the feed-forward part")
        position: str = option(
            "where the Adapter stands: before the residual addition, and so before a layer norm after it, or on the output "
            "of each layer norm, which then stays frozen (`freeze_layer_norm`)", "before_norm",
            choices=("before_norm", "after_norm"),
        )  # fmt: skip

        def conflicts(self) -> Iterator[str]:
            yield from super().conflicts()
            if self.position == "after_norm" and self.places != "both":
                yield "position=after_norm adapts all norms of a layer: leave places out"

    def config(self, text_model: nn.Module, train_also: list[str]) -> PeftConfig:
        from routevl.methods.adapter.model import RoutedAdapterConfig

        return RoutedAdapterConfig(**self.config_fields(), modules_to_save=train_also or None)
