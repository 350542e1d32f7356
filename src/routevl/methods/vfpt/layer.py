"""Layers of a vision transformer that read prompts of their own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from routevl.errors import RoutevlError

if TYPE_CHECKING:
    from routevl.methods.vfpt import Vfpt

OTHER = "take a plain vision transformer as vision_backbone"


class PromptedLayer(nn.Module):
    """A layer that reads n prompts, an (n, d) parameter, behind the first token.

    Args:
        layer: (B, L, d) -> (B, L, d).
        bound: the prompts start uniform in ±bound.
        place: whether it is the first layer, whose input has no prompts yet, and whether the last one, whose output loses them.
    """

    def __init__(self, layer: nn.Module, width: int, bound: float, options: Vfpt.Options, place: tuple[bool, bool]) -> None:
        super().__init__()
        self.layer = layer
        self.prompts = nn.Parameter(torch.empty(options.num_virtual_tokens, width).uniform_(-bound, bound))
        self.transformed = int(options.fourier_share * options.num_virtual_tokens)
        self.dimension = options.dimension
        self.dropout = nn.Dropout(options.dropout)
        self.is_first, self.is_last = place

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, L, d), or (B, L + n, d) where a layer before it has put prompts there; out as it came, but for the last layer's.

        Raises:
            RoutevlError: its input or output are no tokens of width d.
        """
        n, width = self.prompts.shape
        if hidden_states.dim() != 3 or hidden_states.shape[2] != width:
            shape = " x ".join(map(str, hidden_states.shape[1:]))
            raise RoutevlError(f"a layer of the vision model reads {shape}, not tokens of width {width}: {OTHER}")
        first, rest = hidden_states[:, :1], hidden_states[:, 1 if self.is_first else 1 + n :]
        prompts = self.read(len(hidden_states)).to(hidden_states.dtype)  # (B, n, d)
        output = self.layer(torch.cat([first, prompts, rest], dim=1), *args, **kwargs)  # (B, L + n, d)
        return torch.cat([output[:, :1], output[:, 1 + n :]], dim=1) if self.is_last else output

    def read(self, batch_size: int) -> Tensor:
        """The prompts of B examples, each with dropout of its own, (B, n, d)."""
        prompts = self.dropout(self.prompts.expand(batch_size, -1, -1))
        fourier, plain = prompts[:, : self.transformed], prompts[:, self.transformed :]
        return torch.cat([fourier_transformed(fourier, self.dimension), plain], dim=1) if self.transformed else plain


def fourier_transformed(prompts: Tensor, dimension: str) -> Tensor:
    """The real part of the transform of prompts (B, m, d), not normalised, over "sequence", "hidden" or "all", which is both."""
    axes = {"all": (-2, -1), "sequence": (-2,), "hidden": (-1,)}[dimension]
    return torch.fft.fftn(prompts.float(), dim=axes).real


def put_prompts(vision_model: nn.Module, options: Vfpt.Options) -> nn.Module:
    """Let each layer of a frozen vision model read trained prompts of its own. It is changed.

    They start uniform in ±√(6 / (3 p² + d)), p × p the pixels of a patch and d the width.

    Raises:
        RoutevlError: it has no layers of one kind, or does not cut images into patches by a convolution.
    """
    patches = next((module for module in vision_model.modules() if isinstance(module, nn.Conv2d)), None)
    stacks = [module for module in vision_model.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    stacks = [stack for stack in stacks if len({type(layer) for layer in stack}) == 1]
    if patches is None or not stacks:
        raise RoutevlError(f"{type(vision_model).__name__} has no patches or no layers for prompts to stand before: {OTHER}")
    layers = max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))
    width, pixels = patches.out_channels, patches.in_channels * math.prod(patches.kernel_size)
    bound = math.sqrt(6 / (pixels + width))
    for number, layer in enumerate(layers):
        place = number == 0, number == len(layers) - 1
        layers[number] = PromptedLayer(layer, width, bound, options, place)
    return vision_model
