"""LoRA with a routing function between its two projections (paper, equation 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from routevl.methods.routed import RoutedMethod, RoutedOptions, places_option
from routevl.options import option

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


class Lora(RoutedMethod):
    """h = W0 x_H + (lora_alpha / r) route(x_t, x_v) W_up, on the query and value projections of every layer."""

    @dataclass(frozen=True)
    class Options(RoutedOptions):
        """Options of LoRA."""

        lora_alpha: float = option("the update is scaled by lora_alpha / r", 8.0, above=0)
        lora_dropout: float = option("dropout on the text before the down-projection", 0.0, least=0, below=1)
        bias: str = option("which biases of the text model are trained", "none", choices=("none", "all"))
        places: str = places_option("attention", "query and value", "what reads the hidden states in the feed-forward part")

    def config(self, text_model: nn.Module, train_also: list[str]) -> PeftConfig:
        from routevl.methods.lora.model import RoutedLoraConfig

        return RoutedLoraConfig(**self.config_fields(), modules_to_save=train_also or None)
