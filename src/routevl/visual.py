"""Where the image comes from: stored features, a vision model in the training process, or a control that stands in for either.

A task asks `source.of(image_ids)` for what a batch carries, and the model asks `source.encoder` to make visual tokens of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy
import torch
from torch import Tensor, nn

from routevl.errors import RoutevlError
from routevl.features.store import Features
from routevl.methods.base import Method
from routevl.settings import RunSettings


class VisualSource(Protocol):
    """Where the image comes from.

    Attributes:
        width, length: d_v and L_v of an image's visual tokens.
        image_ids: (n,) int64, sorted.
        encoder: what batches carry -> visual tokens (B, L_v, d_v).
    """

    width: int
    length: int
    image_ids: Tensor
    encoder: nn.Module

    def of(self, image_ids: Sequence[int]) -> Tensor:
        """What a batch carries of its n images. Raises RoutevlError for an image that is not there; the message names its id."""

    def check(self, image_ids: Sequence[int]) -> None:
        """Raise RoutevlError where `of` would for want of an image."""


class StoredFeatures:
    """Features of a frozen vision model, computed once per image: batches carry the tokens themselves, float32 (n, L_v, d_v)."""

    def __init__(self, features: Features) -> None:
        self.width, self.length, self.image_ids = features.width, features.length, features.image_ids
        self.encoder = nn.Identity()
        self.of, self.check = features.features, features.positions


class Control:
    """A source whose images are replaced, each by a function of (seed, image id).

    Args:
        kind: "noise" (standard normal), "ones", or "shuffled", another image's: one cycle through all images in a random order.
    """

    def __init__(self, source: VisualSource, kind: str, seed: int) -> None:
        self.source, self.kind, self.seed, self.check = source, kind, seed, source.check
        self.width, self.length, self.image_ids, self.encoder = source.width, source.length, source.image_ids, source.encoder
        order = self.image_ids[torch.randperm(len(self.image_ids), generator=torch.Generator().manual_seed(seed))]
        self.other = dict(zip(order.tolist(), order.roll(-1).tolist(), strict=True))

    def of(self, image_ids: Sequence[int]) -> Tensor:
        """As the source's, replaced."""
        ids = [int(image_id) for image_id in image_ids]
        if self.kind == "shuffled":
            self.check(ids)
            return self.source.of([self.other[image_id] for image_id in ids])
        real = self.source.of(ids)
        if self.kind == "ones":
            return torch.ones_like(real)
        rows = [numpy.random.default_rng([self.seed, i]).standard_normal(real.shape[1:], dtype=numpy.float32) for i in ids]
        return torch.from_numpy(numpy.stack(rows))


def visual_source(
    settings: RunSettings, method: Method, features: str | Path | None, backbone: str | Path, fingerprint: str, data: Path
) -> VisualSource:
    """The source that a run's settings and method ask for.

    Args:
        features: folder of stored features; None for a method that needs the pixels.
        backbone, fingerprint: the vision model's folder, and the sha256 that stored features must have been made by.
        data: prepared data, whose splits list the images.

    Raises:
        RoutevlError: features or images are missing, or of another vision model; features for a method that needs the pixels.
    """
    if "pixels" in method.needs:
        if features is not None:
            raise RoutevlError(
                f"--features {features}: the method {settings.method} changes the vision model in training, and stored features "
                "are of the model as it was: drop --features"
            )
        from routevl.live_vision import LiveVision  # timm takes seconds to load, and stored features do without it

        source: VisualSource = LiveVision(backbone, method, data, settings.visual_tokens)
    elif features is None:
        raise RoutevlError("--features is missing: the method reads stored features (routevl extract)")
    else:
        source = StoredFeatures(Features(features, settings.visual_tokens, expected_fingerprint=fingerprint))
    return source if settings.control == "none" else Control(source, settings.control, settings.seed)
