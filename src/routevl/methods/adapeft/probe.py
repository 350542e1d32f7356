"""How much the loss falls along the optimiser's step, candidate by candidate, and which candidates a budget goes to.

With u the step's direction restricted to candidate k, and all else at rest,

    L(w - η u) - L(w) ≈ a η² / 2 - b η          a = uᵀ H u,  b = Gᵀ u

a and b are fitted by least squares to the changes of the loss on the step's own batch at four η around the learning rate. The
fit counts where a > 0, b > 0 and R² > 0.99: the candidate's value is then b² / 2a, what the best η would lower the loss by, and
else 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from routevl.errors import RoutevlError
from routevl.tasks.base import VisionLanguageModel

POINTS = (-2.0, -1.0, 1.0, 2.0)  # η in learning rates: twice as many as a and b, so that R² tells something
LEAST_R2 = 0.99
VALUE, PARAMETERS, ACCEPTED, SELECTED = "value.", "parameters.", "accepted.", "selected."


class Fit(NamedTuple):
    """The parabola of a candidate at a step; R² is that of a fit through the origin, 1 - Σ (residual)² / Σ (change)²."""

    a: float
    b: float
    r2: float

    @property
    def accepted(self) -> bool:
        """Whether it has a minimum ahead, and the loss follows it."""
        return self.a > 0 and self.b > 0 and self.r2 > LEAST_R2

    @property
    def value(self) -> float:
        """What the loss falls by at the minimum; 0 where it is not accepted."""
        return self.b**2 / (2 * self.a) if self.accepted else 0.0


def fit(rates: Tensor, changes: Tensor) -> Fit:
    """The parabola through the origin of changes of the loss (n,) at learning rates (n,)."""
    rates, changes = rates.double(), changes.double()
    terms = torch.stack([rates**2 / 2, -rates], dim=1) / rates.abs().max()  # of a size: learning rates are small
    found = torch.linalg.lstsq(terms, changes).solution
    total = changes.square().sum()
    r2 = 1 - (changes - terms @ found).square().sum() / total if total > 0 else torch.tensor(0.0)
    a, b = (found / rates.abs().max()).tolist()
    return Fit(a, b, r2.item())


@torch.no_grad()
def fit_along(
    loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], directions: Sequence[Tensor], learning_rate: float
) -> Fit:
    """The parabola of a loss along directions of some parameters, which are left as they were, to the bit.

    Args:
        loss: computes it, a scalar, without randomness.
    """
    start, rates = [parameter.clone() for parameter in parameters], learning_rate * torch.tensor(POINTS, dtype=torch.float64)
    here, losses = loss().double(), []
    for rate in rates.tolist():
        for parameter, at, direction in zip(parameters, start, directions, strict=True):
            parameter.copy_(at - rate * direction)
        losses.append(loss().double())
    for parameter, at in zip(parameters, start, strict=True):
        parameter.copy_(at)
    return fit(rates, (torch.stack(losses) - here).cpu())


def measured(
    model: VisionLanguageModel,
    batches: Iterable[Mapping[str, Tensor]],
    candidates: Mapping[str, Sequence[nn.Parameter]],
    learning_rate: float,
    every: int,
) -> dict[str, list[Fit]]:
    """Train all that is trainable with Adam, without dropout, and fit each candidate's parabola at the first step and every so
    many-th after it, on this step's batch and before it is made."""
    model.eval()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    fits: dict[str, list[Fit]] = {name: [] for name in candidates}
    for number, batch in enumerate(batches):
        optimiser.zero_grad()
        model(**batch)["loss"].backward()
        if number % every:
            optimiser.step()
            continue
        before = _weights(optimiser)
        optimiser.step()
        after = _weights(optimiser)
        _set(before)
        for name, parameters in candidates.items():
            moved = [parameter for parameter in parameters if parameter in optimiser.state]
            directions = [_direction(optimiser, parameter) for parameter in moved]
            fits[name].append(fit_along(lambda: model(**batch)["loss"], moved, directions, learning_rate))  # noqa: B023 (run here)
        _set(after)
    return fits


def _weights(optimiser: torch.optim.Optimizer) -> dict[nn.Parameter, Tensor]:
    """Copies of an optimiser's parameters."""
    return {p: p.detach().clone() for group in optimiser.param_groups for p in group["params"]}


@torch.no_grad()
def _set(weights: Mapping[nn.Parameter, Tensor]) -> None:
    for parameter, weight in weights.items():
        parameter.copy_(weight)


def _direction(optimiser: torch.optim.Adam, parameter: nn.Parameter) -> Tensor:
    """What Adam's last step moved a parameter along: m / (√v + ε), both corrected for their start."""
    (group,), state = optimiser.param_groups, optimiser.state[parameter]
    (first, second), step = group["betas"], state["step"].item()
    mean, square = state["exp_avg"] / (1 - first**step), state["exp_avg_sq"] / (1 - second**step)
    return mean / (square.sqrt() + group["eps"])


def selected(values: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> list[str]:
    """The candidates with the largest value for their size, in this order, as long as all of them together have no more
    parameters than the budget; of equal ones the first. Those of a smaller budget are among those of a larger one."""
    ranked = sorted((name for name in values if values[name] > 0), key=lambda name: -values[name] / sizes[name])
    chosen: list[str] = []
    for name in ranked:
        budget -= sizes[name]
        if budget < 0:
            break
        chosen.append(name)
    return chosen


def table_of(fits: Mapping[str, Sequence[Fit]], sizes: Mapping[str, int], budget: float) -> dict[str, Tensor]:
    """The table of candidates, scalars by column and candidate: "value.", the mean of its fits' values, and "accepted.", the
    share of them that are accepted, float64; "parameters.", int64; "selected.", bool.

    Raises:
        RoutevlError: no fit of any candidate was accepted, or the budget is less than what the best candidate needs.
    """
    values = {name: sum(f.value for f in of) / max(1, len(of)) for name, of in fits.items()}
    chosen = selected(values, sizes, budget)
    if not any(values.values()):
        raise RoutevlError(
            "adapeft: the loss followed no candidate's parabola in the probe: raise batches or set another learning_rate"
        )
    if not chosen:
        best = max(values, key=lambda name: values[name] / sizes[name])
        raise RoutevlError(
            f"adapeft: the best candidate, {best}, has {sizes[best]} parameters, but share allows {int(budget)}: raise share"
        )
    table = {}
    for name, of in fits.items():
        table[VALUE + name] = torch.tensor(values[name], dtype=torch.float64)
        table[ACCEPTED + name] = torch.tensor(sum(f.accepted for f in of) / max(1, len(of)), dtype=torch.float64)
        table[PARAMETERS + name] = torch.tensor(sizes[name])
        table[SELECTED + name] = torch.tensor(name in chosen)
    return table
