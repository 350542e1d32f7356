"""Stage `extract`: one shard of stored features, a contiguous slice of all images, sorted by id."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from routevl.backbones.vision import VisionBackbone, load_vision_backbone
from routevl.features.images import BadImages, ImageFile, read_image_lists, slice_of_shard
from routevl.features.index import TOKENS, digest_of_ids
from routevl.features.loading import load_batches
from routevl.files import atomic_file
from routevl.options import at_least
from routevl.progress import progress

PRECISIONS = ("float32", "bfloat16", "float16")
IMAGES_PER_CHUNK = 512  # 196 patches of width 768 in float32: 0.3 GB on the device, and as much in memory while it is written
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's numbers, in its malloc.h
TIMING = re.compile(r"^extract: (\d+) images in ([\d.]+) s$", re.MULTILINE)  # in the log, without the time to load the model
BYTES = {"I64": 8, "F32": 4}  # of one number, by safetensors' name of its type


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl extract`."""
    parser.add_argument("--images", nargs="+", required=True, metavar="JSON", help="images.json of every split")
    parser.add_argument("--backbone", required=True, metavar="FOLDER", help="vision model of timm or transformers")
    parser.add_argument("--shard", type=at_least(0), default=0, help="which shard to compute, counted from 0")
    parser.add_argument("--shards", type=at_least(1), default=1, help="how many shards there are")
    parser.add_argument("--tokens", nargs="+", choices=TOKENS, default=list(TOKENS), help="what to store")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images per forward pass")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="autocast type, stored as float32")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads of the forward pass")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that decode images; 0: this one does")
    parser.add_argument("--output", required=True, metavar="SAFETENSORS", help="the shard's file")


def run(arguments: argparse.Namespace) -> None:
    """Encode one shard's images and write them as one safetensors file, whole or not at all.

    The file holds `image_ids` (n,) int64 and, as asked, `pooled` (n, d), `patches` (n, L, d'), `grid` (n, 36 at most, d') and
    `all` (n, 1 + L or more, d'), float32.
    Finished chunks are kept beside it in `<output>.partial` until it is complete: an interrupted extraction resumes from them.

    Raises:
        RoutevlError: a bad image list, image or backbone, tokens that it does not give, or an empty shard; no output is written
            then. All bad images of the shard are named, at the end: the chunks without any are finished.
    """
    torch.set_num_threads(arguments.threads)
    _keep_freed_memory()
    all_images = read_image_lists(arguments.images)
    images = slice_of_shard(all_images, arguments.shard, arguments.shards)
    backbone = load_vision_backbone(arguments.backbone)
    tokens = [name for name in TOKENS if name in arguments.tokens]
    for kind in tokens:
        backbone.tokens.shape(kind)
    metadata = {
        "backbone_fingerprint": backbone.fingerprint,
        "tokens": " ".join(tokens),
        "precision": arguments.precision,
        "shard": str(arguments.shard),
        "shards": str(arguments.shards),
        "image_list": digest_of_ids(image.image_id for image in all_images),
    }
    folder = Path(f"{arguments.output}.partial")
    chunks = _plan_chunks(images, folder, metadata)
    started = time.perf_counter()
    encoded = _fill_chunks(chunks, backbone, tokens, arguments)
    print(f"extract: {encoded} images in {time.perf_counter() - started:.3f} s", flush=True)
    with atomic_file(arguments.output) as temporary:
        _join_chunks(chunks, temporary, metadata)
    shutil.rmtree(folder)


def _keep_freed_memory() -> None:
    """Let glibc keep memory that is given back: each layer takes as much again, and the kernel would clear it anew, which costs a
    CPU a good part of its time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for parameter, value in ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0)):
            mallopt(parameter, value)


# ------------------------------------------------------------------------------------------- chunks


class Chunk(NamedTuple):
    """A run of images whose features are kept in a file, with the shard's metadata, until the whole shard is there."""

    images: list[ImageFile]
    path: Path
    metadata: dict[str, str]

    def is_done(self) -> bool:
        """Whether the file holds just these images, of just this content, by this backbone."""
        try:
            with safe_open(self.path, framework="np") as file:
                return file.metadata() == self.metadata
        except (OSError, SafetensorError):  # not there, or cut off
            return False

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write the file, whole or not at all."""
        with atomic_file(self.path) as temporary:
            save_file(tensors, temporary, metadata=self.metadata)


def _plan_chunks(images: list[ImageFile], folder: Path, metadata: dict[str, str]) -> list[Chunk]:
    chunks = []
    for start in range(0, len(images), IMAGES_PER_CHUNK):
        members = images[start : start + IMAGES_PER_CHUNK]
        path = folder / f"chunk-{start:09d}.safetensors"
        chunks.append(Chunk(members, path, metadata | {"sources": _digest_of_sources(members)}))
    return chunks


def _digest_of_sources(images: list[ImageFile]) -> str:
    """Changes with the images' ids and content, so that a chunk of replaced images is not reused.

    Where no hash of the content is known, it changes with the files' names, sizes and times.
    """
    digest = hashlib.sha256()
    for image in images:
        content = image.sha256
        if content is None and os.path.isfile(image.file_name):
            status = os.stat(image.file_name)
            content = f"{image.file_name} {status.st_size} {status.st_mtime_ns}"
        digest.update(f"{image.image_id} {content}\n".encode())
    return digest.hexdigest()


def _fill_chunks(chunks: list[Chunk], backbone: VisionBackbone, tokens: list[str], arguments: argparse.Namespace) -> int:
    """Write the chunks that are not there; returns how many images they have."""
    missing = [chunk for chunk in chunks if not chunk.is_done()]
    if len(missing) < len(chunks):
        print(f"extract: {len(chunks) - len(missing)} of {len(chunks)} chunks are there already", flush=True)
    problems: list[str] = []
    encoded = _encode_chunks(missing, backbone, tokens, arguments, problems)
    with ThreadPoolExecutor(max_workers=1) as writer:  # the device goes on with the next chunk while the disk writes this one
        written = writer.submit(lambda: None)
        for chunk, tensors in zip(missing, encoded, strict=True):
            written.result()
            if tensors is not None:
                written = writer.submit(chunk.write, tensors)
        written.result()
    if problems:
        raise BadImages(problems)
    return sum(len(chunk.images) for chunk in missing)


def _join_chunks(chunks: list[Chunk], output: Path, metadata: dict[str, str]) -> None:
    """Concatenate chunk files along the first axis into one safetensors file, holding one chunk in memory at a time.

    safetensors itself can only write tensors that are in memory, and the metadata in a random order: the same features would not
    give the same bytes. Its format is a length, a JSON header and the raw tensors.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    with safe_open(chunks[0].path, framework="np") as first:
        names = first.offset_keys()  # 8-byte ids before 4-byte features, so that all are aligned
        for name in names:
            dtype, shape = first.get_slice(name).get_dtype(), first.get_slice(name).get_shape()
            shape = [sum(len(chunk.images) for chunk in chunks), *shape[1:]]
            end = offset + BYTES[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(output, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for chunk in chunks:
                with safe_open(chunk.path, framework="np") as source:
                    file.write(source.get_tensor(name).data)


# ----------------------------------------------------------------------------------------- encoding


def _encode_chunks(
    chunks: list[Chunk], backbone: VisionBackbone, tokens: list[str], arguments: argparse.Namespace, problems: list[str]
) -> Iterator[dict[str, Tensor] | None]:
    """The tensors of each chunk in turn; one data loader runs over the batches of all of them.

    What is wrong with images is added to `problems`; a chunk with bad images is None, and the rest of it is read but not encoded.
    A GPU gets its batches from pinned memory and keeps their features until the chunk ends, so that it never waits for this
    process in between.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone.model.to(device)
    size = arguments.batch_size
    batches = [chunk.images[start : start + size] for chunk in chunks for start in range(0, len(chunk.images), size)]
    loaded = progress(load_batches(batches, backbone.transform, device, arguments.workers), len(batches), "extract")
    for chunk in chunks:
        parts, known = [], len(problems)
        for _ in range(math.ceil(len(chunk.images) / size)):
            pixels = next(loaded)
            if isinstance(pixels, list):
                problems += pixels
            elif len(problems) == known:
                parts.append(_encode_batch(pixels, backbone, tokens, device, arguments.precision))
        if len(problems) > known:
            yield None
            continue
        tensors = {name: torch.cat([part[name] for part in parts]).cpu() for name in tokens}
        yield {"image_ids": torch.tensor([image.image_id for image in chunk.images]), **tensors}
    next(loaded, None)  # lets the progress report its end


def _encode_batch(
    pixels: Tensor, backbone: VisionBackbone, tokens: list[str], device: torch.device, precision: str
) -> dict[str, Tensor]:
    autocast = torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
    with torch.inference_mode(), autocast:
        encoded = backbone.encode(pixels.to(device, non_blocking=True), tokens)
    return {name: features.float().contiguous() for name, features in encoded.items()}
