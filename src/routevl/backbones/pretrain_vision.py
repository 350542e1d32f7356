"""Stage `pretrain-vision`: a ViT or a ResNet on the attributes of drawn scenes, never a word."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import timm
import torch
from PIL.Image import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy_with_logits

from routevl.backbones import pretrain
from routevl.backbones.pretrain import HELD_OUT, HELD_OUT_DATA, TRAINING_DATA, random_generator
from routevl.data.scenes import (
    ATTRIBUTES,
    ATTRIBUTES_PER_CELL,
    COLORS,
    GRID,
    SHAPES,
    SIZES,
    THINGS_PER_SCENE,
    attributes,
    render,
    sample_scene,
)
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, check_replaceable
from routevl.options import at_least

POSITION_SCALE = 0.5  # of the ViT's initial position embeddings; at timm's 0.02 it is slow to learn what is where
THINGS_PER_IMAGE = (2, 3, 4, 5, 6)  # more than scenes have: there is more to learn from each
POSITIVE_WEIGHT = 5.0  # only one attribute in sixteen is present
STRIDES = (8, 16, 32)  # of timm's ResNets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl pretrain-vision`."""
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="vit")
    parser.add_argument("--images", type=at_least(1), required=True, help="training images of random scenes")
    parser.add_argument("--image-size", type=at_least(1), default=48, help="pixels a side")
    parser.add_argument("--patch-size", type=at_least(1), default=8, help="pixels a side, of the last grid's tokens in a ResNet")
    pretrain.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train a ViT or a ResNet on drawn scenes to tell what stands in each cell of the grid; save it as a timm folder.

    A linear head, dropped afterwards, reads the attributes of all cells from a ViT's [CLS] token, which so has to
    gather the whole image, and those of its own cell alone from each patch token, which so has to know
    where it is. A ResNet has no such token: what it pools is a mean of those that know where they are.

    Raises:
        RoutevlError: a bad option, or training diverged.
    """
    check_replaceable(arguments.output, "config.json")
    if arguments.image_size % arguments.patch_size:
        raise RoutevlError(f"--image-size {arguments.image_size} is not a multiple of --patch-size {arguments.patch_size}")
    pretrain.prepare(arguments)
    model = ARCHITECTURES[arguments.architecture](arguments)
    head = nn.Linear(arguments.hidden_size, ATTRIBUTES)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)  # as the saved folder will have it
    images, targets = _draw(arguments.images, arguments, TRAINING_DATA, THINGS_PER_IMAGE)

    def loss_of(indices: list[int]) -> Tensor:
        pixels = torch.stack([transform(images[index]) for index in indices])
        tokens = _tokens(model, pixels)
        expected = torch.cat([targets[indices, None], _only_own_cell(targets[indices])], dim=1)
        expected = expected[:, -tokens.shape[1] :]  # without the first, [CLS]'s, where there is none
        weight = torch.tensor(POSITIVE_WEIGHT)
        return binary_cross_entropy_with_logits(head(tokens), expected, pos_weight=weight, reduction="sum") / len(indices)

    parameters = [*model.parameters(), *head.parameters()]
    pretrain.train(parameters, [1] * arguments.images, loss_of, arguments, "pretrain-vision")
    quality = _quality(model.eval(), head, transform, *_draw(HELD_OUT, arguments, HELD_OUT_DATA, THINGS_PER_SCENE))
    with atomic_folder(arguments.output, "config.json") as folder:
        save_for_hf(model, str(folder), model_args=dict(model._model_args), safe_serialization=True)
        pretrain.write_record(folder, "pretrain-vision", quality, arguments)


def write_untrained(folder: str | Path, options: Mapping[str, Any]) -> None:
    """What a pretraining with these options would begin with, as a timm folder."""
    arguments = pretrain.arguments_of(add_arguments, options)
    model = ARCHITECTURES[arguments.architecture](arguments)
    save_for_hf(model, str(folder), model_args=dict(model._model_args), safe_serialization=True)


def _vision_transformer(arguments: argparse.Namespace) -> nn.Module:
    size = arguments.image_size
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=0,
        img_size=size, patch_size=arguments.patch_size, embed_dim=arguments.hidden_size,
        depth=arguments.layers, num_heads=arguments.heads,
        pretrained_cfg_overlay={"input_size": (3, size, size), "crop_pct": 1.0, "num_classes": 0},
    )  # fmt: skip
    nn.init.normal_(model.pos_embed, std=POSITION_SCALE)
    return model


def _resnet(arguments: argparse.Namespace) -> nn.Module:
    """As CLIP's: a deep stem, bottlenecks, and means where it makes the grid smaller. Its widths are a quarter, half and all of
    the hidden size, and its last grid is finer than a ResNet's usual one where the patch size is below 32.

    Raises:
        RoutevlError: a patch or hidden size that no ResNet has.
    """
    if arguments.patch_size not in STRIDES:
        raise RoutevlError(f"--patch-size {arguments.patch_size}: a resnet's is one of {', '.join(map(str, STRIDES))}")
    if arguments.hidden_size % 16:
        raise RoutevlError(f"--hidden-size {arguments.hidden_size}: a resnet's is a multiple of 16")
    size, narrowest = arguments.image_size, arguments.hidden_size // 16
    return timm.create_model(
        "resnet50d", pretrained=False, num_classes=0,
        layers=[arguments.layers] * 4, channels=[narrowest, 2 * narrowest, 4 * narrowest, 4 * narrowest], stem_width=narrowest,
        output_stride=arguments.patch_size,
        pretrained_cfg_overlay={"input_size": (3, size, size), "crop_pct": 1.0, "num_classes": 0},
    )  # fmt: skip


ARCHITECTURES = {"vit": _vision_transformer, "resnet": _resnet}


def _draw(count: int, arguments: argparse.Namespace, stream: int, numbers: Sequence[int]) -> tuple[list[Image], Tensor]:
    """Images of random scenes and their attributes, float32 (count, ATTRIBUTES)."""
    generator = random_generator(arguments.seed, stream)
    images, targets = [], []
    for _ in range(count):
        scene = sample_scene(generator, numbers)
        images.append(render(scene, arguments.image_size, generator))
        targets.append(attributes(scene))
    return images, torch.from_numpy(numpy.stack(targets)).float()


def _tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    """What the head reads of pixels (B, 3, H, W): a ViT's [CLS] token, then each cell's (B, 1 + cells, d); of a ResNet the cells'
    alone (B, cells, d)."""
    hidden_states = model.forward_features(pixels)
    if hidden_states.dim() == 4:  # a map (B, d, rows, columns)
        return _mean_over_cells(hidden_states.flatten(2).transpose(1, 2))
    return torch.cat([hidden_states[:, :1], _mean_over_cells(hidden_states[:, 1:])], dim=1)


def _mean_over_cells(patches: Tensor) -> Tensor:
    """Patch tokens (B, L, d) -> the mean of those in each cell of the scenes' grid (B, cells, d)."""
    side = math.isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (B, d, side, side)
    return adaptive_avg_pool2d(grid, GRID).flatten(2).transpose(1, 2)


def _only_own_cell(targets: Tensor) -> Tensor:
    """Attributes of all cells (B, cells * a) -> a copy per cell, zero elsewhere (B, cells, cells * a)."""
    cells = GRID * GRID
    own = torch.eye(cells)[:, :, None] * targets.unflatten(1, (1, cells, -1))  # (B, cells, cells, a)
    return own.flatten(2)


def _quality(
    model: nn.Module, head: nn.Module, transform: Callable[[Image], Tensor], images: list[Image], targets: Tensor
) -> dict[str, float]:
    """How well the attributes are told, by a ViT's [CLS] token or by each of a ResNet's cells: F1 over all of them, accuracy per
    thing in a scene."""
    logits = []
    with torch.inference_mode():
        for start in range(0, len(images), 100):
            pixels = torch.stack([transform(image) for image in images[start : start + 100]])
            logits.append(head(_tokens(model, pixels)))
    guesses = _guesses(torch.cat(logits))
    found, there = guesses > 0, targets > 0
    quality = {"attribute_f1": 2 * (found & there).sum().item() / (found.sum() + there.sum()).item()}
    occupied = there.unflatten(1, (-1, ATTRIBUTES_PER_CELL)).any(-1)
    kinds = {"shape": len(SHAPES), "color": len(COLORS), "size": len(SIZES)}
    groups = [
        tensor.unflatten(1, (-1, ATTRIBUTES_PER_CELL))[occupied].split(list(kinds.values()), dim=-1)
        for tensor in (guesses, targets)
    ]
    for kind, guessed, expected in zip(kinds, *groups, strict=True):
        quality[f"{kind}_accuracy"] = (guessed.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return quality


def _guesses(logits: Tensor) -> Tensor:
    """Of all cells' attributes (n, ATTRIBUTES), from what the head says of each token: [CLS], or each cell of itself."""
    cells = GRID * GRID
    if logits.shape[1] > cells:
        return logits[:, 0]
    own = logits.unflatten(2, (cells, -1)).diagonal(dim1=1, dim2=2)  # (n, a, cells)
    return own.transpose(1, 2).flatten(1)
