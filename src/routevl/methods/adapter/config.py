"""Configuration of routed adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from transformers.activations import ACT2FN

from routevl.errors import RoutevlError
from routevl.methods.adapter import Adapter
from routevl.methods.routed.config import MethodType, RoutedConfig


@dataclass
class RoutedAdapterConfig(RoutedConfig):
    """Bottleneck adapters that route visual features: h = [x_H +] act(route(x_t, x_v)) W_up (paper, equation 5).

    x_H is the output of the adapted module, a linear one or a layer norm: with the default targets, an adapter after the
    attention output and one after the feed-forward output of every layer, before the residual addition. Both projections have
    a bias.

    Raises:
        RoutevlError: a rank that is not positive, an unknown routing function, scale or activation.
    """

    PEFT_TYPE: ClassVar[MethodType] = MethodType("ROUTED_ADAPTER")
    options_class: ClassVar[type] = Adapter.Options

    activation: str = field(
        default="gelu", metadata={"help": "The non-linearity in the bottleneck, by its name in transformers."}
    )
    residual: bool = field(default=True, metadata={"help": "Add x_H to the adapter's output, so that it starts as the identity."})
    places: str = field(
        default="both",
        metadata={"help": "Outputs adapted where target_modules is None: attention, ffn or both."},
    )
    position: str = field(
        default="before_norm",
        metadata={"help": "before_norm, or after_norm: on the layer norms of every layer, where target_modules is None."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACT2FN:
            raise RoutevlError(
                f"activation {self.activation!r} is not one of transformers' activations ({', '.join(sorted(ACT2FN))})"
            )
