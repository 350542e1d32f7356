"""Grids of features."""

from __future__ import annotations

from math import ceil, isqrt

import torch
from torch import Tensor

from routevl.errors import RoutevlError

SIDE = 6  # of the largest grid that is kept as it is, as CLIP-BART's is


def pooled_grid(features: Tensor) -> Tensor:
    """A square grid of features, row by row, (B, n * n, d) -> (B, 36, d), maxima over its parts; as it is where n is 6 or less.

    Of 7 × 7 to 6 × 6, CLIP-BART's, a part is 2 × 2 tokens, and its neighbour's begins one further: what torch's
    adaptive_max_pool2d does, whose gradient is not deterministic on GPUs.

    Raises:
        RoutevlError: the tokens are no square grid.
    """
    side = isqrt(features.shape[1])
    if side**2 != features.shape[1]:
        raise RoutevlError(f"{features.shape[1]} visual tokens are no square grid")
    if side <= SIDE:
        return features
    grid = features.unflatten(1, (side, side))  # (B, n, n, d)
    for axis in (1, 2):
        bounds = [(part * side // SIDE, ceil((part + 1) * side / SIDE)) for part in range(SIDE)]
        grid = torch.stack([grid.narrow(axis, start, end - start).amax(axis) for start, end in bounds], axis)
    return grid.flatten(1, 2)
