"""Routing functions: how the other modality is mixed in inside a low-rank bottleneck (paper, section 3).

A bottleneck projects text hidden states x_H (B, L_t, d) and visual features x_R (B, L_v, d) with the SAME down-projection:

    x_t = x_H W_down      (B, L_t, r)
    x_v = x_R W_down      (B, L_v, r)

and a routing function turns the two into the (B, L_t, r) tensor that the up-projection reads. Every routing function is
linear in x_t, adds no parameter, and treats each example on its own. To add one: write the function, add its row to ROUTING.

Shapes: B examples, L_t text positions, L_v visual tokens, r the rank. dtypes: those of x_t; x_v has the same.
`mask` (B, L_v), bool, is True where a visual token is real; None means that all are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routevl.errors import RoutevlError

if TYPE_CHECKING:  # the workflow reads the names in ROUTING without loading torch
    from torch import Tensor

    RoutingFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def mean_visual_token(x_v: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of an image's visual tokens: (B, L_v, r) -> (B, 1, r). A lone token is returned as it is."""
    if mask is None:
        return x_v if x_v.shape[1] == 1 else x_v.mean(dim=1, keepdim=True)
    weights = mask.unsqueeze(-1).to(x_v.dtype)  # (B, L_v, 1)
    return (x_v * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp_min(1)


def mul(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t ∘ x'_v: each text position times the image's vector, element by element."""
    return x_t * mean_visual_token(x_v, mask)


def add(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t + x'_v: the image's vector added at each text position."""
    return x_t + mean_visual_token(x_v, mask)


def attn(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t x_vᵀ x_v: linear cross-attention, no softmax. For L_v = 1 this is (x_t · x_v) x_v."""
    if mask is not None:
        x_v = x_v * mask.unsqueeze(-1).to(x_v.dtype)
    return (x_t @ x_v.transpose(1, 2)) @ x_v  # (B, L_t, L_v) then (B, L_t, r)


def expand(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t x''_v, with x''_v the image's vector repeated r times into an r × r matrix: (Σ_i x_t,i) x_v."""
    return x_t.sum(dim=-1, keepdim=True) * mean_visual_token(x_v, mask)


@dataclass(frozen=True)
class Routing:
    """A routing function and how documents and figures show it.

    Attributes:
        function: None reads no visual features: plain LoRA or Adapter, the baseline.
        formula, note: in matplotlib's mathtext.
        shade: how much white (above 0) or black (below 0) is mixed into the colour of its method's family, from -1 to 1.
    """

    function: RoutingFunction | None
    label: str
    formula: str
    note: str
    marker: str
    hatch: str
    line: str
    shade: float


# name -> row; their order is the order of tables, legends and bars
ROUTING: dict[str, Routing] = {
    "none": Routing(None, "no routing", r"$x_t$", "plain LoRA or Adapter", "s", "", "-", 0.62),
    "mul": Routing(mul, "mul", r"$x_t \circ x^{\prime}_v$", r"$x^{\prime}_v$: repeated over text", "o", "////", "--", 0.0),
    "add": Routing(add, "add", r"$x_t + x^{\prime}_v$", r"$x^{\prime}_v$: repeated over text", "^", "....", "-.", 0.34),
    "attn": Routing(attn, "attn", r"$x_t\,(x_v)^{\top} x_v$", "linear, no softmax", "D", "", "-", -0.28),
    "expand": Routing(
        expand, "expand", r"$x_t\, x^{\prime\prime}_v$", r"$x^{\prime\prime}_v$: $r$ copies, $r \times r$",
        "v", "\\\\\\\\", ":", -0.52,
    ),
}  # fmt: skip


def routing_function(name: str) -> RoutingFunction | None:
    """The routing function called `name`, or None for `none`.

    Raises:
        RoutevlError: there is no routing function of that name.
    """
    if name not in ROUTING:
        raise RoutevlError(f"routing {name!r} is not a routing function: choose one of {', '.join(ROUTING)}")
    return ROUTING[name].function
