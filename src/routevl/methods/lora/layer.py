"""The routed LoRA layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from routevl.backbones.skeleton import widths_of
from routevl.conditioning import Conditioning
from routevl.errors import RoutevlError
from routevl.methods.lora.config import RoutedLoraConfig
from routevl.methods.routed.layer import RoutedLayer


@dataclass(frozen=True)
class Fused:
    """How a module's outputs hold several projections: `groups` of them (1, or the heads), in each the projections' `widths`
    side by side, and which of these are adapted."""

    groups: int
    widths: list[int]
    adapted: list[bool]

    def adapted_widths(self) -> list[int]:
        """The whole width of each adapted projection, over all groups."""
        return [self.groups * width for width, adapted in zip(self.widths, self.adapted, strict=True) if adapted]


class RoutedLoraLayer(RoutedLayer):
    """h = W0 x_H + (lora_alpha / r) * route(x_H A, x_R A) B, with A (d, r) shared by text and image (paper, equation 4).

    A module that holds P adapted projections, side by side or head by head, has P bottlenecks of its own: A is (d, P r), and B's
    P blocks (r, d_out) each write to one projection, so that routing never mixes, say, query and value.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_mixer")
    other_param_names = ("lora_dropout", "scaling", "fused", "parts", "after_up", "text_alone")

    def __init__(self, base_layer: nn.Linear | Conv1D, conditioning: Conditioning) -> None:
        super().__init__(base_layer, conditioning)
        self.width, self.out_features = widths_of(base_layer)
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.fused: dict[str, Fused | None] = {}  # adapter name -> how the module holds several projections

    def update_layer(self, adapter: str, config: RoutedLoraConfig, name: str) -> None:
        """Add a bottleneck: A as peft's LoRA draws it, B zero unless it is to be random, so that the model starts as it was."""
        layouts = (layout for end, layout in config.fused_projections.items() if f".{name}".endswith(f".{end}"))
        fused = self.fused[adapter] = next((Fused(**layout) for layout in layouts), None)
        if fused and (fused.groups * sum(fused.widths) != self.out_features or not any(fused.adapted)):
            raise RoutevlError(f"fused_projections {fused} does not fit {name} with its {self.out_features} outputs")
        if fused and config.tasks > 1:
            raise RoutevlError(f"{name} holds several projections, which are adapted for one task alone: leave tasks out")
        self.scaling[adapter] = config.lora_alpha / config.r
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.add_down(adapter, config, parts=sum(fused.adapted) if fused else 1, bias=False)
        width = sum(fused.adapted_widths()) if fused else self.out_features
        self.lora_B[adapter] = self.of_tasks(config, lambda: nn.Linear(config.r, width, bias=False))
        for weight in self.lora_A[adapter].parameters():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for weight in self.lora_B[adapter].parameters() if config.up_init != "random" else ():
            nn.init.zeros_(weight)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, ..., d) -> (B, ..., d_out)."""
        result = self.base_layer(hidden_states, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.adapters_in_use():
            text = self.lora_dropout[adapter](self._cast_input_dtype(hidden_states, self.lora_B[adapter].weight.dtype))
            up, scaling = partial(self._up, adapter), self.scaling[adapter]
            if self.after_up[adapter]:
                updates = [routed * scaling for routed in self.routed(adapter, text, up)]
            else:
                updates = up([routed * scaling for routed in self.routed(adapter, text)])
            fused = self.fused[adapter]
            result = add_to_projections(result, updates, fused) if fused else result + updates[0]
        return result.to(dtype)

    def _up(self, adapter: str, streams: Sequence[Tensor]) -> list[Tensor]:
        """Each bottleneck's up-projection: P times (B, ..., r) -> P times (B, ..., d_out)."""
        up, fused = self.lora_B[adapter], self.fused[adapter]
        if fused is None:
            return [up(stream) for stream in streams]
        weights = up.weight.split(fused.adapted_widths())
        return [nn.functional.linear(stream, weight) for stream, weight in zip(streams, weights, strict=True)]


def add_to_projections(result: Tensor, updates: Sequence[Tensor], fused: Fused) -> Tensor:
    """Add each bottleneck's update (..., its projection's width), in the order of the adapted projections, to its projection of
    `result` (..., d_out), which holds them all."""
    pieces = (update.unflatten(-1, (fused.groups, -1)) for update in updates)
    projections = result.unflatten(-1, (fused.groups, -1)).split(fused.widths, -1)
    added = [p + next(pieces) if adapted else p for p, adapted in zip(projections, fused.adapted, strict=True)]
    return torch.cat(added, dim=-1).flatten(-2)
