"""PEFT methods with a routing function in their bottleneck, as methods of Hugging Face peft.

To add a method: a folder beside these with config.py, layer.py, model.py and an __init__.py that registers it, and one
row in METHODS.
"""

from routevl.methods.adapter import RoutedAdapterConfig, RoutedAdapterModel
from routevl.methods.lora import RoutedLoraConfig, RoutedLoraModel

__all__ = ["METHODS", "RoutedAdapterConfig", "RoutedAdapterModel", "RoutedLoraConfig", "RoutedLoraModel"]

# value of the run sheet's column `method` -> peft config
METHODS = {"lora": RoutedLoraConfig, "adapter": RoutedAdapterConfig}
