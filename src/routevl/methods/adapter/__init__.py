"""Bottleneck adapters with a routing function between their two projections."""

from routevl.methods.adapter.config import RoutedAdapterConfig
from routevl.methods.adapter.model import RoutedAdapterModel
from routevl.methods.registration import register

__all__ = ["RoutedAdapterConfig", "RoutedAdapterModel"]

register(RoutedAdapterConfig.PEFT_TYPE, RoutedAdapterConfig, RoutedAdapterModel)
