"""METER's two streams against recorded numbers and formulas; what goes into them; how they are made, trained and loaded."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import SMALL, B, D, L, one_step, prepared_for, shaken, small_options
from conftest import SmallWorld, run_stage
from recorded import assert_agrees, needs_reference, put, recorded
from runs import Run, interrupted_calls, new_run, own_signals, probe
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, RobertaConfig

from routevl.backbones.co_attention import CoAttentionConfig, CoAttentionModel
from routevl.backbones.derivations import check_backbones
from routevl.backbones.pretrain_co_attention import Learner
from routevl.backbones.skeleton import layers_in
from routevl.backbones.structure import structure_of
from routevl.backbones.text import load_text_backbone, text_skeleton
from routevl.errors import RoutevlError
from routevl.methods.base import layer_norms
from routevl.methods.table import METHODS, method_class, new_method
from routevl.sheet import model_type
from routevl.tasks.vqa import VqaModel
from routevl.training.load import load_run

IMAGE, TOKENS, LAYERS, INNER, VOCABULARY = 20, 5, 2, 48, 50  # width and number of the image's tokens


def two_streams(dropout: float = 0.0, **changes: Any) -> CoAttentionModel:
    sizes = {"hidden_size": D, "num_attention_heads": 4}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    text = RobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=40, num_hidden_layers=2, intermediate_size=64, **sizes, **drop
    )
    own = {"num_hidden_layers": LAYERS, "intermediate_size": INNER, "image_width": IMAGE, **sizes, **drop, **changes}
    return CoAttentionModel(CoAttentionConfig(text, **own)).eval()


def build(
    method: str, options: dict[str, Any], prefix: bool = True, norms: bool = True, dropout: float = 0.0, width: int = IMAGE
) -> VqaModel:
    torch.manual_seed(0)
    text_model = two_streams(dropout).requires_grad_(False)
    chosen = new_method(method, options, "test")
    trains_norms = norms and "freeze_layer_norm=no" not in method_class(method).refuses
    train_also = layer_norms(text_model) if trains_norms else []
    visual = SimpleNamespace(width=width, encoder=nn.Identity())
    return VqaModel(7, text_model, chosen, prepared_for(method, text_model), train_also, visual, prefix).eval()


def batch_of(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(4, 48, (B, L), generator=generator),
        "attention_mask": torch.ones(B, L, dtype=torch.int64),
        "image": torch.randn(B, TOKENS, IMAGE, generator=generator),
        "answer_scores": torch.rand(B, 7, generator=generator),
    }


# ------------------------------------------------------------------------------------ recorded numbers


@needs_reference
def test_recorded_streams_poolers_head_and_loss() -> None:
    tensors, meta = recorded("meter")
    width, inner = meta["hidden"], tensors["param.text0.intermediate.dense.weight"].shape[0]
    text_width, image_width = (tensors[f"{name}_features"].shape[-1] for name in ("text", "image"))
    text = RobertaConfig(vocab_size=9, hidden_size=text_width, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config = CoAttentionConfig(
        text, image_width=image_width, hidden_size=width, num_hidden_layers=meta["layers"], num_attention_heads=meta["heads"],
        intermediate_size=inner,
    )  # fmt: skip
    model = CoAttentionModel(config).eval().requires_grad_(False)
    put(model.type_embeddings.weight, tensors["type_embedding"])
    for name, stream in (("text", model.cross_modal_text), ("image", model.cross_modal_image)):
        for part in ("weight", "bias"):
            put(getattr(stream.transform, part), tensors[f"param.transform_{name}.{part}"])
            put(getattr(stream.pooler, part), tensors[f"param.pooler_{name}.dense.{part}"])
        for number, layer in enumerate(stream.layers):
            for of_layer, parameter in layer.named_parameters():
                put(parameter, tensors[f"param.{name}{number}.{of_layer}"])
    model.text_encoder.forward = lambda **inputs: SimpleNamespace(last_hidden_state=tensors["text_features"])
    states: dict[str, Tensor] = {}
    for name, stream in (("text", model.cross_modal_text), ("image", model.cross_modal_image)):
        for number, layer in enumerate(stream.layers):
            layer.register_forward_hook(lambda _, args, output, key=f"layer{number}.{name}": states.update({key: output}))
            if number == 0:
                layer.register_forward_pre_hook(lambda _, args, key=f"fusion_input.{name}": states.update({key: args[0]}))
    output = model(attention_mask=tensors["text_mask"], image_embeds=tensors["image_features"])
    assert len(states) == 2 + 2 * meta["layers"]
    for name, state in states.items():
        assert_agrees(state, tensors[name])
        assert (state - tensors[name]).abs().max() <= 2e-6
    assert_agrees(output.pooler_output, tensors["pooled"])
    task = VqaModel(
        meta["answers"], model, new_method("full", {}, "test"), {}, [], SimpleNamespace(width=image_width, encoder=nn.Identity()),
        True,
    ).eval()  # fmt: skip
    for name, parameter in task.head.named_parameters():
        put(parameter, tensors[f"param.head.{name}"])
    ids = torch.zeros(tensors["text_features"].shape[:2], dtype=torch.int64)
    found = task(ids, tensors["text_mask"], tensors["image_features"], tensors["labels"])
    assert_agrees(task(ids, tensors["text_mask"], tensors["image_features"])["logits"], tensors["logits"])
    assert_agrees(found["loss"], tensors["loss"])


# ------------------------------------------------------------------------------------ computed numbers


def attention(layer: nn.Module, x: Tensor, read: Tensor, real: Tensor, heads: int) -> Tensor:
    """A post-norm attention of BERT's layer, head by head and in float64: (L, d), (L', d) and (L',) -> (L, d)."""
    inner = layer.self
    q, k, v = inner.query(x), inner.key(read), inner.value(read)
    of_heads = []
    for part in range(heads):
        own = slice(part * x.shape[1] // heads, (part + 1) * x.shape[1] // heads)
        scores = q[:, own] @ k[:, own].T / (x.shape[1] / heads) ** 0.5
        scores[:, ~real] = -torch.inf
        of_heads.append(scores.softmax(-1) @ v[:, own])
    return layer.output.LayerNorm(layer.output.dense(torch.cat(of_heads, -1)) + x)


def test_both_streams_read_what_the_other_was_before_the_layer() -> None:
    torch.manual_seed(0)
    model = two_streams().double().requires_grad_(False)
    text, image = torch.randn(4, D).double(), torch.randn(TOKENS, D).double()
    real = torch.tensor([True, True, True, False])
    x, y = text, image
    for of_text, of_image in zip(model.cross_modal_text.layers, model.cross_modal_image.layers, strict=True):
        after = []
        for layer, own, of_own, other, of_other in (
            (of_text, x, real, y, torch.ones(TOKENS, dtype=torch.bool)),
            (of_image, y, torch.ones(TOKENS, dtype=torch.bool), x, real),
        ):
            state = attention(layer.attention, own, own, of_own, 4)
            state = attention(layer.crossattention, state, other, of_other, 4)
            inner = nn.functional.gelu(layer.intermediate.dense(state))
            after.append(layer.output.LayerNorm(layer.output.dense(inner) + state))
        x, y = after
    mask = torch.where(real, 0.0, -1e4)[None, None, None].double()
    found = model.fused(text[None], image[None], mask)
    torch.testing.assert_close(found[0][0], x, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1][0], y, rtol=0, atol=1e-12)


def test_streams_that_are_swapped_with_their_weights_give_each_others_states() -> None:
    torch.manual_seed(0)
    model = two_streams(image_width=D).double().requires_grad_(False)
    text, image = torch.randn(2, 3, D).double(), torch.randn(2, TOKENS, D).double()
    first = model.fused(text, image, None)
    model.cross_modal_text, model.cross_modal_image = model.cross_modal_image, model.cross_modal_text
    second = model.fused(image, text, None)
    for ours, theirs in zip(first, reversed(second), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert not torch.allclose(model.fused(text, image, None)[0], first[0])


def test_text_padding_changes_nothing_and_neither_do_batch_mates() -> None:
    torch.manual_seed(0)
    model = two_streams().double()
    batch = batch_of()
    ids, mask, image = batch["input_ids"], batch["attention_mask"], batch["image"].double()
    alone = model(ids, mask, image_embeds=image).pooler_output
    padded = model(nn.functional.pad(ids, (0, 3), value=7), nn.functional.pad(mask, (0, 3)), image_embeds=image)
    torch.testing.assert_close(padded.pooler_output, alone, rtol=0, atol=1e-12)
    turned = model(ids.flip(0), mask, image_embeds=image.flip(0)).pooler_output
    torch.testing.assert_close(turned.flip(0), alone, rtol=0, atol=1e-12)
    other = model(ids, mask, image_embeds=torch.cat([image[:1], -image[1:]])).pooler_output
    torch.testing.assert_close(other[0], alone[0], rtol=0, atol=1e-12)
    for half in (slice(0, D), slice(D, None)):  # the image reaches both poolers
        assert (other[1, half] - alone[1, half]).abs().max() > 1e-6


def test_parameters_are_as_many_as_counted_by_hand() -> None:
    model = two_streams()
    layer = 8 * (D * D + D) + 2 * D * INNER + INNER + D + 3 * 2 * D
    own = LAYERS * layer + D * D + D
    counts = {name: sum(p.numel() for p in stream.parameters()) for name, stream in model.streams.items()}
    assert counts == {"cross_modal_text": own + D * D + D, "cross_modal_image": own + IMAGE * D + D}
    outside = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("cross_modal", "text_encoder")))
    assert outside == 2 * D


def test_it_saves_and_loads_to_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = two_streams(), batch_of()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "image_embeds": batch["image"]}
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.equal(again(**inputs)[name], model(**inputs)[name])


def test_the_parts_of_both_streams_are_found() -> None:
    found = structure_of(two_streams())
    streams, layers = ("cross_modal_text", "cross_modal_image"), range(LAYERS)
    of_streams = [f"{stream}.layers.{number}" for number in layers for stream in streams]
    of_text = [f"text_encoder.encoder.layer.{number}" for number in range(2)]
    for kind, role in (("query", "query"), ("key", "key"), ("value", "value")):
        cross = [f"{layer}.{part}.self.{kind}" for layer in of_streams for part in ("attention", "crossattention")]
        assert set(found.computing(role)) == {*cross, *(f"{layer}.attention.self.{kind}" for layer in of_text)}
    assert set(found.attention_outputs) == {f"{layer}.attention.output.dense" for layer in (*of_text, *of_streams)}
    assert set(found.cross_attention_outputs) == {f"{layer}.crossattention.output.dense" for layer in of_streams}
    assert set(found.feed_forward_outputs) == {f"{layer}.output.dense" for layer in (*of_text, *of_streams)}
    for layer in of_streams:
        assert found.sub_layer_inputs[f"{layer}.crossattention.output.dense"] == f"{layer}.crossattention.self.query"
        assert found.feed_forward_inputs[f"{layer}.output.dense"] == (f"{layer}.intermediate.dense",)
    assert [*layers_in(two_streams())] == [f"{stream}.layers.{number}" for stream in streams for number in layers]


# ---------------------------------------------------------------------------------- methods in two streams

CASES = [
    (method, options)
    for method in METHODS
    if not {"co_attention", "vqa"} & method_class(method).refuses.keys()
    for options in small_options(method)
]
CASES += [("lora", SMALL["lora"] | {"routing": "mul", "routed_tokens": "mean", "routed_positions": "text"})]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))


@every_case
def test_a_method_trains_and_examples_and_padding_stay_apart(case: tuple[str, dict[str, Any]]) -> None:
    model, batch = build(*case), batch_of()
    first = model(**batch)["loss"].item()
    for _ in range(4):
        one_step(model, batch)
    assert model(**batch)["loss"].item() < first
    trained = [p for p in model.parameters() if p.requires_grad]
    grouped = [p for group in model.method.groups(model, 0.1) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained} and len(grouped) == len(trained)
    model = shaken(model).double()
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    together = model(**batch)["losses"]
    alone = model(**{name: tensor[1:2] for name, tensor in batch.items()})["losses"]
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-10)
    padded = {name: nn.functional.pad(batch[name], (0, 2)) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**batch | padded)["losses"], together, rtol=0, atol=1e-10)
    other = model(**batch | {"image": -batch["image"]})["losses"]
    assert (other - together).abs().min() > 1e-7


@every_case
def test_a_method_saves_and_loads_to_the_same_bits(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    model, batch = shaken(build(*case)), batch_of()
    model.save(tmp_path)
    again = build(*case)
    again.load(tmp_path)
    assert torch.equal(again(**batch)["losses"], model(**batch)["losses"])


def test_without_the_image_it_is_blind_but_where_it_is_routed() -> None:
    batch = batch_of()
    other = batch | {"image": -batch["image"]}
    blind = build("lora", SMALL["lora"], prefix=False)
    assert torch.equal(blind(**batch)["losses"], blind(**other)["losses"])
    routed = shaken(build("lora", SMALL["lora"] | {"routing": "mul"}, prefix=False))
    assert not torch.equal(routed(**batch)["losses"], routed(**other)["losses"])


def test_routed_at_the_texts_positions_the_images_stream_keeps_its_own() -> None:
    """With an image of zeros `mul` gives no update, but where what is read is the image and keeps x_t."""
    batch = batch_of()
    model = shaken(build("lora", SMALL["lora"] | {"routing": "mul", "routed_positions": "text"}))
    read: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "image_alone")}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, output, name=name: read.update({name: output - _.base_layer(args[0])}))
    zero = batch | {"image": torch.zeros_like(batch["image"])}
    model.text_model.base_model.visual_projection["default"].bias.data.zero_()
    model(**zero)
    of_image = {name for name, update in read.items() if update.abs().max() > 0}
    expected = {
        name
        for name in layers
        if ("cross_modal_image" in name) != ("crossattention" in name and name.endswith("value")) and "cross_modal" in name
    }
    assert of_image == expected and len(of_image) == 4 * LAYERS


def test_tokens_of_another_width_are_refused() -> None:
    with pytest.raises(RoutevlError, match="reads tokens of width 20, and the vision backbone gives 24: derive it with"):
        build("full", {}, width=24)


def test_rates_of_full_fine_tuning_cover_every_parameter_once() -> None:
    model = build("full", {"head_rate": 50, "cross_modal_rate": 5})
    groups = model.method.groups(model, 0.001)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rate_of = {names[id(p)]: round(group["lr"] / 0.001) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rate_of) == len(names)
    assert groups[0]["lr"] == 0.001
    for name, rate in rate_of.items():
        assert rate == (50 if name.startswith("head.") else 5 if ".cross_modal_" in name else 1)
    assert rate_of["text_model.type_embeddings.weight"] == rate_of["text_model.text_encoder.embeddings.LayerNorm.bias"] == 1
    [whole] = build("full", {}).method.groups(model, 0.001)
    assert [id(p) for p in whole["params"]] == [id(p) for p in model.parameters()]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = shaken(build("lora", SMALL["lora"] | {"routing": "mul"})).train()
        if checkpointing:
            model.text_model.get_base_model().gradient_checkpointing_enable()
        model(**batch_of())["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_das_skips_layers_of_both_streams_each_alone() -> None:
    model, batch = build("das", SMALL["das"] | {"skipped": 2}), batch_of()
    skipped = [name for name, module in layers_in(model.text_model).items() if module.adapter.skipped]
    assert skipped == ["cross_modal_text.layers.0", "cross_modal_text.layers.1"]  # the largest gates of the test
    called: list[str] = []
    for name, module in model.text_model.named_modules():
        if re.fullmatch(r"cross_modal_\w+\.layers\.\d\.attention", name):
            module.register_forward_hook(lambda _, args, output, name=name: called.append(name))
    model(**batch)
    assert called == [f"cross_modal_image.layers.{number}.attention" for number in range(LAYERS)]


# ----------------------------------------------------------------------------------- how it is made and used

OPTIONS = {"layers": 1, "heads": 2, "epochs": 2, "examples": 20, "batch_size": 4, "seed": 5}


@pytest.fixture(scope="module")
def derived(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return derive(small_world, tmp_path_factory.mktemp("meter") / "meter")


def derive(world: SmallWorld, output: Path, **changes: int) -> Path:
    words = [f"{name}={value}" for name, value in (OPTIONS | changes).items()]
    run_stage(
        "derive-backbone", "--by", "co_attention", "--source", world.text["vqa"], "--data", world.data, "--vision-backbone",
        world.vision[16], "--options", *words, "--output", output, "--checkpoint", output.with_name("checkpoint"),
        "--checkpoint-every", 3,
    )  # fmt: skip
    return output


def test_a_derived_folder_is_an_ordinary_one_and_says_what_it_has_learned(derived: Path, small_world: SmallWorld) -> None:
    model, tokenizer = load_text_backbone(derived, "encoder")
    assert isinstance(model, CoAttentionModel) and tokenizer.mask_token is not None
    record = json.loads((derived / "derived.json").read_text())
    assert record["by"] == "co_attention" and record["pairs"] == 20
    assert model.config.vision_fingerprint == record["vision_fingerprint"]
    for name in ("token_accuracy", "token_accuracy_of_other_images", "matching_accuracy"):
        assert 0 <= record[name] <= 1
    skeleton, _ = text_skeleton(derived, "encoder")
    assert skeleton.state_dict().keys() == model.state_dict().keys()
    source, _ = load_text_backbone(small_world.text["vqa"], "encoder")
    changed = [n for n, p in source.named_parameters() if not torch.equal(p, model.text_encoder.get_parameter(n))]
    assert changed  # the text encoder learns too


def test_it_is_derived_to_the_same_bits_again(derived: Path, small_world: SmallWorld, tmp_path: Path) -> None:
    again = derive(small_world, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (derived / "model.safetensors").read_bytes()
    other = derive(small_world, tmp_path / "other", seed=6)
    assert (other / "model.safetensors").read_bytes() != (derived / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [1, 5, 10])
def test_a_derivation_that_was_stopped_or_killed_goes_on_to_the_same_bytes(
    small_world: SmallWorld, derived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Of 10 steps; stopped in the first process, killed in the second."""
    calls = interrupted_calls(monkeypatch, Learner, "loss", step, step + 4)
    with pytest.raises(SystemExit, match="143"), own_signals():
        derive(small_world, tmp_path / "derived")
    assert not (tmp_path / "derived").exists() and (tmp_path / "checkpoint/checkpoint.safetensors").exists()
    if step < 10:
        with pytest.raises(MemoryError), own_signals():
            derive(small_world, tmp_path / "derived")
    made = len(calls)
    again = derive(small_world, tmp_path / "derived")
    assert (again / "model.safetensors").read_bytes() == (derived / "model.safetensors").read_bytes()
    assert len(calls) - made <= 10 - step, "what was done is not done again, but for what no checkpoint has"
    assert not (tmp_path / "checkpoint").exists()


def test_without_epochs_the_text_encoder_is_the_sources(small_world: SmallWorld, tmp_path: Path) -> None:
    model, _ = load_text_backbone(derive(small_world, tmp_path / "fresh", epochs=0), "encoder")
    source, _ = load_text_backbone(small_world.text["vqa"], "encoder")
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter, model.text_encoder.get_parameter(name))


def test_what_does_not_fit_is_refused(small_world: SmallWorld, tmp_path: Path) -> None:
    common = ("--source", small_world.text["vqa"], "--output", tmp_path / "no")
    with pytest.raises(RoutevlError, match="--vision-backbone is missing: the vision backbone whose images it reads"):
        run_stage(
            "derive-backbone",
            "--by",
            "co_attention",
            "--data",
            small_world.data,
            "--checkpoint",
            tmp_path / "checkpoint",
            *common,
        )
    with pytest.raises(RoutevlError, match="--vision-backbone is given: drop it"):
        run_stage(
            "derive-backbone", "--by", "magnitude", "--options", "sparsity=0.5", "--vision-backbone", small_world.vision[16],
            *common,
        )  # fmt: skip
    with pytest.raises(RoutevlError, match="the width 16 is no multiple of 3 heads: set heads or hidden_size"):
        derive(small_world, tmp_path / "no", heads=3)
    pruned = tmp_path / "pruned"
    run_stage(
        "derive-backbone",
        "--by",
        "magnitude",
        "--source",
        small_world.text["vqa"],
        "--options",
        "sparsity=0.5",
        "--output",
        pruned,
    )
    with pytest.raises(RoutevlError, match="it is pruned, and pretraining would fill its zeros: take what it was derived from"):
        derive(replace(small_world, text={"vqa": pruned}), tmp_path / "no")


def entries(**derivation: Any) -> dict[str, dict[str, Any]]:
    """The backbones of a configuration."""
    of_text = {"roberta": {"path": "somewhere"}, "meter": {"derive": {"by": "co_attention", "from": "roberta", **derivation}}}
    return {"text": of_text, "vision": {"vit": {"path": "elsewhere"}}}


def test_a_configuration_names_the_vision_model_that_it_is_derived_with() -> None:
    check_backbones(entries(**{"with": "vit"}))
    assert model_type(entries(**{"with": "vit"})["text"], "meter") == "co_attention"  # which some methods refuse
    where = r"configuration: backbones\.text\.meter\.derive: with"
    with pytest.raises(RoutevlError, match=f"{where} is missing: the vision backbone whose images it reads"):
        check_backbones(entries())
    with pytest.raises(RoutevlError, match=f"{where} 'resnet' is none of backbones.vision"):
        check_backbones(entries(**{"with": "resnet"}))
    with pytest.raises(RoutevlError, match=f"{where} is given: drop it"):
        check_backbones(entries(by="magnitude", options={"sparsity": 0.5}, **{"with": "vit"}))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {"head_rate": 5, "cross_modal_rate": 2}),
        ("lora", {"routing": "mul", "routed_tokens": "mean", "routed_positions": "text"}),
    ],
)
def test_a_run_trains_predicts_and_loads(
    method: str, options: dict[str, Any], derived: Path, small_world: SmallWorld, tmp_path: Path
) -> None:
    run = new_run(
        small_world, tmp_path, "vqa", method=method, options=options, text_backbone=derived, visual_tokens="all", epochs=1
    ).train()
    assert run.results() and json.loads((run.model / "run.json").read_text())["trainable_params"] > 0
    assert ("import routevl.backbones.co_attention  #" in (run.model / "README.md").read_text()) == (method == "lora")
    text_model, _ = load_text_backbone(derived, "encoder")
    loaded = load_run(text_model, run.model)
    ids = torch.tensor([[0, 5, 2]])
    extra = {"visual_features": torch.zeros(1, 1, 16), "image_positions": torch.zeros(1, 3, dtype=torch.bool)}
    assert loaded(input_ids=ids, **(extra if method == "lora" else {})).pooler_output.shape == (1, 32)


def test_das_searches_among_the_layers_of_both_streams(derived: Path, small_world: SmallWorld, tmp_path: Path) -> None:
    options = {"skipped": 1, "search_epochs": 2, "every": 2, "subsets": 2, "head_rate": 50, "cross_modal_rate": 5}
    run = new_run(
        small_world, tmp_path, "vqa", method="das", options=options, text_backbone=derived, visual_tokens="all", epochs=1
    )
    prepared = probe(run, tmp_path / "prepared.safetensors")
    gates = load_file(prepared)
    assert gates.keys() == {"cross_modal_text.layers.0", "cross_modal_image.layers.0"}
    run = Run(tmp_path, run.options | {"prepared": prepared}).train()
    left_out, _ = sorted(gates, key=lambda name: -gates[name].item())  # what is skipped has one bottleneck, the other one three
    saved = load_file(run.model / "method.safetensors")
    assert {name for name in saved if name.startswith(f"{left_out}.") and ".adapter." in name} == {
        f"{left_out}.adapter.skip.{part}.{kind}" for part in ("norm", "down", "up") for kind in ("weight", "bias")
    }


def test_both_models_are_trained_in_full(derived: Path, small_world: SmallWorld, tmp_path: Path) -> None:
    run = new_run(small_world, tmp_path, "vqa", method="full_both", text_backbone=derived, visual_tokens="all", epochs=1)
    run = Run(tmp_path, {name: value for name, value in run.options.items() if name != "features"})
    task = run.trainer().task
    names = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in task.model.named_parameters()}
    start = {name: tensor.clone() for name, tensor in task.model.tensors().items()}
    run.train()
    saved = load_file(run.model / "last" / "task.safetensors")
    of_vision = {name for name in names if name.startswith("vision.")}
    assert of_vision and {name for name in saved if not name.startswith("head.")} == of_vision
    assert all(not torch.equal(saved[name], start[name]) for name in of_vision if name.endswith("weight"))


def test_a_run_with_another_vision_model_is_refused(derived: Path, small_world: SmallWorld, tmp_path: Path) -> None:
    run = new_run(small_world, tmp_path, "vqa", text_backbone=derived, visual_tokens="all", width=24)
    with pytest.raises(RoutevlError, match="its image stream was trained with the vision model .* set the run's vision_backbone"):
        run.trainer()
