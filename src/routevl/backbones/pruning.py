"""What the derivations that prune share: the weights, the smallest of them, a folder's copy, and zeros that stay zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from routevl.backbones.folder import copy_but_weights
from routevl.backbones.skeleton import LINEAR
from routevl.errors import RoutevlError
from routevl.files import read_json


def pruned_copy(source: Path, output: Path, prune: Callable[[nn.Module], dict[str, Any]]) -> dict[str, Any]:
    """Copy a backbone's folder with weights that `prune` changes in place; the files' names and the rest are as they were.

    Returns:
        what `prune` did.

    Raises:
        RoutevlError: config.json does not say which class of transformers the weights are of.
    """
    config = read_json(source / "config.json")
    if "architecture" in config:
        from timm.models import save_for_hf  # takes seconds to load

        from routevl.backbones.spvit.form import load_timm

        model = load_timm(source, pretrained=True)
        found = prune(model)
        save_for_hf(model, str(output), model_args=dict(config.get("model_args", {})), safe_serialization=True)
    else:
        model_class = getattr(transformers, (config.get("architectures") or [""])[0], None)
        if model_class is None:
            raise RoutevlError(f"backbone {source}: config.json does not say which class of transformers its weights are of")
        model = model_class.from_pretrained(source, dtype="auto", use_safetensors=True)
        found = prune(model)
        model.save_pretrained(output)
    copy_but_weights(source, output)  # config.json as it was, too
    return found


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of a model of transformers or timm, but for its head, by their names without a prefix of the model."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    modules = getattr(model, "base_model", model).named_modules()
    return {name: module for name, module in modules if isinstance(module, LINEAR) and module is not head}


def smallest(values: Tensor, count: int) -> Tensor:
    """Which `count` of (n,) values are the smallest, (n,) bool; of equal ones the first."""
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(count).values
    chosen = values < threshold
    at_threshold = (values == threshold).nonzero().flatten()
    chosen[at_threshold[: count - int(chosen.sum())]] = True
    return chosen


# -------------------------------------------------------------------------------------------- in training


def pruned_weights(text_model: nn.Module) -> list[nn.Parameter]:
    """The weights of a text backbone, as `load_text_backbone` loads it, that have been pruned; none of one that was not."""
    return [module.weight for module in prunable(text_model).values()] if getattr(text_model, "is_pruned", False) else []


def keep_zeros(model: nn.Module, pruned: Sequence[nn.Parameter]) -> None:
    """Let those entries of pruned weights that are zero stay so, bit for bit, in the model that a method has made.

    Weights that it trains get no gradient there, and peft refuses to merge its adapters, which are dense, into any.
    """
    for weight in pruned:
        if weight.requires_grad:
            weight.register_hook(partial(_without_zeros, weight))
    for module in model.modules() if pruned else ():
        if isinstance(module, BaseTuner):
            module._check_merge_allowed = _refuse_to_merge


def _without_zeros(weight: nn.Parameter, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(weight == 0, 0)


def _refuse_to_merge() -> NoReturn:
    raise RoutevlError(
        "the backbone is pruned, and an adapter that is merged would fill its zeros: use the adapter beside it, or the backbone "
        "that it was derived from"
    )
