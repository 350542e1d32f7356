"""What routed methods share: their options here; config.py, layer.py and tuner.py are what peft sees of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routevl.methods.peft_method import PeftMethod, modules_option
from routevl.options import option
from routevl.routing import ROUTING

if TYPE_CHECKING:
    from torch import Tensor, nn

VISUAL_SCALES = ("none", "tanh", "layer_norm")


@dataclass(frozen=True)
class RoutedOptions:
    """Options of every routed method."""

    r: int = option("rank of the bottleneck", 8, least=1)
    routing: str = option("routing function", "none", choices=ROUTING)
    visual_scale: str = option(
        "parameter-free scaling of the routed features; `attn` and `expand` are quadratic in them, so `tanh` or `layer_norm` "
        "where a vision model's features are not bounded", "none", choices=VISUAL_SCALES,
    )  # fmt: skip
    target_modules: str | None = modules_option("modules to adapt")


class RoutedMethod(PeftMethod):
    """A method with a routing function in its bottleneck."""

    @property
    def uses_image(self) -> bool:
        return self.options.routing != "none"

    def visual_projection(self, text_model: nn.Module, width: int) -> nn.Linear | None:
        return text_model.base_model.project_from(width)

    def part_of(self, name: str) -> str:
        return "visual_projection" if ".visual_projection." in name else super().part_of(name)

    def beside(self, inputs: Mapping[str, Tensor], visual: Tensor | None) -> dict[str, Tensor]:
        return {"visual_features": visual} if self.uses_image else {}
