"""Which positions have which context, what is trained for each of them, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from routevl.backbones.skeleton import widths_of
from routevl.backbones.structure import KEY, QUERY, VALUE, Structure
from routevl.conditioning import PER_POSITION, Conditioning
from routevl.errors import RoutevlError
from routevl.methods.lora.layer import Fused, add_to_projections
from routevl.methods.routed.tuner import layer_of
from routevl.methods.vl_pet import encoder_of

TEXT, IMAGE = "text", "image"
CONTEXTS = (TEXT, IMAGE)  # a context's number in `token_context` is its place


# ------------------------------------------------------------------------------ contexts of positions


def context_of_positions(attention_mask: Tensor, image_positions: Tensor | None) -> Tensor:
    """The contexts of positions: those that are the image's, (B, L) bool, or None where there are none; all others are text,
    padding too: (B, L) int64."""
    context = torch.full_like(attention_mask, CONTEXTS.index(TEXT), dtype=torch.int64)
    return context if image_positions is None else context.masked_fill(image_positions, CONTEXTS.index(IMAGE))


def streams_of_contexts(text_model: nn.Module) -> Conditioning:
    """Let calls of a model have `token_context`, (B, L) int64: the number in CONTEXTS of the context of each position that the
    model, or its encoder, reads. Positions that are generated go on with the last one's."""
    return Conditioning(text_model, {"token_context": PER_POSITION}, contexts_of)


def contexts_of(given: dict[str, Tensor]) -> dict[str, Any]:
    """What layers read: the stream, `there`, the contexts that it has at all, and `behind`, those that are behind it. Raises
    RoutevlError where it is not as `streams_of_contexts` says."""
    context = given["token_context"]
    if context.dim() != 2 or context.dtype != torch.int64 or not context.shape[1]:
        raise RoutevlError(f"token_context must be (batch, positions) int64, not {tuple(context.shape)} {context.dtype}")
    there, behind = (part.unique().tolist() for part in (context, context[:, -1]))  # once a call: a GPU has to be waited for
    if wrong := [number for number in there if not 0 <= number < len(CONTEXTS)]:
        names = ", ".join(f"{number} ({name})" for number, name in enumerate(CONTEXTS))
        raise RoutevlError(f"token_context has a {wrong[0]}, but the contexts are {names}")
    return {"token_context": context, "there": there, "behind": behind}


def masks(conditioning: Conditioning | None, hidden_states: Tensor) -> dict[str, Tensor | None]:
    """Context of any of the positions (B, L, d) that are computed now -> which of them have it, (B, L, 1) bool; None for all.

    Args:
        conditioning: has the contexts; None: all positions are text.

    Raises:
        RoutevlError: the call has no `token_context`, or one of another shape than (B, L).
    """
    if conditioning is None:
        return {TEXT: None}
    context = conditioning.per_position("token_context", hidden_states.shape[:2], "token_context").to(hidden_states.device)
    call = conditioning.call()
    length = call.streams["token_context"].shape[1]
    found = call.streams["there" if call.position < length else "behind"]
    return {CONTEXTS[n]: None if len(found) == 1 else (context == n).unsqueeze(-1) for n in found}


class InContext(nn.Module):
    """Σ_c m_c(t) f_c(x) at position t, of modules f_c: (..., d) -> (..., d_out), or (d_out) where it is the same everywhere.

    What no position has is not computed.
    """

    def __init__(self, of_contexts: Mapping[str, nn.Module], conditioning: Conditioning | None) -> None:
        super().__init__()
        self.of_contexts = nn.ModuleDict(of_contexts)
        self.conditioning = conditioning

    def forward(self, hidden_states: Tensor) -> Tensor:
        texts = hidden_states if self.conditioning is None else self.conditioning.by_text(hidden_states)
        found = {context: mask for context, mask in masks(self.conditioning, texts).items() if context in self.of_contexts}
        if not found:
            return hidden_states.new_zeros(())
        parts = ((self.of_contexts[context](texts), mask) for context, mask in found.items())
        total = sum(part if mask is None else part * mask for part, mask in parts)
        return total.view(*hidden_states.shape[:-1], -1) if total.dim() > 1 else total


class Scaled(nn.Module):
    """(1 + scale(x)) ∘ x: (..., d) -> the same."""

    def __init__(self, scale: InContext) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * (1 + self.scale(hidden_states)).to(hidden_states.dtype)


# -------------------------------------------------------------------------- what each context may have


class Vector(nn.Module):
    """A trained vector (d), from zero on; of a module that holds several projections 0 in those that are not adapted.

    Args:
        layout: which they are; None: the module is one.
    """

    def __init__(self, width: int, layout: Fused | None, device: torch.device) -> None:
        super().__init__()
        self.width, self.layout = width, layout
        self.vector = nn.Parameter(torch.zeros(sum(layout.adapted_widths()) if layout else width, device=device))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(d), whatever is read."""
        if self.layout is None:
            return self.vector
        return add_to_projections(self.vector.new_zeros(self.width), self.vector.split(self.layout.adapted_widths()), self.layout)


class Lora(nn.Module):
    """scaling B A x + β, A (r, d) as Kaiming's uniform, B (d_out, r) and β (d_out) from zero on. A module that holds P adapted
    projections has an A for each of them, and 0 in the others.

    Args:
        module: the linear module that it is for.
        layout: as Vector.
        bias: whether there is β.
    """

    def __init__(self, module: nn.Module, layout: Fused | None, rank: int, scaling: float, bias: bool) -> None:
        super().__init__()
        (width, self.width), device = widths_of(module), module.weight.device
        self.layout, self.scaling = layout, scaling
        widths = layout.adapted_widths() if layout else [self.width]
        self.downs = nn.ModuleList(nn.Linear(width, rank, bias=False, device=device) for _ in widths)
        self.ups = nn.ModuleList(nn.Linear(rank, width_out, bias=False, device=device) for width_out in widths)
        for down, up in zip(self.downs, self.ups, strict=True):
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        self.bias = Vector(self.width, layout, device) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d) -> (..., d_out)."""
        updates = [up(down(hidden_states) * self.scaling) for down, up in zip(self.downs, self.ups, strict=True)]
        if self.layout is None:
            update = updates[0]
        else:
            update = add_to_projections(updates[0].new_zeros(*hidden_states.shape[:-1], self.width), updates, self.layout)
        return update if self.bias is None else update + self.bias(hidden_states)


# ----------------------------------------------------------------------------------------- where it goes


@dataclass(frozen=True)
class Place:
    """A module that gets something.

    Attributes:
        layouts: context -> which of the projections that the module holds get it, None: the module is one, or reads for one.
        mixed: whether its positions have the contexts of `token_context`; else all are text.
        inner: whether what it reads is changed, and not what it gives.
    """

    name: str
    layouts: Mapping[str, Fused | None]
    mixed: bool
    inner: bool = False


def every_place(text_model: nn.Module, parts: Structure) -> Iterator[Place]:
    """All of attention and feed-forward parts."""
    outputs = (*parts.attention_outputs, *parts.cross_attention_outputs)
    return places_of(
        text_model, parts, (QUERY, KEY, VALUE), [*outputs, *parts.beginnings_of_feed_forward(), *parts.ends_of_feed_forward()]
    )


def places_of(
    text_model: nn.Module, parts: Structure, roles: Iterable[str], whole: Iterable[str] = (), inner: Iterable[str] = ()
) -> Iterator[Place]:
    """The modules that compute any of these roles, and those of two lists of names: what they give is changed, or what they read.

    Raises:
        RoutevlError: one of them reads what has no positions.
    """
    encoder, outputs = encoder_of(text_model), parts.attention_outputs
    of_encoder = {*parts.cross_attention_inputs}
    ends = not text_model.config.is_encoder_decoder and len(outputs) > 1  # layers that share their modules have one
    last = layer_of(outputs[-1]) if ends else None

    def place(name: str, own: Iterable[str], inner: bool = False) -> Place:
        if name in parts.shared:
            raise RoutevlError(
                f"{name} also reads a table of positions, which has no context, so that Context-PEFT cannot adapt it"
            )
        mixed = name in of_encoder or name.startswith(encoder)
        seen = {KEY, VALUE} if layer_of(name) == last else {QUERY, KEY, VALUE, ""}  # of the roles that an image's position has
        of_context = {TEXT: {*own}, **({IMAGE: {*own} & seen} if mixed else {})}
        return Place(name, {c: _layout(parts, name, of) for c, of in of_context.items() if of}, mixed, inner)

    for name in parts.computing(*roles):
        yield place(name, parts.roles[name] & {*roles})
    for name in whole:
        yield place(name, [""])
    for name in inner:
        yield place(name, [""], inner=True)


def _layout(parts: Structure, name: str, roles: Iterable[str]) -> Fused | None:
    fused = parts.fused.get(name)
    if fused is None:
        return None
    return Fused(fused.groups, list(fused.widths), [role in roles for role in fused.roles])
