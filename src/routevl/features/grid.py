"""Grids of features."""

from __future__ import annotations

from math import isqrt

from torch import Tensor, nn

from routevl.errors import RoutevlError


def pooled_grid(features: Tensor, side: int = 6) -> Tensor:
    """A square grid of features made smaller by maxima over its parts: (B, n * n, d), row by row -> (B, side * side, d).

    Of 7 × 7 to 6 × 6, CLIP-BART's, a part is 2 × 2 tokens, and its neighbour's begins one further.

    Raises:
        RoutevlError: the tokens are no square grid.
    """
    tokens = features.shape[1]
    if isqrt(tokens) ** 2 != tokens:
        raise RoutevlError(f"{tokens} visual tokens are no square grid: take a vision model's grid tokens, without [CLS]")
    grid = features.transpose(1, 2).unflatten(2, (isqrt(tokens), -1))  # (B, d, n, n)
    return nn.functional.adaptive_max_pool2d(grid, side).flatten(2).transpose(1, 2)
