"""Stage `index-features`: the index over all shards of one backbone. Free of torch."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from routevl.errors import RoutevlError
from routevl.files import sha256_of, write_json

# What can be stored of an image: one token, all patches, a square grid of them, of 6 x 6 where it has more, or the patches behind
# the class token.
TOKENS = ("pooled", "patches", "grid", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl index-features`."""
    parser.add_argument("--shards", nargs="+", required=True, metavar="SAFETENSORS", help="every shard's file")
    parser.add_argument("--output", required=True, metavar="JSON", help="index.json, in the shards' folder")


def run(arguments: argparse.Namespace) -> None:
    """Check that the shards belong together and are complete, and write their index.

    The index says of each kind of tokens how many an image has and how wide they are: `{"pooled": {"length": 1, "width": d}}`.

    Raises:
        RoutevlError: a shard is unreadable, missing, twice there, or of another backbone, precision,
            choice of tokens, number of shards or image list.
    """
    shards = sorted((_describe_shard(Path(path)) for path in arguments.shards), key=lambda shard: shard["shard"])
    _check_shards(shards)
    folder = Path(arguments.output).parent
    first = shards[0]
    entries = [{"file": os.path.relpath(s["path"], folder), "n": s["n"], "sha256": sha256_of(s["path"])} for s in shards]
    index = {
        "backbone_fingerprint": first["backbone_fingerprint"],
        "precision": first["precision"],
        "tokens": first["tokens"],
        "shards": entries,
        "n": sum(shard["n"] for shard in shards),
    }
    write_json(arguments.output, index)


def _describe_shard(path: Path) -> dict[str, Any]:
    with open_shard(path, "np") as file:
        metadata = file.metadata() or {}
        try:
            shapes = {name: file.get_slice(name).get_shape() for name in metadata["tokens"].split()}
            return {
                "path": path,
                "n": file.get_slice("image_ids").get_shape()[0],
                "tokens": {name: {"length": math.prod(shape[1:-1]), "width": shape[-1]} for name, shape in shapes.items()},
                "shard": int(metadata["shard"]),
                "number of shards": int(metadata["shards"]),
                **{key: metadata[key] for key in ("backbone_fingerprint", "precision", "image_list")},
            }
        except KeyError as error:
            raise RoutevlError(f"{path}: not a feature shard (its metadata lack {error})") from None


def _check_shards(shards: list[dict[str, Any]]) -> None:
    first = shards[0]
    for shard in shards:
        for key in ("number of shards", "backbone_fingerprint", "precision", "tokens", "image_list"):
            if shard[key] != first[key]:
                raise RoutevlError(
                    f"{shard['path']}: {key} {shard[key]}, but {first[key]} in {first['path']}; "
                    "extract all shards with the same options"
                )
    numbers = [shard["shard"] for shard in shards]
    if numbers != list(range(first["number of shards"])):
        raise RoutevlError(f"--shards: found the shards {numbers}, expected each of {first['number of shards']} once")


def digest_of_ids(image_ids: Iterable[int]) -> str:
    """The sha256, in hexadecimal, of all image ids in their order: `image_list` of a shard's metadata."""
    return hashlib.sha256(",".join(map(str, image_ids)).encode()).hexdigest()


def open_shard(path: Path, framework: str) -> Any:
    """safetensors' open file of a shard, whose tensors come as those of "np" (numpy) or "pt" (torch)."""
    try:
        return safe_open(path, framework=framework)
    except (OSError, SafetensorError) as error:
        raise RoutevlError(f"{path}: not a readable safetensors file ({error})") from None
