"""The images that features are extracted from: their lists and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from routevl.data.records import INTEGER, STRING, Format, list_of
from routevl.errors import RoutevlError

IMAGES = Format("a list of images as routevl prepare writes it", list_of(id=INTEGER, file_name=STRING))


class ImageFile(NamedTuple):
    """One image: its id (unique over all splits) and its file."""

    image_id: int
    file_name: str


def read_image_lists(paths: Sequence[str | Path]) -> list[ImageFile]:
    """All images of several `images.json` of `routevl prepare`, without repetitions, sorted by id.

    Raises:
        RoutevlError: not such a file; one id with two different files.
    """
    file_names: dict[int, str] = {}
    for path in paths:
        for entry in IMAGES.read(path):
            image_id, name = entry["id"], entry["file_name"]
            if file_names.setdefault(image_id, name) != name:
                raise RoutevlError(f"{path}: image id {image_id} names {name}, but {file_names[image_id]} before")
    return [ImageFile(image_id, file_names[image_id]) for image_id in sorted(file_names)]


def slice_of_shard(images: list[ImageFile], shard: int, shards: int) -> list[ImageFile]:
    """The contiguous slice of shard `shard` (counted from 0), not empty; the slices' sizes differ by one at most."""
    if not shard < shards <= len(images):
        raise RoutevlError(
            f"--shard {shard} of --shards {shards}: expected shard < shards <= {len(images)}, the number of images"
        )
    return images[len(images) * shard // shards : len(images) * (shard + 1) // shards]


def read_image(image: ImageFile) -> Image.Image:
    """Decode an image file completely.

    Raises:
        RoutevlError: missing, truncated or not an image; the message names the file and the id.
    """
    try:
        with Image.open(image.file_name) as opened:
            opened.load()
            return opened
    except FileNotFoundError:
        raise RoutevlError(f"image {image.image_id}: no such file: {image.file_name}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError and ValueError for some broken PNG and JPEG headers.
        raise RoutevlError(
            f"image {image.image_id}: {image.file_name} cannot be decoded, it is damaged or not an image ({error})"
        ) from None
