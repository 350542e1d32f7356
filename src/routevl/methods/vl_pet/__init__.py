"""VL-PET: bottlenecks after the encoder's sub-layers, under gates of one granularity or another, and on the decoder's values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from routevl.errors import RoutevlError
from routevl.methods.base import is_causal
from routevl.methods.bottleneck import BottleneckMethod, BottleneckOptions
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.backbones.structure import Structure

CAUSAL = "its gate is a mean over all positions, so that a token would see those that it is to predict"


class VLPet(BottleneckMethod):
    """G ∘ h', h' = h + U gelu(D h), in place of the output h of every sub-layer of the encoder, and adapters beside the values of
    the decoder's cross-attention.

    The gate G reads the sub-layer's input x too. It is σ(U_g gelu(D_g x)) (`large`), σ(w · (x + h') + c) (`middle_x`) or 1 + g
    (`middle_y`). Of the layer norms those of the encoder alone are trained. A model without a decoder of its own is all encoder.
    """

    @dataclass(frozen=True)
    class Options(BottleneckOptions):
        """Options of VL-PET."""

        gate: str = option("what the gate is", "large", choices=("large", "middle_x", "middle_y"))

    def gates(self, text_model: nn.Module) -> Callable[[int], nn.Module]:
        """What makes a gate for hidden states of a width."""
        from routevl.methods.vl_pet import layer

        device = text_model.device
        return {
            "large": lambda width: layer.LargeGate(width, self.rank(width), device),
            "middle_x": lambda width: layer.MiddleXGate(width, device),
            "middle_y": lambda width: layer.MiddleYGate(width, device),
        }[self.options.gate]

    def norms(self, text_model: nn.Module, train_also: list[str]) -> list[str]:
        encoder = encoder_of(text_model)
        return [name for name in train_also if name.startswith(encoder)]

    def adapt(self, text_model: nn.Module, parts: Structure) -> None:
        from routevl.backbones.skeleton import widths_of
        from routevl.methods.bottleneck.layer import add_in_parallel, change_sub_layer, plain_bottleneck
        from routevl.methods.vl_pet.layer import GatedBottleneck

        new_gate, device, encoder = self.gates(text_model), text_model.device, encoder_of(text_model)
        for name in (*parts.attention_outputs, *parts.feed_forward_outputs):
            if not name.startswith(encoder):
                continue
            if name not in parts.sub_layer_inputs:
                raise RoutevlError(f"{name}: what its output is added to, which VL-PET's gate reads, is not found in this model")
            width = widths_of(text_model.get_submodule(name))[1]
            gated = GatedBottleneck(plain_bottleneck(width, self.rank(width), width, device), new_gate(width))
            change_sub_layer(text_model, parts.sub_layer_inputs[name], name, gated)
        for name in parts.cross_attention_values:
            if name in parts.fused:
                raise RoutevlError(f"{name} computes more than a cross-attention's values, which are adapted alone")
            module = text_model.get_submodule(name)
            width, width_out = widths_of(module)
            add_in_parallel(module, plain_bottleneck(width, self.rank(width), width_out, device))


class VLPetSmall(VLPet):
    """As VL-PET's others, with one gate for an example: the mean of σ(w · [x; h'] + c) over its positions."""

    refuses: ClassVar[Mapping[str, str]] = {"gpt2": CAUSAL, "co_attention": "its mean is over the positions of one stream"}

    @dataclass(frozen=True)
    class Options(BottleneckOptions):
        """Options of VL-PET small."""

        masked_mean: bool = option(
            "whether padding is left out of the gate's mean; in the original it counts, so that an example depends on those that "
            "it shares a batch with", True,
        )  # fmt: skip

    def gates(self, text_model: nn.Module) -> Callable[[int], nn.Module]:
        from routevl.conditioning import PER_POSITION, Conditioning
        from routevl.methods.vl_pet.layer import SmallGate

        if is_causal(text_model):
            raise RoutevlError(f"VL-PET small refuses {type(text_model).__name__}: {CAUSAL}")
        conditioning = Conditioning(text_model, {"token_mask": PER_POSITION}) if self.options.masked_mean else None
        return lambda width: SmallGate(width, text_model.device, conditioning)

    def beside(self, inputs: Mapping[str, Tensor], visual: Tensor | None) -> dict[str, Tensor]:
        return {"token_mask": inputs["attention_mask"]} if self.options.masked_mean else {}


def encoder_of(text_model: nn.Module) -> str:
    """What the names of the encoder's modules begin with in an encoder-decoder; of all modules in another model."""
    if not text_model.config.is_encoder_decoder:
        return ""
    encoder = text_model.get_encoder()
    return next(f"{name}." for name, module in text_model.named_modules() if module is encoder)
