"""The tuner that routed methods share, and how they become known to peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from routevl.conditioning import PER_EXAMPLE, Conditioning, refuse_a_second
from routevl.errors import RoutevlError
from routevl.methods.routed.config import RoutedConfig
from routevl.methods.routed.layer import RoutedLayer

# name -> parameter-free scaling of the visual features x_R, (B, L_v, d) -> the same
VISUAL_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda features: features,
    "tanh": torch.tanh,
    "layer_norm": lambda features: nn.functional.layer_norm(features, features.shape[-1:]),
}
STREAMS = {"visual_features": PER_EXAMPLE, "visual_mask": PER_EXAMPLE}


def register(peft_type: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Enter a method under its own `peft_type`, so that a saved adapter never loads as some other method.

    `peft.register_peft_method` accepts only the members of peft's enum; these mappings are what it fills.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_class.prefix


class RoutedTuner(BaseTuner):
    """peft's tuner for routed methods. Subclasses name their layer and how to wrap a module in it.

    `model(...)` and `model.generate(...)` take `visual_features` (B, L_v, d) and `visual_mask` (B, L_v), bool, beside their own
    arguments; the features are scaled and projected once per call.
    """

    uses_shared_state = True

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        refuse_a_second(model)  # before peft writes the new config into the first tuner's
        super().__init__(model, *args, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: RoutedConfig, adapter_name: str) -> None:
        self.conditioning = Conditioning(model, STREAMS, self._prepare)
        self.visual_projection = nn.ModuleDict()  # adapter name -> Linear(visual_width, d), only where the widths differ
        self.routed_width: dict[str, int] = {}  # name of an adapter that routes -> d, the width that all its modules work on

    def _prepare_adapter_config(self, peft_config: RoutedConfig, model_config: dict) -> RoutedConfig:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if isinstance(peft_config.target_modules, set):  # written to adapter_config.json, which must not vary from run to run
            peft_config.target_modules = sorted(peft_config.target_modules)
        return peft_config

    def _new_layer(self, target: nn.Module, name: str) -> RoutedLayer:
        """Wrap `target` in this method's layer. Raises RoutevlError for a module type that the method cannot adapt."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: RoutedConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, RoutedLayer) else self._new_layer(target, current_key)
        layer.update_layer(adapter_name, peft_config, current_key)
        if peft_config.routing != "none":
            self._route_at_width(peft_config, adapter_name, layer.width, current_key)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _route_at_width(self, config: RoutedConfig, adapter: str, width: int, name: str) -> None:
        """Check that all modules share one width, to which the visual features are projected where need be."""
        if self.routed_width.setdefault(adapter, width) != width:
            raise RoutevlError(
                f"target module {name} works on width {width} but others on {self.routed_width[adapter]}: "
                "routing needs one width, that of the visual features"
            )
        if config.visual_width not in (None, width) and adapter not in self.visual_projection:
            projection = nn.Linear(config.visual_width, width, bias=False)
            self.visual_projection[adapter] = projection.requires_grad_(not config.inference_mode)

    def _prepare(self, given: dict[str, Tensor]) -> dict[Any, Tensor | None]:
        """x_R (B, L_v, d) of each adapter that routes, and the mask.

        Raises:
            RoutevlError: features or mask of the wrong shape.
        """
        features, mask = given.get("visual_features"), given.get("visual_mask")
        if features is None:
            raise RoutevlError("the call has a visual_mask but no visual_features")
        if features.dim() != 3:
            raise RoutevlError(f"visual_features must have the shape (batch, L_v, d), not {tuple(features.shape)}")
        if mask is not None and mask.shape != features.shape[:2]:
            raise RoutevlError(f"visual_mask must have the shape {tuple(features.shape[:2])}, not {tuple(mask.shape)}")
        routed = [name for name in self.active_adapters if name in self.routed_width]
        return {("visual_features", name): self._prepare_for(name, features) for name in routed} | {"visual_mask": mask}

    def _prepare_for(self, adapter: str, features: Tensor) -> Tensor:
        """x_R for one adapter: width checked, scaled, projected: (B, L_v, visual width) -> (B, L_v, d)."""
        config = self.peft_config[adapter]
        expected = config.visual_width or self.routed_width[adapter]
        if features.shape[-1] != expected:
            raise RoutevlError(
                f"visual_features has width {features.shape[-1]} but adapter {adapter!r} expects {expected}: "
                "set visual_width in its config to the features' width"
            )
        features = VISUAL_SCALES[config.visual_scale](features)
        if adapter in self.visual_projection:
            projection = self.visual_projection[adapter].to(features.device)
            features = projection(features.to(projection.weight.dtype))
        return features

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """peft's own, with the adapters' visual projections made trainable or frozen along with them."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, projection in self.visual_projection.items():
            projection.requires_grad_(name in self.active_adapters and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """peft's own, with what routing keeps for the adapter removed too."""
        super().delete_adapter(adapter_name)
        for kept in (self.visual_projection, self.routed_width):
            if adapter_name in kept:
                del kept[adapter_name]

    def _check_merge_allowed(self) -> None:
        raise RoutevlError("a routed adapter depends on the image and cannot be merged into the weights: use unload()")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self.conditioning.detach()
        return model
