"""Frozen visual features, computed once per image and stored: shards of safetensors and an index.

extract         one shard: a contiguous slice of all images, sorted by id
index-features  the index over all shards of one backbone
Features        reading by image id, memory-mapped
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.files import atomic_file, read_json, sha256_of, write_json

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from routevl.backbones import VisionBackbone

TOKENS = ("pooled", "patches")
PRECISIONS = ("float32", "bfloat16", "float16")
IMAGES_PER_CHUNK = 512  # 196 patches of width 768 in float32: 0.3 GB on the device, and as much in memory while it is written
BYTES_PER_COPY = 2**24


# ------------------------------------------------------------------------------------- the image list


@dataclass(frozen=True)
class ImageFile:
    """One image to encode: its id (unique over all splits) and its file."""

    image_id: int
    file_name: str


def read_image_lists(paths: Sequence[str | Path]) -> list[ImageFile]:
    """All images of several `images.json`, without repetitions, sorted by id.

    Raises:
        RoutevlError: not a list of {"id": int, "file_name": str}; one id with two different files.
    """
    file_names: dict[int, str] = {}
    for path in paths:
        entries = read_json(path)
        if not isinstance(entries, list):
            raise RoutevlError(f"{path}: expected a list of images")
        for index, entry in enumerate(entries):
            image = _image_file(entry, index, path)
            if file_names.setdefault(image.image_id, image.file_name) != image.file_name:
                raise RoutevlError(
                    f"{path}: image id {image.image_id} names {image.file_name}, but {file_names[image.image_id]} before"
                )
    return [ImageFile(image_id, file_names[image_id]) for image_id in sorted(file_names)]


def _image_file(entry: Any, index: int, path: str | Path) -> ImageFile:
    image_id = entry.get("id") if isinstance(entry, dict) else None
    file_name = entry.get("file_name") if isinstance(entry, dict) else None
    if type(image_id) is not int or not isinstance(file_name, str):
        raise RoutevlError(f'{path}: entry {index}: expected {{"id": integer, "file_name": string}}')
    return ImageFile(image_id, file_name)


def slice_of_shard(images: list[ImageFile], shard: int, shards: int) -> list[ImageFile]:
    """The contiguous slice of shard `shard` (counted from 0); the slices' sizes differ by one at most."""
    if shards < 1 or not 0 <= shard < shards:
        raise RoutevlError(f"--shard {shard} of --shards {shards}: expected 0 <= shard < shards")
    return images[len(images) * shard // shards : len(images) * (shard + 1) // shards]


def read_image(image: ImageFile) -> Image:
    """Decode an image file completely.

    Raises:
        RoutevlError: missing, truncated or not an image; the message names the file and the id.
    """
    from PIL import Image as pillow

    try:
        with pillow.open(image.file_name) as opened:
            opened.load()
            return opened
    except FileNotFoundError:
        raise RoutevlError(f"image {image.image_id}: no such file: {image.file_name}") from None
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        # Pillow raises SyntaxError and ValueError for some broken PNG and JPEG headers.
        raise RoutevlError(
            f"image {image.image_id}: {image.file_name} cannot be decoded, it is damaged or not an image ({error})"
        ) from None


# ------------------------------------------------------------------------------------ stage `extract`


def import_libraries() -> None:
    """Import at one point what the stage needs, so that start-up can be measured apart from work."""
    import timm  # noqa: F401
    import torch  # noqa: F401


def add_arguments_extract(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl extract`."""
    parser.add_argument("--images", nargs="+", required=True, metavar="JSON", help="images.json of every split")
    parser.add_argument("--backbone", required=True, metavar="FOLDER", help="vision model of timm or transformers")
    parser.add_argument("--shard", type=int, default=0, help="which shard to compute, counted from 0")
    parser.add_argument("--shards", type=int, default=1, help="how many shards there are")
    parser.add_argument("--tokens", nargs="+", choices=TOKENS, default=list(TOKENS), help="what to store")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="autocast type, stored as float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the forward pass")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images; 0: this one does")
    parser.add_argument("--output", required=True, metavar="SAFETENSORS", help="the shard's file")


def run_extract(arguments: argparse.Namespace) -> None:
    """Encode one shard's images and write them as one safetensors file, whole or not at all.

    The file holds `image_ids` (n,) int64 and, as asked, `pooled` (n, d) and `patches` (n, L, d) float32.
    Finished chunks are kept beside it in `<output>.partial` until it is complete, and reused by the next
    call.

    Raises:
        RoutevlError: a bad option, image list, image or backbone; no output is written then.
    """
    import torch

    from routevl.backbones import load_vision_backbone

    for option in ("batch_size", "threads"):
        if getattr(arguments, option) < 1:
            raise RoutevlError(f"--{option.replace('_', '-')} {getattr(arguments, option)}: expected at least 1")
    if arguments.workers < 0:
        raise RoutevlError(f"--workers {arguments.workers}: expected 0 or more")
    torch.set_num_threads(arguments.threads)
    all_images = read_image_lists(arguments.images)
    images = slice_of_shard(all_images, arguments.shard, arguments.shards)
    if not images:
        raise RoutevlError(
            f"shard {arguments.shard} of {arguments.shards} is empty: there are only {len(all_images)} images; set fewer shards"
        )
    backbone = load_vision_backbone(arguments.backbone)
    tokens = [name for name in TOKENS if name in arguments.tokens]
    metadata = {
        "backbone_fingerprint": backbone.fingerprint,
        "tokens": " ".join(tokens),
        "precision": arguments.precision,
        "shard": str(arguments.shard),
        "shards": str(arguments.shards),
        "image_list": _digest_of_ids(all_images),
    }
    partial = Path(f"{arguments.output}.partial")
    chunks = _plan_chunks(images, partial, metadata)
    _fill_chunks(chunks, backbone, tokens, metadata, arguments)
    with atomic_file(arguments.output) as temporary:
        _join_chunks([chunk.path for chunk in chunks], temporary, metadata)
    shutil.rmtree(partial)


def _digest_of_ids(images: list[ImageFile]) -> str:
    """Tells shards of one image list from shards of another."""
    return hashlib.sha256(",".join(str(image.image_id) for image in images).encode()).hexdigest()


@dataclass(frozen=True)
class Chunk:
    """A run of images whose features are kept in one file until the whole shard is there."""

    images: list[ImageFile]
    path: Path
    sources: str

    def is_done(self, metadata: dict[str, str]) -> bool:
        """Whether the file holds just these images, from just these files, by this backbone."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="np") as file:
                return file.metadata() == {**metadata, "sources": self.sources}
        except (OSError, SafetensorError):  # not there, or cut off
            return False


def _plan_chunks(images: list[ImageFile], partial: Path, metadata: dict[str, str]) -> list[Chunk]:
    chunks = []
    for start in range(0, len(images), IMAGES_PER_CHUNK):
        members = images[start : start + IMAGES_PER_CHUNK]
        chunks.append(Chunk(members, partial / f"chunk-{start:09d}.safetensors", _digest_of_sources(members)))
    return chunks


def _digest_of_sources(images: list[ImageFile]) -> str:
    """Changes with the images' ids, files, sizes and times: a chunk of replaced images is not reused."""
    digest = hashlib.sha256()
    for image in images:
        try:
            status = os.stat(image.file_name)
        except OSError:
            raise RoutevlError(f"image {image.image_id}: no such file: {image.file_name}") from None
        digest.update(f"{image.image_id} {image.file_name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _fill_chunks(
    chunks: list[Chunk],
    backbone: VisionBackbone,
    tokens: list[str],
    metadata: dict[str, str],
    arguments: argparse.Namespace,
) -> None:
    missing = [chunk for chunk in chunks if not chunk.is_done(metadata)]
    if len(missing) < len(chunks):
        print(f"extract: {len(chunks) - len(missing)} of {len(chunks)} chunks are there already", flush=True)
    encoded = _encode_chunks(missing, backbone, tokens, arguments)
    with ThreadPoolExecutor(max_workers=1) as writer:  # the device goes on with the next chunk while the disk writes this one
        writing: Future | None = None
        for chunk, tensors in zip(missing, encoded, strict=True):
            if writing:
                writing.result()
            writing = writer.submit(_write_chunk, chunk, tensors, metadata)
        if writing:
            writing.result()


def _write_chunk(chunk: Chunk, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with atomic_file(chunk.path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, "sources": chunk.sources})


def _encode_chunks(
    chunks: list[Chunk], backbone: VisionBackbone, tokens: list[str], arguments: argparse.Namespace
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each chunk in turn; one data loader runs over the batches of all of them.

    A GPU gets its batches from pinned memory and keeps their features until the chunk ends, so that it never waits for this
    process in between.
    """
    import torch

    from routevl.progress import progress

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone.model.to(device)
    size = arguments.batch_size
    batches = [chunk.images[start : start + size] for chunk in chunks for start in range(0, len(chunk.images), size)]
    loaded = progress(_load_batches(batches, backbone, device, arguments.workers), len(batches), "extract")
    for chunk in chunks:
        parts = []
        for _ in range(math.ceil(len(chunk.images) / size)):
            parts.append(_encode_batch(next(loaded), backbone, tokens, device, arguments.precision))
        tensors = {name: torch.cat([part[name] for part in parts]).cpu() for name in tokens}
        yield {"image_ids": torch.tensor([image.image_id for image in chunk.images]), **tensors}
    next(loaded, None)  # lets the progress report its end


def _load_batches(
    batches: list[list[ImageFile]], backbone: VisionBackbone, device: torch.device, workers: int
) -> Iterator[torch.Tensor]:
    """Pixels (B, 3, H, W) of each batch; bad images raise their one-line error here, not inside a worker."""
    from torch.utils.data import DataLoader

    data = _Batches(batches, backbone.transform)
    loader = DataLoader(data, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda")
    for pixels in loader:
        if isinstance(pixels, str):
            raise RoutevlError(pixels)
        yield pixels


class _Batches:
    """A map-style data set whose items are whole batches: pixels, or the message of an error."""

    def __init__(self, batches: list[list[ImageFile]], transform: Any) -> None:
        self.batches = batches
        self.transform = transform

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        import torch

        try:
            return torch.stack([self.transform(read_image(image)) for image in self.batches[index]])
        except RoutevlError as error:
            return str(error)


def _encode_batch(
    pixels: torch.Tensor, backbone: VisionBackbone, tokens: list[str], device: torch.device, precision: str
) -> dict[str, torch.Tensor]:
    import torch

    autocast = torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
    with torch.inference_mode(), autocast:
        outputs = dict(zip(TOKENS, backbone.encode(pixels.to(device, non_blocking=True)), strict=True))
    return {name: outputs[name].float().contiguous() for name in tokens}


def _join_chunks(chunks: list[Path], output: Path, metadata: dict[str, str]) -> None:
    """Concatenate chunk files along the first axis into one safetensors file, without holding it in memory.

    safetensors can only write tensors that are in memory, and the patches of a large data set are not; its
    format (a length, a JSON header, the raw tensors) is simple enough to be streamed.
    """
    sources = [_read_header(chunk) for chunk in chunks]
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    # In the order of their offsets in the chunks, so that 8-byte ids stay aligned.
    names = sorted(sources[0].entries, key=lambda name: sources[0].entries[name]["data_offsets"])
    for name in names:
        entries = [source.entries[name] for source in sources]
        end = offset + sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
        rows = sum(entry["shape"][0] for entry in entries)
        header[name] = {
            **entries[0],
            "shape": [rows, *entries[0]["shape"][1:]],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(output, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for source in sources:
                source.copy_tensor(name, file)


@dataclass(frozen=True)
class _Header:
    """Where a safetensors file keeps each of its tensors."""

    path: Path
    entries: dict[str, Any]
    start: int

    def copy_tensor(self, name: str, output: Any) -> None:
        begin, end = self.entries[name]["data_offsets"]
        with open(self.path, "rb") as file:
            file.seek(self.start + begin)
            for position in range(begin, end, BYTES_PER_COPY):
                output.write(file.read(min(BYTES_PER_COPY, end - position)))


def _read_header(path: Path) -> _Header:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    del entries["__metadata__"]
    return _Header(path, entries, 8 + length)


# ----------------------------------------------------------------------------- stage `index-features`


def add_arguments_index_features(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl index-features`."""
    parser.add_argument("--shards", nargs="+", required=True, metavar="SAFETENSORS", help="every shard's file")
    parser.add_argument("--output", required=True, metavar="JSON", help="index.json, in the shards' folder")


def run_index_features(arguments: argparse.Namespace) -> None:
    """Check that the shards belong together and are complete, and write their index.

    Raises:
        RoutevlError: a shard is unreadable, missing, twice there, or of another backbone, precision,
            choice of tokens, number of shards or image list.
    """
    shards = sorted((_describe_shard(Path(path)) for path in arguments.shards), key=lambda shard: shard["shard"])
    _check_shards(shards)
    folder = Path(arguments.output).parent
    first = shards[0]
    write_json(
        arguments.output,
        {
            "backbone_fingerprint": first["backbone_fingerprint"],
            "precision": first["precision"],
            "width": first["width"],
            "tokens": first["lengths"],
            "shards": [
                {
                    "file": os.path.relpath(shard["path"], folder),
                    "n": shard["n"],
                    "sha256": sha256_of(shard["path"]),
                }
                for shard in shards
            ],
            "n": sum(shard["n"] for shard in shards),
        },
    )


def _describe_shard(path: Path) -> dict[str, Any]:
    with _open_shard(path, "np") as file:  # shapes are all that is read: no need to load torch
        metadata = file.metadata() or {}
        try:
            tokens = metadata["tokens"].split()
            shapes = {name: file.get_slice(name).get_shape() for name in tokens}
            return {
                "path": path,
                "n": file.get_slice("image_ids").get_shape()[0],
                "width": shapes[tokens[0]][-1],
                "lengths": {name: shape[1] if len(shape) == 3 else 1 for name, shape in shapes.items()},
                "shard": int(metadata["shard"]),
                "number of shards": int(metadata["shards"]),
                **{key: metadata[key] for key in ("backbone_fingerprint", "precision", "image_list")},
            }
        except KeyError as error:
            raise RoutevlError(f"{path}: not a feature shard (its metadata lack {error})") from None


def _check_shards(shards: list[dict[str, Any]]) -> None:
    first = shards[0]
    for key in ("number of shards", "backbone_fingerprint", "precision", "lengths", "width", "image_list"):
        for shard in shards:
            if shard[key] != first[key]:
                raise RoutevlError(
                    f"{shard['path']}: {key} {shard[key]}, but {first[key]} in {first['path']}; "
                    "extract all shards with the same options"
                )
    numbers = [shard["shard"] for shard in shards]
    for number in range(first["number of shards"]):
        if numbers.count(number) != 1:
            found = "missing" if number not in numbers else f"given {numbers.count(number)} times"
            raise RoutevlError(f"shard {number} of {first['number of shards']} is {found}")


def _open_shard(path: Path, framework: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError:
        raise RoutevlError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise RoutevlError(f"{path}: not a readable safetensors file ({error})") from None


# --------------------------------------------------------------------------------------------- reading


class Features:
    """Stored features of one kind of tokens, read by image id from memory-mapped shards.

    Attributes:
        width: d.
        length: L_v, the visual tokens per image (1 for "pooled").
        fingerprint: of the backbone that made them.

    Raises:
        RoutevlError: no index or shard, a shard that does not fit the index, tokens that were not stored,
            or a backbone other than `expected_fingerprint`.
    """

    def __init__(self, folder: str | Path, tokens: str = "pooled", expected_fingerprint: str | None = None) -> None:
        index_path = Path(folder) / "index.json"
        index = read_json(index_path)
        try:
            self.fingerprint: str = index["backbone_fingerprint"]
            self.width: int = index["width"]
            lengths, shards = index["tokens"], index["shards"]
        except (KeyError, TypeError):
            raise RoutevlError(f"{index_path}: not an index of features") from None
        if tokens not in lengths:
            raise RoutevlError(
                f"{index_path}: no {tokens!r} tokens stored, only {', '.join(lengths)}; extract them with --tokens"
            )
        if expected_fingerprint not in (None, self.fingerprint):
            raise RoutevlError(
                f"{index_path}: made by the backbone {self.fingerprint}, but {expected_fingerprint} "
                "is expected; extract the features again or use that backbone"
            )
        self.length: int = lengths[tokens]
        self._folder = Path(folder)
        self._open(shards, tokens)

    def _open(self, shards: list[dict[str, Any]], tokens: str) -> None:
        import torch

        self._shards, ids = [], []
        for shard in shards:
            path = self._folder / shard["file"]
            with _open_shard(path, "pt") as file:
                # get_tensor maps the file: rows are read from disk when they are asked for.
                shard_ids, rows = file.get_tensor("image_ids"), file.get_tensor(tokens)
            if len(shard_ids) != shard["n"]:
                raise RoutevlError(f"{path}: {len(shard_ids)} images, but {shard['n']} in the index; index it again")
            self._shards.append(rows)
            ids.append(shard_ids)
        self._image_ids = torch.cat(ids)  # shards are contiguous slices of the sorted ids, so these are sorted
        self._starts = torch.tensor([0, *(len(shard_ids) for shard_ids in ids)]).cumsum(0)

    def __len__(self) -> int:
        return len(self._image_ids)

    def positions(self, image_ids: Sequence[int]) -> torch.Tensor:
        """Where the features of some images stand, counted over all shards: int64 (n,).

        Raises:
            RoutevlError: an image without features; the message names its id.
        """
        import torch

        wanted = torch.as_tensor(image_ids, dtype=torch.int64)
        positions = torch.searchsorted(self._image_ids, wanted).clamp(max=len(self) - 1)
        unknown = wanted[self._image_ids[positions] != wanted]
        if len(unknown):
            raise RoutevlError(f"image {unknown[0].item()}: no features in {self._folder}; extract them for every split")
        return positions

    def features(self, image_ids: Sequence[int]) -> torch.Tensor:
        """The features of some images, in their order and with repetitions: float32 (n, L_v, d); errors as `positions`."""
        import torch

        positions = self.positions(image_ids)
        shard_numbers = torch.searchsorted(self._starts, positions, right=True) - 1
        result = torch.empty(len(positions), self.length, self.width)
        for number in shard_numbers.unique().tolist():
            chosen = shard_numbers == number
            rows = self._shards[number][positions[chosen] - self._starts[number]]
            result[chosen] = rows.reshape(-1, self.length, self.width)
        return result
