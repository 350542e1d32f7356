"""The plain bottleneck, how it is drawn, and how it comes to change what a frozen module computes."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import gelu_new

from routevl.backbones.structure import Structure, structure_of
from routevl.errors import RoutevlError

STANDARD_DEVIATION = 0.02  # of weights at the start: BART's own, whose initialiser runs over the original adapters
# what the sub-layer that is running in this thread has read
_INPUT: ContextVar[Tensor | None] = ContextVar("routevl_sub_layer_input", default=None)


class Bottleneck(nn.Module):
    """U gelu_new(D x), with D: d -> r and U: r -> d_out, each with a bias; gelu_new is GELU's tanh form."""

    activation: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(gelu_new)  # no part of a model: transformers has one for all

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d) -> (..., d_out)."""
        return self.up(self.activation(self.down(hidden_states)))


class InParallel(nn.Module):
    """h + the bottleneck of what the sub-layer has read, for `change_sub_layer`."""

    def __init__(self, bottleneck: nn.Module) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, hidden_states: Tensor, read: Tensor) -> Tensor:
        """h and what the sub-layer has read, (..., d) -> (..., d)."""
        return hidden_states + self.bottleneck(read).to(hidden_states.dtype)


def linear(width: int, width_out: int, device: torch.device) -> nn.Linear:
    """A linear layer with weights from N(0, 0.02²) and no bias yet: no start at zero, and so none as the frozen model."""
    layer = nn.Linear(width, width_out, device=device)
    nn.init.normal_(layer.weight, std=STANDARD_DEVIATION)
    nn.init.zeros_(layer.bias)
    return layer


def plain_bottleneck(width: int, rank: int, width_out: int, device: torch.device) -> Bottleneck:
    """A bottleneck of two linear layers."""
    return Bottleneck(linear(width, rank, device), linear(rank, width_out, device))


def change_output(module: nn.Module, adapter: nn.Module) -> None:
    """Let an adapter change a module's output, (..., d) -> (..., d). The module has it as its part `adapter`."""
    module.adapter = adapter
    module.register_forward_hook(_changed)


def change_input(module: nn.Module, adapter: nn.Module) -> None:
    """Let an adapter change what a module reads, (..., d) -> (..., d). The module has it as its part `adapter`."""
    module.adapter = adapter
    module.register_forward_pre_hook(_changed_input)


def add_in_parallel(module: nn.Module, adapter: nn.Module) -> None:
    """Let an adapter read what a module reads, and add what it makes of it to the module's output."""
    module.adapter = adapter
    module.register_forward_hook(_added_in_parallel)


def note_input(module: nn.Module) -> None:
    """Let a module that is the first to read a sub-layer's input x, (B, T, d), note it for `noted_input`."""
    module.register_forward_pre_hook(_note_input)


def noted_input() -> Tensor:
    """x of the sub-layer that is running in this thread."""
    x = _INPUT.get()
    _INPUT.set(None)  # keep nothing alive until the next call
    return x


def change_sub_layer(text_model: nn.Module, first: str, last: str, adapter: nn.Module) -> None:
    """Let an adapter change a sub-layer's output by what the sub-layer has read, (..., d) both -> (..., d).

    Args:
        first: name of the module that reads the sub-layer's input.
        last: name of the module that gives its output, which then has the adapter as its part `adapter`.
    """
    note_input(text_model.get_submodule(first))
    module = text_model.get_submodule(last)
    module.adapter = adapter
    module.register_forward_hook(_changed_by_input)


# functions of this module, since hooks are copied and pickled with their model


def _changed(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.adapter(output)


def _changed_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return module.adapter(args[0]), *args[1:]


def _added_in_parallel(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.adapter(args[0]).to(output.dtype)


def _note_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    _INPUT.set(args[0])


def _changed_by_input(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.adapter(output, noted_input())


def parts_of(text_model: nn.Module) -> Structure:
    """The parts of a text model, whose feed-forward parts end in linear modules. Raises RoutevlError where they are not found."""
    try:
        structure = structure_of(text_model)
        structure.ends_of_feed_forward()
    except RoutevlError as error:  # its advice, to name modules, is for methods that can be told them
        raise RoutevlError(str(error).partition("; ")[0]) from error
    return structure
