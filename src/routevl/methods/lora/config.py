"""Configuration of routed LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from routevl.errors import RoutevlError
from routevl.methods.lora import Lora
from routevl.methods.routed.config import MethodType, RoutedConfig

LAYOUT = {"groups", "widths", "adapted"}  # of a module that holds several projections


@dataclass
class RoutedLoraConfig(RoutedConfig):
    """LoRA whose bottleneck routes visual features: h = W0 x_H + (lora_alpha / r) route(x_t, x_v) W_up (paper, equation 4).

    >>> model = get_peft_model(model, RoutedLoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], routing="mul"))
    >>> model(**text, visual_features=features)  # features: (batch, L_v, d)

    Raises:
        RoutevlError: a rank that is not positive, an unknown routing function or scale, a dropout outside [0, 1).
    """

    PEFT_TYPE: ClassVar[MethodType] = MethodType("ROUTED_LORA")
    options_class: ClassVar[type] = Lora.Options

    lora_alpha: float = field(default=8, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the text hidden states before the down-projection."})
    bias: str = field(default="none", metadata={"help": "Which biases of the text model are trained: none or all."})
    places: str = field(
        default="attention",
        metadata={"help": "Adapted where target_modules is None: attention (query, value), ffn (its first matrices) or both."},
    )
    fused_projections: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "For modules that hold several projections, by the end of their name: `groups` (1, or the heads, where each "
            "head has its part of all projections), the `widths` of the projections in a group, and which of them are `adapted`, "
            "each with its own bottleneck. None: found in the model, where query and value are adapted; {}: nothing is fused."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, layout in (self.fused_projections or {}).items():
            if not (isinstance(layout, dict) and layout.keys() == LAYOUT and len(layout["widths"]) == len(layout["adapted"])):
                raise RoutevlError(f"fused_projections: {name}: expected {', '.join(sorted(LAYOUT))}, not {layout!r}")
