"""Routing functions against METHOD's formulas, computed one example, position and dimension at a time."""

from __future__ import annotations

import pytest
import torch

from routevl.errors import RoutevlError
from routevl.routing import ROUTING, routing_function, without_ablations

B, L_T, R = 3, 5, 4
ROUTED = [name for name, row in ROUTING.items() if row.function is not None]


def by_hand(name: str, x_t: torch.Tensor, x_v: torch.Tensor) -> torch.Tensor:
    """One example's routing (L_t, r) x (L_v, r) -> (L_t, r), by explicit loops over the formula's indices."""
    mean = sum(x_v[j] for j in range(len(x_v))) / len(x_v)
    out = torch.empty_like(x_t)
    for t in range(len(x_t)):
        for k in range(x_t.shape[1]):
            if name == "mul":
                out[t, k] = x_t[t, k] * mean[k]
            elif name == "add":
                out[t, k] = x_t[t, k] + mean[k]
            elif name == "attn":
                out[t, k] = sum((x_t[t] * x_v[j]).sum() * x_v[j, k] for j in range(len(x_v)))
            elif name == "self_attn":
                out[t, k] = sum(x_t[t, i] * x_t[t, i] for i in range(x_t.shape[1])) * mean[k]
            elif name == "attn_relu":
                out[t, k] = sum((x_t[t].clamp_min(0) * x_v[j].clamp_min(0)).sum() * x_v[j, k] for j in range(len(x_v)))
            elif name == "attn_ones":
                out[t, k] = sum((x_t[t] * x_v[j]).sum() for j in range(len(x_v)))
            elif name == "expand":  # the image's vector repeated r times into an r x r matrix
                repeated = torch.stack([mean] * x_t.shape[1])
                out[t, k] = sum(x_t[t, i] * repeated[i, k] for i in range(x_t.shape[1]))
    return out


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("name", ROUTED)
def test_formula(name: str, length: int) -> None:
    torch.manual_seed(0)
    x_t, x_v = torch.randn(B, L_T, R, dtype=torch.float64), torch.randn(B, length, R, dtype=torch.float64)
    expected = torch.stack([by_hand(name, text, image) for text, image in zip(x_t, x_v, strict=True)])
    torch.testing.assert_close(ROUTING[name].function(x_t, x_v, None), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ROUTED)
def test_masked_tokens_do_not_count(name: str) -> None:
    torch.manual_seed(0)
    x_t, x_v = torch.randn(2, L_T, R, dtype=torch.float64), torch.randn(2, 6, R, dtype=torch.float64)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    routed = ROUTING[name].function(x_t, x_v, mask)
    torch.testing.assert_close(routed[0], by_hand(name, x_t[0], x_v[0, :4]), rtol=0, atol=1e-12)
    torch.testing.assert_close(routed[1], by_hand(name, x_t[1], x_v[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("name", ROUTED)
def test_examples_are_independent_and_gradients_right(name: str, length: int) -> None:
    torch.manual_seed(0)
    x_t = torch.randn(B, L_T, R, dtype=torch.float64, requires_grad=True)
    x_v = torch.randn(B, length, R, dtype=torch.float64, requires_grad=True)
    gradient_t, gradient_v = torch.autograd.grad(ROUTING[name].function(x_t, x_v, None)[1].sum(), (x_t, x_v))
    for example in (0, 2):
        assert not gradient_t[example].any() and not gradient_v[example].any()
    assert gradient_t[1].any() and gradient_v[1].any()
    assert torch.autograd.gradcheck(lambda a, b: ROUTING[name].function(a, b, None), (x_t, x_v))


def test_the_functions_of_the_method_are_linear_in_the_text() -> None:
    torch.manual_seed(0)
    x_t, y_t, x_v = (torch.randn(B, L, R, dtype=torch.float64) for L in (L_T, L_T, 3))
    for route in (row.function for row in without_ablations().values() if row.function is not None):
        offset = route(torch.zeros_like(x_t), x_v, None)  # `add` is affine: x'_v itself
        combined = route(2 * x_t + y_t, x_v, None) - offset
        separate = 2 * (route(x_t, x_v, None) - offset) + route(y_t, x_v, None) - offset
        torch.testing.assert_close(combined, separate)


@pytest.mark.parametrize("name", ROUTED)
def test_a_position_sees_no_other(name: str) -> None:
    """Neither a later token, which a causal model is to predict, nor padding."""
    torch.manual_seed(0)
    x_t, x_v = torch.randn(B, L_T, R, dtype=torch.float64), torch.randn(B, 3, R, dtype=torch.float64)
    alone = ROUTING[name].function(x_t[:, 2:3], x_v, None)
    torch.testing.assert_close(alone, ROUTING[name].function(x_t, x_v, None)[:, 2:3], rtol=0, atol=1e-12)


def test_unknown_name() -> None:
    with pytest.raises(RoutevlError, match="'mull' is not a routing function: choose one of none, mul"):
        routing_function("mull")
