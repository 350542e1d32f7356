"""What a bottleneck is made of beside plain linear maps: the two streams' own down-projections, and what mixes the streams.

A module that computes several projections, such as GPT-2's query and value, has P bottlenecks side by side; else P is 1. A mixer
is one bottleneck's: x_t (B, L_t, r), x_v (B, L_v, r) and the mask (B, L_v) or None -> (B, L_t, r), in the dtype of x_t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from routevl.methods.routed import QUARTERS
from routevl.routing import routing_function

if TYPE_CHECKING:
    from routevl.methods.routed.config import RoutedConfig


class Split(nn.Module):
    """W_down of the text and W_down of the image apart (bottleneck=split)."""

    def __init__(self, width: int, r: int, parts: int, bias: bool) -> None:
        super().__init__()
        self.text, self.image = (SplitStream(width, r, parts, bias) for _ in range(2))


class SplitStream(nn.ModuleList):
    """One stream's P down-projections, each d -> r/4 -> r without an activation: (B, ..., d) -> (B, ..., P r)."""

    def __init__(self, width: int, r: int, parts: int, bias: bool) -> None:
        inner = r // QUARTERS
        maps = ((nn.Linear(width, inner, bias=False), nn.Linear(inner, r, bias=bias)) for _ in range(parts))
        super().__init__(nn.Sequential(*of_part) for of_part in maps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, ..., d) -> (B, ..., P r)."""
        return torch.cat([part(hidden_states) for part in self], dim=-1)


class Routed(nn.Module):
    """A routing function as a mixer, which has no parameter."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.function = name, routing_function(name)

    def forward(self, x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
        """See the module."""
        return self.function(x_t, x_v, mask)

    def extra_repr(self) -> str:
        """The function's name."""
        return self.name


class CrossAttention(nn.Module):
    """softmax(x_t W_q (x_v W_k)ᵀ / √(r/4)) x_v W_v W_o in four heads of r/4 dimensions (bottleneck=cross_attention).

    With one visual token the softmax is 1: every text position gets x_v W_v W_o, and W_q and W_k no gradient.
    """

    def __init__(self, r: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(r, r, bias=False) for _ in range(4))

    def forward(self, x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
        """See the module."""
        projected = self.query(x_t), self.key(x_v), self.value(x_v)
        heads = (x.unflatten(-1, (QUARTERS, -1)).transpose(1, 2) for x in projected)  # (B, 4, L, r/4)
        real = None if mask is None else mask[:, None, None]  # (B, 1, 1, L_v)
        mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=real)
        return self.output(mixed.transpose(1, 2).flatten(-2))


def new_down(config: RoutedConfig, width: int, parts: int, bias: bool) -> nn.Module:
    """The down-projections (B, ..., width) -> (B, ..., parts * r): of both streams, or a Split."""
    if config.bottleneck == "split":
        return Split(width, config.r, parts, bias)
    return nn.Linear(width, parts * config.r, bias=bias)


def new_mixer(config: RoutedConfig) -> nn.Module:
    """The mixer of one bottleneck that reads features."""
    return CrossAttention(config.r) if config.bottleneck == "cross_attention" else Routed(config.routing)
