"""Pruning by magnitude: the smallest entries of all linear weights, compared over the whole model, become zero."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from routevl.backbones.derivations import MagnitudeOptions
from routevl.errors import RoutevlError
from routevl.files import read_json


def prune(source: Path, options: MagnitudeOptions, output: Path) -> dict[str, Any]:
    """Copy a backbone's folder with the floor(sparsity × entries) smallest entries of its linear weights set to zero.

    Biases, norms, embeddings and heads are left alone.

    Returns:
        how many entries were compared, and how many of them are zero now.

    Raises:
        RoutevlError: config.json does not say which class of transformers the weights are of.
    """
    config = read_json(source / "config.json")
    if "architecture" in config:
        import timm  # takes seconds to load

        model = timm.create_model(f"local-dir:{source}", pretrained=True)
        pruned = _zero_smallest(_linear_weights(model, but=model.get_classifier()), options.sparsity)
        timm.models.save_for_hf(model, str(output), model_args=dict(config.get("model_args", {})), safe_serialization=True)
    else:
        model_class = getattr(transformers, (config.get("architectures") or [""])[0], None)
        if model_class is None:
            raise RoutevlError(f"backbone {source}: config.json does not say which class of transformers its weights are of")
        model = model_class.from_pretrained(source, dtype="auto", use_safetensors=True)
        pruned = _zero_smallest(_linear_weights(model.base_model), options.sparsity)
        model.save_pretrained(output)
    for path in source.iterdir():  # tokenizer, preprocessing, and a config.json as it was
        if path.suffix != ".safetensors" and not path.name.endswith(".safetensors.index.json"):
            shutil.copy(path, output)
    return pruned


def _linear_weights(model: nn.Module, but: nn.Module | None = None) -> list[torch.Tensor]:
    linear = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not but)
    return [module.weight.detach() for module in linear]


def _zero_smallest(weights: Sequence[torch.Tensor], sparsity: float) -> dict[str, int]:
    """Zero floor(sparsity × entries) entries in place; of those at the threshold the first ones."""
    magnitudes = torch.cat([weight.abs().flatten().float() for weight in weights])
    count = int(sparsity * len(magnitudes))
    if count:
        threshold = magnitudes.kthvalue(count).values
        smallest = magnitudes < threshold
        at_threshold = (magnitudes == threshold).nonzero().flatten()
        smallest[at_threshold[: count - int(smallest.sum())]] = True
        for weight, mask in zip(weights, smallest.split([weight.numel() for weight in weights]), strict=True):
            weight[mask.view_as(weight)] = 0
    return {"entries": len(magnitudes), "zero": sum(int((weight == 0).sum()) for weight in weights)}
