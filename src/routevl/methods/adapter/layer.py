"""The routed adapter layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from routevl.conditioning import Conditioning
from routevl.methods.adapter.config import RoutedAdapterConfig
from routevl.methods.routed.layer import RoutedLayer
from routevl.routing import routing_function


class RoutedAdapterLayer(RoutedLayer):
    """h = [x_H +] act(route(x_H W_down, x_R W_down)) W_up on the output x_H of a module (paper, equation 5)."""

    adapter_layer_names = ("adapter_down", "adapter_up")
    other_param_names = ("activation", "residual", "route")

    def __init__(self, base_layer: nn.Linear | Conv1D, conditioning: Conditioning) -> None:
        super().__init__(base_layer, conditioning)
        self.width = base_layer.nf if isinstance(base_layer, Conv1D) else base_layer.out_features
        self.adapter_down = nn.ModuleDict()
        self.adapter_up = nn.ModuleDict()
        self.activation = nn.ModuleDict()
        self.residual: dict[str, bool] = {}

    def update_layer(self, adapter: str, config: RoutedAdapterConfig, name: str) -> None:
        """Add a bottleneck. With the residual W_up starts at zero, so that the model starts as it was; without it W_up keeps
        nn.Linear's own initialisation, since a zero output would erase the module."""
        self.route[adapter] = routing_function(config.routing)
        self.residual[adapter] = config.residual
        self.activation[adapter] = ACT2FN[config.activation]
        self.adapter_down[adapter] = nn.Linear(self.width, config.r)
        self.adapter_up[adapter] = nn.Linear(config.r, self.width)
        if config.residual:
            nn.init.zeros_(self.adapter_up[adapter].weight)
            nn.init.zeros_(self.adapter_up[adapter].bias)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, ..., d_in) -> (B, ..., d)."""
        result = self.base_layer(hidden_states, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.adapters_in_use():
            down, up = self.adapter_down[adapter], self.adapter_up[adapter]
            result = self._cast_input_dtype(result, down.weight.dtype)
            update = up(self.activation[adapter](self.routed(adapter, down, result)))
            result = result + update if self.residual[adapter] else update
        return result.to(dtype)
