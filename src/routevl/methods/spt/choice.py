"""Which weights SPT trains, and how: ranked together by the squares of their gradients, under a budget.

The τ weights with the largest squares are taken. A matrix (rows, columns) with c of them, and alpha c at least what a module
beside it costs, gets that module; else its c entries are trained. A norm or bias of n numbers, c of them taken, is trained whole
where beta c is at least n. Of several τ that one counts whose total of parameters is nearest to the budget, of equally near ones
the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from routevl.backbones.matrices import matrices_of, turned
from routevl.backbones.structure import Fused
from routevl.errors import RoutevlError
from routevl.methods.base import layer_norms
from routevl.methods.bottleneck.layer import parts_of

if TYPE_CHECKING:
    from routevl.methods.spt import Spt

STEPS = 79  # numbers of weights that are tried ...
STEPS_TO_BUDGET = 20  # ... at equal distances, so many of them up to the budget itself
ENTRIES, MODULES = "entries.", "modules."  # what is chosen of a parameter, by its name: see `choice_of`

Key = TypeVar("Key", bound=Hashable)


# ------------------------------------------------------------------------------------------- what is ranked


class Part(NamedTuple):
    """A module whose weights are ranked, and how it holds several projections; None where it does not."""

    module: nn.Module
    fused: Fused | None

    def split(self, parameter: str, tensor: Tensor) -> list[Tensor]:
        """A tensor that belongs to a parameter of the module, such as its squared gradients: of each projection the (rows,
        columns) of a matrix or the (n,) of a vector."""
        return matrices_of(turned(self.module, tensor) if parameter == "weight" else tensor, self.fused)


def ranked(text_model: PreTrainedModel) -> dict[str, Part]:
    """The modules whose weights are ranked, by name and in the model's order: the matrices of attention and of feed-forward
    parts, with their biases, and the norms; no embeddings and no head. Raises RoutevlError as `parts_of`, or without norms."""
    found = parts_of(text_model)
    matrices = {*found.roles, *found.attention_outputs, *found.cross_attention_outputs}
    matrices |= {*found.feed_forward_outputs}.union(*found.feed_forward_inputs.values())
    names = {*matrices, *layer_norms(text_model)}
    return {name: Part(module, found.fused.get(name)) for name, module in text_model.named_modules() if name in names}


# ----------------------------------------------------------------------------------------------- the choice


class Choice(NamedTuple):
    """What is trained.

    Attributes:
        modules: the matrices that get a module.
        entries: where the trained entries of the others are, flat and sorted: (c,) int64, of a whole vector all.
        total: how many parameters that are.
        taken: τ.
    """

    modules: set[Any]
    entries: dict[Any, Tensor]
    total: int
    taken: int


def cost_of(kind: str, r: int) -> Callable[[int, int], int]:
    """What makes, of a matrix's numbers of rows and columns, the number of parameters of the module that it gets."""
    return {"lora": lambda rows, columns: r * (rows + columns), "adapter": lambda rows, columns: 2 * rows * r + r + rows}[kind]


def choose(
    squares: Mapping[Key, Tensor], cost: Callable[[int, int], int], budget: float, step: int, alpha: float, beta: float
) -> Choice:
    """Choose among matrices (rows, columns) and vectors (n,) by their entries' squared gradients.

    Args:
        step: τ = step, 2 step, ... is tried, STEPS times.
    """
    tensors = list(squares.values())
    owners, places = _largest(tensors, STEPS * step)
    prices = torch.tensor([cost(*t.shape) if t.dim() > 1 else len(t) for t in tensors], dtype=torch.float64)
    enough = prices / torch.tensor([alpha if t.dim() > 1 else beta for t in tensors], dtype=torch.float64)
    tried = [min(step * n, len(owners)) for n in range(1, STEPS + 1)]
    counts = torch.stack([owners[:taken].bincount(minlength=len(tensors)) for taken in tried])  # (STEPS, tensors)
    totals = torch.where(counts >= enough, prices, counts.double()).sum(1)
    gaps = (totals - budget).abs()
    best = int((gaps == gaps.min()).nonzero().max())
    whole, owners, places = counts[best] >= enough, owners[: tried[best]], places[: tried[best]]
    modules, entries = set(), {}
    for number, (key, tensor) in enumerate(squares.items()):
        if whole[number] and tensor.dim() > 1:
            modules.add(key)
            entries[key] = places[:0]
        else:
            entries[key] = torch.arange(len(tensor)) if whole[number] else places[owners == number].sort().values
    return Choice(modules, entries, int(totals[best]), tried[best])


def _largest(tensors: list[Tensor], most: int) -> tuple[Tensor, Tensor]:
    """The largest numbers of all tensors, the largest first and of equal ones the first: whose they are and where they are in
    it, both (most,) int64, or as many as there are."""
    values, owners, places = torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    for number, tensor in enumerate(tensors):
        own = tensor.flatten().cpu()
        candidates = (own > values[-1]).nonzero()[:, 0] if len(values) == most else torch.arange(len(own))
        together = torch.cat([values, own[candidates]])
        order = together.argsort(descending=True, stable=True)[:most]
        values = together[order]
        owners = torch.cat([owners, torch.full_like(candidates, number)])[order]
        places = torch.cat([places, candidates])[order]
    return owners, places


def choice_of(parts: Mapping[str, Part], squares: Mapping[str, Tensor], budget: float, options: Spt.Options) -> dict[str, Tensor]:
    """What is trained of a text model.

    Args:
        parts: of `ranked`.
        squares: name of each parameter of the text model -> its entries' squared gradients.
        budget: parameters to train.

    Returns:
        "entries.<parameter>" -> the places of its trained entries in it, flat and sorted: (c,) int64, possibly none;
        "modules.<weight>" -> which of its projections get a module, one where it is not fused: (P,) bool.

    Raises:
        RoutevlError: a gradient that is not finite.
    """
    pieces: dict[tuple[str, int], Tensor] = {}  # name of the parameter and number of the projection -> squared gradients
    for name, (part, parameter) in parameters_of(parts).items():
        if not squares[name].isfinite().all():
            raise RoutevlError(f"spt: the gradients of {name} are not finite: set precision=float32 or take another model")
        pieces |= {(name, number): own for number, own in enumerate(part.split(parameter, squares[name]))}
    step = max(1, round(budget / STEPS_TO_BUDGET))
    choice = choose(pieces, cost_of(options.kind, options.r), budget, step, options.alpha, options.beta)
    found = {}
    for name, (part, parameter) in parameters_of(parts).items():
        where = part.split(parameter, torch.arange(squares[name].numel()).view(squares[name].shape))
        chosen = [own.flatten()[choice.entries[name, number]] for number, own in enumerate(where)]
        found[ENTRIES + name] = torch.cat(chosen).sort().values
        if squares[name].dim() > 1:
            found[MODULES + name] = torch.tensor([(name, number) in choice.modules for number in range(len(where))])
    return found


def parameters_of(parts: Mapping[str, Part]) -> dict[str, tuple[Part, str]]:
    """The ranked parameters by their names in the text model: whose each is, and its name there."""
    named = ((module, part, parameter) for module, part in parts.items() for parameter, _ in part.module.named_parameters())
    return {f"{module}.{parameter}": (part, parameter) for module, part, parameter in named}
