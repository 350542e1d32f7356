"""What travels beside a call: named, declared streams that the layers of a method read, which the model's own forward knows not.

A tuner declares its streams and attaches a `Conditioning` to the model. Hooks take the streams out of the arguments of
`model(...)` and `model.generate(...)`; every layer reads them from the one object. They are forgotten when the call returns: no
layer can see those of an earlier batch, nor those of another thread's call. Layers that gradient checkpointing runs again get
those of the forward pass that they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from routevl.errors import RoutevlError

PER_EXAMPLE = "example"  # (B, ...): repeated for beams
PER_POSITION = "position"  # (B, L, ...): one for each position of the call; generated positions continue the last of them


@dataclass(frozen=True)
class Call:
    """The streams of the call that is running.

    Attributes:
        streams: what `prepare` made of the given ones; empty where the call has none.
        generating: whether the batch may be larger than that of the streams, by the number of beams.
        position: how many positions came before, in a cache.
        texts: tells how many texts the running forward pass has, with beams; None where that is not known.
        within: the call that this one was made in, such as a forward pass with an image of its own in a search.
        kept: what `Conditioning.kept` has computed already, for the steps of a generation.
    """

    streams: Mapping[Any, Any]
    generating: bool = False
    position: int = 0
    texts: Callable[[], int | None] = lambda: None
    within: Call | None = None
    kept: dict[Any, Tensor] = field(default_factory=dict)


# The running calls of all models in this thread. One variable for all: a ContextVar can be neither copied nor pickled.
_RUNNING: ContextVar[Mapping[Conditioning, Call]] = ContextVar("routevl_running_calls", default={})  # noqa: B039 (never changed)


class Conditioning:
    """The streams of one model.

    Args:
        model: a model of transformers, or any module, whose calls carry them.
        streams: name of an argument -> PER_EXAMPLE or PER_POSITION.
        prepare: given streams -> what the layers read, once per call; raises RoutevlError where they are wrong.

    Raises:
        RoutevlError: the model has streams of another tuner already.
    """

    def __init__(
        self,
        model: nn.Module,
        streams: Mapping[str, str],
        prepare: Callable[[dict[str, Tensor]], Mapping[Any, Any]] = dict,
    ) -> None:
        refuse_a_second(model)
        self.model, self.streams, self.prepare = model, dict(streams), prepare
        self._checkpointable: list[nn.Module] | None = None  # found in the first training step: there are many others
        self._checkpointing: list[tuple[nn.Module, Callable]] = []  # modules with their own gradient checkpointing function
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]
        model._conditioning = self
        if hasattr(model, "generate"):
            # peft calls the base model's own `generate`, which refuses arguments that it does not know
            model.generate = self._generate

    def detach(self) -> None:
        """Take everything off the model again, which is then as it was."""
        for handle in self._handles:
            handle.remove()
        for module, checkpoint in self._checkpointing:
            module._gradient_checkpointing_func = checkpoint
        self._checkpointing = []
        self.model.__dict__.pop("generate", None)
        self.model._conditioning = None

    # -- what layers read

    def by_text(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (B, ..., d) as they are; (B * L, d), as some models flatten them, as (B, L, d)."""
        texts = None if hidden_states.dim() > 2 else self.call().texts()
        if not texts or len(hidden_states) % texts:
            return hidden_states
        return hidden_states.unflatten(0, (texts, -1))

    def per_example(self, key: Any, batch_size: int, name: str) -> Tensor:
        """A stream (batch_size, ...) by its key in `prepare`'s result, repeated for beams while generating.

        Args:
            name: the argument that it comes from, for errors.

        Raises:
            RoutevlError: the call has no such stream, or one of another batch size.
        """
        value, beams = self._stream(key, batch_size, name)
        return value if beams == 1 else value.repeat_interleave(beams, 0)

    def projected(self, key: Any, text: Tensor, name: str, projection: nn.Module) -> Tensor:
        """A layer's projection of a stream: (b, ..., d) -> (B, ..., r), for the text's hidden states (B, ..., d), whose dtype and
        device it gets; errors as `per_example`.

        It is projected before it is repeated for beams, and `kept`.
        """
        value, beams = self._stream(key, len(text), name)

        def repeated() -> Tensor:
            result = projection(value.to(text.device, text.dtype))
            return result if beams == 1 else result.repeat_interleave(beams, 0)

        return self.kept((key, projection, beams, text.dtype, text.device), repeated)

    def kept(self, place: Any, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives; while tokens are generated, what it gave at the first of them (not where a gradient or a compiled
        graph is wanted)."""
        call = self.call()
        if place in call.kept:
            return call.kept[place]
        result = compute()
        if call.generating and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call.kept[place] = result
        return result

    def _stream(self, key: Any, batch_size: int, name: str) -> tuple[Any, int]:
        """A stream as the call has it, and how many beams there are for each of its rows."""
        call = self.call()
        if key not in call.streams:
            raise RoutevlError(f"a layer of this model reads {name}, but the call has none: pass {name} to it")
        value = call.streams[key]
        if value is None or value.shape[0] == batch_size:
            return value, 1
        beams, remainder = divmod(batch_size, value.shape[0])
        if not call.generating or remainder or beams == 0:
            raise RoutevlError(f"{name} has batch size {value.shape[0]} but the text has {batch_size}: they must be equal")
        return value, beams

    def per_position(self, key: Any, shape: tuple[int, int], name: str) -> Tensor:
        """A stream for the (batch_size, length) positions that are computed now, behind those in the cache; errors as
        `per_example`."""
        batch_size, length = shape
        value, start = self.per_example(key, batch_size, name), self.call().position
        if value.shape[1] < start + length:
            if not self.call().generating:
                raise RoutevlError(f"{name} has {value.shape[1]} positions but the text has {start + length}: they must be equal")
            last = value[:, -1:]
            value = torch.cat([value, last.expand(-1, start + length - value.shape[1], *last.shape[2:])], dim=1)
        return value[:, start : start + length]

    def call(self) -> Call:
        """The call that is running."""
        return _RUNNING.get().get(self, Call({}))

    # -- the call

    def run_with(self, call: Call, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run a function as part of a call."""
        before = _RUNNING.get()
        _RUNNING.set({**before, self: call})
        try:
            return function(*args, **kwargs)
        finally:
            _RUNNING.set(before)

    def _taken_from(self, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        given = {name: kwargs.pop(name) for name in self.streams if name in kwargs}
        return {name: value for name, value in given.items() if value is not None}

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        given, before = self._taken_from(kwargs), self.call()
        now = {"position": _cached_positions(kwargs), "texts": partial(_number_of_texts, self.model, args, kwargs)}
        if before.generating and not given:
            call = replace(before, **now)
        else:
            call = Call(self.prepare(given) if given else {}, within=before if before.generating else None, **now)
        _RUNNING.set({**_RUNNING.get(), self: call})
        if module.training and given:
            self._keep_streams_when_checkpointing()
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        call = self.call()
        if not call.generating:
            others = {model: running for model, running in _RUNNING.get().items() if model is not self}
            _RUNNING.set(others if call.within is None else {**others, self: call.within})

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        given = self._taken_from(kwargs)
        prompts = (_number_of_texts(self.model, args, kwargs) or 1) if given else 0
        for name, value in given.items():
            if value.shape[0] != prompts:
                raise RoutevlError(
                    f"{name} has batch size {value.shape[0]} but there {'is' if prompts == 1 else 'are'} {prompts} "
                    f"prompt{'s' * (prompts != 1)}: they must be equal (beams are no prompts)"
                )
        call = Call(self.prepare(given) if given else {}, generating=True)
        return self.run_with(call, type(self.model).generate, self.model, *args, **kwargs)

    # -- gradient checkpointing

    def _keep_streams_when_checkpointing(self) -> None:
        """Gradient checkpointing runs a layer again in the backward pass, when the call is long over: let each checkpointed call
        of transformers' layers remember its own streams."""
        if self._checkpointable is None:
            self._checkpointable = [m for m in self.model.modules() if hasattr(m, "gradient_checkpointing")]
        for module in self._checkpointable:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, _CheckpointWithStreams):
                self._checkpointing.append((module, checkpoint))
                module._gradient_checkpointing_func = _CheckpointWithStreams(checkpoint, self)


def refuse_a_second(model: nn.Module) -> None:
    """Raise RoutevlError where a model has streams of another tuner already, which would take them first."""
    if getattr(model, "_conditioning", None) is not None:
        raise RoutevlError("the base model already has a tuner with streams of its own: unload() it, or load the model anew")


class _CheckpointWithStreams:
    """transformers' gradient checkpointing function, with the streams of the forward pass bound to the recomputation."""

    def __init__(self, checkpoint: Callable, conditioning: Conditioning) -> None:
        self.checkpoint = checkpoint
        self.conditioning = conditioning

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        call = self.conditioning.call()
        needs_gradient = any(isinstance(value, Tensor) and value.requires_grad for value in call.streams.values())
        if needs_gradient and getattr(self.checkpoint, "keywords", {}).get("use_reentrant"):
            raise RoutevlError(
                "gradient checkpointing with use_reentrant=True gives no gradient to what the visual features come from (a "
                "projection): use use_reentrant=False"
            )
        return self.checkpoint(partial(self.conditioning.run_with, call, function), *args, **kwargs)


def _cached_positions(kwargs: Mapping[str, Any]) -> int:
    """How many positions a forward pass finds in its cache."""
    cache = kwargs.get("past_key_values")
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0


def _number_of_texts(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """How many texts a call has, in `generate` before it makes beams of them: the rows of its input, else of any tensor that is
    given; None where there is none."""
    inputs = ("inputs", "input_ids", getattr(model, "main_input_name", "input_ids"), "inputs_embeds", "encoder_outputs")
    given = next((value for value in (*args[:1], *map(kwargs.get, inputs)) if value is not None), None)
    if given is None:
        given = next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    return None if given is None else len(given if isinstance(given, (Tensor, list)) else given[0])
