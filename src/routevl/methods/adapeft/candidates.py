"""The candidates that AdaPEFT chooses from: a kind of parameters of a layer each, "<kind>.<layer>"."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from routevl.backbones.skeleton import layers_in
from routevl.backbones.structure import QUERY, VALUE, Fused
from routevl.methods.base import is_layer_norm
from routevl.methods.bottleneck.layer import parts_of
from routevl.methods.spt.layer import low_rank, update_outputs

LORA, BIAS, NORM = "lora", "bias", "norm"
OUTSIDE = "outside"  # the layer of what is in none

Adapted = tuple[nn.Module, Fused | None, list[int]]  # a linear module, how it holds projections, and the adapted ones


def partition(text_model: PreTrainedModel) -> dict[str, list[Adapted] | list[nn.Parameter]]:
    """The candidates in the model's order: of "lora" what gets low-rank updates, of "bias" and "norm" parameters of its own.

    Raises:
        RoutevlError: as `parts_of`.
    """
    found, layers, candidates = parts_of(text_model), [*layers_in(text_model)], {}
    for name, module in text_model.named_modules():
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), OUTSIDE)
        roles = found.fused[name].roles if name in found.fused else found.roles.get(name, ())
        adapted = [number for number, role in enumerate(roles) if role in (QUERY, VALUE)]
        if adapted:
            candidates.setdefault(f"{LORA}.{layer}", []).append((module, found.fused.get(name), adapted))
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if is_layer_norm(module):
                candidates.setdefault(f"{NORM}.{layer}", []).append(parameter)
            elif parameter_name == "bias":
                candidates.setdefault(f"{BIAS}.{layer}", []).append(parameter)
    return candidates


def train(
    text_model: PreTrainedModel, candidates: Mapping[str, list[Adapted] | list[nn.Parameter]], r: int
) -> dict[str, list[nn.Parameter]]:
    """Let candidates of `partition` be trained, with low-rank updates of rank r made for them: name -> its parameters."""
    parameters = {}
    for name, of in candidates.items():
        if name.startswith(f"{LORA}."):
            for module, fused, adapted in of:
                update_outputs(module, fused, adapted, lambda columns, rows: low_rank(columns, rows, r), of_input=True)
            parameters[name] = [parameter for module, *_ in of for parameter in module.adapter.parameters()]
        else:
            parameters[name] = [parameter.requires_grad_(True) for parameter in of]
    return parameters
