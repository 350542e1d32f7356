"""The search of DAS: which layers a task can do without.

Every layer has a gate g, p = σ(g) is how likely it is to be skipped. While adapters are trained with other layers skipped at each
step, gates move along the policy gradient of a reward on validation examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from routevl.errors import RoutevlError
from routevl.methods.das.layer import Detour
from routevl.training.optimisation import optimisation_of

if TYPE_CHECKING:
    from routevl.methods.das import DAS
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


class Gates:
    """The gates of a search, and which layers are skipped at each of its steps.

    Attributes:
        values: g of each layer, (n,) float64.

    Raises:
        RoutevlError: as `chosen`; fewer sets of layers than are to be compared.
    """

    def __init__(self, layers: int, options: DAS.Options, seed: int) -> None:
        self.values = torch.zeros(layers, dtype=torch.float64)
        chosen(self.values.tolist(), options.skipped)
        if (sets := math.comb(layers, options.skipped)) < options.subsets:
            raise RoutevlError(
                f"das: subsets is {options.subsets}, but there are {sets} sets of layers to skip: set a smaller subsets"
            )
        self.options = options
        self.since = 0  # steps since they moved; it runs on through the epochs in which they do not
        self.generator = torch.Generator().manual_seed(seed)

    def next_step(self, epoch: int, losses_of: Callable[[Sequence[Sequence[int]]], Tensor]) -> tuple[int, ...]:
        """The layers that are skipped at the next step, which is in this epoch; before, the gates move where it is time.

        Args:
            losses_of: sets of layers -> losses as `moved` gets them.
        """
        if epoch >= self.options.still_epochs and self.since >= self.options.every:
            sets = drawn_apart(self.values, self.options.skipped, self.options.subsets, self.generator)
            self.values = moved(self.values, sets, losses_of(sets), self.options.reward_scale)
            self.since = 0
        self.since += 1
        return drawn(self.values, self.options.skipped, self.generator)

    def tensors(self) -> dict[str, Tensor]:
        """See `routevl.training.prepared.State`."""
        return {"values": self.values, "since": torch.tensor(self.since), "generator": self.generator.get_state()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `routevl.training.prepared.State`."""
        self.values, self.since = tensors["values"], int(tensors["since"])
        self.generator.set_state(tensors["generator"])


def search(
    task: Task, batches: Batches, groups: Callable[..., list[dict[str, Any]]], detours: list[Detour], options: DAS.Options
) -> Tensor:
    """Train the adapters with other layers skipped at each step, and move the gates.

    Args:
        task: its model has detours that are not skipped yet.
        groups: as `Method.groups`.

    Returns:
        The gate of each detour: (n,) float64.

    Raises:
        RoutevlError: as `Gates`, and as `Batches.steps`.
    """
    gates = Gates(len(detours), options, task.settings.seed)  # refuses before the work
    model, validation = task.model, batches.validation()
    steps = options.search_epochs * len(batches.of_epoch(0))
    optimisation = optimisation_of(task.settings, groups(model, task.settings.learning_rate), steps)
    model.train()
    for epoch, batch in batches.steps(options.search_epochs, optimisation, gates):
        skip(detours, gates.next_step(epoch, lambda sets: losses_without(model, detours, sets, validation)))
        model(**batch)["loss"].backward()
        optimisation.step()
    return gates.values


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
