"""Routing functions: how the other modality is mixed in inside a low-rank bottleneck (paper, section 3).

A bottleneck projects text hidden states x_H (B, L_t, d) and visual features x_R (B, L_v, d) with the SAME down-projection:

    x_t = x_H W_down      (B, L_t, r)
    x_v = x_R W_down      (B, L_v, r)

and a routing function turns the two into the (B, L_t, r) tensor that the up-projection reads. Every routing function adds no
parameter and treats each text position of each example on its own. The four of the paper are linear in x_t; of the ablations
`attn_relu` and `self_attn` are not. To add one: write the function, add its row to ROUTING.

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


def _real(x_v: Tensor, mask: Tensor | None) -> Tensor:
    """The visual tokens (B, L_v, r), with zeros for those that are not real."""
    return x_v if mask is None else x_v * mask.unsqueeze(-1).to(x_v.dtype)


def mul(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t ∘ x'_v: each text position times the image's vector, element by element."""
    return x_t * mean_visual_token(x_v, mask)


def add(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t + x'_v: the image's vector added at each text position."""
    return x_t + mean_visual_token(x_v, mask)


def attn(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t x_vᵀ x_v: linear cross-attention, no softmax. For L_v = 1 this is (x_t · x_v) x_v."""
    x_v = _real(x_v, mask)
    return (x_t @ x_v.transpose(1, 2)) @ x_v  # (B, L_t, L_v) then (B, L_t, r)


def expand(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t x''_v, with x''_v the image's vector repeated r times into an r × r matrix: (Σ_i x_t,i) x_v."""
    return x_t.sum(dim=-1, keepdim=True) * mean_visual_token(x_v, mask)


def self_attn(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t x_tᵀ x'_v, each text position by itself: |x_t|² x'_v. No position sees another, so no later token and no padding."""
    return x_t.square().sum(dim=-1, keepdim=True) * mean_visual_token(x_v, mask)


def attn_relu(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """relu(x_t) relu(x_v)ᵀ x_v: `attn` whose weights of the visual tokens cannot be negative."""
    scores = x_t.relu() @ x_v.relu().transpose(1, 2)  # (B, L_t, L_v)
    return scores @ _real(x_v, mask)


def attn_ones(x_t: Tensor, x_v: Tensor, mask: Tensor | None) -> Tensor:
    """x_t x_vᵀ 1: `attn` with ones (L_v, r) in the place of its values: Σ_j (x_t · x_v,j) in each of the r dimensions."""
    return (x_t @ _real(x_v, mask).transpose(1, 2)).sum(dim=-1, keepdim=True).expand_as(x_t)


@dataclass(frozen=True)
class Routing:
    """A routing function and how documents and figures show it.

    Attributes:
        function: None reads no visual features: plain LoRA or Adapter, the baseline.
        formula, note: in matplotlib's mathtext.
        shade: how much white (above 0) or black (below 0) is mixed into the colour of its method's family, from -1 to 1.
        ablation: it is not one of the method, but is compared with it.
    """

    function: RoutingFunction | None
    label: str
    formula: str
    note: str
    marker: str
    hatch: str
    line: str
    shade: float
    ablation: bool = False


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
    "self_attn": Routing(
        self_attn, "self attn", r"$x_t\,(x_t)^{\top} x^{\prime}_v$", "each text position by itself",
        "P", "++++", "--", 0.48, ablation=True,
    ),
    "attn_relu": Routing(
        attn_relu, "attn relu", r"$\mathrm{relu}(x_t)\,\mathrm{relu}(x_v)^{\top} x_v$", "no weight below zero",
        "X", "xxxx", "-.", -0.14, ablation=True,
    ),
    "attn_ones": Routing(
        attn_ones, "attn ones", r"$x_t\,(x_v)^{\top} \mathbf{1}$", "ones for the values", "*", "oooo", ":", 0.2, ablation=True,
    ),
}  # fmt: skip


def without_ablations() -> dict[str, Routing]:
    """The rows of ROUTING that are no ablations: those that describe the method."""
    return {name: row for name, row in ROUTING.items() if not row.ablation}


def routing_function(name: str) -> RoutingFunction | None:
    """The routing function called `name`, or None for `none`.

    Raises:
        RoutevlError: there is no routing function of that name.
    """
    if name not in ROUTING:
        raise RoutevlError(f"routing {name!r} is not a routing function: choose one of {', '.join(ROUTING)}")
    return ROUTING[name].function
