"""The layers of steering vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from routevl.conditioning import PER_POSITION, Conditioning
from routevl.tasks.base import VisionLanguageModel


class Steered(nn.Module):
    """A layer of the text model, with a vector added to its output."""

    def __init__(self, layer: nn.Module, rms: Tensor, width: int, conditioning: Conditioning) -> None:
        super().__init__()
        self.layer = layer
        self.conditioning = conditioning
        self.register_buffer("rms", rms.detach().clone(), persistent=False)
        self.steering_vector = nn.Parameter(torch.zeros(width))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        hidden_states = output[0] if isinstance(output, tuple) else output  # (B, L, d)
        depth = self.conditioning.per_position("depth", hidden_states.shape[:2], "depth")  # (B, L)
        steered = hidden_states + (depth.unsqueeze(-1) * self.rms * self.steering_vector).to(hidden_states.dtype)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered


def layers_of(text_model: nn.Module) -> nn.ModuleList:
    """The text model's layers: its longest list of modules."""
    return max((module for module in text_model.modules() if isinstance(module, nn.ModuleList)), key=len)


def steer(text_model: nn.Module, prepared: Mapping[str, Tensor]) -> nn.Module:
    """Put a vector after each layer."""
    conditioning = Conditioning(text_model, {"depth": PER_POSITION})
    layers = layers_of(text_model)
    for index, layer in enumerate(layers):
        layers[index] = Steered(layer, prepared[f"layer.{index}"], text_model.config.hidden_size, conditioning)
    return text_model


@torch.no_grad()
def root_mean_squares(model: VisionLanguageModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The root mean square of each layer's output over some batches, by "layer.<n>"."""
    squares: dict[str, list[Tensor]] = {}

    def note(name: str, output: Any) -> None:
        hidden_states = output[0] if isinstance(output, tuple) else output
        squares.setdefault(name, []).append(hidden_states.float().square().mean())

    layers = enumerate(layers_of(model.text_model))
    hooks = [layer.register_forward_hook(lambda _, __, output, n=f"layer.{i}": note(n, output)) for i, layer in layers]
    model.eval()
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(values).mean().sqrt() for name, values in squares.items()}
