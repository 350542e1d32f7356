"""AdaPEFT: the fit on losses that are known, what the probe leaves as it was, the choice, and the candidates of a model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from cases import LAYERS, TEXT_MODELS, D, batch_of, build
from torch import Tensor, nn

from routevl.errors import RoutevlError
from routevl.methods.adapeft.candidates import partition, train
from routevl.methods.adapeft.probe import (
    ACCEPTED,
    PARAMETERS,
    SELECTED,
    VALUE,
    Fit,
    fit_along,
    measured,
    selected,
    table_of,
)
from routevl.methods.table import new_method

OPTIONS = {"r": 4, "share": 0.05, "batches": 4, "every": 2}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(), parameters))


# ------------------------------------------------------------------------------------------------- the fit


def quadratic(sign: float = 1.0) -> tuple[Callable[[], Tensor], dict[str, nn.Parameter], Tensor]:
    """½ (w - c)ᵀ diag(h) (w - c) in two groups, and h of both."""
    groups = {name: nn.Parameter(normal(size, seed=size)) for name, size in (("one", 5), ("two", 7))}
    centre, curvature = normal(12, seed=1), sign * (normal(12, seed=2).abs() + 0.1)
    return lambda: 0.5 * (curvature * (torch.cat(list(groups.values())) - centre) ** 2).sum(), groups, curvature


def test_the_value_is_exact_on_a_quadratic() -> None:
    """Along the gradient, b²/2a = (Σ g²)² / (2 Σ h g²); each group alone."""
    loss, groups, curvature = quadratic()
    for own, h in zip(groups.values(), curvature.split([5, 7]), strict=True):
        (g,) = gradients(loss, [own])
        found = fit_along(loss, [own], [g], 0.01)
        assert found.accepted and found.r2 == pytest.approx(1)
        assert found.a == pytest.approx((h * g * g).sum().item(), rel=1e-9)
        assert found.b == pytest.approx((g * g).sum().item(), rel=1e-9)
        assert found.value == pytest.approx(((g * g).sum() ** 2 / (2 * (h * g * g).sum())).item(), rel=1e-9)


def test_what_has_no_minimum_ahead_is_rejected() -> None:
    loss, groups, _ = quadratic(sign=-1.0)
    concave = fit_along(loss, [groups["one"]], gradients(loss, [groups["one"]]), 0.01)
    assert concave.a < 0 and not concave.accepted and concave.value == 0
    loss, groups, _ = quadratic()
    uphill = fit_along(loss, [groups["one"]], [-g for g in gradients(loss, [groups["one"]])], 0.01)
    assert uphill.b < 0 and uphill.r2 > 0.99 and not uphill.accepted


def test_a_loss_that_follows_no_parabola_is_rejected() -> None:
    """A kink where it stands; two points would fit it as well as any other."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    kink = fit_along(lambda: 3 * w.clamp(min=0).sum() + 0.5 * w.clamp(max=0).sum(), [w], [torch.ones(1).double()], 0.1)
    assert not kink.accepted
    wave = fit_along(lambda: (20 * w).sin().sum(), [w], [torch.ones(1).double()], 0.1)
    assert wave.r2 < 0.99 and not wave.accepted
    still = fit_along(lambda: 0 * w.sum(), [w], [torch.ones(1).double()], 0.1)
    assert still.r2 == 0 and still.value == 0


def test_the_weights_stay_to_the_bit() -> None:
    w = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    before = w.detach().clone()
    fit_along(lambda: w.square().sum(), [w], [torch.randn(1000)], 0.37)
    assert torch.equal(w, before) and w.requires_grad


# ----------------------------------------------------------------------------------------------- the probe


def candidates_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    return train(model.text_model.requires_grad_(False), partition(model.text_model), 4)


def probed(kind: str, every: int, dropout: float = 0.0) -> tuple[nn.Module, dict[str, list[Fit]]]:
    model = build("full", kind, {}, dropout=dropout)
    torch.manual_seed(3)
    candidates = candidates_of(model)
    return model, measured(model, [batch_of(kind, seed) for seed in range(4)], candidates, 0.01, every)


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_measuring_changes_no_step(kind: str) -> None:
    """The probe's training is the same to the bit, however often it is measured."""
    often, seldom = probed(kind, 1), probed(kind, 4)
    for (name, ours), (_, theirs) in zip(often[0].named_parameters(), seldom[0].named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert {len(fits) for fits in often[1].values()} == {4} and {len(fits) for fits in seldom[1].values()} == {1}
    assert all(ours[0] == theirs[0] for ours, theirs in zip(often[1].values(), seldom[1].values(), strict=True))


def test_it_is_measured_along_adams_steps_from_where_they_start() -> None:
    """Against a second training with torch's own Adam, in float64 and with dropout, which the probe must not draw."""
    model, twin = (build("full", "roberta", {}, dropout=0.5).double() for _ in range(2))
    batches = [{n: t.double() if t.is_floating_point() else t for n, t in batch_of("roberta", seed).items()} for seed in range(2)]
    torch.manual_seed(3)
    candidates = candidates_of(model)
    torch.manual_seed(3)
    of_twin = candidates_of(twin)
    model.double(), twin.double()
    found = measured(model, batches, candidates, 0.01, 1)
    optimiser = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=0.01)
    for number, batch in enumerate(batches):
        optimiser.zero_grad()
        before = {p: p.detach().clone() for p in twin.parameters()}
        twin(**batch)["loss"].backward()
        optimiser.step()
        for name, parameters in of_twin.items():
            steps = {p: before[p] - p.detach() for p in parameters if p.grad is not None}
            slope = sum((p.grad * step).sum() for p, step in steps.items()) / 0.01
            assert found[name][number].b == pytest.approx(slope.item(), rel=0.05), name  # b is G·u, but for third derivatives


# ---------------------------------------------------------------------------------------------- the choice


def test_subsets_are_nested_and_within_their_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {f"c{n}": v for n, v in enumerate(torch.rand(12, generator=generator).tolist())} | {"none": 0.0}
    sizes = {name: int(n) for name, n in zip(values, torch.randint(1, 50, (13,), generator=generator), strict=True)}
    ranked = sorted((n for n in values if values[n]), key=lambda n: -values[n] / sizes[n])
    smaller: list[str] = []
    for budget in range(sum(sizes.values()) + 1):
        chosen = selected(values, sizes, budget)
        assert chosen == ranked[: len(chosen)] and chosen[: len(smaller)] == smaller
        total = sum(sizes[name] for name in chosen)
        assert total <= budget
        assert len(chosen) == len(ranked) or total + sizes[ranked[len(chosen)]] > budget  # the longest
        smaller = chosen
    assert smaller == ranked


def test_rejected_fits_count_as_nothing_in_the_mean() -> None:
    good, bad = Fit(2.0, 2.0, 1.0), Fit(2.0, 2.0, 0.9)
    table = table_of({"a": [good, bad, bad, bad], "b": [bad] * 4}, {"a": 5, "b": 1}, 10)
    assert (table[VALUE + "a"], table[ACCEPTED + "a"], table[PARAMETERS + "a"]) == (0.25, 0.25, 5)
    assert table[SELECTED + "a"] and not table[SELECTED + "b"] and table[VALUE + "b"] == 0


def test_a_choice_of_nothing_is_an_error() -> None:
    good, bad = Fit(2.0, 2.0, 1.0), Fit(-2.0, 2.0, 1.0)
    with pytest.raises(RoutevlError, match="adapeft: the loss followed no candidate's parabola in the probe: raise batches"):
        table_of({"a": [bad]}, {"a": 5}, 10)
    with pytest.raises(RoutevlError, match="adapeft: the best candidate, a, has 5 parameters, but share allows 4: raise share"):
        table_of({"a": [good]}, {"a": 5}, 4.5)


# ------------------------------------------------------------------------------------------- in the model


def test_the_candidates_are_kinds_of_layers() -> None:
    names = {kind: list(partition(TEXT_MODELS[kind]())) for kind in TEXT_MODELS}
    layers = [f"transformer.h.{number}" for number in range(LAYERS)]
    assert sorted(names["gpt2"]) == sorted([f"{of}.{n}" for of in ("lora", "bias", "norm") for n in layers] + ["norm.outside"])
    assert len(names["bart"]) == 3 * 2 * LAYERS + 1 and "lora.decoder.layers.1" in {
        n.replace("model.", "") for n in names["bart"]
    }
    model = TEXT_MODELS["gpt2"]().requires_grad_(False)
    of = train(model, partition(model), 4)
    sizes = {name: sum(p.numel() for p in parameters) for name, parameters in of.items()}
    assert sizes[f"lora.{layers[0]}"] == 2 * 4 * 2 * D and sizes[f"norm.{layers[0]}"] == 4 * D and sizes["norm.outside"] == 2 * D
    assert sizes[f"bias.{layers[0]}"] == 3 * D + D + 4 * D + D
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_what_is_selected_is_trained_from_the_start(kind: str) -> None:
    method = new_method("adapeft", OPTIONS, "test")
    model = build("full", kind, {})
    task = SimpleNamespace(model=model, settings=SimpleNamespace(learning_rate=0.01))
    table = method.prepare(task, iter([batch_of(kind, seed) for seed in range(5)]))
    text_model = TEXT_MODELS[kind]().requires_grad_(False)
    everything, before = sum(p.numel() for p in text_model.parameters()), {n: p.clone() for n, p in text_model.named_parameters()}
    names = [name.removeprefix(SELECTED) for name in table if name.startswith(SELECTED)]
    assert names == list(partition(text_model))
    chosen = [name for name in names if table[SELECTED + name]]
    built = method.build(text_model, table, [])
    trained = {name: p for name, p in built.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(table[PARAMETERS + name] for name in chosen)
    assert 0 < sum(p.numel() for p in trained.values()) <= 0.05 * everything
    assert all(torch.equal(p, before[n]) for n, p in built.named_parameters() if n in before)
    lora = {name for name in trained if ".adapter." in name}
    assert bool(lora) == any(name.startswith("lora.") for name in chosen)
    lost = {name: tensor for name, tensor in table.items() if name != SELECTED + names[-1]}
    with pytest.raises(KeyError, match=names[-1]):
        method.build(TEXT_MODELS[kind](), lost, [])
    with pytest.raises(RoutevlError, match="among what is chosen from .*; set freeze_layer_norm"):
        method.build(TEXT_MODELS[kind](), table, ["a norm"])
