"""Batches of pixels of image files, decoded here or by other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader

from routevl.features.images import BadImages, ImageFile, read_images
from routevl.signals import ignore_stop_signals_of_others


def load_batches(
    batches: Sequence[Sequence[ImageFile]], transform: Callable[[Image], Tensor], device: torch.device, workers: int
) -> Iterator[Tensor | list[str]]:
    """Of each batch the pixels (B, 3, H, W) on the CPU, or what is wrong with its images.

    Args:
        transform: an image -> its pixels (3, H, W).
        device: where they will be moved.
        workers: processes that decode images; 0: this one does.
    """
    load = partial(_pixels, transform=transform)
    # a generator of its own, so that making a loader does not advance the global one
    options = {"worker_init_fn": ignore_stop_signals_of_others, "generator": torch.Generator().manual_seed(0)}
    pinned = device.type == "cuda"
    yield from DataLoader(batches, batch_size=None, collate_fn=load, pin_memory=pinned, num_workers=workers, **options)


def pixels_of(images: Iterable[ImageFile], transform: Callable[[Image], Tensor]) -> Tensor:
    """The pixels (B, 3, H, W) of image files, of each what `transform` makes of it. Raises BadImages."""
    return torch.stack([transform(image) for image in read_images(images)])


def _pixels(images: Sequence[ImageFile], transform: Callable[[Image], Tensor]) -> Tensor | list[str]:
    try:
        return pixels_of(images, transform)
    except BadImages as error:  # which a worker process could not raise in one line
        return error.problems
