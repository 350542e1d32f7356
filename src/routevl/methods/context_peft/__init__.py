"""Context-PEFT: what is trained is there twice, once for the positions of the image and once for those of the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from routevl.errors import RoutevlError
from routevl.methods.base import NoOptions
from routevl.methods.bottleneck import BottleneckMethod
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.backbones.structure import Structure
    from routevl.conditioning import Conditioning
    from routevl.methods.context_peft.layer import Place


class ContextPeft(BottleneckMethod):
    """A method that trains something for each context of the positions that a module works on; subclasses say what, and where.

    What an encoder reads has the contexts of its positions, so that the keys and values of cross-attention have them too; all
    that a decoder beside it writes is text. A position of the image has nothing where no position of the text can see what
    would become of it: in the last layer of a model without a decoder beside it, but for keys and values.
    """

    refuses: ClassVar[Mapping[str, str]] = {"co_attention": "its contexts are those of the positions of one stream"}

    def adapt(self, text_model: nn.Module, parts: Structure) -> None:
        from routevl.methods.context_peft.layer import streams_of_contexts

        places = [*self.places(text_model, parts)]  # refused before anything is put in
        conditioning = streams_of_contexts(text_model)
        for place in places:
            self.put(text_model.get_submodule(place.name), place, conditioning if place.mixed else None)

    def places(self, text_model: nn.Module, parts: Structure) -> Iterator[Place]:
        """The modules that get something, and for what."""
        raise NotImplementedError

    def put(self, module: nn.Module, place: Place, conditioning: Conditioning | None) -> None:
        """Give a module something for each context; without a conditioning all its positions are text."""
        raise NotImplementedError

    def beside(self, inputs: Mapping[str, Tensor], visual: Tensor | None) -> dict[str, Tensor]:
        from routevl.methods.context_peft.layer import context_of_positions

        return {"token_context": context_of_positions(inputs["attention_mask"], inputs.get("image_positions"))}


class ContextLora(ContextPeft):
    """W0 x + b + Σ_c m_c(t) (s_c B_c A_c x + β_c) at position t, m_c being 1 where t has context c, image or text, and else 0; on
    queries, keys, values, the outputs of attention, and both matrices of feed-forward parts."""

    @dataclass(frozen=True)
    class Options:
        """Options of Context-PEFT's LoRA."""

        r: int = option("rank of the update of each context", 8, least=1)
        lora_alpha: float = option("updates are scaled by lora_alpha / r", 8.0, above=0)
        use_rslora: bool = option("scale by lora_alpha / √r instead", False)
        image_scale: float = option("what the image's updates are scaled by besides", 1.0, above=0)
        use_bias: bool = option("whether each context has a bias β_c too, in modules that have one", True)

    def places(self, text_model: nn.Module, parts: Structure) -> Iterator[Place]:
        from routevl.methods.context_peft.layer import every_place

        return every_place(text_model, parts)

    def put(self, module: nn.Module, place: Place, conditioning: Conditioning | None) -> None:
        from routevl.methods.bottleneck.layer import add_in_parallel
        from routevl.methods.context_peft.layer import InContext, Lora

        rank, bias = self.options.r, self.options.use_bias and module.bias is not None
        layouts = place.layouts.items()
        updates = {context: Lora(module, layout, rank, self.scaling(context), bias) for context, layout in layouts}
        add_in_parallel(module, InContext(updates, conditioning))

    def scaling(self, context: str) -> float:
        """s_c, what the updates of a context are scaled by."""
        from routevl.methods.context_peft.layer import IMAGE

        options = self.options
        scaling = options.lora_alpha / (options.r**0.5 if options.use_rslora else options.r)
        return scaling * options.image_scale if context == IMAGE else scaling


class ContextBitFit(ContextPeft):
    """W0 x + b + Σ_c m_c(t) b_c at position t, in the modules of Context-PEFT's LoRA that have a bias."""

    Options = NoOptions

    def places(self, text_model: nn.Module, parts: Structure) -> Iterator[Place]:
        from routevl.methods.context_peft.layer import every_place

        there = [place for place in every_place(text_model, parts) if text_model.get_submodule(place.name).bias is not None]
        if not there:
            raise RoutevlError(f"{type(text_model).__name__} has no biases in its attention and feed-forward parts")
        return iter(there)

    def put(self, module: nn.Module, place: Place, conditioning: Conditioning | None) -> None:
        from routevl.backbones.skeleton import widths_of
        from routevl.methods.bottleneck.layer import add_in_parallel
        from routevl.methods.context_peft.layer import InContext, Vector

        width, device = widths_of(module)[1], module.weight.device
        vectors = {context: Vector(width, layout, device) for context, layout in place.layouts.items()}
        add_in_parallel(module, InContext(vectors, conditioning))


class ContextIA3(ContextPeft):
    """(1 + Σ_c m_c(t) l_c) ∘ what a module gives at position t, of the modules of keys and values; ∘ what it reads, of the last
    module of a feed-forward part."""

    Options = NoOptions

    def places(self, text_model: nn.Module, parts: Structure) -> Iterator[Place]:
        from routevl.backbones.structure import KEY, VALUE
        from routevl.methods.context_peft.layer import places_of

        return places_of(text_model, parts, (KEY, VALUE), inner=parts.ends_of_feed_forward())

    def put(self, module: nn.Module, place: Place, conditioning: Conditioning | None) -> None:
        from routevl.backbones.skeleton import widths_of
        from routevl.methods.bottleneck.layer import change_input, change_output
        from routevl.methods.context_peft.layer import InContext, Scaled, Vector

        width, device = widths_of(module)[0 if place.inner else 1], module.weight.device
        vectors = {context: Vector(width, layout, device) for context, layout in place.layouts.items()}
        change = change_input if place.inner else change_output
        change(module, Scaled(InContext(vectors, conditioning)))
