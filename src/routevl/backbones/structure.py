"""The parts of a text model, found by what depends on what: the names that its authors gave do not matter.

Every linear module's output is replaced by random numbers that stand for themselves, and gradients say what the next modules'
inputs depend on directly. The input of an attention's output projection at one position depends on

* values at other positions, and on the value alone where there is one position, since the softmax over it is 1;
* keys at other positions, and on no key where there is one position;
* the query of its own position, and on no query where there is one position.

So the projections are told apart to the component, also where one module holds several of them side by side or head by head.
What the output of an attention or a feed-forward part is added to, the next module that reads something else tells: it reads
the sum.

Weights are not read: a model on the meta device will do, as long as its buffers are real.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from routevl.backbones.co_attention import has_image_stream
from routevl.backbones.skeleton import LINEAR, base_of, ready_to_run, replaced, widths_of
from routevl.errors import RoutevlError

QUERY, KEY, VALUE = "query", "key", "value"
BATCH = 2
LENGTHS = ((1, 1), (2, 3))  # positions of the text, and of what an encoder has read, or of an image
NEGLIGIBLE = 1e-3  # of the largest gradient: rounding, where the true one is zero
NAME_THEM = "name the modules to adapt: `target_modules` of the text backbone in the configuration, or of the peft config"


@dataclass(frozen=True)
class Fused:
    """How a module's outputs hold several projections: as `groups` of heads, in each the projections' `widths` side by side."""

    groups: int
    roles: tuple[str, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """The modules of a text model by what they do, in the order in which they are called.

    Attributes:
        roles: name of a module that computes queries, keys or values -> which of them.
        fused: name of a module that computes more than one of them -> how.
        attention_outputs: output projections of attention over the text itself.
        cross_attention_outputs: of attention over what an encoder has read, or of one stream over another.
        cross_attention_values: the modules that compute its values.
        cross_attention_inputs: the modules that read this: these, and those that compute its keys.
        feed_forward_outputs: the last module of each layer's feed-forward part.
        sub_layer_inputs: name of one of these outputs -> the last module before it that has read what the output is added to;
            only where there is one.
        feed_forward_inputs: name of one of these -> the modules that its input depends on and that read hidden states: the first
            matrix, or two where one is a gate; only where there are any.
        shared: modules that also read what is of no example, such as a table of relative positions.
    """

    roles: Mapping[str, frozenset[str]] = field(default_factory=dict)
    fused: Mapping[str, Fused] = field(default_factory=dict)
    attention_outputs: tuple[str, ...] = ()
    cross_attention_outputs: tuple[str, ...] = ()
    cross_attention_values: tuple[str, ...] = ()
    cross_attention_inputs: tuple[str, ...] = ()
    feed_forward_outputs: tuple[str, ...] = ()
    sub_layer_inputs: Mapping[str, str] = field(default_factory=dict)
    feed_forward_inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()

    def computing(self, *roles: str) -> list[str]:
        """The modules that compute any of these roles."""
        return [name for name, own in self.roles.items() if own & set(roles)]

    def ends_of_feed_forward(self) -> tuple[str, ...]:
        """`feed_forward_outputs`. Raises RoutevlError where there are none, as with experts, which are no linear modules."""
        if not self.feed_forward_outputs:
            raise RoutevlError(f"the model has no feed-forward part that ends in a linear module; {NAME_THEM}")
        return self.feed_forward_outputs

    def beginnings_of_feed_forward(self) -> tuple[str, ...]:
        """All of `feed_forward_inputs`. Raises RoutevlError where there are none."""
        if not self.feed_forward_inputs:
            raise RoutevlError(f"the model has no feed-forward part that begins with a linear module; {NAME_THEM}")
        return tuple(dict.fromkeys(name for names in self.feed_forward_inputs.values() for name in names))


def structure_of(model: PreTrainedModel) -> Structure:
    """Find the parts of a text model of transformers. It is run twice, on a few positions, and left as it was.

    Raises:
        RoutevlError: it cannot be run on embeddings, or has no attention with one linear module for the query and one for the
            value.
    """
    linears = _linear_modules(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that threads only wait for each other
    try:
        (one, _), (several, reads) = (_run(model, linears, *lengths) for lengths in LENGTHS)
        attentions = _attentions(one, several)
    except Exception as error:  # of the model's own code, of any kind
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RoutevlError(f"the parts of {type(model).__name__} cannot be found ({reason}); {NAME_THEM}") from error
    finally:
        torch.set_num_threads(threads)
    if not attentions:
        raise RoutevlError(
            f"{type(model).__name__} has no attention with one linear module for the query and one for the value; {NAME_THEM}"
        )
    parts: dict[str, dict[str, Tensor]] = {}  # a module that several layers share has the same parts in all of them
    for attention in attentions:
        for name, own in attention.parts.items():
            parts.setdefault(name, own)
    itself, cross = ([a.output for a in attentions if a.cross is crossed] for crossed in (False, True))
    called = [call.name for call in several if call.hidden_states is not None]
    feed_forward = _feed_forward_outputs(linears, called, itself, {*parts, *itself, *cross})
    return Structure(
        roles={name: frozenset(own) for name, own in parts.items()},
        fused={name: _layout(name, own) for name, own in parts.items() if len(own) > 1},
        attention_outputs=tuple(dict.fromkeys(itself)),
        cross_attention_outputs=tuple(dict.fromkeys(cross)),
        cross_attention_values=tuple(
            dict.fromkeys(n for a in attentions if a.cross for n, own in a.parts.items() if VALUE in own)
        ),
        cross_attention_inputs=tuple(
            dict.fromkeys(n for a in attentions if a.cross for n, own in a.parts.items() if QUERY not in own)
        ),
        feed_forward_outputs=feed_forward,
        sub_layer_inputs=_sub_layer_inputs(reads, {*itself, *cross, *feed_forward}),
        feed_forward_inputs=_feed_forward_inputs(linears, several, feed_forward),
        shared=frozenset(call.name for call in several if call.hidden_states is None),
    )


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The linear modules by name; those that a tuner has wrapped by the name that they had before."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        wrapped = any(name.startswith(f"{parent}.") for parent, of in found.items() if isinstance(of, BaseTunerLayer))
        if not wrapped and isinstance(module, (*LINEAR, BaseTunerLayer)):
            found[name] = module
    return {name: module for name, module in found.items() if isinstance(base_of(module), LINEAR)}


# ------------------------------------------------------------------------------------------ running


class Call(NamedTuple):
    """One call of a linear module.

    Attributes:
        hidden_states: its input, (B, L, d); None where that has no entry for each position of each example.
        output: the random numbers that it gave, (B, L, d_out); any shape where it is of no example.
    """

    name: str
    hidden_states: Tensor | None
    output: Tensor


class Read(NamedTuple):
    """What a module without parts was given, such as a norm or a linear module, and what it gave: (positions, d) float32."""

    name: str
    given: Tensor
    output: Tensor


def _run(
    model: PreTrainedModel, linears: Mapping[str, nn.Module], length: int, encoder_length: int
) -> tuple[list[Call], list[Read]]:
    """The calls of the linear modules in a forward pass whose linear outputs are replaced, and what it gives all modules without
    parts to read; both in their order."""
    calls: list[Call] = []
    reads: list[Read] = []
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    width = model.get_input_embeddings().weight.shape[1]

    def embeddings(length: int) -> Tensor:
        return torch.randn(BATCH, length, width, generator=generator).to(device)

    inputs = {"inputs_embeds": embeddings(length)}
    if has_image_stream(model):
        image = torch.randn(BATCH, encoder_length, model.config.image_width, generator=generator)
        inputs["image_embeds"] = image.to(device)
    if model.config.is_encoder_decoder:
        inputs = {"inputs_embeds": embeddings(encoder_length), "decoder_inputs_embeds": embeddings(length)}

    def stand_in(name: str, module: nn.Module) -> Callable[..., Tensor]:
        width_out = widths_of(module)[1]

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            *shape, width = hidden_states.shape
            positions = math.prod(shape) // BATCH
            of_examples = positions in (length, encoder_length) and shape in ([BATCH, positions], [BATCH * positions])
            own = (BATCH, positions) if of_examples else shape  # OPT flattens examples and positions
            output = torch.randn((*own, width_out), generator=generator).to(hidden_states).detach().requires_grad_()
            calls.append(Call(name, hidden_states.reshape(*own, width) if of_examples else None, output))
            return output.reshape(*shape, width_out).clone()  # the model may change it in place

        return forward

    def note(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        tensors = [tensor for tensor in (*args[:1], output) if isinstance(tensor, Tensor) and tensor.dim() > 1]
        if len(tensors) == 2:  # copied, since the model may change them in place
            reads.append(Read(name, *(tensor.detach().to(torch.float32, copy=True).flatten(0, -2) for tensor in tensors)))

    simple = linears | {name: module for name, module in model.named_modules() if not [*module.children()]}
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in simple.items()]
    try:
        with _evaluated(model), ready_to_run(model, linears.values()), replaced(linears, stand_in), torch.enable_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, reads


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """No dropout, and layers forget where their input comes from."""

    def forget(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()}

    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    hooks = [layer.register_forward_pre_hook(forget, with_kwargs=True) for layer in layers]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for hook in hooks:
            hook.remove()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


# ---------------------------------------------------------------------------------------- attention


class _Attention(NamedTuple):
    """One attention: name of a module -> role -> which of its outputs have it, (d,) bool; and its output projection."""

    parts: dict[str, dict[str, Tensor]]
    output: str
    cross: bool


def _attentions(one: list[Call], several: list[Call]) -> list[_Attention]:
    """The attentions of the calls of a run with one position and of another with several."""
    found = []
    for place, (call, long_call) in enumerate(zip(one, several, strict=True)):
        alone, together = _influences(call, one[:place]), _influences(long_call, several[:place])
        largest = max((gradient.abs().max() for gradient in alone.values()), default=0)
        parts: dict[str, dict[str, Tensor]] = {}
        crossed = False
        for source, gradient in together.items():
            length = several[source].output.shape[1]
            crosses = length != long_call.hidden_states.shape[1]
            elsewhere = _touched(gradient if crosses else gradient[:, :-1])
            here = _touched(gradient) & ~elsewhere
            without_softmax = _touched(alone[source], NEGLIGIBLE * largest) if source in alone else torch.zeros_like(here)
            roles = {QUERY: here & ~without_softmax, KEY: elsewhere & ~without_softmax, VALUE: elsewhere & without_softmax}
            for role, mask in roles.items():
                if mask.any():
                    parts.setdefault(several[source].name, {})[role] = mask
                    crossed = crosses if role == VALUE else crossed
        modules = Counter(role for own in parts.values() for role in own)
        if modules[QUERY] == modules[VALUE] == 1 <= modules[KEY]:  # else something else mixes positions, such as a convolution
            found.append(_Attention(parts, call.name, crossed))
    return found


def _influences(call: Call, before: list[Call]) -> dict[int, Tensor]:
    """Which outputs the last position of a call's input depends on directly: place of a call -> gradient (B, L, d)."""
    if call.hidden_states is None or not call.hidden_states.requires_grad or not before:
        return {}
    weights = torch.randn(call.hidden_states[:, -1].shape, generator=torch.Generator().manual_seed(0))
    last = (call.hidden_states[:, -1] * weights.to(call.hidden_states)).sum()
    gradients = torch.autograd.grad(last, [c.output for c in before], retain_graph=True, allow_unused=True)
    return {n: g for n, g in enumerate(gradients) if g is not None and before[n].hidden_states is not None}


def _touched(gradient: Tensor, least: float | Tensor = 0.0) -> Tensor:
    """Which components of (B, L, d) have a gradient at any position: (d,) bool."""
    return (gradient.abs() > least).flatten(0, 1).any(0)


def _layout(name: str, parts: Mapping[str, Tensor]) -> Fused:
    """How a module's outputs hold the roles, from which of them have which."""
    roles_of = [next((role for role, mask in parts.items() if mask[n]), "") for n in range(len(next(iter(parts.values()))))]
    runs = [(role, len(list(members))) for role, members in groupby(roles_of)]
    groups = max(n for n in range(1, len(runs) + 1) if len(runs) % n == 0 and runs == runs[: len(runs) // n] * n)
    roles, widths = zip(*runs[: len(runs) // groups], strict=True)
    if len(set(roles)) < len(roles):
        raise RoutevlError(f"{name} holds queries, keys and values in no order that is known; {NAME_THEM}")
    return Fused(groups, roles, widths)


# ------------------------------------------------------------------------------------- feed-forward


def _feed_forward_outputs(
    linears: Mapping[str, nn.Module], called: list[str], attention_outputs: list[str], of_attention: set[str]
) -> tuple[str, ...]:
    """Of each layer the module of the hidden states' width that is called last, beside its attention."""
    found = []
    for output in dict.fromkeys(attention_outputs):
        path = output.split(".")
        for end in range(len(path), 0, -1):  # the innermost numbered part around the attention that has other modules too
            layer = ".".join(path[:end]) + "."
            inside = [name for name in called if name.startswith(layer) and name not in of_attention]
            if path[end - 1].isdigit() and inside:
                same_width = [name for name in inside if widths_of(linears[name])[1] == widths_of(linears[output])[1]]
                found += same_width[-1:]
                break
    return tuple(dict.fromkeys(found))


def _feed_forward_inputs(
    linears: Mapping[str, nn.Module], calls: list[Call], ends: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """Of each feed-forward part's end the modules that read hidden states and that its input depends on directly."""
    found = {}
    for end in ends:
        place = next(n for n, call in enumerate(calls) if call.name == end)
        before = [calls[source].name for source in _influences(calls[place], calls[:place])]
        reading = [name for name in before if widths_of(linears[name])[0] == widths_of(linears[end])[1]]
        if reading:
            found[end] = tuple(dict.fromkeys(reading))
    return found


# -------------------------------------------------------------------------------- residual addition


def _sub_layer_inputs(reads: list[Read], outputs: Collection[str]) -> dict[str, str]:
    """Of each output the module that has read, last before it, what it is added to: the sum, without the output."""
    found = {}
    for place, (name, _, output) in enumerate(reads):
        if name not in outputs:
            continue
        later = (read.given for read in reads[place + 1 :] if read.given.shape == output.shape)
        added_to = next((given for given in later if not given.equal(output)), output) - output  # dropout reads the output alone
        before = [read for read in reversed(reads[:place]) if read.given.shape == output.shape]
        nearest = min(before, key=lambda read: (read.given - added_to).abs().max(), default=None)  # a norm may change little
        if nearest and torch.allclose(nearest.given, added_to, atol=1e-4):
            found[name] = nearest.name
    return found


# ------------------------------------------------------------------------------------------ targets


def targets(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Modules as peft's `target_modules`: the ends of their names behind the layers' numbers, where no other module of the model
    has that end; their full names else."""
    names = set(names)
    ends = {name: re.sub(r".*\.\d+\.", "", name) for name in names}
    others = [name for name, _ in model.named_modules() if name not in names]
    clash = {end for end in set(ends.values()) if any(f".{other}".endswith(f".{end}") for other in others)}
    return sorted({name if end in clash else end for name, end in ends.items()})
