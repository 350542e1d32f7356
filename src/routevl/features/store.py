"""Stored features, read by image id from memory-mapped shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routevl.errors import RoutevlError
from routevl.features.index import digest_of_ids, open_shard
from routevl.files import read_json


class Features:
    """Stored features of one kind of tokens, read by image id.

    Args:
        folder: of index.json and the shards.
        tokens: one of TOKENS.
        expected_fingerprint: of the backbone that must have made them; None: any.

    Attributes:
        length: L_v, the visual tokens per image (1 for "pooled").
        width: d, of this kind of tokens.
        fingerprint: of the backbone that made them.
        image_ids: all ids, sorted, int64 (n,).

    Raises:
        RoutevlError: no index or shard, an index of an older form, tokens that were not stored, a backbone other than
            `expected_fingerprint`, or a shard of another backbone, precision, shape or list of images than the index or the other
            shards have.
    """

    def __init__(self, folder: str | Path, tokens: str = "pooled", expected_fingerprint: str | None = None) -> None:
        self._folder = Path(folder)
        path = self._folder / "index.json"
        index = read_json(path)
        if "width" in index:  # one for all kinds of tokens
            raise RoutevlError(f"{path}: an index of an older routevl; index the features again (routevl index-features)")
        stored = index["tokens"]
        self.fingerprint: str = index["backbone_fingerprint"]
        if tokens not in stored:
            raise RoutevlError(f"{path}: no {tokens!r} tokens stored, only {', '.join(stored)}; extract them with --tokens")
        if expected_fingerprint not in (None, self.fingerprint):
            raise RoutevlError(
                f"{path}: made by the backbone {self.fingerprint}, but {expected_fingerprint} "
                "is expected; extract the features again or use that backbone"
            )
        self.length: int = stored[tokens]["length"]
        self.width: int = stored[tokens]["width"]
        ids, self._shards, image_lists = zip(*(self._open(shard, tokens, index) for shard in index["shards"]), strict=True)
        self.image_ids = torch.cat(ids)  # shards are contiguous slices of the sorted ids, so these are sorted
        self._starts = torch.tensor([0, *map(len, ids)]).cumsum(0)
        image_list = digest_of_ids(self.image_ids.tolist())
        for shard, of_shard in zip(index["shards"], image_lists, strict=True):
            if of_shard != image_list:
                raise self._misfit(shard, "of another list of images than the other shards, or in another place among them")

    def _open(self, entry: dict[str, Any], tokens: str, index: dict[str, Any]) -> tuple[Tensor, Tensor, str]:
        """A shard's ids (m,), its features (m, ...), which are read from disk when they are asked for, and its `image_list`."""
        with open_shard(self._folder / entry["file"], "pt") as shard:
            metadata = shard.metadata() or {}
            for key, name in (("backbone_fingerprint", "backbone"), ("precision", "precision")):
                if metadata.get(key) != index[key]:
                    raise self._misfit(entry, f"of another {name} than its index says")
            ids, features = shard.get_tensor("image_ids"), shard.get_tensor(tokens)
        shape = len(ids), len(features), math.prod(features.shape[1:-1]), features.shape[-1]
        if shape != (entry["n"], entry["n"], self.length, self.width):
            raise self._misfit(entry, "of another shape than its index says")
        return ids, features, metadata.get("image_list", "")

    def _misfit(self, entry: dict[str, Any], problem: str) -> RoutevlError:
        return RoutevlError(f"{self._folder / entry['file']}: {problem}; index the features again")

    def __len__(self) -> int:
        return len(self.image_ids)

    def positions(self, image_ids: Sequence[int]) -> Tensor:
        """Where the features of some images stand, counted over all shards: int64 (n,).

        Raises:
            RoutevlError: an image without features; the message names its id.
        """
        wanted = torch.as_tensor(image_ids, dtype=torch.int64)
        positions = torch.searchsorted(self.image_ids, wanted).clamp(max=len(self) - 1)
        unknown = wanted[self.image_ids[positions] != wanted]
        if len(unknown):
            raise RoutevlError(f"image {unknown[0].item()}: no features in {self._folder}; extract them for every split")
        return positions

    def features(self, image_ids: Sequence[int]) -> Tensor:
        """The features of some images, in their order and with repetitions: float32 (n, L_v, d); errors as `positions`."""
        positions = self.positions(image_ids)
        shard_numbers = torch.searchsorted(self._starts, positions, right=True) - 1
        result = torch.empty(len(positions), self.length, self.width)
        for number in shard_numbers.unique().tolist():
            chosen = shard_numbers == number
            rows = self._shards[number][positions[chosen] - self._starts[number]]
            result[chosen] = rows.reshape(-1, self.length, self.width)
        return result
