"""The plain bottleneck, how it is drawn, and how it comes to change what a frozen module computes."""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers.activations import gelu_new

from routevl.backbones.structure import Structure, structure_of
from routevl.errors import RoutevlError

STANDARD_DEVIATION = 0.02  # of weights at the start: BART's own, whose initialiser runs over the original adapters

_INPUT: ContextVar[Tensor | None] = ContextVar("routevl_sub_layer_input", default=None)


class Bottleneck(nn.Module):
    """U gelu_new(D x), with D: d -> r and U: r -> d_out, each with a bias; gelu_new is GELU's tanh form."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d) -> (..., d_out)."""
        return self.up(gelu_new(self.down(hidden_states)))


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


# functions of this module, since hooks are copied and pickled with their model


def _changed(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.adapter(output)


def _added_in_parallel(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.adapter(args[0])


def _note_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    _INPUT.set(args[0])


def parts_of(text_model: nn.Module) -> Structure:
    """The parts of a text model, whose feed-forward parts end in linear modules. Raises RoutevlError where they are not found."""
    try:
        structure = structure_of(text_model)
        structure.ends_of_feed_forward()
    except RoutevlError as error:  # its advice, to name modules, is for methods that can be told them
        raise RoutevlError(str(error).partition("; ")[0]) from error
    return structure
