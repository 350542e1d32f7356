"""The matrices that linear modules hold: which way round they are, and several in one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from routevl.backbones.structure import Fused


def turned(module: nn.Module, weight: Tensor) -> Tensor:
    """A linear module's weight as (rows, columns) = (outputs, inputs), and back; it shares its memory."""
    return weight.T if isinstance(module, Conv1D) else weight


def matrices_of(tensor: Tensor, fused: Fused | None, dim: int = 0) -> list[Tensor]:
    """What belongs to each projection of a module in a tensor that has the module's outputs along `dim`: its weight (outputs,
    inputs), its bias or what it puts out."""
    if fused is None:
        return [tensor]
    dim %= tensor.dim()
    return [part.flatten(dim, dim + 1) for part in tensor.unflatten(dim, (fused.groups, -1)).split(fused.widths, dim + 1)]


def joined(matrices: list[Tensor], fused: Fused | None, dim: int = 0) -> Tensor:
    """The inverse of `matrices_of`."""
    if fused is None:
        return matrices[0]
    dim %= matrices[0].dim()
    return torch.cat([matrix.unflatten(dim, (fused.groups, -1)) for matrix in matrices], dim + 1).flatten(dim, dim + 1)
