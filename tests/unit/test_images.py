"""Image files: what is read is the image that was prepared, in RGB by a stated rule, and what cannot be is said as what it is."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image, ImageCms

from routevl.errors import RoutevlError
from routevl.features.images import MOST_NAMED, BadImages, ImageFile, read_image, read_image_lists, read_images, to_rgb

RAMP = numpy.array([[0, 2**15, 2**16 - 1]], dtype=numpy.uint16)
RED = Image.new("RGB", (8, 6), (200, 10, 20))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(path: Path, content: bytes, sha256: str | None = None) -> ImageFile:
    path.write_bytes(content)
    return ImageFile(7, str(path), sha256)


def levels(image: Image.Image) -> list[int]:
    """The grey levels of the first three pixels."""
    assert image.mode == "RGB"
    pixels = [image.getpixel((x, 0)) for x in range(3)]
    assert all(len(set(pixel)) == 1 for pixel in pixels)
    return [pixel[0] for pixel in pixels]


def tiff(bits: int, photometric: int, pixels: bytes, sample_format: int = 1) -> bytes:
    """A TIFF file of three grey pixels, of kinds that Pillow does not write."""
    tags = {
        256: 3, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 1, 279: len(pixels), 339: sample_format
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def png(bits: int, pixels: bytes, transparent: int) -> bytes:
    """A PNG file of three grey pixels with a transparent value."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 3, 1, bits, 0, 0, 0, 0),
        b"tRNS": struct.pack(">H", transparent),
        b"IDAT": zlib.compress(b"\0" + pixels),
        b"IEND": b"",
    }
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def lab(image: Image.Image) -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


# ------------------------------------------------------------------------------------ pixel formats


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBa", "RGBX", "CMYK", "HSV", "YCbCr", "LAB", "P", "PA"])
def test_h21_colours_stay_what_they_are(mode: str) -> None:
    by_way_of = {"P": RED.quantize(), "PA": RED.quantize(), "RGBa": RED.convert("RGBA"), "LAB": lab(RED)}
    image = by_way_of.get(mode, RED)
    image = image if image.mode == mode else image.convert(mode)
    difference = numpy.abs(numpy.asarray(to_rgb(image), dtype=int) - numpy.asarray(RED, dtype=int)).max()
    assert image.mode == mode and difference < 12


TWELVE_BITS = bytes([0, 8, 0, 255, 240])  # 0, 2,048 and 4,095
GREYS = {
    "L": (saved(Image.fromarray((RAMP >> 8).astype(numpy.uint8)), "PNG"), [0, 128, 255]),
    "1": (saved(Image.fromarray(RAMP > 0), "PNG"), [0, 255, 255]),
    "16-bit PNG": (saved(Image.fromarray(RAMP), "PNG"), [0, 127, 255]),
    "16-bit TIFF": (saved(Image.fromarray(RAMP), "TIFF"), [0, 127, 255]),
    "16-bit TIFF, big-endian": (saved(Image.frombytes("I;16B", (3, 1), RAMP.astype(">u2").tobytes()), "TIFF"), [0, 127, 255]),
    "16-bit TIFF whose 0 is white": (tiff(16, 0, RAMP.tobytes()), [255, 127, 0]),
    "12-bit TIFF": (tiff(12, 1, TWELVE_BITS), [0, 127, 255]),
    "16-bit PGM": (b"P5 3 1 65535\n" + RAMP.astype(">u2").tobytes(), [0, 127, 255]),
    "10-bit PGM": (b"P5 3 1 1023\n" + numpy.array([0, 512, 1023], ">u2").tobytes(), [0, 127, 255]),
    "32-bit TIFF with 16-bit values": (saved(Image.fromarray(RAMP.astype(numpy.int32)), "TIFF"), [0, 127, 255]),
    "float TIFF": (saved(Image.fromarray((RAMP / 65535).astype(numpy.float32)), "TIFF"), [0, 127, 255]),
    "float TIFF whose 0 is white": (tiff(32, 0, struct.pack("<3f", 0, 0.25, 1), sample_format=3), [255, 191, 0]),
    "transparent 8 bits": (png(8, bytes([0, 128, 255]), 0), [255, 128, 255]),
    "transparent 16 bits": (png(16, RAMP.astype(">u2").tobytes(), 2**15), [0, 255, 255]),
}


@pytest.mark.parametrize("name", GREYS)
def test_h21_grey_is_scaled_from_black_to_white(tmp_path: Path, name: str) -> None:
    content, expected = GREYS[name]
    assert levels(read_image(stored(tmp_path / "image", content))) == expected


def test_h21_grey_of_16_bits_that_came_from_8_is_as_it_was() -> None:
    grey = numpy.arange(256, dtype=numpy.uint16).reshape(16, 16)
    assert numpy.array_equal(numpy.asarray(to_rgb(Image.fromarray(grey * 257)))[..., 0], grey)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (RAMP.astype(numpy.int32) * 30000, r"pixel format I with values from 0 to 1.96605e\+09: 0 is black and 65535 white"),
        (RAMP.astype(numpy.int32) - 1, "pixel format I with values from -1 to 65534"),
        ((RAMP / 257).astype(numpy.float32), "pixel format F with values from 0 to 255: 0 is black and 1 white"),
        (numpy.full((2, 2), numpy.nan, numpy.float32), "pixel format F with values from nan to nan"),
    ],
)
def test_h21_values_of_which_nothing_says_what_is_white_are_refused(tmp_path: Path, pixels: numpy.ndarray, message: str) -> None:
    image = stored(tmp_path / "image.tif", saved(Image.fromarray(pixels), "TIFF"))
    with pytest.raises(RoutevlError, match=rf"^image 7: .*image\.tif has the {message}"):
        read_image(image)


def test_transparency_is_shown_on_white() -> None:
    for mode, color in (("RGBA", (0, 0, 0, 0)), ("RGBa", (0, 0, 0, 0)), ("LA", (0, 0)), ("La", (0, 0)), ("PA", (0, 0))):
        assert to_rgb(Image.new(mode, (4, 4), color)).getpixel((0, 0)) == (255, 255, 255), mode
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "F"])
def test_exif_orientation_is_applied(mode: str) -> None:
    image = Image.new(mode, (10, 4))
    image.getexif()[0x0112] = 6  # rotated by a quarter
    assert to_rgb(image).size == (4, 10)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_h21_damaged_exif_is_no_damage_of_the_image(tmp_path: Path, kind: str) -> None:
    image = stored(tmp_path / "image", saved(RED, kind, exif=b"Exif\0\0no tags"))
    assert read_image(image).size == (8, 6)


# --------------------------------------------------------------------------------------------- files


def test_h21_a_wrong_name_is_no_damage(tmp_path: Path) -> None:
    for kind in ("WEBP", "GIF", "PNG", "BMP", "TIFF"):
        assert read_image(stored(tmp_path / "image.jpg", saved(RED, kind))).size == (8, 6)


def test_h21_of_several_frames_the_first_is_read(tmp_path: Path) -> None:
    for kind in ("GIF", "TIFF", "WEBP"):
        frames = {"save_all": True, "append_images": [Image.new("RGB", (8, 6), "blue")]}
        image = read_image(stored(tmp_path / "image", saved(RED, kind, **frames)))
        assert numpy.abs(numpy.subtract(image.getpixel((4, 3)), RED.getpixel((4, 3)))).max() < 12


def test_h21_an_image_is_refused_for_what_is_wrong_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(Image.effect_noise((64, 64), 60), "JPEG")
    for content in (b"", whole[:600], b"<html>404 Not Found</html>", whole[:20] + whole[40:]):
        with pytest.raises(
            BadImages, match=r"^image 7: .*image\.jpg cannot be decoded: it is damaged, not an image, or of"
        ) as caught:
            read_image(stored(tmp_path / "image.jpg", content))
        assert "BytesIO" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(BadImages, match=r"image\.jpg is too large to be decoded \(.*4096 pixels.*exceeds limit") as caught:
        read_image(stored(tmp_path / "image.jpg", whole))
    assert "damaged" not in str(caught.value)
    for name, message in (
        ("none.jpg", "no such file"),
        ("", "cannot be read .Is a directory"),
        ("a\0b", "cannot be read .embedded"),
    ):
        with pytest.raises(BadImages, match=message):
            read_image(ImageFile(7, str(tmp_path / name)))


def test_h21_all_bad_images_are_named_at_once(tmp_path: Path) -> None:
    good = stored(tmp_path / "good.png", saved(RED, "PNG"))
    bad = [ImageFile(number, str(tmp_path / f"absent{number}.png")) for number in range(3)]
    with pytest.raises(BadImages, match=r"^3 images cannot be used: image 0: .*absent0\.png; image 1: .*; image 2: ") as caught:
        read_images([bad[0], good, *bad[1:], good])
    assert len(caught.value.problems) == 3 and "\n" not in str(caught.value)
    assert [image.size for image in read_images([good, good])] == [(8, 6)] * 2
    assert str(BadImages(["x"] * (MOST_NAMED + 2))).endswith("x; and 2 more")


def test_b11_a_swapped_image_is_refused(tmp_path: Path) -> None:
    content = saved(RED, "PNG")
    image = stored(tmp_path / "image.png", content, hashlib.sha256(content).hexdigest())
    assert read_image(image).size == (8, 6)
    for other in (saved(Image.new("RGB", (8, 6), "blue"), "PNG"), b"no image"):
        stored(tmp_path / "image.png", other)
        with pytest.raises(BadImages, match=r"^image 7: .*image\.png is not the image that was prepared$"):
            read_image(image)


def test_b11_hashes_of_image_lists(tmp_path: Path) -> None:
    """A list made by hand may have none; wrong ones, and two for one image, are errors."""
    entry = {"id": 1, "file_name": "a.png"}
    lists = [tmp_path / "a.json", tmp_path / "b.json"]
    for hashes, expected in [
        ((None, None), None),
        (("0" * 64, "0" * 64), "0" * 64),
        (("0" * 64, "1" * 64), f"image id 1 has the sha256 {'1' * 64}, but {'0' * 64} before"),
        (("0" * 64, "0" * 63), r"data\[0\].sha256 must match pattern"),
        (("0" * 64, 0), r"data\[0\].sha256 must be string"),
    ]:
        for path, sha256 in zip(lists, hashes, strict=True):
            path.write_text(json.dumps([entry if sha256 is None else entry | {"sha256": sha256}]))
        if expected in (None, "0" * 64):
            assert read_image_lists(lists) == [ImageFile(1, "a.png", expected)]
        else:
            with pytest.raises(RoutevlError, match=expected):
                read_image_lists(lists)
