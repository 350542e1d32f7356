"""What the stage `inside` measures: by definition on small numbers, and of trained runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import SmallWorld, command_line, run_stage
from runs import Run, new_run
from torch import Tensor

from routevl.errors import RoutevlError
from routevl.methods.routed.layer import RoutedLayer
from routevl.routing import ROUTING
from routevl.training.inside import Bottleneck, along, cosine, effective_rank, linear_cka, mixers_of, tapping

M, R = 40, 6  # rows and columns of what is measured


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- the measures


def test_effective_rank() -> None:
    """By its definition; equal singular values count in full, a single direction counts once."""
    states = normal(M, R) * torch.arange(1, R + 1)
    values = numpy.linalg.svd(states.numpy(), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(states) == pytest.approx(numpy.exp(-(shares * numpy.log(shares)).sum()))
    assert effective_rank(torch.linalg.qr(normal(M, R)).Q) == pytest.approx(R)
    assert effective_rank(normal(M, 1) * normal(1, R)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(M, R)) == 0


def test_linear_cka() -> None:
    """As the normalised HSIC of centred Gram matrices; rotations, scales and shifts change nothing."""
    first, second = normal(M, R), normal(M, 4, seed=1) + normal(M, R)[:, :4]
    centre = torch.eye(M, dtype=torch.float64) - 1 / M
    grams = [centre @ states @ states.T @ centre for states in (first, second)]
    expected = (grams[0] * grams[1]).sum() / (torch.linalg.norm(grams[0]) * torch.linalg.norm(grams[1]))
    assert linear_cka(first, second) == pytest.approx(expected.item())
    assert linear_cka(first @ torch.linalg.qr(normal(R, R)).Q * 3 + 1, second) == pytest.approx(expected.item())
    assert linear_cka(first, first) == pytest.approx(1)
    assert linear_cka(first, normal(1, R).float().expand(M, R).double() / 3) is None


def test_cosine_and_share_along() -> None:
    states, others = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -5.0]])
    assert cosine(states, others) == pytest.approx((0.6 - 1) / 2)
    assert along(states, others) == pytest.approx((9 + 4) / (25 + 4))
    assert along(torch.zeros(2, 2), others) is None


@pytest.mark.parametrize("routing", [name for name in ROUTING if name != "none"])
def test_with_one_visual_token_some_functions_keep_one_number_of_a_token(routing: str) -> None:
    """They put each token on the line of its image's vector; mul and add do not, and attn_ones puts it on another line."""
    x_t, x_v = normal(3, 5, R), normal(3, 1, R, seed=1)
    found = Bottleneck()
    found.add(torch.ones(3, 5, dtype=torch.bool), x_t, x_v, None, ROUTING[routing].function(x_t, x_v, None))
    share = found.measured()["along_image"]
    assert share == pytest.approx(1) if routing in ("attn", "expand", "self_attn", "attn_relu") else share < 0.9


def test_padding_and_prefix_count_nothing() -> None:
    """Nor does how examples are put into batches; patches have no one direction to lie along."""
    x_t, x_v, routed = normal(4, 7, R), normal(4, 3, R, seed=1), normal(4, 7, R, seed=2)
    real = torch.ones(4, 5, dtype=torch.bool)  # behind two positions of a prefix
    real[1, 3:] = real[3, 1:] = False
    whole, parted = Bottleneck(), Bottleneck()
    whole.add(real, x_t, x_v, None, routed)
    for tensor in (x_t, routed):
        tensor[:, :2] = tensor[1, 5:] = tensor[3, 3:] = torch.nan
    for rows in (slice(0, 1), slice(1, 4)):
        parted.add(real[rows], x_t[rows], x_v[rows], None, routed[rows])
    assert parted.measured() == pytest.approx(whole.measured(), nan_ok=False)
    assert whole.measured()["along_image"] is None


# ------------------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module", params=[("vqa", "adapter", "attn"), ("caption", "lora", "mul")], ids="-".join)
def trained(request: pytest.FixtureRequest, small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished routed run."""
    task, method, routing = request.param
    root = tmp_path_factory.mktemp("inside")
    return new_run(small_world, root, task, method=method, options={"routing": routing, "visual_scale": "tanh"}, epochs=1).train()


def inside(run: Run, output: Path, **changes: Any) -> dict[str, Any]:
    look_into([run], [output], **changes)
    return json.loads(output.read_text())


def look_into(runs: list[Run], outputs: list[Path], **changes: Any) -> None:
    names = ("data", "features", "text_backbone", "vision_backbone", "threads", "workers")
    options = (
        {name: runs[0].options[name] for name in names} | {"model": [run.model for run in runs], "output": outputs} | changes
    )
    run_stage("inside", *command_line(options))


def test_each_bottleneck_of_a_trained_run_is_measured(trained: Run, tmp_path: Path) -> None:
    """GPT-2's query and value have one each, in one module."""
    found = inside(trained, tmp_path / "inside.json")
    task = trained.trainer().task
    layers = {n: m for n, m in task.model.named_modules() if isinstance(m, RoutedLayer)}
    parts = 2 if trained.options["task"] == "caption" else 1
    bottlenecks = found["bottlenecks"]
    assert len(bottlenecks) == parts * len(layers) and {b["part"] for b in bottlenecks} == set(range(parts))
    assert {b["layer"] for b in bottlenecks} == set(range(len(layers) * parts // 2))
    assert all(any(name.endswith(b["module"]) for name in layers) for b in bottlenecks)
    for bottleneck in bottlenecks:
        assert 1 <= bottleneck["effective_rank_before"] <= 2 and -1 <= bottleneck["cosine_after"] <= 1
        routes_to_a_line = trained.options["options"]["routing"] == "attn"
        assert bottleneck["along_image"] == pytest.approx(1, abs=1e-5) if routes_to_a_line else bottleneck["along_image"] < 1
    assert inside(trained, tmp_path / "again.json") == found
    assert inside(trained, tmp_path / "few.json", examples=2)["examples"] == 2


def test_several_runs_share_a_process(trained: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "other", trained.changed(seed=2).options).train()
    outputs = [tmp_path / "first.json", tmp_path / "second.json"]
    look_into([trained, other], outputs)
    first, second = (json.loads(output.read_text()) for output in outputs)
    assert first == inside(trained, tmp_path / "alone.json")
    assert second == inside(other, tmp_path / "alone.json") != first


def test_the_numbers_are_those_of_the_models_own_forward_pass(trained: Run, tmp_path: Path) -> None:
    found = inside(trained, tmp_path / "inside.json")["bottlenecks"][0]
    task = trained.trainer().task
    task.model.load(trained.model)
    task.model.eval()
    examples = task.examples("val")
    batch = task.collate([examples[place] for place in range(len(examples))])
    layer = task.model.text_model.base_model.model.get_submodule(found["module"])
    with torch.no_grad(), tapping({"layer": layer}) as calls:
        task.model(**batch)
    x_t, x_v, _, routed = calls["layer"][0]
    real = batch["attention_mask"].bool()
    text, after = (states[:, -real.shape[1] :][real].double() for states in (x_t, routed))
    image = torch.repeat_interleave(x_v[:, 0].double(), real.sum(1), 0)
    assert found["cosine_before"] == pytest.approx(cosine(text, image), abs=1e-6)
    assert found["effective_rank_after"] == pytest.approx(effective_rank(after), abs=1e-5)
    assert not any(mixer._forward_hooks for mixer in mixers_of(layer))


@pytest.mark.parametrize(
    ("task", "routing", "why"),
    [
        ("vqa", "none", "the run has no routing function to look into"),
        pytest.param("multitask", "mul", "its text model is an encoder-decoder", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_cannot_be_looked_into_is_refused(
    small_world: SmallWorld, tmp_path: Path, task: str, routing: str, why: str
) -> None:
    run = new_run(small_world, tmp_path, task, options={"routing": routing}, epochs=1).train()
    with pytest.raises(RoutevlError, match=why):
        inside(run, tmp_path / "inside.json")
    assert not (tmp_path / "inside.json").exists()
