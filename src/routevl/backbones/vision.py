"""Frozen vision models: loading them, and what tokens they give of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from routevl.backbones.folder import check_folder, fingerprint_of
from routevl.backbones.skeleton import no_weights
from routevl.backbones.vision_folder import Layout, Unreadable, VisionFolder, shape_text
from routevl.backbones.vision_timm import TimmFolder
from routevl.backbones.vision_transformers import TransformersFolder
from routevl.errors import RoutevlError, first_line
from routevl.features.grid import pooled_grid
from routevl.features.index import TOKENS
from routevl.files import read_json

BLANK = ((64, 48), (48, 64))  # width and height of images that no preprocessing may tell apart


@dataclass(frozen=True)
class Tokens:
    """The kinds of tokens that a vision model gives of an image.

    Attributes:
        folder: the model's.
        shapes: kind -> length and width; (1, d) for "pooled", (L, d') for "patches", (36 at most, d') for "grid", (1 + L or more,
            d') for "all".
        refused: why the model gives no tokens of the other kinds.
        layout: where the patches stand in its hidden states, if it gives any.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, int]]
    refused: Mapping[str, str]
    layout: Layout | None

    def shape(self, kind: str) -> tuple[int, int]:
        """Length and width of an image's tokens of a kind. Raises RoutevlError where the model gives none."""
        if kind in self.refused:
            raise RoutevlError(
                f"backbone {self.folder}: no {kind} tokens: {self.refused[kind]}; "
                f"leave {kind} out of features.tokens and visual_tokens, or use another model"
            )
        return self.shapes[kind]


@dataclass
class VisionBackbone:
    """A frozen vision model with its own preprocessing, the same in training and inference.

    Attributes:
        source: the folder that it was loaded from.
        model: the torch module, float32, in evaluation mode, without gradients.
        fingerprint: sha256 of the weights, config and preprocessing (`fingerprint_of`).
        transform: an upright RGB image, as `routevl.features.images` reads it -> float32 (3, H, W), resized, cropped, normalised.
        tokens: what `encode` can give.
    """

    source: VisionFolder
    model: nn.Module
    fingerprint: str
    transform: Callable[[Image.Image], Tensor]
    tokens: Tokens

    def encode(self, pixels: Tensor, kinds: Iterable[str]) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W) -> of each kind asked for, "pooled" (B, d), "patches" (B, L, d'), "grid" (B, 36 at most, d') or
        "all" (B, 1 + L or more, d').

        The pooled token is the model's own: transformers' `pooler_output` (ViT: dense + tanh on [CLS], the
        paper's choice) where its weights are there, else the normalised [CLS]; for timm what its head reads. The
        grid is that of the patches, max-pooled to 6 x 6 where it is larger. All tokens are those of the last hidden states as
        they stand there, the class token first; of a model without one the mean of the patches stands before them.

        Raises:
            RoutevlError: a kind that the model does not give, or gives in another shape than `tokens` says.
        """
        shapes = {kind: self.tokens.shape(kind) for kind in kinds}
        output = self.source.output(self.model, pixels)
        encoded = {kind: _tokens_of(self.source, self.model, output, kind, self.tokens.layout) for kind in shapes}
        for kind, tokens in encoded.items():
            if (found := _length_and_width(tokens)) != shapes[kind]:
                raise RoutevlError(f"backbone {self.source.folder}: {kind} tokens of the shape {found}, not {shapes[kind]}")
        return encoded


def load_vision_backbone(path: str | Path) -> VisionBackbone:
    """Load a vision model from a timm or transformers folder.

    Raises:
        RoutevlError: as `check_folder`; the folder cannot be read, lacks weights, or is not an image encoder.
    """
    source = vision_folder(check_folder(path))
    model = source.load().float().eval().requires_grad_(False)
    transform = source.transform(model)
    return VisionBackbone(source, model, fingerprint_of(source.folder), transform, _tokens_given_by(source))


def vision_skeleton(path: str | Path) -> VisionBackbone:
    """As `load_vision_backbone`, by config.json and preprocessor_config.json alone: its parameters are on the meta device, and it
    has no fingerprint."""
    source = vision_folder(Path(path))
    with no_weights():
        model = source.build().float().eval().requires_grad_(False)
    return VisionBackbone(source, model, "", source.transform(model), _tokens_given_by(source))


def vision_tokens(path: str | Path) -> Tokens:
    """What tokens the model of a folder gives, by config.json and preprocessor_config.json alone: no weights, no images.

    Raises:
        RoutevlError: no such files; not an image encoder; it cannot run on what its preprocessing makes of images.
    """
    return _tokens_given_by(vision_folder(Path(path)))


def vision_folder(folder: Path) -> VisionFolder:
    """The library's reading of a vision model's folder. Raises RoutevlError where it is none that the library knows."""
    return (TimmFolder if "architecture" in read_json(folder / "config.json") else TransformersFolder)(folder)


# ------------------------------------------------------------------------------- which tokens a model gives


def _tokens_given_by(source: VisionFolder) -> Tokens:
    """What tokens a model gives, found by a pass of two blank images through a twin of it that has no weights.

    A twin, since a pass may leave something in a model. It is on the meta device, where nothing is computed but shapes; a model
    that cannot run there runs on the CPU. No random number of the caller's is drawn.
    """
    with torch.random.fork_rng(devices=[]):
        with suppress(Exception), torch.device("meta"):  # a model's code may ask for what a tensor without numbers has not
            return _tokens_of_twin(source)
        return _tokens_of_twin(source)


def _tokens_of_twin(source: VisionFolder) -> Tokens:
    twin = source.build().float().eval()
    size = _size_of_images(source, twin)
    pixels = torch.zeros(2, *size)
    shapes, refused, layout = {}, {}, None
    with torch.inference_mode():
        try:
            output = source.output(twin, pixels)
        except Exception as error:
            raise RoutevlError(f"backbone {source.folder}: cannot run on images of {size} ({first_line(error)})") from None
        for kind in TOKENS:
            try:
                if kind == "patches":
                    layout = source.layout(twin, output, pixels)
                if kind in ("grid", "all") and "patches" not in shapes:
                    raise Unreadable("it gives no patches")
                if kind == "grid":
                    _check_square(size)
                tokens = _tokens_of(source, twin, output, kind, layout)
                if tokens.dim() != (2 if kind == "pooled" else 3) or len(tokens) != len(pixels):
                    raise Unreadable(f"they are {shape_text(tokens)}")
                shapes[kind] = _length_and_width(tokens)
            except (Unreadable, RoutevlError) as reason:
                refused[kind] = str(reason)
            except Exception as error:
                if pixels.is_meta:
                    raise
                refused[kind] = f"they cannot be read ({first_line(error)})"
    return Tokens(source.folder, shapes, refused, layout)


def _size_of_images(source: VisionFolder, model: nn.Module) -> tuple[int, ...]:
    """(3, H, W) of what the preprocessing makes of every image."""
    with torch.device("cpu"):
        transform = source.transform(model)
        try:
            sizes = [tuple(transform(Image.new("RGB", size)).shape) for size in BLANK]
        except Exception as error:
            raise RoutevlError(f"backbone {source.folder}: its preprocessing fails ({first_line(error)})") from None
    if sizes[0] != sizes[1]:
        raise RoutevlError(
            f"backbone {source.folder}: its preprocessing makes {sizes[0]} of a broad image and {sizes[1]} of a high one; "
            "give preprocessor_config.json a size with height and width, or a crop"
        )
    return sizes[0]


def _check_square(size: tuple[int, ...]) -> None:
    """Raise Unreadable where images (3, H, W) are not square."""
    if size[1] != size[2]:
        raise Unreadable(f"its images have {size[1]} x {size[2]} pixels, so that their patches are no square grid")


def _tokens_of(source: VisionFolder, model: nn.Module, output: Any, kind: str, layout: Layout | None) -> Tensor:
    """Pooled (B, d), patches (B, L, d), their grid (B, 36 at most, d) or all tokens (B, 1 + L or more, d) of a model's output."""
    if kind == "pooled":
        return source.pooled(model, output)
    if kind == "all":
        return layout.whole(source.hidden_states(output))
    patches = layout.patches(source.hidden_states(output))
    return pooled_grid(patches) if kind == "grid" else patches


def _length_and_width(tokens: Tensor) -> tuple[int, int]:
    """Of pooled (B, d), or other tokens (B, L, d)."""
    return (1, *tokens.shape[1:]) if tokens.dim() == 2 else tuple(tokens.shape[1:])
