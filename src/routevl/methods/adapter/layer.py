"""The routed adapter layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from routevl.backbones.skeleton import LINEAR, widths_of
from routevl.conditioning import Conditioning
from routevl.methods.adapter.config import RoutedAdapterConfig
from routevl.methods.routed.layer import RoutedLayer


class RoutedAdapterLayer(RoutedLayer):
    """h = [x_H +] act(route(x_H W_down, x_R W_down)) W_up on the output x_H of a module (paper, equation 5)."""

    adapter_layer_names = ("adapter_down", "adapter_up", "adapter_mixer")
    other_param_names = ("activation", "residual", "parts", "after_up", "text_alone")

    def __init__(self, base_layer: nn.Module, conditioning: Conditioning) -> None:
        super().__init__(base_layer, conditioning)
        linear = isinstance(base_layer, LINEAR)  # else a layer norm
        self.width = widths_of(base_layer)[1] if linear else next(base_layer.parameters()).shape[-1]
        self.activation = nn.ModuleDict()
        self.residual: dict[str, bool] = {}

    def update_layer(self, adapter: str, config: RoutedAdapterConfig, name: str) -> None:
        """Add a bottleneck. With the residual W_up starts at zero, so that the model starts as it was; without it, or where it
        is to be random, W_up keeps nn.Linear's own initialisation, since a zero output would erase the module."""
        self.residual[adapter] = config.residual
        self.activation[adapter] = ACT2FN[config.activation]
        self.add_down(adapter, config, parts=1, bias=True)
        self.adapter_up[adapter] = self.of_tasks(config, lambda: nn.Linear(config.r, self.width))
        if config.up_init == "zero" or (config.up_init is None and config.residual):
            for parameter in self.adapter_up[adapter].parameters():
                nn.init.zeros_(parameter)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, ..., d_in) -> (B, ..., d)."""
        result = self.base_layer(hidden_states, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.adapters_in_use():
            result = self._cast_input_dtype(result, self.adapter_up[adapter].weight.dtype)
            up = partial(self._up, adapter)
            [update] = self.routed(adapter, result, up) if self.after_up[adapter] else up(self.routed(adapter, result))
            result = result + update if self.residual[adapter] else update
        return result.to(dtype)

    def _up(self, adapter: str, streams: Sequence[Tensor]) -> list[Tensor]:
        """The activation and the up-projection: each (B, ..., r) -> (B, ..., d)."""
        return [self.adapter_up[adapter](self.activation[adapter](stream)) for stream in streams]
