"""SPViT: branches, gates and costs against recorded and computed numbers; the cut; derived folders; what is resumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import SmallWorld, run_stage
from recorded import assert_agrees, needs_reference, put, recorded
from runs import interrupted_calls, own_signals
from safetensors.torch import load_file
from timm.models.vision_transformer import Attention, Mlp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from routevl.backbones.folder import origin_of
from routevl.backbones.spvit import compress as phases
from routevl.backbones.spvit.compress import Kept, cut, in_stored_form, kept_by, whole
from routevl.backbones.spvit.form import BRANCHES, KEY, SIDES, Convolution, Nothing, take_form
from routevl.backbones.spvit.search import (
    TAPS,
    GatedUnits,
    MixedConvolution,
    SinglePath,
    add_gates,
    costs_of,
    counted,
    drawn,
    gates_of,
    new_mixture,
    shares,
)
from routevl.backbones.vision import load_vision_backbone, vision_tokens
from routevl.errors import RoutevlError
from routevl.files import read_json, sha256_of, write_json
from routevl.methods.table import new_method

OPEN = {"attention": (5.0, 5.0, 5.0), "conv3": (5.0, 5.0, -5.0), "conv1": (5.0, -5.0, 5.0), "nothing": (-5.0, 5.0, 5.0)}
RECORDED = {"attention": "msa", "conv3": "conv3x3", "conv1": "conv1x1", "nothing": "none"}


# ---------------------------------------------------------------------------------------- recorded numbers


def recorded_layer() -> tuple[SinglePath, dict[str, Tensor]]:
    tensors, meta = recorded("spvit")
    own = {name.removeprefix("param."): tensor for name, tensor in tensors.items() if name.startswith("param.")}
    attention = Attention(meta["d"], num_heads=meta["heads"], qkv_bias=True)
    for part in ("weight", "bias"):
        put(getattr(attention.qkv, part), torch.cat([own[f"qk.{part}"], own[f"v.{part}"]]))
        put(getattr(attention.proj, part), own[f"proj.{part}"])
    layer = SinglePath(attention, (meta["window"], meta["window"])).eval()
    put(layer.conv1.mixture, own["head_probs"])
    for branch, name in ((layer.conv1, "bn_1x1"), (layer.conv3, "bn_3x3")):
        branch.norm.load_state_dict(
            {part: own[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")}, strict=False
        )
    return layer, tensors


@needs_reference
@pytest.mark.parametrize("branch", BRANCHES)
def test_recorded_branches_in_the_search_in_fine_tuning_and_as_they_are_stored(branch: str) -> None:
    layer, tensors = recorded_layer()
    put(layer.gates, torch.tensor(OPEN[branch]))
    x, name = tensors["x"], RECORDED[branch]
    assert_agrees(layer(x), tensors[f"search.{name}.y"])
    tuned = {"attention": layer.attention, "conv1": layer.conv1, "conv3": layer.conv3, "nothing": Nothing()}[branch]
    if branch == "nothing":  # the source's fine-tuning gives the normed input, unlike its search
        assert torch.equal(tensors["finetune.none.y"], x) and not tuned(x).any()
    else:
        assert_agrees(tuned(x), tensors[f"finetune.{name}.y"])
    if branch in SIDES:
        assert_agrees(tuned.plain()(x), tensors[f"finetune.{name}.y"])


@needs_reference
def test_recorded_gates_of_hidden_units() -> None:
    tensors, _ = recorded("spvit")
    units, width = tensors["ffn.param.fc1.weight"].shape
    feed_forward = Mlp(width, units)
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        put(feed_forward.get_parameter(name), tensors[f"ffn.param.{name}"])
    feed_forward.act = GatedUnits(feed_forward.act, units)
    put(feed_forward.act.gates, tensors["ffn.param.ffn_thresholds"])
    assert_agrees(feed_forward.eval()(tensors["x"]), tensors["ffn.y"])


# ---------------------------------------------------------------------------------------- computed numbers


@pytest.fixture
def float64() -> Iterator[None]:
    """All new tensors are."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def transformer() -> nn.Module:
    """A toy of 3 x 2 patches."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depth": 4, "num_heads": 3, "mlp_ratio": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(12, 8), patch_size=4, **sizes)
    return shaken(model.eval())


def shaken(model: nn.Module) -> nn.Module:
    """All parameters and running statistics moved, so that nothing is as it starts."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())):
        tensor.data += torch.rand(tensor.shape, generator=generator) * 0.3
    return model


def pixels(images: int = 2) -> Tensor:
    return torch.randn(images, 3, 12, 8, generator=torch.Generator().manual_seed(2))


def test_the_3_x_3_convolution_is_attention_to_one_position_per_tap(float64: None) -> None:
    """Before its norm, in float64: tap k attends to the patch k // 3 - 1 columns and k % 3 - 1 rows away, with its own values."""
    rows, columns, attention = 3, 2, transformer().blocks[0].attn
    convolution = shaken(MixedConvolution(attention, new_mixture(attention), 3, (rows, columns))).eval()
    seen = []
    convolution.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = torch.randn(2, 1 + rows * columns, 12)
    output = convolution(tokens)
    of_heads = (convolution.mixture / 0.01).softmax(0)
    values, biases = attention.qkv.weight[24:].view(3, 4, 12), attention.qkv.bias[24:].view(3, 4)
    expected = torch.zeros(2, rows * columns, 4)
    for tap in range(TAPS):
        attended = torch.zeros(rows * columns, rows * columns)
        for row in range(rows):
            for column in range(columns):
                there = row + tap % 3 - 1, column + tap // 3 - 1
                if 0 <= there[0] < rows and 0 <= there[1] < columns:
                    attended[row * columns + column, there[0] * columns + there[1]] = 1
        value = sum(of_heads[head, tap] * values[head] for head in range(3))  # (d_h, d)
        expected += attended @ tokens[:, 1:] @ value.T + sum(of_heads[head, tap] * biases[head] for head in range(3))
    torch.testing.assert_close(seen[0].flatten(2).transpose(1, 2), expected)
    assert torch.equal(output[:, 0], tokens[:, 0]), "the class token passes by"


def test_drawn_gates_have_the_gradient_of_the_sigmoid(float64: None) -> None:
    theta = torch.tensor([-2.0, 0.3, 1.5, 4.0], requires_grad=True)
    torch.manual_seed(3)
    gates = drawn(theta)
    torch.manual_seed(3)
    noisy = torch.logit(torch.rand(4)) + theta.detach()
    assert gates.tolist() == (noisy > 0).tolist()
    gates.sum().backward()
    torch.testing.assert_close(theta.grad, noisy.sigmoid() * (1 - noisy.sigmoid()))
    theta.grad = None
    open_now = counted(theta)
    assert open_now.tolist() == [0, 1, 1, 1]
    open_now.sum().backward()
    p = theta.detach().sigmoid()
    torch.testing.assert_close(theta.grad, (p - 0.5).sigmoid() * (0.5 - p).sigmoid() * p * (1 - p))


def test_gates_are_open_as_often_as_they_are_likely(float64: None) -> None:
    torch.manual_seed(0)
    theta = torch.full((20000,), 1.5)
    assert abs(drawn(theta).mean() - torch.tensor(1.5).sigmoid()) < 0.01


@pytest.mark.parametrize(
    ("gates", "branch", "gradient"),
    [
        ((0, 0, 0), "nothing", lambda a, b, c: (a, 0, 0)),
        ((0, 1, 1), "nothing", lambda a, b, c: (a + b + c, 0, 0)),
        ((1, 0, 0), "conv1", lambda a, b, c: (a, b - a, 0)),
        ((1, 1, 0), "conv3", lambda a, b, c: (0, b - a, c - b)),
        ((1, 1, 1), "attention", lambda a, b, c: (0, 0, c - b)),
    ],
)
def test_a_gate_with_an_open_one_after_it_is_a_constant(
    gates: tuple[int, int, int], branch: str, gradient: Callable[..., tuple[float, float, float]]
) -> None:
    values = (3.0, 7.0, 20.0)  # of conv1, conv3, attention
    leaf = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
    output = sum(share * value for share, value in zip(shares(leaf), values, strict=True))
    assert output == {"nothing": 0.0, "conv1": 3.0, "conv3": 7.0, "attention": 20.0}[branch]
    output.backward()
    assert leaf.grad.tolist() == list(gradient(*values))


def test_a_gate_that_is_far_below_zero_kills_what_it_opens(float64: None) -> None:
    layer = SinglePath(transformer().blocks[0].attn, (3, 2)).train()
    tokens = torch.randn(2, 7, 12)
    for gate, dead in enumerate((("conv1", "conv3", "attention"), ("conv3", "attention"), ("attention",))):
        put(layer.gates, torch.tensor([50.0 if before < gate else -50.0 for before in range(3)]))
        for name in dead:
            layer.get_submodule(name).register_forward_hook(lambda module, args, output: output + 1e6)
        alive = layer(tokens)
        if gate == 0:
            assert not alive.any()
        assert alive.abs().max() < 1e3, "what is dead would be seen"
        for name in dead:
            layer.get_submodule(name)._forward_hooks.clear()
    units = GatedUnits(nn.GELU(), 5)
    put(units.gates, torch.tensor([50.0, -50.0, 50.0, -50.0, 50.0]))
    assert (units(torch.ones(3, 5)) != 0).tolist() == [[True, False, True, False, True]] * 3


def some_kept() -> Kept:
    return Kept(["conv1", "conv3", "nothing", "attention"], [[0, 2, 3], [*range(24)], [], [5]])


def test_multiply_adds_are_those_that_a_counter_counts(float64: None) -> None:
    """But for what the source leaves out or counts besides: the class token in feed-forward parts, and norms."""
    original = transformer()
    costs, smaller = costs_of(original), transformer()
    cut(smaller, some_kept())
    for model, kept in ((original, whole(original)), (in_stored_form(smaller), some_kept())):
        with FlopCounterMode(display=False) as counter:
            model.forward_features(pixels(1))
        units = sum(len(of_layer) for of_layer in kept.units)
        norms = (2 * 4 + 1) * 2 * 12 * 7
        assert kept.multiply_adds(costs) == counter.get_total_flops() // 2 - 2 * 12 * units + norms
    stored = transformer()
    take_form(stored, some_kept().branches, [len(units) for units in some_kept().units])
    assert [(name, tensor.shape) for name, tensor in stored.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in smaller.state_dict().items()
    ]


def test_the_search_counts_the_multiply_adds_of_what_its_gates_keep_and_each_gate_lowers_them(float64: None) -> None:
    model = transformer()
    costs = costs_of(model)
    add_gates(model)
    of_attentions, of_units = gates_of(model)
    for gates, branch in zip(of_attentions, some_kept().branches, strict=True):
        put(gates, torch.tensor(OPEN[branch]))
    for gates, units in zip(of_units, some_kept().units, strict=True):
        put(gates, torch.tensor([1.0 if unit in units else -1.0 for unit in range(24)]))
    expected = costs.expected(of_attentions, of_units)
    assert kept_by(model) == some_kept() and expected == some_kept().multiply_adds(costs)
    expected.backward()
    assert all((gates.grad > 0).all() for gates in of_units)
    assert [(gates.grad > 0).tolist() for gates in of_attentions] == [
        [True, True, False], [False, True, True], [True, False, False], [False, False, True],
    ]  # fmt: skip


def test_the_cut_model_is_the_searched_one_with_its_gates_as_they_are(float64: None) -> None:
    """On the same weights, in float64; so is what is stored of it."""
    searched = transformer()
    add_gates(searched)
    shaken(searched).eval()
    for block, branch, units in zip(searched.blocks, *some_kept(), strict=True):
        put(block.attn.gates, torch.tensor(OPEN[branch]))
        put(block.mlp.act.gates, torch.tensor([1.0 if unit in units else -1.0 for unit in range(24)]))
    plain = copy.deepcopy(searched)
    for block in plain.blocks:
        block.attn, block.mlp.act = block.attn.attention, block.mlp.act.activation
    cut(plain, kept_by(searched))
    for block, of_search in zip(plain.blocks, searched.blocks, strict=True):
        if isinstance(block.attn, MixedConvolution):
            mixed = of_search.attn.conv1 if block.attn.side == 1 else of_search.attn.conv3
            block.attn.norm.load_state_dict(mixed.norm.state_dict())
            put(block.attn.mixture, mixed.mixture)
    expected = searched.forward_features(pixels())
    torch.testing.assert_close(plain.eval().forward_features(pixels()), expected)
    stored = in_stored_form(plain)
    assert [type(block.attn) for block in stored.blocks] == [Convolution, Convolution, Nothing, Attention]
    torch.testing.assert_close(stored.forward_features(pixels()), expected)


# ------------------------------------------------------------------------------------------------ folders

OPTIONS = {
    "flops": 0.4, "search_epochs": 8, "tune_epochs": 3, "batch_size": 5, "learning_rate": 0.001, "gate_learning_rate": 0.2,
}  # fmt: skip


def derive(world: SmallWorld, output: Path, source: Path | None = None, **changes: Any) -> Path:
    words = [f"{name}={value}" for name, value in (OPTIONS | changes).items()]
    checkpoint = output.parent / "checkpoint"
    run_stage(
        "derive-backbone", "--by", "spvit", "--source", source or world.vision[16], "--data", world.data, "--options", *words,
        "--checkpoint", checkpoint, "--checkpoint-every", 2, "--output", output,
    )  # fmt: skip
    assert not checkpoint.exists()
    return output


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def derived(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return derive(small_world, tmp_path_factory.mktemp("spvit") / "derived")


def test_a_derived_folder_says_what_it_keeps_and_gives_the_tokens_of_its_source_in_shape(
    small_world: SmallWorld, derived: Path
) -> None:
    source = load_vision_backbone(small_world.vision[16])
    record, layers = read_json(derived / "derived.json"), read_json(derived / "config.json")[KEY]
    assert layers == {"branches": record["branches"], "units": record["units"]}
    costs = costs_of(source.model)
    assert record["multiply_adds_before"] == whole(source.model).multiply_adds(costs)
    assert record["multiply_adds_after"] == costs.of(**layers) < record["multiply_adds_before"]
    model = load_vision_backbone(derived)
    assert record["params_before"] == sum(parameter.numel() for parameter in source.model.parameters())
    assert record["params_after"] == sum(parameter.numel() for parameter in model.model.parameters()) < record["params_before"]
    assert 0 < record["distance"] < 2
    assert vision_tokens(derived).shapes == vision_tokens(small_world.vision[16]).shapes
    assert origin_of(derived).derivations == ({"by": "spvit", "options": record["options"]},) and not origin_of(derived).is_pruned
    assert origin_of(derived).pretraining == origin_of(small_world.vision[16]).pretraining


def test_a_folder_is_derived_again_to_the_same_bytes(small_world: SmallWorld, derived: Path, tmp_path: Path) -> None:
    assert digests(derive(small_world, tmp_path / "again")) == digests(derived)
    other = derive(small_world, tmp_path / "other", seed=1)
    assert digests(other)["model.safetensors"] != digests(derived)["model.safetensors"]


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_derived_folder_gives_the_tokens_that_the_fine_tuned_model_gave_and_is_read_like_any_other(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branch: str
) -> None:
    """By whatever reads folders of timm: extraction, another crop, pruning, a vision model with prompts."""
    models, write = [], phases.write
    monkeypatch.setattr(phases, "kept_by", lambda model: Kept([branch], [[1, 5, 7]]))
    monkeypatch.setattr(phases, "write", lambda model, *rest: (models.append(model), write(model, *rest)))
    folder = derive(small_world, tmp_path / "derived")
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    encoded = load_vision_backbone(folder).encode(images, ["pooled", "patches"])
    assert torch.equal(encoded["patches"], models[0].forward_features(images)[:, 1:])
    assert torch.equal(encoded["pooled"], models[0].forward_features(images)[:, 0])
    shard = tmp_path / "shard.safetensors"
    run_stage("extract", "--images", small_world.data / "val/images.json", "--backbone", folder, "--output", shard)
    assert load_file(shard)["patches"].shape == (5, 4, 16)
    for by, option in (("crop", "crop_mode=squash"), ("magnitude", "sparsity=0.5")):
        run_stage("derive-backbone", "--by", by, "--source", folder, "--options", option, "--output", tmp_path / by)
        assert [step["by"] for step in origin_of(tmp_path / by).derivations] == ["spvit", by]
        weights = load_vision_backbone(tmp_path / by).model.blocks[0].mlp.fc1.weight
        assert weights.shape == (3, 16) and (weights == 0).any() == (by == "magnitude")
    prompted = new_method("vpt", {"num_virtual_tokens": 3}, "test").adapt_vision(load_vision_backbone(folder).model)
    tokens = prompted.forward_features(images)
    assert tokens.shape == (3, 5, 16) and torch.equal(tokens[:, 1:], encoded["patches"]) == (branch != "attention")


@pytest.mark.parametrize("step", [1, 20, 24, 26, 33])
def test_a_derivation_that_was_stopped_or_killed_goes_on_to_the_same_bytes(
    small_world: SmallWorld, derived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """24 steps of the search, 9 of the fine-tuning; killed in the second process, which has made a few more of them."""
    calls = interrupted_calls(monkeypatch, phases.Phases, "_distance", step, step + 3)
    with pytest.raises(SystemExit, match="143"), own_signals():
        derive(small_world, tmp_path / "derived")
    assert not (tmp_path / "derived").exists() and (tmp_path / "checkpoint/checkpoint.safetensors").exists()
    if step < 30:
        with pytest.raises(MemoryError), own_signals():
            derive(small_world, tmp_path / "derived")
    made = len(calls)
    assert digests(derive(small_world, tmp_path / "derived")) == digests(derived)
    left = 24 + 9 + 1 - step  # and the validation split's batch
    assert left - 3 <= len(calls) - made <= left, "what was done is not done again, but for what no checkpoint has"


# ------------------------------------------------------------------------------------------------- faults


def test_what_it_cannot_compress_is_refused_in_one_line(small_world: SmallWorld, tmp_path: Path) -> None:
    run_stage(
        "pretrain-vision", "--architecture", "resnet", "--seed", 1, "--epochs", 1, "--images", 2, "--image-size", 32,
        "--patch-size", 16, "--hidden-size", 16, "--layers", 1, "--output", tmp_path / "resnet",
    )  # fmt: skip
    with pytest.raises(RoutevlError, match="resnet: not a plain vision transformer of timm, such as vit_base_patch16_224"):
        derive(small_world, tmp_path / "derived", tmp_path / "resnet")
    with pytest.raises(RoutevlError, match="roberta: .*not an image encoder"):
        derive(small_world, tmp_path / "derived", small_world.text["vqa"])
    assert not (tmp_path / "derived").exists()


def test_a_split_without_images_is_named(small_world: SmallWorld, tmp_path: Path) -> None:
    for split, images in (("train", read_json(small_world.data / "train/images.json")), ("val", [])):
        write_json(tmp_path / "data" / split / "images.json", images)
    paths = ("--source", small_world.vision[16], "--data", tmp_path / "data", "--checkpoint", tmp_path / "checkpoint")
    with pytest.raises(RoutevlError, match=r"val/images\.json: no images, of which SPViT needs some in both splits"):
        run_stage("derive-backbone", "--by", "spvit", *paths, "--output", tmp_path / "derived")


def test_a_loss_that_is_no_number_and_wrong_options_are_named(small_world: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(RoutevlError, match="spvit: the loss of the search is nan: set a lower learning_rate"), own_signals():
        derive(small_world, tmp_path / "derived", learning_rate=1e30)
    for option, message in (
        ({"flops": 1}, "flops is 1.0, expected less than 1"),
        ({"search_epochs": 0}, "search_epochs is 0, expected 1 or more"),
        ({"gate_learning_rate": -1}, "gate_learning_rate is -1.0, expected more than 0"),
        ({"lambda": 3}, "no option 'lambda'"),
    ):
        with pytest.raises(RoutevlError, match=message):
            derive(small_world, tmp_path / "derived", **option)


def test_a_checkpoint_that_is_missing_too_much_or_of_another_derivation_is_named(small_world: SmallWorld, tmp_path: Path) -> None:
    paths = ("--source", small_world.vision[16], "--output", tmp_path / "derived")
    with pytest.raises(RoutevlError, match="--by spvit: the derivation trains, and --checkpoint is missing"):
        run_stage("derive-backbone", "--by", "spvit", *paths, "--data", small_world.data)
    with pytest.raises(RoutevlError, match="--by magnitude: the derivation does not train: drop --checkpoint"):
        run_stage("derive-backbone", "--by", "magnitude", *paths, "--options", "sparsity=0.5", "--checkpoint", tmp_path / "c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "kept_by", lambda model: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError), own_signals():
            derive(small_world, tmp_path / "derived")
    with pytest.raises(
        RoutevlError, match=r"checkpoint\.safetensors: the unfinished run has options .*: delete .*checkpoint to start"
    ):
        derive(small_world, tmp_path / "derived", seed=1)


def test_a_search_that_cuts_nothing_says_so(small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = derive(small_world, tmp_path / "derived", gate_learning_rate=1e-6, search_epochs=1)
    assert "it has cut nothing: set a higher gate_learning_rate or more search_epochs" in capsys.readouterr().err
    record = json.loads((folder / "derived.json").read_text())
    assert record["multiply_adds_after"] == record["multiply_adds_before"]
