"""The side network, and how a frozen model runs beside it.

A stack is what runs through one list of layers: a model's encoder, its decoder, or all of it but the head. `Ladder` takes the
place of a stack's forward pass: it runs the frozen stack on the text, keeps the output of each layer, and then runs a stack of
the same class whose widths are smaller and whose layers are `Rung`s. Masks, positions and caches of both are thus the model's
own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from routevl.backbones.skeleton import layers_of, stacks_of
from routevl.conditioning import PER_EXAMPLE, Conditioning
from routevl.errors import RoutevlError
from routevl.methods.lst.cut import cut

TEMPERATURE = 0.1  # of the gates
WIDTHS = ("hidden_size", "head_dim", "intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")


def put_beside(text_model: PreTrainedModel, scores: Mapping[str, Tensor], reduction: int, dropout: float) -> PreTrainedModel:
    """Put a side network beside a frozen model, which keeps its forward, generate and config.

    `model(...)` and `model.generate(...)` take `visual_tokens` (B, P, d) beside their own arguments: the first P positions of
    `inputs_embeds` (B, P + L_t, d) are these and enter the side network alone.

    Args:
        scores: what `row_scores` found in the model.

    Raises:
        RoutevlError: as `side_config` and `cut`; embeddings of another width than the hidden states.
        KeyError: as `cut`.
    """
    width, embedding_width = text_model.config.hidden_size, text_model.get_input_embeddings().weight.shape[1]
    if embedding_width != width:
        raise RoutevlError(
            f"lst: {type(text_model).__name__} has embeddings of width {embedding_width} but hidden states of width {width}, and "
            "needs equal widths: take another text backbone"
        )
    stacks = stacks_of(text_model)
    sides = {name: _new_stack(type(stack), side_config(stack.config, reduction)) for name, stack in stacks.items()}
    cut(text_model, sides, scores, reduction)
    conditioning = Conditioning(text_model, {"visual_tokens": PER_EXAMPLE})
    *encoder, last = stacks
    for name, stack in stacks.items():
        ends = name == last
        place = {"ends": ends, "crosses": ends and bool(encoder), "decodes": ends and text_model.can_generate()}
        stack.ladder = Ladder(stack, sides[name], conditioning, dropout, **place)
    return text_model


def side_config(config: PretrainedConfig, reduction: int) -> PretrainedConfig:
    """A model's configuration with all widths divided, and as many heads.

    Raises:
        RoutevlError: a width does not divide, or the new one not by the number of heads.
    """
    small = copy.deepcopy(config)
    for name in WIDTHS:
        width = getattr(config, name, None)
        if width is None:
            continue
        if width % reduction:
            raise RoutevlError(f"lst: the text backbone's {name} {width} does not divide by reduction={reduction}")
        setattr(small, name, width // reduction)
    if small.hidden_size % config.num_attention_heads:
        raise RoutevlError(
            f"lst: with reduction={reduction} the side network's width {small.hidden_size} does not divide by the text "
            f"backbone's {config.num_attention_heads} heads"
        )
    return small


def _new_stack(stack_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A stack without what it would never run: token embeddings and pooler. Its tables of positions are run, but not read."""
    pooler = "add_pooling_layer" in inspect.signature(stack_class.__init__).parameters
    stack = stack_class(config, **({"add_pooling_layer": False} if pooler else {}))
    stack.set_input_embeddings(nn.Identity())
    return stack.requires_grad_(False)


# ------------------------------------------------------------------------------------------ the climb


@dataclass
class Climb:
    """What the frozen stack has left for the side network in one forward pass.

    Attributes:
        embeddings: what its first layer read, (B, L, d).
        states: the output of each layer, (B, L, d).
        start: s_0, (B, P + L, d / reduction).
    """

    embeddings: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)
    start: Tensor | None = None


_CLIMB: ContextVar[Climb] = ContextVar("routevl_climb")  # of this thread: another may run the same model


@contextmanager
def climbing() -> Iterator[Climb]:
    """A climb that the rungs of this thread take part in."""
    climb = Climb()
    token = _CLIMB.set(climb)
    try:
        yield climb
    finally:
        _CLIMB.reset(token)


def _note_embeddings(layer: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    _CLIMB.get().embeddings = args[0] if args else kwargs["hidden_states"]


def _note_state(layer: nn.Module, args: tuple, output: Any) -> None:
    _CLIMB.get().states.append(output[0] if isinstance(output, tuple) else output)


def climbed(side: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """σ(a / T) s + (1 - σ(a / T)) D h: gate a scalar, update (B, L, d / reduction), side (B, P + L, d / reduction), to whose
    first P positions zeros come."""
    share = torch.sigmoid(gate / TEMPERATURE)
    update = nn.functional.pad(update, (0, 0, side.shape[1] - update.shape[1], 0))
    return share * side + (1 - share) * update


class Rung(nn.Module):
    """A layer of the side network, which first takes in what the backbone's layer of the same number has put out."""

    def __init__(self, layer: nn.Module, number: int, width: int, side_width: int) -> None:
        super().__init__()
        self.number = number
        self.gate = nn.Parameter(torch.zeros(()))
        self.down = nn.Linear(width, side_width)
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B, P + L, d / reduction) -> the layer's output; what else it takes goes to it."""
        climb = _CLIMB.get()
        side = hidden_states if self.number else climb.start  # what the stack makes of its embeddings is not read
        return self.layer(climbed(side, self.gate, self.down(climb.states[self.number])), *args, **kwargs)


class Ladder(nn.Module):
    """The forward pass of a frozen stack with a side network beside it.

    The stack's output has the side network's hidden states in place of its own, projected up: (B, P + L, d). An encoder before a
    decoder has both side by side, its own and the side network's, (B, P + L, d + d / reduction), as the decoder's two halves
    each read their own; in the former the image's positions are zero and masked.

    Args:
        ends: whether the model's head reads what the stack puts out; else it is an encoder before a decoder.
        decodes: whether the stack has a cache. Both halves' layers are in one, the side network's first, so that it counts the
            image's positions and beams are told apart in both.
        crosses: whether the stack reads an encoder, which alone has the image's positions.
    """

    def __init__(
        self,
        stack: PreTrainedModel,
        side: PreTrainedModel,
        conditioning: Conditioning,
        dropout: float,
        ends: bool,
        crosses: bool,
        decodes: bool,
    ) -> None:
        super().__init__()
        self.crosses, self.decodes = crosses, decodes
        self.width, side_width = stack.config.hidden_size, side.config.hidden_size
        self.conditioning = conditioning
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(self.width, side_width)
        self.up = nn.Linear(side_width, self.width) if ends else None
        self.side = side
        for number, layer in enumerate(layers := layers_of(side)):
            layers[number] = Rung(layer, number, self.width, side_width)
        self.rungs = len(layers)
        frozen = layers_of(stack)
        frozen[0].register_forward_pre_hook(_note_embeddings, with_kwargs=True)
        for layer in frozen:
            layer.register_forward_hook(_note_state)
        self.run_frozen, stack.forward = stack.forward, self.forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stack's own arguments and output; see the class. Raises RoutevlError where the call has an image but token ids."""
        visual = self.conditioning.call().streams.get("visual_tokens")
        image = 0 if visual is None else visual.shape[1]
        before, elsewhere = (0, image) if self.crosses else (image, 0)  # the image's positions here, and in the encoder
        cache = self._cache(past_key_values, use_cache)
        now = before if cache is None or cache.get_seq_length() == 0 else 0  # those of them that are not cached
        if now and inputs_embeds is None:
            raise RoutevlError("visual_tokens are the first positions of inputs_embeds: pass these in place of input_ids")
        of_side, of_frozen = (None, None) if cache is None else _halves(cache, self.rungs)
        states = (None, None) if encoder_hidden_states is None else encoder_hidden_states.split(self.width, dim=-1)
        text_positions = _behind(now, position_ids)
        if text_positions is not None:
            text_positions = (text_positions - before).clamp(min=0)  # transformers gives padding any position

        frozen = {
            "input_ids": input_ids,
            "inputs_embeds": _behind(now, inputs_embeds),
            "attention_mask": _behind(before, attention_mask),
            "position_ids": text_positions,
            "past_key_values": of_frozen,
            "use_cache": use_cache,
            "encoder_hidden_states": _behind(elsewhere, states[0]),
            "encoder_attention_mask": _behind(elsewhere, encoder_attention_mask),
        }
        with climbing() as climb:
            with torch.no_grad():
                output = self.run_frozen(**_given(frozen), **kwargs)
            start = climb.embeddings
            if now:
                start = torch.cat([self.dropout(inputs_embeds[:, :now]).to(start), start], dim=1)
            climb.start = self.down(start)
            side = {
                "inputs_embeds": climb.start,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": of_side,
                "use_cache": use_cache,
                "encoder_hidden_states": states[1],
                "encoder_attention_mask": encoder_attention_mask,
            }
            hidden_states = self.side(**_given(side)).last_hidden_state  # (B, P + L, d / reduction)
        if self.up is None:
            own = nn.functional.pad(output.last_hidden_state, (0, 0, now, 0))
            output.last_hidden_state = torch.cat([own, hidden_states], dim=-1)
        else:
            output.last_hidden_state = self.up(self.dropout(hidden_states))
        if self.decodes:
            output.past_key_values = cache
        return output

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache of both halves; a new one where the model's own forward pass would make one."""
        wanted = self.side.config.use_cache if use_cache is None else use_cache
        if given is not None or not (self.decodes and wanted):
            return given
        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if self.crosses else DynamicCache()


def _behind(positions: int, tensor: Tensor | None) -> Tensor | None:
    """What stands behind the first positions, (B, P + L, ...) -> (B, L, ...)."""
    return None if tensor is None else tensor[:, positions:]


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not None; a stack need not know the others."""
    return {name: value for name, value in arguments.items() if value is not None}


def _halves(cache: Cache, layers: int) -> tuple[Cache, Cache]:
    """Two caches of so many layers each that hold the layers of one."""
    if isinstance(cache, EncoderDecoderCache):
        both = (_halves(half, layers) for half in (cache.self_attention_cache, cache.cross_attention_cache))
        return tuple(EncoderDecoderCache(*halves) for halves in zip(*both, strict=True))
    while len(cache.layers) < 2 * layers:
        cache.layers.append(DynamicLayer())
    halves = DynamicCache(), DynamicCache()
    halves[0].layers, halves[1].layers = cache.layers[:layers], cache.layers[layers:]
    return halves
