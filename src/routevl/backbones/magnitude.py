"""Pruning by magnitude: the smallest entries of all linear weights, compared over the whole model, become zero."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
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
    """
    names = set(linear_weights(source))
    tensors, metadata = {}, {}
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy(path, output)
            continue
        with safe_open(path, framework="pt") as file:
            metadata[path.name] = file.metadata()
            tensors[path.name] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    weights = [tensor for of_file in tensors.values() for name, tensor in of_file.items() if name in names]
    if len(weights) != len(names):
        raise RoutevlError(f"backbone {source}: its weights lack {len(names) - len(weights)} of {len(names)} linear modules")
    entries = sum(weight.numel() for weight in weights)
    magnitudes = torch.cat([weight.abs().flatten().float() for weight in weights])
    if pruned := int(options.sparsity * entries):
        threshold = magnitudes.kthvalue(pruned).values
        for weight in weights:
            weight[weight.abs() <= threshold] = 0
    for name, of_file in tensors.items():
        save_file(of_file, output / name, metadata=metadata[name])
    return {"entries": entries, "zero": sum(int((weight == 0).sum()) for weight in weights)}


def linear_weights(folder: Path) -> list[str]:
    """The names of the weights of a model's linear modules, but for its heads, as its files have them.

    Raises:
        RoutevlError: not a model of transformers or timm.
    """
    config = read_json(folder / "config.json")
    if "architecture" in config:
        from routevl.backbones.vision import load_vision_backbone  # timm takes seconds to load

        base, prefix = load_vision_backbone(folder).model, ""
    else:
        model_class = getattr(transformers, (config.get("architectures") or [""])[0], None)
        if model_class is None:
            raise RoutevlError(f"backbone {folder}: config.json does not say which class of transformers its weights are of")
        with torch.device("meta"):
            model = model_class(transformers.AutoConfig.from_pretrained(folder))
        base = model.base_model
        prefix = "" if base is model else f"{model.base_model_prefix}."
    modules = base.named_modules()
    return [f"{prefix}{name}.weight" for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
