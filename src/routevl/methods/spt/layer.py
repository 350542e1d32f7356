"""What SPT trains: single entries of a parameter, and modules beside the matrices of a frozen module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.utils import parametrize

from routevl.backbones.matrices import joined, matrices_of
from routevl.backbones.skeleton import widths_of
from routevl.backbones.structure import Fused
from routevl.errors import RoutevlError
from routevl.methods.spt.choice import ENTRIES, MODULES, parameters_of, ranked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from routevl.methods.spt import Spt


class Entries(nn.Module):
    """W + S: a frozen parameter with trained numbers, zero at the start, added at some of its places.

    Args:
        places: flat places in the parameter, (c,) int64.
    """

    def __init__(self, places: Tensor, parameter: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", places.to(parameter.device), persistent=False)
        self.values = nn.Parameter(parameter.new_zeros(len(places)))

    def forward(self, parameter: Tensor) -> Tensor:
        """Any shape -> the same."""
        return parameter.flatten().index_add(0, self.places, self.values).view_as(parameter)


class DropPath(nn.Module):
    """In training a share of the examples becomes zero, and the others are scaled so that the mean stays."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, ..., d) -> the same."""
        if not self.training or self.share == 0:
            return hidden_states
        kept = hidden_states.new_empty((len(hidden_states), *[1] * (hidden_states.dim() - 1))).bernoulli_(1 - self.share)
        return hidden_states * kept / (1 - self.share)


def low_rank(columns: int, rows: int, r: int, dropout: float = 0.0, drop_path: float = 0.0) -> nn.Sequential:
    """B A x, with A: columns -> r and B: r -> rows, B zero at the start."""
    down, up = nn.Linear(columns, r, bias=False), nn.Linear(r, rows, bias=False)
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(up.weight)
    return nn.Sequential(nn.Dropout(dropout), down, up, DropPath(drop_path))


def bottleneck(rows: int, r: int, dropout: float = 0.0, drop_path: float = 0.0) -> nn.Sequential:
    """U gelu(D y), with D: rows -> r and U: r -> rows, each with a bias, U and the biases zero at the start; gelu is GELU's erf
    form."""
    down, up = nn.Linear(rows, r), nn.Linear(r, rows)
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    for tensor in (down.bias, up.weight, up.bias):
        nn.init.zeros_(tensor)
    return nn.Sequential(nn.Dropout(dropout), down, nn.GELU(), up, DropPath(drop_path))


class Updates(nn.Module):
    """What is added to some of the projections that a module computes.

    Args:
        updates: number of the projection -> what computes its update.
        fused: how the module holds several projections; None where it is one.
        of_input: an update reads what the module reads, (B, ..., columns); else its projection as the module computes it,
            (B, ..., rows).
    """

    def __init__(self, updates: Mapping[int, nn.Module], fused: Fused | None, of_input: bool) -> None:
        super().__init__()
        self.updates = nn.ModuleDict({str(number): update for number, update in updates.items()})
        self.fused, self.of_input = fused, of_input

    def forward(self, hidden_states: Tensor, output: Tensor) -> Tensor:
        """The module's input (B, ..., columns) and output (B, ..., all rows) -> the changed output."""
        projections = matrices_of(output, self.fused, -1)
        for number, update in self.updates.items():
            own = projections[int(number)]
            projections[int(number)] = own + update(hidden_states if self.of_input else own).to(own.dtype)
        return joined(projections, self.fused, -1)


def _updated(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.adapter(args[0], output)  # a function of this file, since hooks are copied and pickled with their model


def update_outputs(
    module: nn.Module, fused: Fused | None, chosen: Collection[int], new: Callable[[int, int], nn.Module], of_input: bool
) -> None:
    """Let updates change the chosen ones of the projections of a linear module, which has them as its part `adapter`.

    Args:
        new: numbers of the module's inputs and of the projection's outputs -> what computes the update of a projection.
        of_input: as of `Updates`.
    """
    columns, rows = widths_of(module)
    widths = [fused.groups * width for width in fused.widths] if fused else [rows]
    module.adapter = Updates({n: new(columns, widths[n]) for n in chosen}, fused, of_input).to(module.weight.device)
    module.register_forward_hook(_updated)


def train_entries(module: nn.Module, name: str, places: Tensor) -> None:
    """Let the entries of a module's parameter at flat places (c,) be trained; the parameter itself where that is all of it."""
    parameter = module.get_parameter(name)
    if len(places) == parameter.numel():
        parameter.requires_grad_(True)
    elif len(places):
        parametrize.register_parametrization(module, name, Entries(places, parameter))


def train_chosen(text_model: PreTrainedModel, prepared: Mapping[str, Tensor], options: Spt.Options) -> None:
    """Let what is chosen, as `choice_of` has it, of a frozen text model be trained.

    Raises:
        KeyError: the choice is of a text model with other parameters.
        RoutevlError: it is of one with smaller or larger ones.
    """
    sizes = (options.r, options.dropout, options.drop_path)
    of_input = options.kind == "lora"
    for name, (part, parameter_name) in parameters_of(ranked(text_model)).items():
        parameter = part.module.get_parameter(parameter_name)
        places = prepared[ENTRIES + name]
        modules = prepared[MODULES + name] if parameter.dim() > 1 else places.new_zeros(1)
        if len(places) and places.max() >= parameter.numel():
            raise RoutevlError(f"--prepared was found for another text model: {name} has only {parameter.numel()} entries")
        train_entries(part.module, parameter_name, places)
        if modules.any():
            update_outputs(
                part.module,
                part.fused,
                modules.nonzero()[:, 0].tolist(),
                lambda columns, rows: low_rank(columns, rows, *sizes) if of_input else bottleneck(rows, *sizes),
                of_input,
            )
