"""The tuner that puts routed LoRA layers into a model."""

from __future__ import annotations

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from routevl.methods.lora.config import RoutedLoraConfig
from routevl.methods.lora.layer import RoutedLoraLayer
from routevl.methods.routed.tuner import RoutedTuner, register

# model type -> modules whose output is several projections side by side, and which of them LoRA adapts
FUSED_PROJECTIONS = {"gpt2": {"c_attn": [True, False, True]}}  # query, key, value


class RoutedLoraModel(RoutedTuner):
    """Routed LoRA on `nn.Linear` and transformers' `Conv1D` modules of any model (see RoutedLoraConfig)."""

    prefix = "lora_"
    tuner_layer_cls = RoutedLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: RoutedLoraConfig, model_config: dict) -> RoutedLoraConfig:
        if peft_config.fused_projections is None:
            peft_config.fused_projections = FUSED_PROJECTIONS.get(model_config.get("model_type"), {})
        return super()._prepare_adapter_config(peft_config, model_config)


register(RoutedLoraConfig.PEFT_TYPE, RoutedLoraConfig, RoutedLoraModel)
