"""LoRA with a routing function between its two projections."""

from routevl.methods.lora.config import RoutedLoraConfig
from routevl.methods.lora.model import RoutedLoraModel
from routevl.methods.registration import register

__all__ = ["RoutedLoraConfig", "RoutedLoraModel"]

register(RoutedLoraConfig.PEFT_TYPE, RoutedLoraConfig, RoutedLoraModel)
