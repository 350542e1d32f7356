"""The images that features are extracted from, and that methods and figures read: their lists, files and pixel formats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from routevl.data.records import INTEGER, STRING, Format, list_of
from routevl.errors import RoutevlError

IMAGES = Format(
    "a list of images as routevl prepare writes it",
    list_of("sha256", id=INTEGER, file_name=STRING, sha256={"type": "string", "pattern": "^[0-9a-f]{64}$"}),
)
MOST_NAMED = 1000  # bad images in one message


class ImageFile(NamedTuple):
    """One image: its id (unique over all splits), its file, and the sha256 of its bytes in hexadecimal, where that is known."""

    image_id: int
    file_name: str
    sha256: str | None = None


class BadImages(RoutevlError):
    """Images that cannot be used: `problems` has one sentence about each, with its id and file."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = f"{len(problems)} images cannot be used: " if len(problems) > 1 else ""
        more = f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        super().__init__(count + "; ".join(problems[:MOST_NAMED]) + more)


def read_image_lists(paths: Sequence[str | Path]) -> list[ImageFile]:
    """All images of several `images.json` of `routevl prepare`, without repetitions, sorted by id.

    Lists made by hand may lack the hashes of the images; these are then taken as they are.

    Raises:
        RoutevlError: not such a file; one id with two different files or hashes.
    """
    images: dict[int, ImageFile] = {}
    for path in paths:
        for entry in IMAGES.read(path):
            image = ImageFile(entry["id"], entry["file_name"], entry.get("sha256"))
            first = images.setdefault(image.image_id, image)
            if first.file_name != image.file_name:
                raise RoutevlError(f"{path}: image id {image.image_id} names {image.file_name}, but {first.file_name} before")
            if first.sha256 != image.sha256:
                raise RoutevlError(f"{path}: image id {image.image_id} has the sha256 {image.sha256}, but {first.sha256} before")
    return [images[image_id] for image_id in sorted(images)]


def slice_of_shard(images: list[ImageFile], shard: int, shards: int) -> list[ImageFile]:
    """The contiguous slice of shard `shard` (counted from 0), not empty; the slices' sizes differ by one at most."""
    if not shard < shards <= len(images):
        raise RoutevlError(
            f"--shard {shard} of --shards {shards}: expected shard < shards <= {len(images)}, the number of images"
        )
    return images[len(images) * shard // shards : len(images) * (shard + 1) // shards]


def read_images(images: Iterable[ImageFile]) -> list[Image.Image]:
    """Decode image files, each as `to_rgb` says. Raises BadImages, which names all that `read_image` would refuse."""
    decoded, problems = [], []
    for image in images:
        try:
            decoded.append(read_image(image))
        except BadImages as error:
            problems += error.problems
    if problems:
        raise BadImages(problems)
    return decoded


def read_image(image: ImageFile) -> Image.Image:
    """Decode an image file, of whatever name, as `to_rgb` says; of several frames the first one.

    Raises:
        BadImages: the file is missing, not the one that was prepared, damaged, too large, or of a kind or pixel format that has
            no reading.
    """
    try:
        data = Path(image.file_name).read_bytes()
    except FileNotFoundError:
        raise BadImages([f"image {image.image_id}: no such file: {image.file_name}"]) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise BadImages([f"image {image.image_id}: {image.file_name} cannot be read ({reason})"]) from None
    if image.sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise BadImages([f"image {image.image_id}: {image.file_name} is not the image that was prepared"])
    try:
        with Image.open(BytesIO(data)) as opened:
            return to_rgb(opened)
    except Exception as error:  # Pillow raises errors of many types for files that are broken in some way
        raise BadImages([f"image {image.image_id}: {image.file_name} {_said(error)}"]) from error


def _said(error: Exception) -> str:
    """What an error of Pillow or of `to_rgb` says about a file."""
    if isinstance(error, RoutevlError):
        return str(error)
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        return f"is too large to be decoded ({error})"
    reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
    return f"cannot be decoded: it is damaged, not an image, or of a kind that Pillow cannot read{reason}"


# ------------------------------------------------------------------------------------ pixel formats

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of the tags of a TIFF file


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's pixel formats ("modes") as 8-bit RGB: upright by its EXIF orientation, transparency on white.

    EXIF that cannot be read is ignored. The formats:

    * 1, L, P, RGB, RGBX, CMYK, YCbCr, HSV and LAB are converted by Pillow, which has cut colours of 16 bits to their upper 8. A
      colour profile in the file is not applied.
    * LA, La, PA, RGBA, RGBa, and any format with a transparent value, are laid on white.
    * I;16 in all byte orders, and I, which may hold 32 bits but has 16 of a PGM file: 0 is black and 65535 white (4095 in a TIFF
      file of 12 bits).
    * F: 0 is black and 1 white.

    Raises:
        RoutevlError: values of I or F outside these ranges, of which nothing says what is white. The message is a predicate ("has
            the pixel format ...") without the image's name.
    """
    image.load()
    tags = getattr(image, "tag_v2", {})
    with suppress(Exception):  # the pixels are sound; damaged EXIF fails in many ways
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        white = 1 if image.mode == "F" else 2 ** min(tags.get(BITS_PER_SAMPLE, (16,))[0], 16) - 1
        image = _grey(image, white, inverted=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image, white: int, inverted: bool) -> Image.Image:
    """Grey values of the modes I and F as L, or as LA where one of them is transparent; from 0, black, to `white`."""
    values = numpy.asarray(image if image.mode == "F" else image.convert("I"))
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):
        raise RoutevlError(
            f"has the pixel format {image.mode} with values from {low:g} to {high:g}: 0 is black and {white} white, and nothing "
            "says what others are; convert it to 8 or 16 bits"
        )
    grey = Image.fromarray(((white - values if inverted else values) * (255 / white)).astype(numpy.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(numpy.where(values == transparent, 0, 255).astype(numpy.uint8)))
    return grey
