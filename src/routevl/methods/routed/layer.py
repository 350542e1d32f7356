"""The layer that routed methods share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from routevl.conditioning import Conditioning
from routevl.errors import RoutevlError

if TYPE_CHECKING:
    from routevl.routing import RoutingFunction

CANNOT_MERGE = (
    "ROUTED_LORA and ROUTED_ADAPTER depend on the image and cannot be merged into the weights (merge_and_unload, merge_adapter, "
    "unmerge_adapter): use unload() for the base model"
)


class RoutedLayer(nn.Module, BaseTunerLayer):
    """A frozen module with routed bottlenecks, one per adapter. Subclasses add the projections and the forward pass."""

    def __init__(self, base_layer: nn.Module, conditioning: Conditioning) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.conditioning = conditioning
        self.route: dict[str, RoutingFunction | None] = {}
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True  # peft's `disable_input_dtype_casting` sets it

    def routed(self, adapter: str, down: nn.Module, hidden_states: Tensor, parts: int = 1) -> Tensor:
        """route(x_H W_down, x_R W_down): (B, ..., d) -> (B, ..., parts * r), each of the `parts` bottlenecks on its own."""
        route = self.route[adapter]
        if route is None:
            return down(hidden_states)
        leading, hidden_states = hidden_states.shape[:-1], self.conditioning.by_text(hidden_states)
        x_t = down(hidden_states)
        x_v = self.conditioning.projected(("visual_features", adapter), hidden_states, "visual_features", down)
        mask = self.conditioning.per_example("visual_mask", len(hidden_states), "visual_mask")
        mask = None if mask is None else mask.to(x_v.device)  # layers may be on several devices
        x_t = x_t.reshape(x_t.shape[0], -1, x_t.shape[-1])  # (B, L_t, parts * r)
        if parts == 1:
            return route(x_t, x_v, mask).view(*leading, -1)
        pieces = zip(x_t.chunk(parts, -1), x_v.chunk(parts, -1), strict=True)
        return torch.cat([route(text, image, mask) for text, image in pieces], dim=-1).view(*leading, -1)

    def adapters_in_use(self) -> list[str]:
        """The names of the active adapters that this module has; none while adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.route]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """A routed adapter has no fixed weight to merge. Raises RoutevlError always, as `unmerge` does."""
        raise RoutevlError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """See `merge`."""
        raise RoutevlError(CANNOT_MERGE)
