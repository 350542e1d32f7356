"""The routed LoRA layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from routevl.conditioning import Conditioning
from routevl.errors import RoutevlError
from routevl.methods.lora.config import RoutedLoraConfig
from routevl.methods.routed.layer import RoutedLayer
from routevl.routing import routing_function


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

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("lora_dropout", "scaling", "fused", "route")

    def __init__(self, base_layer: nn.Linear | Conv1D, conditioning: Conditioning) -> None:
        super().__init__(base_layer, conditioning)
        if isinstance(base_layer, Conv1D):
            self.width, self.out_features = base_layer.nx, base_layer.nf
        else:
            self.width, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.fused: dict[str, Fused | None] = {}  # adapter name -> how the module holds several projections

    def update_layer(self, adapter: str, config: RoutedLoraConfig, name: str) -> None:
        """Add a bottleneck: A as peft's LoRA draws it, B zero, so that the model starts as it was."""
        layouts = (layout for end, layout in config.fused_projections.items() if f".{name}".endswith(f".{end}"))
        fused = self.fused[adapter] = next((Fused(**layout) for layout in layouts), None)
        if fused and (fused.groups * sum(fused.widths) != self.out_features or not any(fused.adapted)):
            raise RoutevlError(f"fused_projections {fused} does not fit {name} with its {self.out_features} outputs")
        parts = sum(fused.adapted) if fused else 1
        self.route[adapter] = routing_function(config.routing)
        self.scaling[adapter] = config.lora_alpha / config.r
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A[adapter] = nn.Linear(self.width, parts * config.r, bias=False)
        self.lora_B[adapter] = nn.Linear(config.r, sum(fused.adapted_widths()) if fused else self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A[adapter].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter].weight)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, ..., d) -> (B, ..., d_out)."""
        result = self.base_layer(hidden_states, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.adapters_in_use():
            down, up, fused = self.lora_A[adapter], self.lora_B[adapter], self.fused[adapter]
            text = self.lora_dropout[adapter](self._cast_input_dtype(hidden_states, down.weight.dtype))
            routed = self.routed(adapter, down, text, parts=sum(fused.adapted) if fused else 1) * self.scaling[adapter]
            result = _add_to_projections(result, routed, up.weight, fused) if fused else result + up(routed)
        return result.to(dtype)


def _add_to_projections(result: Tensor, routed: Tensor, up: Tensor, fused: Fused) -> Tensor:
    """Add each bottleneck's update to its projection of `result`.

    Args:
        result: (..., d_out), which holds the fused projections.
        routed: (..., P * r), the P bottlenecks side by side, in the order of the adapted projections.
        up: (sum of the adapted projections' widths, r), their up-projections one below the other.
    """
    pieces = zip(routed.chunk(sum(fused.adapted), -1), up.split(fused.adapted_widths()), strict=True)
    updates = (nn.functional.linear(x, w).unflatten(-1, (fused.groups, -1)) for x, w in pieces)
    projections = result.unflatten(-1, (fused.groups, -1)).split(fused.widths, -1)
    added = [p + next(updates) if adapted else p for p, adapted in zip(projections, fused.adapted, strict=True)]
    return torch.cat(added, dim=-1).flatten(-2)
