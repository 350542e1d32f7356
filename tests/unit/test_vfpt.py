"""Visual prompts: sequences against recorded and computed numbers, what trains, what is refused."""

from __future__ import annotations

import cmath
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from conftest import SmallWorld, run_options
from recorded import assert_agrees, needs_reference, put, recorded
from runs import Run, new_run
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from routevl.backbones import pretrain_vision
from routevl.errors import RoutevlError
from routevl.methods.table import new_method
from routevl.methods.vfpt.layer import PromptedLayer, fourier_transformed, put_prompts
from routevl.settings import RunSettings
from routevl.training.check import check, write_data

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_classes": 0}


def options(method: str = "vfpt", **values: Any) -> Any:
    return new_method(method, values, "test").options


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**SIZES).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ recorded


class Tapped(nn.Module):
    """What stands in for a layer in the recorded numbers, a linear map; it keeps its input."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.read = hidden_states
        return hidden_states @ self.weight.T + self.bias


@needs_reference
@pytest.mark.parametrize("case", ["half", "full", "append", "sequence_only", "hidden_only"])
def test_recorded_sequences_of_three_layers(case: str) -> None:
    """Fourier prompts that the original appends are the same behind the others: no layer sees the order of tokens."""
    tensors, meta = recorded("vfpt")
    about = meta["cases"][case]
    n, m, share = about["prompts"], about["fourier_prompts"], about["alpha"]
    of_case = {name.removeprefix(f"{case}."): tensor for name, tensor in tensors.items() if name.startswith(f"{case}.")}
    prompts = [of_case["prompts_layer0"], *of_case["prompts_deep"]]
    chosen = options(num_virtual_tokens=n, fourier_share=share, dimension=about["dimension"])
    layers = []
    for number, own in enumerate(prompts):
        layer = Tapped(of_case[f"layer{number}.stub_weight"], of_case[f"layer{number}.stub_bias"])
        place = number == 0, number == len(prompts) - 1
        layers.append(PromptedLayer(layer, own.shape[1], about["init_bound"], chosen, place))
        put(layers[-1].prompts, own)
    hidden_states = of_case["embeddings"]
    for number, layer in enumerate(layers):
        hidden_states = layer(hidden_states)
        read = layer.layer.read
        if about["location"] == "append":
            read = torch.cat([read[:, :1], read[:, 1 + m : 1 + n], read[:, 1 : 1 + m], read[:, 1 + n :]], dim=1)
        assert_agrees(read, of_case[f"layer{number}.input_sequence"])
    assert hidden_states.shape == of_case["embeddings"].shape


@needs_reference
def test_the_recorded_bound_is_that_of_its_patches_and_width() -> None:
    about = recorded("vfpt")[1]["cases"]["half"]
    model = timm.models.VisionTransformer(**SIZES | {"patch_size": about["patch_size"], "embed_dim": about["d"]})
    chosen = options(num_virtual_tokens=500)
    prompts = torch.stack([layer.prompts for layer in put_prompts(model, chosen).blocks]).detach().abs()
    assert 0.99 * about["init_bound"] < prompts.max() <= about["init_bound"]
    assert math.isclose(prompts.mean(), about["init_bound"] / 2, rel_tol=0.05)


# ------------------------------------------------------------------------------------------------ computed


@pytest.mark.parametrize("dimension", ["all", "sequence", "hidden"])
def test_the_transform_is_the_real_part_of_the_sums(dimension: str) -> None:
    m, d = 3, 4
    prompts = torch.randn(1, m, d, generator=torch.Generator().manual_seed(0))
    found = fourier_transformed(prompts, dimension)[0]
    for token in range(m):
        for unit in range(d):
            expected = 0j
            for k in range(m):
                for j in range(d):
                    over_tokens = cmath.exp(-2j * cmath.pi * token * k / m) if dimension != "hidden" else complex(k == token)
                    over_units = cmath.exp(-2j * cmath.pi * unit * j / d) if dimension != "sequence" else complex(j == unit)
                    expected += prompts[0, k, j].item() * over_tokens * over_units
            assert math.isclose(found[token, unit], expected.real, abs_tol=1e-5)
    if dimension == "all":
        torch.testing.assert_close(found, torch.fft.fft2(prompts[0]).real)


def test_plain_prompts_are_tokens_that_leave_before_the_norm() -> None:
    """VPT-deep by hand: after each layer they are cut off, before each new ones are put there."""
    model, twin = vit(), vit()
    adapted = new_method("vpt", {"num_virtual_tokens": 2}, "test").adapt_vision(model)
    pixels = torch.randn(2, 3, 16, 16)
    prompts = [layer.prompts for layer in adapted.blocks]
    hidden_states = twin._pos_embed(twin.patch_embed(pixels))  # [cls; patches], (2, 5, 8)
    for block, own in zip(twin.blocks, prompts, strict=True):
        together = torch.cat([own.expand(2, -1, -1), hidden_states], dim=1)  # elsewhere, which makes no difference
        hidden_states = block(together)[:, 2:]
    torch.testing.assert_close(adapted.forward_features(pixels), twin.norm(hidden_states), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(adapted(pixels), twin(pixels), atol=1e-3)
    for layer in adapted.blocks:
        assert layer.transformed == 0 and torch.equal(layer.read(3), layer.prompts.expand(3, -1, -1))


@pytest.mark.parametrize(("share", "transformed"), [(0.5, 2), (0.79, 3), (1.0, 5)])
def test_the_share_is_rounded_down_and_the_first_are_transformed(share: float, transformed: int) -> None:
    layer = put_prompts(vit(), options(num_virtual_tokens=5, fourier_share=share)).blocks[1]
    read = layer.read(1)[0]
    assert torch.equal(read[transformed:], layer.prompts[transformed:])
    torch.testing.assert_close(read[:transformed], torch.fft.fft2(layer.prompts[:transformed]).real)


def test_dropout_comes_before_the_transform_for_each_example_by_itself() -> None:
    layer = put_prompts(vit(), options(num_virtual_tokens=5, dropout=0.5)).blocks[0].train()
    read = layer.read(2)
    back = torch.fft.ifft2(read).real * 2  # of a real part: the mean of each entry and its mirror image
    mirrored = back.roll((-1, -1), (1, 2)).flip(1, 2)
    torch.testing.assert_close(back, mirrored, rtol=0, atol=1e-5)
    assert not torch.equal(read[0], read[1])
    assert torch.equal(*layer.eval().read(2))


@pytest.mark.parametrize("kind", ["timm", "vit", "clip"])
def test_tokens_are_as_many_and_as_wide_and_prompts_alone_train(kind: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"image_size": 16, "patch_size": 8}
    models = {
        "timm": vit,
        "vit": lambda: ViTModel(ViTConfig(**sizes)),
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**sizes)),
    }
    model = models[kind]().eval().requires_grad_(False)
    pixels = torch.randn(2, 3, 16, 16)

    def tokens() -> Tensor:
        return model.forward_features(pixels) if kind == "timm" else model(pixel_values=pixels).last_hidden_state

    before = tokens()
    put_prompts(model, options(num_virtual_tokens=4))
    after = tokens()
    assert after.shape == before.shape == (2, 5, 8) and not torch.allclose(after, before, atol=1e-3)
    after.square().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 and sum(parameter.numel() for parameter in trained.values()) == 3 * 4 * 8  # L n d
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())


# ------------------------------------------------------------------------------------------------- in a run


def prompted(world: SmallWorld, root: Path, task: str = "vqa", **values: Any) -> Run:
    run = new_run(world, root, task, method="vfpt", epochs=1)
    left = {name: value for name, value in run.options.items() if name != "features"}
    return Run(root, {**left, "options": {"num_virtual_tokens": 3} | values})


def test_a_run_trains_prompts_head_and_norms_with_the_backbones_in_place(small_world: SmallWorld, tmp_path: Path) -> None:
    run = prompted(small_world, tmp_path)
    task = run.trainer().task
    start = {name: tensor.clone() for name, tensor in task.model.tensors().items()}
    prompts = [name for name in start if name.endswith(".prompts")]
    assert len(prompts) == 1 and start[prompts[0]].shape == (3, 16)
    run.train()
    saved = load_file(run.model / "last" / "task.safetensors")
    assert {name for name in saved if not name.startswith("head.")} == {*prompts}
    assert not torch.equal(saved[prompts[0]], start[prompts[0]])
    own = {name.removeprefix("text_model.") for name in start if name.startswith("text_model.")}
    assert all("LayerNorm" in name for name in own) and own == load_file(run.model / "method.safetensors").keys()


def test_prompts_have_dropout_in_training_and_the_vision_model_none(small_world: SmallWorld, tmp_path: Path) -> None:
    vision = prompted(small_world, tmp_path, dropout=0.5).trainer().task.model.train().vision
    training = {type(module).__name__ for module in vision.modules() if module.training}
    assert training == {"PromptedLayer", "Dropout"}
    assert all(module.p == 0.5 for module in vision.modules() if module.training and isinstance(module, nn.Dropout))
    assert not any(module.training for module in vision.eval().modules())


def test_pairs_of_images_are_seen_one_by_one(small_world: SmallWorld, tmp_path: Path) -> None:
    """As in NLVR2, among questions about one image."""
    task = prompted(small_world, tmp_path, "multitask").trainer().task
    examples = [*task.training_examples()]
    pair = next(example for example in examples if len(example["images"]) == 2)
    one = next(example for example in examples if len(example["images"]) == 1)
    batch = task.collate([pair, one])
    assert batch["image"].shape[:2] == (2, 2)
    vision = task.model.eval().vision
    with torch.no_grad():
        tokens = vision(batch["image"])  # (B, 2, L_v, d_v)
        torch.testing.assert_close(tokens[0, 1:], vision(task.visual.of(pair["images"][1:])), rtol=1e-5, atol=1e-6)
    task.model(**batch)["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in task.model.named_parameters() if name.endswith("prompts"))


def test_stored_features_are_refused(small_world: SmallWorld, tmp_path: Path) -> None:
    run = prompted(small_world, tmp_path).changed(features=small_world.features[16])
    with pytest.raises(RoutevlError, match="the method vfpt changes the vision model in training, and stored features .* drop"):
        run.train()


def test_a_vision_model_that_is_no_plain_transformer_is_named_before_anything_runs(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    values = run_options(small_world, "vqa", method="vfpt", epochs=1)
    names = RunSettings.__dataclass_fields__.keys() - {"options"}
    given = {name: values[name] for name in names if name in values} | {"seed": 1}
    settings = RunSettings.read(given, {"num_virtual_tokens": 3}, "test")
    write_data(tmp_path / "data")
    counts = check(settings, small_world.text["vqa"], small_world.vision[16], tmp_path / "data")
    assert counts["vision"] == 3 * 16
    resnet = {"architecture": "resnet", "seed": 0, "images": 1, "epochs": 1}
    pretrain_vision.write_untrained(tmp_path / "resnet", resnet)
    with pytest.raises(RoutevlError, match="method vfpt: .* take a plain vision transformer as vision_backbone"):
        check(settings, small_world.text["vqa"], tmp_path / "resnet", tmp_path / "data")


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(RoutevlError, match="Linear has no patches or no layers for prompts to stand before"):
        put_prompts(nn.Linear(2, 2), SimpleNamespace(num_virtual_tokens=1))
