"""The tuner that puts routed LoRA layers into a model."""

from __future__ import annotations

from torch import nn

from routevl.backbones.structure import QUERY, VALUE, Structure, targets
from routevl.methods.lora.config import RoutedLoraConfig
from routevl.methods.lora.layer import RoutedLoraLayer
from routevl.methods.routed.tuner import RoutedTuner, register


class RoutedLoraModel(RoutedTuner):
    """Routed LoRA on `nn.Linear` and transformers' `Conv1D` modules of any model (see RoutedLoraConfig)."""

    prefix = "lora_"
    tuner_layer_cls = RoutedLoraLayer
    left_to_the_model = ("target_modules", "fused_projections")

    def default_targets(self, structure: Structure, config: RoutedLoraConfig, model: nn.Module) -> list[str]:
        attention = structure.computing(QUERY, VALUE) if config.places != "ffn" else ()
        feed_forward = structure.beginnings_of_feed_forward() if config.places != "attention" else ()
        return [*attention, *feed_forward]

    def complete(self, config: RoutedLoraConfig, model: nn.Module) -> Structure:
        structure = super().complete(config, model)
        if config.fused_projections is None:
            config.fused_projections = {}
            for fused in dict.fromkeys(structure.fused.values()):
                adapted = [role in (QUERY, VALUE) for role in fused.roles]
                layout = {"groups": fused.groups, "widths": list(fused.widths), "adapted": adapted}
                names = [name for name, own in structure.fused.items() if own == fused]
                config.fused_projections |= {end: layout for end in targets(model, names) if any(adapted)}
        return structure


register(RoutedLoraConfig.PEFT_TYPE, RoutedLoraConfig, RoutedLoraModel)
