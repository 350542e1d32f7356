"""Images, and the vision model that runs in the training process, for methods that adapt it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from routevl.backbones.vision import VisionBackbone, load_vision_backbone
from routevl.errors import RoutevlError
from routevl.features.images import read_image_lists
from routevl.features.loading import pixels_of
from routevl.methods.base import Method


class LiveVision:
    """A `routevl.visual.VisualSource` whose batches carry pixels, float32 (n, 3, H, W): the vision model runs in every step.

    Args:
        folder: the vision model's, which the method adapts.
        data: prepared data, whose splits list the images.
        tokens: one of TOKENS.

    Raises:
        RoutevlError: as `load_vision_backbone`; the model gives no such tokens; a bad list of images.
    """

    def __init__(self, folder: str | Path, method: Method, data: Path, tokens: str) -> None:
        backbone = load_vision_backbone(folder)
        self.length, self.width = backbone.tokens.shape(tokens)
        self.files = {image.image_id: image for image in read_image_lists(sorted(data.glob("*/images.json")))}
        self.image_ids = torch.tensor(sorted(self.files))
        self.transform = backbone.transform
        self.encoder = VisionEncoder(backbone, method, tokens)

    def of(self, image_ids: Sequence[int]) -> Tensor:
        """Pixels, float32 (n, 3, H, W). Raises RoutevlError for unknown images, and for all that `read_image` refuses."""
        self.check(image_ids)
        return pixels_of((self.files[int(image_id)] for image_id in image_ids), self.transform)

    def check(self, image_ids: Sequence[int]) -> None:
        """Raise RoutevlError for an image that no split lists."""
        for image_id in image_ids:
            if int(image_id) not in self.files:
                raise RoutevlError(f"image {image_id}: no split lists it")


class VisionEncoder(nn.Module):
    """Pixels (..., 3, H, W) -> visual tokens (..., L_v, d_v), by a vision model that the method adapts.

    The vision model's own modules are in evaluation mode always, as where features are stored; the method's train.
    """

    def __init__(self, backbone: VisionBackbone, method: Method, tokens: str) -> None:
        super().__init__()
        own = {*backbone.model.modules()}
        self.model = backbone.model = method.adapt_vision(backbone.model)
        self.of_method = [module for module in self.model.modules() if module not in own]
        self.encode = backbone.encode
        self.tokens = tokens

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.shape[:-3]  # (B,), or (B, 2) of pairs
        tokens = self.encode(pixels.flatten(0, -4), [self.tokens])[self.tokens]
        return (tokens if tokens.dim() == 3 else tokens.unsqueeze(1)).unflatten(0, images)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Keep evaluation mode, but in the method's modules."""
        super().train(False)
        for module in self.of_method:
            module.training = mode
        return self
