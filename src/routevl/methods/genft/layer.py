"""The generator of updates, and what stands beside each frozen module that it updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from routevl.backbones.matrices import joined, matrices_of, turned
from routevl.backbones.structure import QUERY, VALUE, Fused, Structure
from routevl.conditioning import Conditioning
from routevl.errors import RoutevlError

ADAPTED = (QUERY, VALUE)
STANDARD_DEVIATION = 0.02  # of what the vision code draws
# name -> activation σ, of (...) to the same
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda values: values,
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "gelu": nn.functional.gelu,
    "tanh": torch.tanh,
}


class Rows(nn.Module):
    """What the generator has of a matrix of its own, or of the two of an attention: a (m, d) and b (d, m)."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.a, self.b = a, b


class Half(nn.Module):
    """σ_o([B, b] σ_i([A; a] x + c) + e) for each row x of a matrix: A (h, d), B (d, h), c (h + m), e (d); a and b are given."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter, c: nn.Parameter | None, e: nn.Parameter | None) -> None:
        super().__init__()
        self.a, self.b, self.c, self.e = a, b, c, e

    def forward(self, matrix: Tensor, rows: Rows | None, factor: float, inner: str, outer: str) -> Tensor:
        """(d, d) -> (d, d); `factor` is that of A, a, B and b."""
        a = self.a if rows is None else torch.cat([self.a, rows.a])  # (h + m, d)
        b = self.b if rows is None else torch.cat([self.b, rows.b], dim=1)  # (d, h + m)
        hidden = ACTIVATIONS[inner](nn.functional.linear(matrix, factor * a, self.c))
        return ACTIVATIONS[outer](nn.functional.linear(hidden, factor * b, self.e))


class Generator(nn.Module):
    """s ΔW of a frozen matrix W: the first half's output for ρ W, turned, is what the second half reads.

    Args:
        width: d, of all matrices.
        options: of `routevl.methods.genft.GenFT`.
        transposed: whether s ΔWᵀ is wanted, and ρ is a factor of the halves' matrices in place of W's. These are then drawn from
            N(0, 0.02²), cut at 2, else as those of nn.Linear.
    """

    def __init__(self, width: int, options: Any, transposed: bool, device: torch.device) -> None:
        super().__init__()
        self.width, self.options, self.transposed = width, options, transposed
        self.drop = nn.Dropout(options.dropout)
        self.halves = nn.ModuleList(self._new_half(device) for _ in range(2 if options.h else 0))

    def _new_half(self, device: torch.device) -> Half:
        width, h, m = self.width, self.options.h, self.options.m
        a, b = self._drawn(h, width, device), self._drawn(width, h, device)
        if not self.options.bias:
            return Half(a, b, None, None)
        return Half(a, b, _uniform(h + m, width, device), _uniform(width, h, device))

    def _drawn(self, rows: int, columns: int, device: torch.device) -> nn.Parameter:
        if not self.transposed:
            return _uniform((rows, columns), columns, device)
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, columns, device=device), std=STANDARD_DEVIATION))

    def new_rows(self, device: torch.device) -> Rows | None:
        """What a matrix has of its own at the start. In the vision code b is zero."""
        if not self.options.m:
            return None
        rows = Rows(self._drawn(self.options.m, self.width, device), self._drawn(self.width, self.options.m, device))
        if self.transposed:
            nn.init.zeros_(rows.b)
        return rows

    def forward(self, weight: Tensor, rows: Rows | None) -> Tensor:
        """W (d, d), as (outputs, inputs) -> what is added to it, (d, d). Without shared rows (h = 0) ΔW is b a."""
        rho = self.options.rho if self.options.m else 1.0
        of_weight, of_matrices = (1.0, rho) if self.transposed else (rho, 1.0)
        activations = self.options.inner, self.options.outer
        update = of_weight * weight
        for number, half in enumerate(self.halves):
            update = self.drop(half(update.T if number else update, rows, of_matrices, *activations))
        if not self.halves:
            update = rows.b @ rows.a
        return self.options.scale * (update.T if self.transposed else update)


def _uniform(shape: int | tuple[int, int], columns: int, device: torch.device) -> nn.Parameter:
    """As nn.Linear's weight and bias, for so many inputs."""
    bound = 1 / math.sqrt(columns)
    return nn.Parameter(nn.init.uniform_(torch.empty(shape, device=device), -bound, bound))


class Update(nn.Module):
    """What the update of a frozen module's matrix adds to its output.

    Args:
        fused: how the module holds several matrices; None where it is one.
        roles: what each of its matrices computes.
        rows: what the generator has of each that is updated.
        conditioning: keeps the update while tokens are generated.
    """

    def __init__(
        self,
        generator: Generator,
        fused: Fused | None,
        roles: Sequence[str],
        rows: Iterable[Rows | None],
        conditioning: Conditioning,
    ) -> None:
        super().__init__()
        self.generator, self.fused, self.roles, self.conditioning = generator, fused, roles, conditioning
        self.rows = nn.ModuleList(rows)

    def of_weight(self, weight: Tensor) -> Tensor:
        """What is added to the module's weight: (d_out, d) -> the same."""
        rows, updates = iter(self.rows), []
        for role, matrix in zip(self.roles, matrices_of(weight, self.fused), strict=True):
            updates.append(self.generator(matrix, next(rows)) if role in ADAPTED else torch.zeros_like(matrix))
        return joined(updates, self.fused)

    def forward(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        """(..., d), and the module's weight (d_out, d) -> (..., d_out)."""
        place = (self, hidden_states.dtype, hidden_states.device)
        return nn.functional.linear(hidden_states, self.conditioning.kept(place, lambda: self.of_weight(weight)))


def _updated(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.adapter(args[0], turned(module, module.weight))


def generate_updates(text_model: nn.Module, parts: Structure, options: Any, transposed: bool, of_attention: bool) -> None:
    """Let one generator update the query and value matrices of a model. The modules that hold them have `Update` as `adapter`.

    Args:
        options, transposed: as `Generator`.
        of_attention: whether the modules of one attention, which have the same parent, have one `Rows` in common.

    Raises:
        RoutevlError: a matrix is not square, or not as wide as the others.
    """
    device = text_model.device
    names = parts.computing(*ADAPTED)
    width = _width_of(text_model, parts, names)
    generator, conditioning = Generator(width, options, transposed, device), Conditioning(text_model, {})
    of_parent: dict[str, Rows | None] = {}
    for name in names:
        roles, rows, parent = _roles(parts, name), [], name.rpartition(".")[0]
        for _ in (role for role in roles if role in ADAPTED):
            rows.append(of_parent[parent] if of_attention and parent in of_parent else generator.new_rows(device))
            of_parent[parent] = rows[-1]
        module = text_model.get_submodule(name)
        module.adapter = Update(generator, parts.fused.get(name), roles, rows, conditioning)
        module.register_forward_hook(_updated)


def _roles(parts: Structure, name: str) -> Sequence[str]:
    """Of each matrix that a module holds what it computes."""
    return parts.fused[name].roles if name in parts.fused else tuple(parts.roles[name])


def _width_of(text_model: nn.Module, parts: Structure, names: Iterable[str]) -> int:
    """The width of all matrices that are updated. Raises RoutevlError where they have not one."""
    width = 0
    for name in names:
        module = text_model.get_submodule(name)
        matrices = matrices_of(turned(module, module.weight), parts.fused.get(name))
        for role, matrix in zip(_roles(parts, name), matrices, strict=True):
            width = width or matrix.shape[1]
            if role in ADAPTED and matrix.shape != (width, width):
                raise RoutevlError(
                    f"genft: the {role} matrix of {name} in the text backbone is {tuple(matrix.shape)}, not ({width}, {width}): "
                    "one generator needs square matrices of one width; take another text backbone"
                )
    return width
