"""What routed methods share: their options here; the other files are what peft sees of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.methods.base import is_causal
from routevl.methods.peft_method import PeftMethod, modules_option
from routevl.methods.per_task import PerTask, tasks_option
from routevl.options import option
from routevl.routing import ROUTING, mean_visual_token

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.methods.routed.config import RoutedConfig

VISUAL_SCALES = ("none", "tanh", "layer_norm")
QUARTERS = 4  # of r: the inner widths of bottleneck=split, the heads of bottleneck=cross_attention


def places_option(default: str, attention: str, ffn: str) -> Any:
    """The option of a routed method that says which parts of a layer it adapts by default, and what that means."""
    meaning = f"the modules to adapt where `target_modules` names none: {attention} (`attention`), {ffn} (`ffn`), or both"
    return option(meaning, default, choices=("attention", "ffn", "both"))


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
    bottleneck: str = option(
        "how text and image meet: in one bottleneck (`shared`, the paper's), with down-projections of their own, d to r/4 to r "
        "(`split`), after the up-projection (`after_up`), or in softmax attention with trained projections instead of a routing "
        "function (`cross_attention`)", "shared", choices=("shared", "split", "after_up", "cross_attention"),
    )  # fmt: skip
    routed_features: str = option(
        "what is routed: the image's features, the mean of the text's own embeddings, or what stands in for the image as in the "
        "setting `control`, while the visual prefix keeps it", "image", choices=("image", "text", "noise", "ones", "shuffled"),
    )  # fmt: skip
    routed_tokens: str | None = option(
        "which of the image's tokens are routed, `all` or their `mean`; `none`: the mean in CLIP-BART, all elsewhere", None,
        choices=("all", "mean"),
    )  # fmt: skip
    routed_positions: str = option(
        "which positions are routed: `all`, or those of the `text`, so that a visual prefix keeps x_t; those of a decoder behind "
        "an encoder are text, and of two streams one is", "all", choices=("all", "text"),
    )  # fmt: skip
    up_init: str | None = option(
        "how the up-projection starts, at zero or drawn as nn.Linear's; `none`: at zero, but at random in an Adapter without "
        "residual, whose module's output would be erased", None, choices=("zero", "random"),
    )  # fmt: skip
    layers_to_transform: str | None = option(
        "layers to adapt, by their numbers from 0 with commas between them; `none`: all", None
    )
    tasks: int = tasks_option("bottlenecks")

    def conflicts(self) -> Iterator[str]:
        """What is wrong with options that are right each by itself."""
        layers = self.layers_to_transform
        if layers is not None and not all(number.isdecimal() for number in layers.split(",")):
            yield f"layers_to_transform is {layers!r}, expected numbers of layers with commas between them"
        if self.bottleneck in ("split", "after_up") and self.routing == "none":
            yield f"bottleneck={self.bottleneck} needs a routing function: set routing"
        if self.bottleneck == "cross_attention" and self.routing != "none":
            yield "bottleneck=cross_attention stands in the place of a routing function: set routing=none"
        if self.bottleneck in ("split", "cross_attention") and self.r % QUARTERS:
            yield f"r is {self.r}, and bottleneck={self.bottleneck} needs a multiple of {QUARTERS}"
        if self.bottleneck != "shared" and self.tasks > 1:
            yield f"tasks is {self.tasks}, but bottleneck={self.bottleneck} is for one: set bottleneck=shared"
        if self.routed_features != "image" and not routes(self):
            yield f"routed_features={self.routed_features} needs a routing function: set routing"
        if self.routed_positions != "all" and not routes(self):
            yield f"routed_positions={self.routed_positions} needs a routing function: set routing"
        if self.routed_tokens is not None and (not routes(self) or self.routed_features == "text"):
            yield f"routed_tokens={self.routed_tokens} needs a routing function that reads the image: set routing"
        for f in fields(self):
            if f.name in ("places", "position") and self.target_modules is not None and getattr(self, f.name) != f.default:
                yield f"target_modules names the modules to adapt: leave {f.name} out, or target_modules"


def routes(options: RoutedOptions | RoutedConfig) -> bool:
    """Whether a bottleneck reads features beside the text."""
    return options.routing != "none" or options.bottleneck == "cross_attention"


class RoutedMethod(PerTask, PeftMethod):
    """A method with a routing function in its bottleneck."""

    @property
    def uses_image(self) -> bool:
        return routes(self.options) and self.options.routed_features != "text"

    @property
    def stand_in(self) -> str | None:
        features = self.options.routed_features
        return None if features in ("image", "text") else features

    @property
    def routed_tokens(self) -> str | None:
        return self.options.routed_tokens

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        of_text = self.options.routed_features == "text"
        if of_text and is_causal(text_model):
            raise RoutevlError(
                f"routed_features=text would show {type(text_model).__name__}, which is to predict each token from those before, "
                "the mean of all: take a task with an encoder, or other routed_features"
            )
        model = super().build(text_model, prepared, train_also)
        if of_text:  # embeddings may be narrower than hidden states
            model.base_model.project_from(model.get_input_embeddings().weight.shape[1])
        return model

    def visual_projection(self, text_model: nn.Module, width: int) -> nn.Linear | None:
        return text_model.base_model.project_from(width) if self.uses_image else None

    def part_of(self, name: str) -> str:
        return "visual_projection" if ".visual_projection." in name else super().part_of(name)

    def beside(self, inputs: Mapping[str, Tensor], visual: Tensor | None) -> dict[str, Tensor]:
        beside = super().beside(inputs, visual)
        if not routes(self.options):
            return beside
        if self.options.routed_features == "text":
            before = 0 if visual is None else visual.shape[1]  # positions of the prefix: without it nothing reads the image
            text, mask = (inputs[name][:, before:] for name in ("inputs_embeds", "attention_mask"))
            visual = mean_visual_token(text, mask.bool())  # (B, 1, d)
        elif "visual_mask" in inputs:
            beside["visual_mask"] = inputs["visual_mask"]
        if self.options.routed_positions != "all":
            if "image_positions" not in inputs:
                raise RoutevlError(
                    f"routed_positions={self.options.routed_positions} is about the image's positions, and there is no visual "
                    "prefix: set prefix, or routed_positions=all"
                )
            beside["image_positions"] = inputs["image_positions"]
        return beside | {"visual_features": visual}
