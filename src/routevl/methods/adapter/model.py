"""The tuner that puts routed adapters into a model."""

from __future__ import annotations

from routevl.backbones.structure import Structure
from routevl.methods.adapter.config import RoutedAdapterConfig
from routevl.methods.adapter.layer import RoutedAdapterLayer
from routevl.methods.routed.tuner import RoutedTuner, register


class RoutedAdapterModel(RoutedTuner):
    """Routed adapters after `nn.Linear` and transformers' `Conv1D` modules of any model (see RoutedAdapterConfig)."""

    prefix = "adapter_"
    tuner_layer_cls = RoutedAdapterLayer

    def default_targets(self, structure: Structure) -> list[str]:
        return [*structure.attention_outputs, *structure.ends_of_feed_forward()]


register(RoutedAdapterConfig.PEFT_TYPE, RoutedAdapterConfig, RoutedAdapterModel)
