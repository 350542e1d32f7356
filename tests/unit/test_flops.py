"""FLOPs of a forward pass: counted by hand, with and without skipped layers, and no fewer where zeros are multiplied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, LAYERS, SMALL, B, D, L, batch_of, build, name_of
from torch import nn

from routevl.training.flops import forward_flops
from routevl.training.optimisation import compile_layers

T, FFN, ANSWERS = 1 + L, 64, 7  # positions: the image's and the text's
LAYER = B * 2 * (T * (4 * D * D + 2 * D * FFN) + 2 * T * T * D)  # matrices; scores and the means by them
HEAD = B * 2 * (D * 2 * D + 2 * D * ANSWERS)
COMPUTE_LESS = {"das", "lst"}  # it leaves layers out; its frozen model does not read the image


def through(width: int, rank: int, positions: int = T) -> int:
    """FLOPs of a matrix down to a rank and one up to the width again."""
    return B * positions * 2 * 2 * width * rank


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("full", LAYERS * LAYER + HEAD),
        ("bitfit", LAYERS * LAYER + HEAD),
        ("peft_lora", LAYERS * (LAYER + 2 * through(D, 4)) + HEAD),  # query and value
        ("das", (LAYERS - 1) * (LAYER + 2 * through(D, 4)) + through(D, 12) + HEAD),  # two parts; the skipped layer's bottleneck
    ],
)
def test_a_pass_costs_what_is_counted_by_hand(method: str, expected: int) -> None:
    """So one layer less costs a layer less, and what stands in its place."""
    model = build(method, "roberta", SMALL.get(method, {}))
    model.train()
    assert forward_flops(model, batch_of("roberta")) == expected
    assert model.training


@pytest.mark.parametrize("case", [case for case in CASES if case[0] not in COMPUTE_LESS], ids=name_of)
def test_no_method_claims_fewer_flops_that_computes_all_that_the_model_does(case: tuple[str, str, dict[str, Any]]) -> None:
    """Masked gradients, trained entries and frozen parts are computed like all others."""
    method, kind, options = case
    batch = batch_of(kind)
    assert forward_flops(build(method, kind, options), batch) >= forward_flops(build("full", kind, {}), batch)


def test_a_weight_that_is_zero_costs_what_any_other_does() -> None:
    model, batch = build("full", "roberta", {}), batch_of("roberta")
    before = forward_flops(model, batch)
    for module in model.text_model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[torch.rand_like(module.weight) < 0.5] = 0
    assert forward_flops(model, batch) == before


@pytest.mark.slow
def test_compiled_layers_are_counted_as_they_were() -> None:
    model, batch = build("full", "roberta", {}), batch_of("roberta")
    compile_layers(model.text_model)
    with torch.no_grad():
        model(**batch)
    assert forward_flops(model, batch) == LAYERS * LAYER + HEAD
