"""Compacter: VL-Adapter's bottlenecks, with projections that are sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routevl.methods.vl_adapter import TaskOptions, VLAdapter
from routevl.options import option

if TYPE_CHECKING:
    import torch
    from torch import nn

PRODUCTS = "Kronecker products in a projection; divides the widths of the hidden states and of the bottlenecks"


class PhmAdapter(VLAdapter):
    """h + the bottleneck of h, as VL-Adapter, with projections x H + b, H = Σ_i kron(R_i, W_i), i = 1 to n: R (n, n, n) and W
    (n, d / n, r / n) of each projection's own."""

    @dataclass(frozen=True)
    class Options(TaskOptions):
        """Options of the PHM-Adapter."""

        n: int = option(PRODUCTS, 2, least=1)

    def projections(self, device: torch.device) -> Callable[[int, int], nn.Module]:
        from routevl.methods.compacter.layer import PhmLinear, full_weights, new_rule

        n = self.options.n
        return lambda width, width_out: PhmLinear(new_rule(n, device), full_weights(n, width, width_out, device))


class Compacter(VLAdapter):
    """h + the bottleneck of h, as the PHM-Adapter's, with one R for the whole model and each W_i of rank one."""

    @dataclass(frozen=True)
    class Options(TaskOptions):
        """Options of Compacter."""

        n: int = option(PRODUCTS, 4, least=1)

    def projections(self, device: torch.device) -> Callable[[int, int], nn.Module]:
        from routevl.methods.compacter.layer import PhmLinear, new_rule, rank_one_weights

        n, rule = self.options.n, new_rule(self.options.n, device)
        return lambda width, width_out: PhmLinear(rule, rank_one_weights(n, width, width_out, device))
