"""What a library has to say of a vision model's folder, so that its output can be read as tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.layers import Format
from torch import Tensor, nn


class Unreadable(Exception):
    """Why an output holds no tokens of some kind; a clause that follows a colon."""


@dataclass(frozen=True)
class Layout:
    """Where the patch tokens stand in a model's hidden states.

    Attributes:
        format: "NLC" (B, before + L, d), "NHWC" (B, height, width, d) or "NCHW" (B, d, height, width).
        before: tokens in front of the patches, such as the class token; NLC alone has some.
    """

    format: Format
    before: int = 0

    def patches(self, hidden_states: Tensor) -> Tensor:
        """Patch tokens (B, L, d), row by row."""
        if self.format is Format.NLC:
            return hidden_states[:, self.before :]
        if self.format is Format.NHWC:
            return hidden_states.flatten(1, 2)
        return hidden_states.flatten(2).transpose(1, 2)

    def whole(self, hidden_states: Tensor) -> Tensor:
        """All tokens (B, before + L, d), the class token first; where none stands before the patches, their mean does."""
        patches = self.patches(hidden_states)
        first = hidden_states[:, : self.before] if self.before else patches.mean(dim=1, keepdim=True)
        return torch.cat([first, patches], dim=1)


class VisionFolder(ABC):
    """A vision model's folder, read by its library: its weights, its preprocessing, and its output.

    Attributes:
        folder: with config.json; `load` alone needs the weights as well.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def load(self) -> nn.Module:
        """The model with its weights. Raises RoutevlError where they are unreadable or incomplete."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model without its weights, on torch's default device. Raises RoutevlError where config.json is of no such model."""

    @abstractmethod
    def transform(self, model: nn.Module) -> Callable[[Image.Image], Tensor]:
        """The model's preprocessing: an upright RGB image -> pixels, float32 (3, H, W)."""

    @abstractmethod
    def output(self, model: nn.Module, pixels: Tensor) -> Any:
        """What the model makes of pixels (B, 3, H, W): that from which the other methods read."""

    @abstractmethod
    def hidden_states(self, output: Any) -> Tensor:
        """The last hidden states of an output, of whatever layout. Raises Unreadable."""

    @abstractmethod
    def pooled(self, model: nn.Module, output: Any) -> Tensor:
        """The model's own pooled token (B, d). Raises Unreadable where it has none."""

    @abstractmethod
    def layout(self, model: nn.Module, output: Any, pixels: Tensor) -> Layout:
        """Where the patch tokens stand, by what the library says of the model. Raises Unreadable where it does not tell."""


def shape_text(tensor: Tensor) -> str:
    """ "B x 197 x 768"."""
    return " x ".join(["B", *map(str, tensor.shape[1:])])
