"""The tuner that puts routed adapters into a model."""

from __future__ import annotations

from routevl.methods.adapter.config import RoutedAdapterConfig
from routevl.methods.adapter.layer import RoutedAdapterLayer
from routevl.methods.routed.tuner import RoutedTuner, register

# model type -> the attention output and the feed-forward output of every layer
TARGET_MODULES = {
    "bert": ["attention.output.dense", "output.dense"],
    "roberta": ["attention.output.dense", "output.dense"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "bart": ["self_attn.out_proj", "fc2"],
}


class RoutedAdapterModel(RoutedTuner):
    """Routed adapters after `nn.Linear` and transformers' `Conv1D` modules of any model (see RoutedAdapterConfig)."""

    prefix = "adapter_"
    tuner_layer_cls = RoutedAdapterLayer
    target_module_mapping = TARGET_MODULES


register(RoutedAdapterConfig.PEFT_TYPE, RoutedAdapterConfig, RoutedAdapterModel)
