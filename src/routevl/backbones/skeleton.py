"""Models without weights: built from a configuration in no memory to speak of, and run for the shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from routevl.backbones.co_attention import has_image_stream

LINEAR = (nn.Linear, Conv1D)
LARGEST = 1e9  # parameters of a model that is run on random weights: 4 GB


class WrongWidth(ValueError):
    """A module cannot take what it is given."""


@contextmanager
def no_weights() -> Iterator[None]:
    """Modules that are made here have parameters on the meta device; their buffers are real.

    What is there already stays one parameter where several modules get it, which accelerate alone would make several.
    """
    register = nn.Module.register_parameter
    with init_empty_weights(include_buffers=False):
        register_empty = nn.Module.register_parameter

        def register_once(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            known = parameter is not None and parameter.is_meta
            (register if known else register_empty)(module, name, parameter)

        nn.Module.register_parameter = register_once
        yield


def base_of(module: nn.Module) -> nn.Module:
    """The module that a tuner's layer has wrapped; any other as it is."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def widths_of(module: nn.Module) -> tuple[int, int]:
    """How many inputs and outputs a linear module has."""
    base = base_of(module)
    return (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


def stacks_of(text_model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> what runs through one list of layers: encoder and decoder, two streams that attend to each other, or the model
    without its head."""
    if has_image_stream(text_model):
        return text_model.streams
    both = text_model.config.is_encoder_decoder
    stacks = (text_model.get_encoder(), text_model.get_decoder()) if both else (text_model.base_model,)
    names = {module: name for name, module in text_model.named_modules()}
    return {names[stack]: stack for stack in stacks}


def layers_of(stack: nn.Module) -> nn.ModuleList:
    """A stack's layers: its outermost list of modules."""
    return next(module for module in stack.modules() if isinstance(module, nn.ModuleList))


def layers_in(text_model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers of a text model by name, in order: an encoder's, then a decoder's; or one stream's, then the other's."""
    names = {module: name for name, module in text_model.named_modules()}
    return {names[layer]: layer for stack in stacks_of(text_model).values() for layer in layers_of(stack)}


@contextmanager
def replaced(modules: Mapping[str, nn.Module], stand_in: Callable[[str, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Let other functions stand in for modules' forward passes."""
    for name, module in modules.items():
        module.forward = stand_in(name, module)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


@contextmanager
def ready_to_run(model: nn.Module, not_read: Iterable[nn.Module] = (), random: bool = False) -> Iterator[None]:
    """Let float32 numbers stand in for parameters of other types, and for what is on the meta device: ones, but zeros for stacks
    of matrices, such as of experts. These take no memory.

    Args:
        not_read: modules whose parameters are left alone.
        random: let random numbers stand in for what is on the meta device, but ones for vectors; these take memory.
    """
    left = {part for module in not_read for part in module.modules()}
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    taken = []
    for module in model.modules():
        for tensors in () if module in left else (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                of_another_type = isinstance(tensor, nn.Parameter) and tensor.dtype != torch.float32
                if tensor is not None and (tensor.is_meta or of_another_type):
                    taken.append((tensors, name, tensor))
                    tensors[name] = nn.Parameter(_to_run(tensor.detach(), device, random), requires_grad=False)
    try:
        yield
    finally:
        for tensors, name, tensor in taken:
            tensors[name] = tensor


def _to_run(tensor: Tensor, device: torch.device, random: bool) -> Tensor:
    if not tensor.is_meta:
        return tensor.float()
    if random and tensor.dim() > 1:
        return torch.randn(tensor.shape, device=device, generator=torch.Generator(device).manual_seed(0)) * 0.02
    if tensor.dim() < 3:
        return torch.ones((), device=device).expand(tensor.shape)
    return torch.from_numpy(numpy.zeros(tensor.shape, numpy.float32)).to(device)  # some kernels want real strides


@torch.no_grad()
def run_for_shapes(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """A forward pass on the CPU in which linear modules give zeros. A model that cannot run so, and is not too large, runs as it
    is on random weights.

    Raises:
        WrongWidth: a linear module got an input of another width; or whatever the model's code raises.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR)}

    def stand_in(name: str, module: nn.Module) -> Callable[..., Tensor]:
        width, width_out = widths_of(module)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if hidden_states.shape[-1] != width:
                raise WrongWidth(f"{name} takes width {width}, not {hidden_states.shape[-1]}")
            return hidden_states.new_zeros(*hidden_states.shape[:-1], width_out)

        return forward

    try:
        with ready_to_run(model), replaced(linears, stand_in):
            return model(**inputs)
    except WrongWidth:
        raise
    except Exception:  # a model's code may look at numbers
        if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
            raise
    with ready_to_run(model, random=True):
        return model(**inputs)
