"""The tuner that puts routed adapters into a model."""

from __future__ import annotations

from torch import nn

from routevl.backbones.skeleton import base_of, widths_of
from routevl.backbones.structure import Structure
from routevl.errors import RoutevlError
from routevl.methods.adapter.config import RoutedAdapterConfig
from routevl.methods.adapter.layer import RoutedAdapterLayer
from routevl.methods.base import is_layer_norm
from routevl.methods.routed.tuner import RoutedTuner, layer_of, register


class RoutedAdapterModel(RoutedTuner):
    """Routed adapters after `nn.Linear` and `Conv1D` modules and layer norms of any model (see RoutedAdapterConfig)."""

    prefix = "adapter_"
    tuner_layer_cls = RoutedAdapterLayer

    def default_targets(self, structure: Structure, config: RoutedAdapterConfig, model: nn.Module) -> list[str]:
        if config.position == "after_norm":
            return _norms_of_layers(structure, config, model)
        attention = structure.attention_outputs if config.places != "ffn" else ()
        feed_forward = structure.ends_of_feed_forward() if config.places != "attention" else ()
        return [*attention, *feed_forward]

    def can_adapt(self, module: nn.Module) -> bool:
        return super().can_adapt(module) or is_layer_norm(module)


def _norms_of_layers(structure: Structure, config: RoutedAdapterConfig, model: nn.Module) -> list[str]:
    """The layer norms in the layers, as wide as the hidden states. Raises RoutevlError: there is none, or they are trained."""
    width = widths_of(model.get_submodule(structure.attention_outputs[0]))[1]
    named = {name.removesuffix(".base_layer"): base_of(module) for name, module in model.named_modules()}
    norms = {name: module for name, module in named.items() if is_layer_norm(module) and layer_of(name) is not None}
    names = [name for name, module in norms.items() if next(module.parameters()).shape[-1] == width]  # not of single heads
    if not names:
        raise RoutevlError(f"position=after_norm: no layer of {type(model).__name__} has a layer norm: set position=before_norm")
    if any(name.endswith(tuple(config.modules_to_save or ())) for name in names):
        raise RoutevlError("position=after_norm adapts the layer norms, which cannot be trained as well: set freeze_layer_norm")
    return names


register(RoutedAdapterConfig.PEFT_TYPE, RoutedAdapterConfig, RoutedAdapterModel)
