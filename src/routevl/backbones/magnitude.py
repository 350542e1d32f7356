"""Pruning by magnitude: the smallest entries of all linear weights, compared over the whole model, become zero."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routevl.backbones.derivations import MagnitudeOptions
from routevl.backbones.pruning import prunable, pruned_copy, smallest


def prune(source: Path, options: MagnitudeOptions, output: Path) -> dict[str, Any]:
    """Copy a backbone's folder with the floor(sparsity × entries) smallest entries of its linear weights set to zero.

    Biases, norms, embeddings and heads are left alone.

    Returns:
        how many entries were compared, and how many of them are zero now.

    Raises:
        RoutevlError: config.json does not say which class of transformers the weights are of.
    """
    return pruned_copy(source, output, partial(_zero_smallest, sparsity=options.sparsity))


def _zero_smallest(model: nn.Module, sparsity: float) -> dict[str, int]:
    weights = [module.weight.detach() for module in prunable(model).values()]
    magnitudes = torch.cat([weight.abs().flatten().float() for weight in weights])
    chosen = smallest(magnitudes, int(sparsity * len(magnitudes)))
    for weight, mask in zip(weights, chosen.split([weight.numel() for weight in weights]), strict=True):
        weight[mask.view_as(weight)] = 0
    return {"entries": len(magnitudes), "zero": sum(int((weight == 0).sum()) for weight in weights)}
