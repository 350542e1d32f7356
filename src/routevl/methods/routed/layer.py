"""The layer that routed methods share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from routevl.conditioning import Conditioning
from routevl.errors import RoutevlError
from routevl.methods.per_task.layer import OfTasks
from routevl.methods.routed import routes
from routevl.methods.routed.bottleneck import Split, new_down, new_mixer
from routevl.methods.routed.config import RoutedConfig

CANNOT_MERGE = (
    "ROUTED_LORA and ROUTED_ADAPTER depend on the image and cannot be merged into the weights (merge_and_unload, merge_adapter, "
    "unmerge_adapter): use unload() for the base model"
)


class RoutedLayer(nn.Module, BaseTunerLayer):
    """A frozen module with routed bottlenecks, one per adapter. Subclasses add the forward pass.

    Their three `adapter_layer_names` are those of the down-projections, the up-projections and the mixers, by adapter.

    Attributes:
        parts: adapter -> how many bottlenecks P it has side by side, each with a stream, an update and a mixer of its own.
        after_up: adapter -> whether the streams meet after the up-projection.
        text_alone: adapter -> whether those of the input's positions that are an image's keep x_t.
        image_alone: adapter -> whether all of them are, and keep it.
    """

    def __init__(self, base_layer: nn.Module, conditioning: Conditioning) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.conditioning = conditioning
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self.parts: dict[str, int] = {}
        self.after_up: dict[str, bool] = {}
        self.text_alone: dict[str, bool] = {}
        self.image_alone: dict[str, bool] = {}
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True  # peft's `disable_input_dtype_casting` sets it

    @property
    def down(self) -> nn.ModuleDict:
        """The down-projections by adapter."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def mixers(self) -> nn.ModuleDict:
        """Of each adapter that reads features its P mixers."""
        return getattr(self, self.adapter_layer_names[2])

    def add_down(self, adapter: str, config: RoutedConfig, parts: int, bias: bool) -> None:
        """Add an adapter's down-projections and mixers."""
        self.parts[adapter], self.after_up[adapter] = parts, config.bottleneck == "after_up"
        self.down[adapter] = self.of_tasks(config, lambda: new_down(config, self.width, parts, bias))
        if routes(config):
            self.mixers[adapter] = nn.ModuleList(new_mixer(config) for _ in range(parts))

    def of_tasks(self, config: RoutedConfig, new: Callable[[], nn.Module]) -> nn.Module:
        """A new module; with several tasks a new one for each."""
        return new() if config.tasks == 1 else OfTasks([new() for _ in range(config.tasks)], self.conditioning)

    def routed(
        self, adapter: str, hidden_states: Tensor, up: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None
    ) -> Sequence[Tensor]:
        """route(x_H W_down, x_R W_down) of each bottleneck: (B, ..., d) -> P times (B, ..., r).

        up: what both streams go through before they meet, P times (B, L, r) -> P times (B, L, d_out).
        """
        down, parts = self.down[adapter], self.parts[adapter]
        if adapter not in self.mixers:
            return _pieces(down(hidden_states), parts)
        of_text, of_image = (down.text, down.image) if isinstance(down, Split) else (down, down)
        leading, hidden_states = hidden_states.shape[:-1], self.conditioning.by_text(hidden_states)
        x_t = of_text(hidden_states)
        x_v = self.conditioning.projected(("visual_features", adapter), hidden_states, "visual_features", of_image)
        mask = self.conditioning.per_example("visual_mask", len(hidden_states), "visual_mask")
        mask = None if mask is None else mask.to(x_v.device)  # layers may be on several devices
        x_t = x_t.reshape(x_t.shape[0], -1, x_t.shape[-1])  # (B, L_t, P r)
        texts, images = _pieces(x_t, parts), _pieces(x_v, parts)
        if up is not None:
            texts, images = up(texts), up(images)
        streams = zip(self.mixers[adapter], texts, images, strict=True)
        mixed = texts if self.image_alone[adapter] else [mix(text, image, mask) for mix, text, image in streams]
        if self.text_alone[adapter]:
            of_image = self.conditioning.per_position("image_positions", x_t.shape[:2], "image_positions")
            of_image = of_image.to(x_t.device).unsqueeze(-1)  # (B, L_t, 1)
            mixed = [torch.where(of_image, text, routed) for text, routed in zip(texts, mixed, strict=True)]
        return [routed.reshape(*leading, -1) for routed in mixed]

    def adapters_in_use(self) -> list[str]:
        """The names of the active adapters that this module has; none while adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.down]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """A routed adapter has no fixed weight to merge. Raises RoutevlError always, as `unmerge` does."""
        raise RoutevlError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """See `merge`."""
        raise RoutevlError(CANNOT_MERGE)


def _pieces(streams: Tensor, parts: int) -> Sequence[Tensor]:
    """(B, ..., P r) -> P times (B, ..., r). A lone stream stays as it is, and so do the last bits of its gradient."""
    return (streams,) if parts == 1 else streams.chunk(parts, -1)
