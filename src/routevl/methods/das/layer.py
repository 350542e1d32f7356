"""The bottlenecks of DAS, and how a layer is skipped."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from routevl.backbones.skeleton import layers_in, layers_of, stacks_of
from routevl.backbones.structure import Structure
from routevl.errors import RoutevlError
from routevl.methods.bottleneck.layer import InParallel, change_sub_layer, linear, note_input, noted_input


class NormedBottleneck(nn.Module):
    """A(x) = U relu(D LN(x)), (..., d) -> the same; D and U as `linear` draws them, so that A(x) is nearly zero at the start."""

    def __init__(self, width: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, device=device)
        self.down = linear(width, rank, device)
        self.up = linear(rank, width, device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.up(self.down(self.norm(hidden_states)).relu())


class Detour(nn.Module):
    """The forward pass of a layer that can be skipped. The layer has it as its part `adapter`.

    Args:
        layer: of a text model: hidden states (B, T, d) and other arguments -> hidden states.
        skip: A that is taken in its place; None: it is never skipped.
        feed_forward: A of its feed-forward part's input, which is added to what the layer gives; None: it is always skipped.

    Attributes:
        skipped: whether it is skipped now.
    """

    def __init__(self, layer: nn.Module, skip: NormedBottleneck | None, feed_forward: NormedBottleneck | None) -> None:
        super().__init__()
        self.skip, self.feed_forward = skip, feed_forward
        self.skipped = False
        self.run_layer = layer.forward
        layer.adapter, layer.forward = self, self.forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own arguments and output. Raises RoutevlError where the layer gives more than hidden states."""
        if self.skipped:
            return hidden_states + self.skip(hidden_states)
        output = self.run_layer(hidden_states, *args, **kwargs)
        if not isinstance(output, Tensor):
            raise RoutevlError("das: the text backbone's layers give more than hidden states: take another text backbone")
        return output + self.feed_forward(noted_input())


def put_beside(
    text_model: nn.Module,
    parts: Structure,
    skippable: Collection[str],
    kept: Collection[str],
    rank: Callable[[int], int],
    skip_rank: Callable[[int], int],
) -> dict[str, Detour]:
    """Put the bottlenecks of DAS into a text model.

    Args:
        skippable, kept: names of layers that get what is needed where they are skipped, and where they are not; all are in one of
            them at least, and none is skipped yet.
        rank, skip_rank: width of the hidden states -> of the bottlenecks in kept layers, and in the place of skipped ones.

    Returns:
        Name of each layer -> its detour, in order.

    Raises:
        RoutevlError: what a sub-layer's output is added to is not found; a layer has not one feed-forward part.
    """
    device, width = text_model.device, text_model.config.hidden_size
    attentions, detours = (*parts.attention_outputs, *parts.cross_attention_outputs), {}
    for layer_name, layer in layers_in(text_model).items():
        ends = [name for name in parts.feed_forward_outputs if name.startswith(f"{layer_name}.")]
        if len(ends) != 1:
            raise RoutevlError(f"das: {layer_name} of the text backbone has {len(ends)} feed-forward parts, not one")
        feed_forward = None
        if layer_name in kept:
            feed_forward = NormedBottleneck(width, rank(width), device)
            note_input(text_model.get_submodule(_first_of(ends[0], parts)))
            for name in attentions:
                if name.startswith(f"{layer_name}."):
                    adapter = InParallel(NormedBottleneck(width, rank(width), device))
                    change_sub_layer(text_model, _first_of(name, parts), name, adapter)
        skip = NormedBottleneck(width, skip_rank(width), device) if layer_name in skippable else None
        detours[layer_name] = Detour(layer, skip, feed_forward)
    return detours


def _first_of(output: str, parts: Structure) -> str:
    """The name of the module that reads what a sub-layer's output, which is that of the module of this name, is added to."""
    if output not in parts.sub_layer_inputs:
        raise RoutevlError(f"das: what the output of {output} is added to in the text backbone is not found")
    return parts.sub_layer_inputs[output]


def renumber(text_model: nn.Module, skipped: Collection[str]) -> None:
    """Let the layers that are not skipped follow each other in a cache, which tells by its first how long it is."""
    if getattr(text_model.config, "scale_attn_by_inverse_layer_idx", False):
        raise RoutevlError("das: the text backbone's attention depends on its layer's number: take another text backbone")
    names = {module: name for name, module in text_model.named_modules()}
    for stack in stacks_of(text_model).values():
        kept = [layer for layer in layers_of(stack) if names[layer] not in skipped]
        for number, layer in enumerate(kept):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
