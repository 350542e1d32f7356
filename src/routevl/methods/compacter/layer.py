"""The projection of Compacter: parameterised hypercomplex multiplication (PHM)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from routevl.errors import RoutevlError


class PhmLinear(nn.Module):
    """x H + b, H = Σ_i kron(R_i, W_i), i = 1 to n.

    Args:
        rule: R, (n, n, n); several projections may have it in common.
        weights: W, (n, d / n, d_out / n), or two factors of it, (n, d / n, 1) and (n, 1, d_out / n).
    """

    def __init__(self, rule: nn.Parameter, weights: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.rule = rule
        self.weights = nn.ParameterList(weights)
        self.bias = nn.Parameter(torch.zeros(len(rule) * self.weights[-1].shape[-1], device=rule.device))

    def matrix(self) -> Tensor:
        """H, (d, d_out)."""
        weights = self.weights[0] if len(self.weights) == 1 else self.weights[0] @ self.weights[1]
        products = torch.einsum("iab,icd->acbd", self.rule, weights)  # (n, d / n, n, d_out / n), summed over i
        return products.flatten(2, 3).flatten(0, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d) -> (..., d_out)."""
        return hidden_states @ self.matrix() + self.bias


def new_rule(n: int, device: torch.device) -> nn.Parameter:
    """R, (n, n, n), from N(0, 0.01²)."""
    return nn.Parameter(nn.init.normal_(torch.empty(n, n, n, device=device), std=0.01))


def full_weights(n: int, width: int, width_out: int, device: torch.device) -> list[nn.Parameter]:
    """W, (n, width / n, width_out / n). Raises RoutevlError where n does not divide both widths."""
    return [_glorot((n, *_divided(n, width, width_out)), device)]


def rank_one_weights(n: int, width: int, width_out: int, device: torch.device) -> list[nn.Parameter]:
    """The factors of W, (n, width / n, 1) and (n, 1, width_out / n). Raises RoutevlError where n does not divide both widths."""
    rows, columns = _divided(n, width, width_out)
    return [_glorot((n, rows, 1), device), _glorot((n, 1, columns), device)]


def _divided(n: int, *widths: int) -> list[int]:
    if wrong := [width for width in widths if width % n]:
        raise RoutevlError(f"n is {n}, which does not divide the width {wrong[0]}: set another n or r")
    return [width // n for width in widths]


def _glorot(shape: tuple[int, int, int], device: torch.device) -> nn.Parameter:
    """Matrices one below the other, each drawn on its own."""
    matrices = torch.empty(shape, device=device)
    for matrix in matrices:
        nn.init.xavier_uniform_(matrix, gain=math.sqrt(2))
    return nn.Parameter(matrices)
