"""The search of DAS: which layers a task can do without.

Every layer has a gate g, p = σ(g) is how likely it is to be skipped. While adapters are trained with other layers skipped at each
step, gates move along the policy gradient of a reward on validation examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from routevl.errors import RoutevlError
from routevl.methods.das.layer import Detour
from routevl.progress import progress
from routevl.training.optimisation import optimisation_of

if TYPE_CHECKING:
    from routevl.tasks.base import Task
    from routevl.training.prepared import Batches


def chosen(gates: Sequence[float], skipped: int) -> list[int]:
    """The numbers of the layers with the largest gates, of equal ones the last, in order.

    Raises:
        RoutevlError: no layer would be left.
    """
    if skipped >= len(gates):
        raise RoutevlError(f"das: skipped is {skipped}, but the text backbone has {len(gates)} layers: set a smaller skipped")
    return sorted(sorted(range(len(gates)), key=lambda number: (gates[number], number))[-skipped:])


def drawn(gates: Tensor, skipped: int, generator: torch.Generator) -> tuple[int, ...]:
    """So many layers, one after another and each with a probability in proportion to σ(g): their numbers, in order."""
    return tuple(torch.multinomial(gates.sigmoid(), skipped, generator=generator).sort().values.tolist())


def drawn_apart(gates: Tensor, skipped: int, number: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """So many such sets, no two alike."""
    sets: dict[tuple[int, ...], None] = {}
    while len(sets) < number:
        sets[drawn(gates, skipped, generator)] = None
    return [*sets]


def moved(gates: Tensor, sets: Sequence[Sequence[int]], losses: Tensor, reward_scale: float = 1.0) -> Tensor:
    """Gates after a move: g_i + (r_j - mean r) p_i (1 - p_i) for each set j that layer i is in, r_j = exp(-loss_j).

    Args:
        gates: (n,).
        sets: the numbers of the skipped layers.
        losses: of the same examples, with the layers of each set skipped: (len(sets),).
        reward_scale: factor of the rewards.
    """
    rewards = reward_scale * (-losses).exp()
    slope = gates.sigmoid() * (1 - gates.sigmoid())
    new = gates.clone()
    for layers, advantage in zip(sets, rewards - rewards.mean(), strict=True):
        new[list(layers)] += advantage * slope[list(layers)]
    return new


def search(
    task: Task, batches: Batches, groups: Callable[..., list[dict[str, Any]]], detours: list[Detour], options: Any
) -> Tensor:
    """Train the adapters with other layers skipped at each step, and move the gates.

    Args:
        task: its model has detours that are not skipped yet.
        groups: as `Method.groups`.
        options: of `routevl.methods.das.DAS`.

    Returns:
        The gate of each detour: (n,) float64.

    Raises:
        RoutevlError: as `chosen`; fewer sets of layers than are to be compared.
    """
    gates = torch.zeros(len(detours), dtype=torch.float64)
    chosen(gates.tolist(), options.skipped)  # refuses before the work
    refuse_too_many_sets(len(detours), options)
    generator = torch.Generator().manual_seed(task.settings.seed)
    model, validation = task.model, batches.validation()
    steps = options.search_epochs * len(batches.of_epoch(0))
    optimisation = optimisation_of(task.settings, groups(model, task.settings.learning_rate), steps)
    model.train()
    since = 0  # steps since the gates moved; it runs on through the epochs in which they do not
    numbered = ((epoch, batch) for epoch in range(options.search_epochs) for batch in batches.of_epoch(epoch))
    for epoch, batch in progress(numbered, steps, "search"):
        if epoch >= options.still_epochs and since >= options.every:
            sets = drawn_apart(gates, options.skipped, options.subsets, generator)
            gates = moved(gates, sets, losses_without(model, detours, sets, validation), options.reward_scale)
            since = 0
        skip(detours, drawn(gates, options.skipped, generator))
        model(**batch)["loss"].backward()
        optimisation.step()
        since += 1
    return gates


def refuse_too_many_sets(layers: int, options: Any) -> None:
    """Raise RoutevlError where there are fewer sets of skipped layers than are compared."""
    if (sets := math.comb(layers, options.skipped)) < options.subsets:
        raise RoutevlError(
            f"das: subsets is {options.subsets}, but there are {sets} sets of layers to skip: set a smaller subsets"
        )


@torch.no_grad()
def losses_without(model: Any, detours: Sequence[Detour], sets: Sequence[Sequence[int]], batch: dict[str, Tensor]) -> Tensor:
    """The loss of one batch with the layers of each set skipped, in the mode that the model is in: (len(sets),) float64, CPU."""
    losses = []
    for layers in sets:
        skip(detours, layers)
        losses.append(model(**batch)["loss"].item())
    return torch.tensor(losses, dtype=torch.float64)


def skip(detours: Sequence[Detour], layers: Sequence[int]) -> None:
    """Let the layers of these numbers be skipped, and no others."""
    for number, detour in enumerate(detours):
        detour.skipped = number in layers
