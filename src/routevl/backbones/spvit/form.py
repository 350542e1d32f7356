"""What SPViT makes of a vision transformer of timm: convolutions in the place of attentions, narrower feed-forward parts.

Its folder is timm's of the transformer that it was made of; config.json says besides, under KEY, what has become of each layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from routevl.files import read_json

KEY = "spvit"
BRANCHES = ("nothing", "conv1", "conv3", "attention")  # what a layer can have, in the order of the gates that open it
SIDES = {"conv1": 1, "conv3": 3}  # of a convolution, in patches


def load_timm(folder: Path, pretrained: bool, **options: Any) -> nn.Module:
    """The model of a folder of timm's, compressed where its config.json says so; `options` are those of `timm.create_model`.

    Args:
        pretrained: with its weights.
    """
    layers = read_json(folder / "config.json").get(KEY)
    model = timm.create_model(f"local-dir:{folder}", pretrained=pretrained and layers is None, **options)
    if layers is not None:
        take_form(model, **layers)
        if pretrained:
            model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def take_form(model: nn.Module, branches: Sequence[str], units: Sequence[int]) -> None:
    """Give a plain vision transformer of timm, in place, new modules in the place of those that it is compressed to.

    Args:
        branches: of each layer one of BRANCHES.
        units: of each layer how many hidden units its feed-forward part has.
    """
    for block, branch, width in zip(model.blocks, branches, units, strict=True):
        if branch in SIDES:
            block.attn = Convolution(model.embed_dim, block.attn.head_dim, SIDES[branch], model.patch_embed.grid_size)
        elif branch == "nothing":
            block.attn = Nothing()
        if width != block.mlp.fc1.out_features:
            narrow(block.mlp, width)


def narrow(feed_forward: nn.Module, units: int) -> None:
    """Give a feed-forward part new linear modules with so many hidden units, of which it may have none."""
    first, second = feed_forward.fc1, feed_forward.fc2
    with warnings.catch_warnings(action="ignore"):  # of weights without entries
        feed_forward.fc1 = nn.Linear(first.in_features, units, bias=first.bias is not None)
        feed_forward.fc2 = nn.Linear(units, second.out_features, bias=second.bias is not None)


class Convolution(nn.Module):
    """U relu(W * x + b) + c over the grid of patches: tokens (B, before + L, d) -> the same. What stands before the patches, such
    as the class token, comes out as it is.

    Args:
        width: d.
        hidden: channels of W * x.
        side: of W, in patches.
        grid: rows and columns of the L patches.
    """

    def __init__(self, width: int, hidden: int, side: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, hidden, side)
        self.up = nn.Linear(hidden, width)
        self.grid = grid

    def forward(self, tokens: Tensor, **masks: Any) -> Tensor:
        return convolved(tokens, self.grid, self.down.weight, self.down.bias, nn.Identity(), self.up.weight, self.up.bias)


class Nothing(nn.Module):
    """Zero, in the place of an attention."""

    def forward(self, tokens: Tensor, **masks: Any) -> Tensor:
        return torch.zeros_like(tokens)


def convolved(
    tokens: Tensor,
    grid: tuple[int, int],
    kernel: Tensor,
    bias: Tensor | None,
    norm: Callable[[Tensor], Tensor],
    up: Tensor,
    up_bias: Tensor | None,
) -> Tensor:
    """U relu(norm(W * x + b)) + c of the patches, beside zeros at its edges; see `Convolution`.

    Shapes: tokens (B, before + L, d), kernel (h, d, side, side), bias (h,), norm (B, h, rows, columns) -> the same, up (d, h),
    up_bias (d,).
    """
    before = tokens.shape[1] - grid[0] * grid[1]
    patches = tokens[:, before:].transpose(1, 2).unflatten(2, grid)  # (B, d, rows, columns)
    hidden = norm(conv2d(patches, kernel, bias, padding=kernel.shape[-1] // 2)).relu()  # (B, h, rows, columns)
    return torch.cat([tokens[:, :before], linear(hidden.flatten(2).transpose(1, 2), up, up_bias)], dim=1)
