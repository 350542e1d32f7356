"""CLIP-BART's model: against recorded numbers and formulas, its methods, what it generates, how many parameters it has."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from cases import (
    CASES,
    LAYERS,
    TASKS,
    TEXT_MODELS,
    D,
    bart,
    name_of,
    one_step,
    prepared_for,
    rows,
    shaken,
    tasks_of,
    trains_norms,
)
from recorded import assert_agrees, needs_reference, put, recorded
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from routevl.backbones.skeleton import no_weights
from routevl.errors import RoutevlError
from routevl.features.grid import pooled_grid
from routevl.methods.base import layer_norms
from routevl.methods.bottleneck.layer import Bottleneck
from routevl.methods.hyperformer.layer import Code, Generated, Head
from routevl.methods.lora.layer import RoutedLoraLayer
from routevl.methods.table import new_method
from routevl.methods.vl_adapter.layer import Adapter
from routevl.tasks.clip_bart.joint_encoder import embed_text_alone, text_of
from routevl.tasks.clip_bart.model import ClipBart
from routevl.tasks.clip_bart.visual_embedding import EXTRA_TOKENS, VisualEmbedding, add_extra_tokens

WIDTH, GRID = 20, 4  # of an image's features, and tokens
START, BOS, EOS = 0, 0, 49  # of cases.bart
CHOICES = (7, 8)  # the tokens of "true" and "false"
ALONE = {"do_sample": False, "num_beams": 1}


def clip_bart(
    text_model: nn.Module, method: str, options: Mapping[str, Any], norms: bool = False, width: int = WIDTH, prefix: bool = True
) -> ClipBart:
    """A model in evaluation mode."""
    text_model.requires_grad_(False)
    visual = SimpleNamespace(width=width, encoder=nn.Identity())
    train_also = layer_norms(text_model) if norms else []
    arguments = (new_method(method, options, "test"), prepared_for(method, text_model), train_also, visual, prefix)
    return ClipBart(CHOICES, text_model, *arguments).eval()


def lively_bart() -> BartForConditionalGeneration:
    """With weights as large as trained ones, so that the encoder matters to the decoder."""
    model = bart()
    for parameter in model.parameters():
        parameter.data *= 10 if parameter.dim() > 1 else 1
    return model


def toy(method: str = "bitfit", norms: bool = False, seed: int = 0, prefix: bool = True, **options: Any) -> ClipBart:
    torch.manual_seed(seed)
    return clip_bart(lively_bart(), method, options, norms, prefix=prefix)


def batch_of(seed: int = 0, images: int = 1) -> dict[str, Tensor]:
    """Three texts of several tasks, the second with padding, with an image or a pair, and answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    input_ids, labels = (torch.randint(4, 48, (3, length), generator=generator) for length in (6, 4))
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 4:], attention_mask[1, 4:], labels[2, 2:] = 1, 0, -100
    image = torch.randn(3, images, GRID, WIDTH, generator=generator)
    image = image[:, 0] if images == 1 else image
    text = {"input_ids": input_ids, "attention_mask": attention_mask, "task_id": tasks_of()}
    return text | {"image": image, "labels": labels}


def read(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch without its labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def seen_by(module: nn.Module) -> list[Any]:
    """The outputs of a module, as they come."""
    outputs: list[Any] = []
    module.register_forward_hook(lambda _, __, output: outputs.append(output))
    return outputs


def given_to(module: nn.Module) -> list[Any]:
    """The first arguments of a module, as they come."""
    arguments: list[Any] = []
    module.register_forward_pre_hook(lambda _, args: arguments.append(args[0]))
    return arguments


# ------------------------------------------------------------------------- against the recorded numbers


def unpacked(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Parameters that are recorded one behind the other, by name."""
    shapes = {parameter: shape for parameter, shape in meta[f"{name}.parameters"]}
    parts = tensors[f"{name}.values"].split([math.prod(shape) for shape in shapes.values()])
    return {parameter: part.view(shape) for (parameter, shape), part in zip(shapes.items(), parts, strict=True)}


OFFICIAL = {  # ends of our names, and of the official ones
    "visual_projection.features": "model.encoder.visual_embedding.feat_embedding",
    "visual_projection.boxes": "model.encoder.visual_embedding.absolute_vis_pos_embedding",
    "visual_projection.image_order": "model.encoder.visual_embedding.img_order_embedding.weight",
    "encoder.S.self_attn.out_proj.adapter.bottlenecks.0": "encoder.S.attn_adapter.adapters.vqa",
    "decoder.S.self_attn.out_proj.adapter.bottlenecks.0": "decoder.S.self_attn_adapter.adapters.vqa",
    "S.encoder_attn.out_proj.adapter.bottlenecks.0": "S.enc_attn_adapter.adapters.vqa",
    "S.fc2.adapter.bottlenecks.0": "S.ff_adapter.adapters.vqa",
    "prompts.of_tasks.0.vectors": "prompt_modules.prompts.vqa.prefix_embedding.0.weight",
    "prompts.of_tasks.0.network.0": "prompt_modules.prompts.vqa.prefix_embedding.1",
    "prompts.of_tasks.0.network.2": "prompt_modules.prompts.vqa.prefix_embedding.3",
    ".down.": ".down_sampler.",
    ".up.": ".up_sampler.",
    "lora_A.default.weight": "lora_As.vqa",
    "lora_B.default.weight": "lora_Bs.vqa",
    "text_model.": "",
    "base_model.model.": "",
    ".base_layer.": ".",
}


def official_name(name: str) -> str:
    """What the official code calls one of our parameters."""
    number = next((part for part in name.split(".") if part.isdigit()), "")
    for ours, theirs in OFFICIAL.items():
        ours, theirs = (text.replace("S", f"layers.{number}") for text in (ours, theirs))
        name = name.replace(ours, theirs)
    return name


def official(method: str, options: Mapping[str, Any], recorded_as: str) -> tuple[ClipBart, dict[str, Tensor], dict[str, Any]]:
    """The recorded model, with what is recorded of it."""
    tensors, meta = recorded("clip_bart")
    sizes = meta["shapes"]
    sides = {f"{side}_{name}": sizes[of] for side in ("encoder", "decoder") for name, of in
             {"layers": f"{side}_layers", "attention_heads": "heads", "ffn_dim": "ffn"}.items()}  # fmt: skip
    vocabulary = sizes["vocabulary"] + sizes["extra_tokens"]
    config = BartConfig(vocab_size=vocabulary, d_model=sizes["d"], max_position_embeddings=sizes["positions"], **sides)
    model = clip_bart(BartForConditionalGeneration(config), method, options, width=sizes["feature"])
    known = unpacked(tensors, meta, "base")
    if recorded_as != "none":
        known |= unpacked(tensors, meta, f"{recorded_as}.param")
    for name, parameter in model.named_parameters():
        put(parameter, known.pop(official_name(name)))
    assert not known
    return model, tensors, meta


@needs_reference
def test_the_visual_embedding_gives_the_recorded_tokens() -> None:
    model, tensors, _ = official("bitfit", {}, "none")
    embedding, features = model.visual_projection, tensors["visual.feats"]
    assert_agrees(embedding(features), tensors["visual.one_image.zero_boxes"])
    assert_agrees(embedding(features, tensors["visual.boxes"]), tensors["visual.one_image.boxes"])
    assert_agrees(embedding(pooled_pair(tensors)), tensors["visual.pair.embedded"])


def pooled_pair(tensors: Mapping[str, Tensor]) -> Tensor:
    """The recorded pairs of images, (B, 2, 36, F)."""
    pairs = tensors["visual.pair"]
    return pooled_grid(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])


@needs_reference
def test_pooling_gives_the_recorded_grids() -> None:
    tensors, _ = recorded("clip_bart")
    assert torch.equal(pooled_grid(tensors["visual.feats"]), tensors["downsample.one_image"])
    assert torch.equal(pooled_pair(tensors).flatten(1, 2), tensors["downsample.pair"])


RECORDED = [
    ("bitfit", {}, "none"),
    ("vl_adapter", {"r": 4}, "adapter"),
    ("peft_lora", {"r": 4, "lora_alpha": 32.0}, "lora"),
    ("lora", {"r": 4, "lora_alpha": 32.0}, "lora"),
    ("vl_prompt", {"num_virtual_tokens": 3, "hidden_size": 6}, "prompt"),
]


@needs_reference
@pytest.mark.parametrize(("method", "options", "name"), RECORDED)
def test_the_model_gives_the_recorded_states_losses_and_decisions(method: str, options: dict[str, Any], name: str) -> None:
    model, tensors, _ = official(method, options, name)
    states, logits = seen_by(model.text_model.get_encoder()), seen_by(model.text_model.get_output_embeddings())
    batch = {"input_ids": tensors["input_ids"], "attention_mask": (tensors["input_ids"] != 1).long()}
    one = batch | {"image": tensors["downsample.one_image"]}
    two = batch | {"image": pooled_pair(tensors)}
    labels, ones = tensors["labels"], torch.ones(len(tensors["labels"]))
    losses = {
        "vqa": model(**one, labels=labels, scores=tensors["scores"]),
        "gqa": model(**one, labels=labels, scores=ones),
        "caption": model(**one, labels=labels),
        "nlvr": model(**two, labels=tensors["nlvr.labels"], scores=ones),
    }
    ends = (-one["image"].shape[1] - one["input_ids"].shape[1], -one["input_ids"].shape[1])
    prompt, image, text = states[0].last_hidden_state.tensor_split(ends, dim=1)
    assert_agrees(torch.cat([prompt, text, image], dim=1), tensors[f"{name}.encoder"])
    assert_agrees(logits[0], tensors[f"{name}.logits"])
    assert_agrees(losses["vqa"]["losses"], tensors[f"{name}.token_losses"].view(labels.shape).sum(-1))
    for task, output in losses.items():
        assert_agrees(output["loss"], tensors[f"{name}.loss.{task}"])
    model.choices = (50, 51)
    assert torch.equal(model.decide(**two).long(), tensors[f"{name}.nlvr.predicted"])


@needs_reference
def test_hyperformer_generates_the_recorded_adapters() -> None:
    tensors, meta = recorded("clip_bart")
    d, r = meta["shapes"]["d"], meta["shapes"]["adapter_bottleneck"]
    known, cpu = unpacked(tensors, meta, "hyperformer.param"), torch.device("cpu")
    code = Code(nn.ParameterList([tensors["hyperformer.task_embedding"]]), 2, cpu, hidden=5, width=3)
    put(code.layers, tensors["hyperformer.layer_id_embedding"])
    for number, name in ((0, "task_hypernet.task_embeding_generator.0"), (2, "task_hypernet.task_embeding_generator.2"),
                         (3, "LayerNorm")):  # fmt: skip
        put_layer(code.network[number], known, name)
    down, up = Head(d, r, cpu, code=3), Head(r, d, cpu, code=3)
    for side, head in (("down", down), ("up", up)):
        for part, layer in (("weight", head.weight), ("bias", head.bias)):
            put_layer(layer, known, f"self_attention_{side}_sampler_hyper_net.{part}_generator.0")
    assert not known
    assert_agrees(code(0, 1), tensors["hyperformer.projected"])
    adapter = Adapter([Bottleneck(Generated(code, down, 0, 1), Generated(code, up, 0, 1))], None)
    assert_agrees(adapter(tensors["hyperformer.x"]), tensors["hyperformer.y"])


def put_layer(layer: nn.Module, known: dict[str, Tensor], name: str) -> None:
    """Set a layer's weight and bias to recorded ones, which are then known no more."""
    for part in ("weight", "bias"):
        put(getattr(layer, part), known.pop(f"{name}.{part}"))


# ------------------------------------------------------------------------------------------------ sizes

D_BASE, VISUAL = 768, 1_582_848  # of bart-base with features of width 2048
NORMS, BIASES, ADAPTER, LORA = 32 * 2 * D_BASE, 125_952, 148_320, 2 * 128 * D_BASE
PHM = 2 * (2 * (D_BASE // 2) * (96 // 2) + 2**3) + 96 + D_BASE
GENERATOR = 6 * 512 + (2 * 512 + 1) * 128 + 129 * 8 + 2 * 8  # of codes, for a stack
PROMPT = 40 * D_BASE + (D_BASE + 1) * 800 + 801 * D_BASE
DOWN, UP = D_BASE * 96 + 96, 96 * D_BASE + D_BASE
VL_PET = 18 * ADAPTER + 13 * 2 * D_BASE  # twelve places in the encoder, six in the decoder
FOUR = {"tasks": 4}
AT_BART_BASE = {  # the reference's name -> method, options, whether norms are trained, and all that is but the visual embedding
    "bitfit": ("bitfit", {}, False, BIASES),
    "single_adapter": ("vl_adapter", {}, True, 30 * ADAPTER + NORMS),
    "multiple_adapters": ("vl_adapter", {"sharing": "multiple", **FOUR}, True, 4 * 30 * ADAPTER + NORMS),
    "half_shared_down": ("vl_adapter", {"sharing": "half_shared", **FOUR}, True, 30 * (DOWN + 4 * UP) + NORMS),
    "half_shared_up": ("vl_adapter", {"sharing": "half_shared_up", **FOUR}, True, 30 * (4 * DOWN + UP) + NORMS),
    "hyperformer": ("hyperformer", FOUR, True, 4 * 512 + 2 * GENERATOR + 5 * 9 * ADAPTER + NORMS),
    "single_prompt": ("vl_prompt", {}, False, PROMPT),
    "multiple_prompts": ("vl_prompt", FOUR, False, 4 * PROMPT),
    "single_compacter": ("phm_adapter", {}, True, 30 * PHM + NORMS),
    "multiple_compacters": ("phm_adapter", {"sharing": "multiple", **FOUR}, True, 4 * 30 * PHM + NORMS),
    "single_lora": ("lora_bias", {"r": 128, "lora_alpha": 32.0}, False, 36 * LORA + BIASES),
    "multiple_lora": ("lora", {"r": 128, "lora_alpha": 32.0, "bias": "all", **FOUR}, False, 4 * 36 * LORA + BIASES),
    "small": ("vl_pet_small", {}, True, VL_PET + 12 * (2 * D_BASE + 1)),
    "middleX": ("vl_pet_middle_x", {}, True, VL_PET + 12 * (D_BASE + 1)),
    "middleY": ("vl_pet_middle_y", {}, True, VL_PET + 12 * D_BASE),
    "large": ("vl_pet_large", {}, True, VL_PET + 12 * ADAPTER),
    "routed_lora": ("lora", {"r": 128, "lora_alpha": 32.0, "routing": "mul"}, False, 36 * LORA),
    "routed_lora_bias": ("lora", {"r": 128, "lora_alpha": 32.0, "bias": "all", "routing": "mul"}, False, 36 * LORA + BIASES),
    "adapter_without_norms": ("vl_adapter", {}, False, 30 * ADAPTER),
}


def at_bart_base(method: str, options: Mapping[str, Any], norms: bool) -> ClipBart:
    """A model of bart-base's size without weights."""
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}.items()}  # fmt: skip
    with no_weights():
        text_model = BartForConditionalGeneration(BartConfig(vocab_size=50265, d_model=D_BASE, **sides))
        add_extra_tokens(text_model)
    text_model.tie_weights()
    with no_weights():
        return clip_bart(text_model, method, options, norms, width=2048)


def sizes(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@pytest.mark.parametrize("name", AT_BART_BASE)
def test_parameter_counts_at_bart_base(name: str) -> None:
    method, options, norms, expected = AT_BART_BASE[name]
    model = at_bart_base(method, options, norms)
    assert sizes(model)[0] == expected + VISUAL
    assert model.trainable_params_by_part()["visual_projection"] == VISUAL


@needs_reference
@pytest.mark.parametrize("name", ["full", *AT_BART_BASE][:-3])
def test_parameter_counts_at_bart_base_are_the_recorded_ones(name: str) -> None:
    _, meta = recorded("clip_bart")
    method, options, norms, _ = AT_BART_BASE.get(name, ("full", {}, False, None))
    counts = meta["bart_base_counts"][name]
    assert sizes(at_bart_base(method, options, norms)) == (counts["trainable"], counts["total"])


def test_extra_tokens_are_frozen_and_the_same_in_every_run() -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(bart().requires_grad_(False))
    before = [model.get_input_embeddings().weight.clone() for model in models]
    for model in models:
        add_extra_tokens(model)
    tables = [model.get_input_embeddings().weight for model in models]
    for table, old, model in zip(tables, before, models, strict=True):
        assert torch.equal(table[: len(old)], old) and len(table) == len(old) + EXTRA_TOKENS == model.config.vocab_size
        assert model.get_output_embeddings().weight is table and not table.requires_grad
    assert torch.equal(tables[0][-EXTRA_TOKENS:], tables[1][-EXTRA_TOKENS:])
    assert tables[0][-EXTRA_TOKENS:].std().item() == pytest.approx(0.02, rel=0.05)


# ------------------------------------------------------------------------------------- against formulas


def test_pooling_takes_maxima_over_overlapping_windows() -> None:
    features = numpy.random.default_rng(0).standard_normal((2, 7, 7, 3))
    expected = numpy.lib.stride_tricks.sliding_window_view(features, (2, 2), axis=(1, 2)).max((-1, -2)).reshape(2, 36, 3)
    assert numpy.array_equal(pooled_grid(torch.from_numpy(features).flatten(1, 2)).numpy(), expected)
    with pytest.raises(RoutevlError, match="50 visual tokens are no square grid"):
        pooled_grid(torch.zeros(1, 50, 3))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("boxed", [True, False])
def test_the_visual_embedding_equals_the_formula(images: int, boxed: bool) -> None:
    random = numpy.random.default_rng(0)
    embedding = VisualEmbedding(WIDTH, nn.Embedding(50, D)).double()
    for parameter in embedding.parameters():
        parameter.data = torch.from_numpy(random.standard_normal(parameter.shape))
    of = {name: parameter.detach().numpy() for name, parameter in embedding.named_parameters()}
    features, boxes = random.standard_normal((3, images, GRID, WIDTH)), random.random((3, images, GRID, 4))
    x1, x2, y1, y2 = numpy.moveaxis(boxes, -1, 0)
    numbers = numpy.stack([x1, x2, y1, y2, (x2 - x1) * (y2 - y1)], -1) * boxed
    expected = normed(of, "features", features) + normed(of, "boxes", numbers)
    expected += of["image_order"][:images, None] + of["token_embedding.weight"][::-1][:GRID]
    given = [torch.from_numpy(array[:, 0] if images == 1 else array) for array in (features, boxes)]
    found = embedding(*given if boxed else given[:1]).detach().numpy()
    numpy.testing.assert_allclose(found, expected.reshape(3, images * GRID, D), rtol=0, atol=1e-12)


def normed(of: Mapping[str, numpy.ndarray], name: str, x: numpy.ndarray) -> numpy.ndarray:
    """A layer norm of a linear layer."""
    y = x @ of[f"{name}.0.weight"].T + of[f"{name}.0.bias"]
    y = (y - y.mean(-1, keepdims=True)) / numpy.sqrt(y.var(-1, keepdims=True) + 1e-5)
    return y * of[f"{name}.1.weight"] + of[f"{name}.1.bias"]


def test_how_the_visual_embedding_starts() -> None:
    torch.manual_seed(0)
    embedding = VisualEmbedding(200, nn.Embedding(300, 400))
    for weight in (embedding.features[0].weight, embedding.boxes[0].weight, embedding.image_order):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not embedding.features[0].bias.any() and not embedding.boxes[0].bias.any()


def test_its_norms_are_in_float32_under_mixed_precision() -> None:
    model = toy()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.visual_projection(batch_of()["image"]).dtype == torch.float32


@pytest.mark.parametrize("images", [1, 2])
def test_the_encoder_reads_the_text_embedded_as_ever_and_the_image_as_it_is(images: int) -> None:
    """Its states are those of its own layers on [text; image]: the order is not known to them."""
    model, batch = toy().double(), batch_of(images=images)
    batch["image"] = batch["image"].double()
    encoder, states = model.text_model.get_encoder(), seen_by(model.text_model.get_encoder())
    model(**batch)
    image = model.visual_projection(batch["image"])
    text = encoder.embed_tokens(batch["input_ids"]) + encoder.embed_positions.weight[2 : 2 + 6]
    text = nn.functional.layer_norm(text, (D,), encoder.layernorm_embedding.weight, encoder.layernorm_embedding.bias)
    hidden_states = torch.cat([text, image], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(image.shape[:2])], dim=1).bool()
    for layer in encoder.layers:
        hidden_states = layer(hidden_states, mask[:, None, None].expand(-1, -1, mask.shape[1], -1))
    expected = torch.cat([hidden_states[:, 6:], hidden_states[:, :6]], dim=1)
    real = torch.cat([mask[:, 6:], mask[:, :6]], dim=1)
    torch.testing.assert_close(states[0].last_hidden_state[real], expected[real], rtol=0, atol=1e-12)


def test_text_and_image_may_be_longer_than_the_table_of_positions() -> None:
    model, batch = toy(), batch_of()
    batch["image"] = torch.randn(3, 2, 36, WIDTH)
    assert model.text_model.get_encoder().embed_positions.num_embeddings < 72
    assert model(**batch)["loss"].isfinite()


def test_beside_its_calls_the_text_model_is_as_it_was() -> None:
    model, batch = toy(), batch_of()
    torch.manual_seed(0)
    base = lively_bart().eval()
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": batch["input_ids"]}
    model(**batch)
    assert torch.equal(model.text_model(**text).logits, base(**text).logits)
    with pytest.raises(RuntimeError, match="stop"), text_of(3):
        raise RuntimeError("stop")
    assert torch.equal(model.text_model(**text).logits, base(**text).logits)


def test_only_a_bart_is_taken() -> None:
    with pytest.raises(RoutevlError, match="a gpt2 model; CLIP-BART needs a bart"):
        embed_text_alone(TEXT_MODELS["gpt2"]())


def test_losses_weigh_items_by_their_scores_and_captions_by_their_tokens() -> None:
    model, batch = toy(), batch_of()
    logits = seen_by(model.text_model.get_output_embeddings())
    scores = torch.tensor([0.9, 0.0, 0.3])
    weighted, plain = model(**batch, scores=scores), model(**batch)
    labels = batch["labels"].numpy()
    probabilities = numpy.exp(logits[0].detach().double().numpy())
    probabilities /= probabilities.sum(-1, keepdims=True)
    losses = [
        [-math.log(probabilities[b, t, token]) for t, token in enumerate(row) if token >= 0] for b, row in enumerate(labels)
    ]
    expected = sum(score * numpy.mean(of) for score, of in zip(scores.tolist(), losses, strict=True)) / 3
    assert weighted["loss"].item() == pytest.approx(expected, rel=1e-5) and weighted["count"] == 3
    assert plain["loss"].item() == pytest.approx(numpy.mean(sum(losses, [])), rel=1e-5) and plain["count"] == 10
    for output in (weighted, plain):
        assert output["losses"].tolist() == pytest.approx([sum(of) for of in losses], rel=1e-5)
        assert output["tokens"].tolist() == [4, 4, 2]


def test_a_decision_compares_two_tokens_after_the_first() -> None:
    model, batch = toy(), read(batch_of(images=2))
    start = torch.tensor([[START, BOS]]).expand(3, -1)
    with text_of(6):
        logits = model.text_model(**model.text_inputs(**batch), decoder_input_ids=start).logits[:, 1]
    decided = model.decide(**batch)
    assert torch.equal(decided, logits[:, 7] > logits[:, 8])
    labels = torch.tensor([[BOS, 7, EOS], [BOS, 8, EOS], [BOS, 7, EOS]])
    assert torch.equal(model(**batch, labels=labels)["decided"], decided == torch.tensor([True, False, True]))
    model.choices = (8, 7)
    assert torch.equal(model.decide(**batch), ~decided)


# ------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("method", ["bitfit", "lora", "adapter"])
def test_it_writes_token_by_token_what_it_reads_in_training(method: str, images: int) -> None:
    """Greedy, with a cache, and the encoder's states made once."""
    options = {"lora": {"r": 4, "routing": "mul"}, "adapter": TEXT_ALONE}.get(method, {})
    model, batch = shaken(toy(method, **options)), read(batch_of(images=images))
    encoded = seen_by(model.text_model.get_encoder())
    written = model.generate(batch, **ALONE, max_new_tokens=5, eos_token_id=None)
    assert len(encoded) == 1
    ids = torch.full((3, 1), START)
    for _ in range(5):
        with torch.no_grad(), text_of(6):
            logits = model.text_model(**model.text_inputs(**batch), decoder_input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, ids)


@pytest.mark.parametrize("method", ["bitfit", "lora", "adapter", "vl_pet_small", "vl_prompt"])
def test_beams_do_not_depend_on_batch_mates(method: str) -> None:
    options = {"lora": {"r": 4, "routing": "attn"}, "adapter": TEXT_ALONE}.get(method, {})
    model, batch = shaken(toy(method, **options)), read(batch_of())
    encoded = seen_by(model.text_model.get_encoder().layers[0])
    search = {"num_beams": 4, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch, **search)
    assert [len(states) for states in encoded] == [3]
    for place in range(3):
        assert torch.equal(model.generate(rows(batch, place), **search)[0], together[place])


# ---------------------------------------------------------------------------------------------- methods

TEXT_ALONE = {"r": 4, "routing": "attn", "visual_scale": "tanh", "routed_tokens": "all", "routed_positions": "text"}
ON_BART = [case for case in CASES if case[1] == "bart"] + [(method, "bart", TEXT_ALONE) for method in ("lora", "adapter")]
every_method = pytest.mark.parametrize("case", ON_BART, ids=name_of)


@every_method
def test_it_learns_with_every_method_and_only_what_is_trained_changes(case: tuple[str, str, dict[str, Any]]) -> None:
    method, _, options = case
    model, batch = toy(method, trains_norms(method), **options), batch_of()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first = model(**batch)["loss"].item()
    for _ in range(6):
        one_step(model, batch)
    assert model(**batch)["loss"].item() < first
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed <= trained == trained & model.tensors().keys()
    assert any(name.startswith("text_model.") for name in changed)
    assert {"visual_projection.features.0.weight", "visual_projection.boxes.0.bias", "visual_projection.image_order"} <= changed


@every_method
def test_items_do_not_depend_on_batch_mates_but_on_their_image(case: tuple[str, str, dict[str, Any]]) -> None:
    method, _, options = case
    model = shaken(toy(method, **options)).double()
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch_of(images=2).items()}
    together = model(**batch)["losses"]
    for place, length in enumerate((6, 4, 6)):
        alone = rows(batch, place)
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(model(**alone)["losses"], together[place : place + 1], rtol=0, atol=1e-5)
    others = batch | {"image": torch.cat([-9 * batch["image"][:1], batch["image"][1:]])}
    torch.testing.assert_close(model(**others)["losses"][1:], together[1:], rtol=0, atol=1e-5)
    assert (model(**others)["losses"][0] - together[0]).abs() > 1e-4


def test_left_and_right_are_told_apart() -> None:
    model, batch = shaken(toy()), batch_of(images=2)
    swapped = batch | {"image": batch["image"].flip(1)}
    assert ((model(**swapped)["losses"] - model(**batch)["losses"]).abs() > 1e-3).all()
    model.visual_projection.image_order.data[1] = model.visual_projection.image_order[0]
    torch.testing.assert_close(model(**swapped)["losses"], model(**batch)["losses"])


@every_method
def test_it_is_saved_and_loaded_whole(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    method, _, options = case
    model = shaken(toy(method, trains_norms(method), **options))
    model.save(tmp_path)
    again = shaken(toy(method, trains_norms(method), **options), seed=2)
    again.load(tmp_path)
    assert torch.equal(again(**batch_of())["losses"], model(**batch_of())["losses"])


CHECKPOINTED = [
    ("lora", {"r": 4, "routing": "attn"}),
    ("lora", TEXT_ALONE),
    ("vl_adapter", {"sharing": "multiple", "tasks": TASKS}),
    ("hyperformer", {"tasks": TASKS}),
    ("vl_prompt", {"tasks": TASKS}),
]


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(case: tuple[str, dict[str, Any]]) -> None:
    """Also of the visual embedding, whose tokens travel beside the call of a routed method too."""
    method, options = case
    gradients = []
    for checkpointing in (False, True):
        model = shaken(toy(method, norms=True, **options)).train()
        if checkpointing:
            model.text_model.gradient_checkpointing_enable()
        sum(model(**batch_of(seed))["loss"] for seed in (0, 1)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@every_method
def test_bfloat16_autocast(case: tuple[str, str, dict[str, Any]]) -> None:
    method, _, options = case
    model, batch = shaken(toy(method, **options)), batch_of()
    exact = model(**batch)["losses"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**batch)
    assert torch.linalg.norm(rough["losses"] - exact) < 0.05 * torch.linalg.norm(exact)
    rough["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"tasks": TASKS}, {"norms": True}])
def test_routed_lora_trains_the_biases_too_and_saves_them(options: dict[str, Any], tmp_path: Path) -> None:
    model = toy("lora", r=4, routing="mul", bias="all", **options)
    biases = {name for name in dict(lively_bart().named_parameters()) if name.endswith(".bias")}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    own = {re.sub(r"text_model\.base_model\.model\.|base_layer\.|modules_to_save\.default\.", "", name) for name in trained}
    norms = set() if "norms" not in options else {f"{name}.weight" for name in layer_norms(lively_bart())}
    assert {name for name in own if not name.startswith("visual_projection.")} == biases | norms
    before = {name: tensor.clone() for name, tensor in model.tensors().items() if name.endswith(".bias")}
    one_step(model, batch_of())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.tensors().items() if name in before)
    shaken(model).save(tmp_path)
    again = toy("lora", r=4, routing="mul", bias="all", **options)
    again.load(tmp_path)
    assert torch.equal(again(**batch_of())["losses"], model(**batch_of())["losses"])


def test_a_routed_method_reads_the_mean_of_the_embedded_tokens() -> None:
    model, batch = toy("lora", r=4, routing="mul"), read(batch_of(images=2))
    image = model.visual_projection(batch["image"])
    read_by_method = model.text_inputs(**batch)["visual_features"]
    torch.testing.assert_close(read_by_method, image.mean(1, keepdim=True))
    model.text_model.base_model._prepare({"visual_features": read_by_method})  # of the width that it expects
    of_all = toy("lora", r=4, routing="mul", routed_tokens="all").text_inputs(**batch)["visual_features"]
    assert torch.equal(of_all, image)


@pytest.mark.parametrize("positions", ["all", "text"])
def test_each_module_is_routed_where_it_reads_a_text(positions: str) -> None:
    """By the formula: where only text is routed, x_t is left at the image's positions in the encoder, and in the keys and values
    of its states, and nowhere in the decoder, which has as many positions as the encoder."""
    options = {"r": 4, "lora_alpha": 8.0, "routing": "mul", "target_modules": "q_proj,k_proj,v_proj"}
    model, batch = shaken(toy("lora", routed_positions=positions, **options)).double(), batch_of(images=2)
    batch |= {"image": batch["image"].double(), "labels": torch.randint(4, 48, (3, 2 * GRID + 6))}
    x_r = model.text_inputs(**read(batch))["visual_features"]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedLoraLayer)}
    given, found = ({name: seen(layer) for name, layer in layers.items()} for seen in (given_to, seen_by))
    model(**batch)
    assert len(layers) == 3 * 3 * LAYERS
    for name, layer in layers.items():
        [x], [output] = given[name], found[name]
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        of_encoder = ".encoder." in name or name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
        plain = torch.arange(x.shape[1])[:, None] < (2 * GRID if of_encoder and positions == "text" else 0)
        x_t = down(x)
        expected = layer.base_layer(x) + 2 * up(torch.where(plain, x_t, x_t * down(x_r)))
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)


def test_without_an_image_in_the_sequence_the_method_alone_sees_it() -> None:
    routed, blind = (toy("lora", prefix=False, r=4, routing=routing) for routing in ("mul", "none"))
    shaken(routed), shaken(blind)
    batch = batch_of()
    other = batch | {"image": -batch["image"]}
    assert not torch.allclose(routed(**batch)["losses"], routed(**other)["losses"])
    assert torch.equal(blind(**batch)["losses"], blind(**other)["losses"])
    assert blind.trainable_params_by_part()["visual_projection"] == 0


APART = [case for case in ON_BART if "tasks" in case[2]]
every_method_with_tasks = pytest.mark.parametrize("case", APART, ids=name_of)


@every_method_with_tasks
def test_each_item_has_the_tensors_of_its_task(case: tuple[str, str, dict[str, Any]]) -> None:
    method, _, options = case
    model, batch = shaken(toy(method, **options)), batch_of()
    task_id = batch.pop("task_id")
    mixed = model(**batch, task_id=task_id)["losses"]
    for task in range(TASKS):
        alike = model(**batch, task_id=torch.full((3,), task))["losses"]
        assert torch.isclose(alike, mixed, atol=1e-5).tolist() == (task_id == task).tolist()
    with pytest.raises(RoutevlError, match="reads task_id, but the call has none"):
        model(**batch)


def test_a_method_without_tensors_of_tasks_needs_no_task() -> None:
    model, batch = toy(), batch_of()
    with_task = model(**batch)["losses"]
    del batch["task_id"]
    assert torch.equal(model(**batch)["losses"], with_task)


@every_method_with_tasks
def test_what_belongs_to_another_task_alone_gets_no_gradient(case: tuple[str, str, dict[str, Any]]) -> None:
    method, _, options = case
    model = shaken(toy(method, **options)).train()
    named = model.named_parameters()  # but for PHA's of examples, which its own losses read
    trained = {name: parameter for name, parameter in named if parameter.requires_grad and ".instances.network." not in name}
    with_gradient = []
    for task in range(TASKS):
        model.zero_grad()
        model(**batch_of() | {"task_id": torch.full((3,), task)})["loss"].backward()
        with_gradient.append({name for name, parameter in trained.items() if parameter.grad is not None})
        assert all(trained[name].grad.any() for name in with_gradient[task] if name.startswith("text_model."))
    shared = set.intersection(*with_gradient)
    apart = [names - shared for names in with_gradient]
    assert all(apart) and len({len(names) for names in apart}) == 1
    assert sum(map(len, apart)) + len(shared) == len(trained) == len(set.union(*with_gradient))


@pytest.mark.parametrize("method", ["hyperformer", "vl_prompt", "lora"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_reads_images_too(copied: Callable[[ClipBart], ClipBart], method: str) -> None:
    options = TEXT_ALONE if method == "lora" else {"tasks": TASKS}
    model = shaken(toy(method, norms=True, **options))
    again = copied(model)
    assert torch.equal(again(**batch_of())["losses"], model(**batch_of())["losses"])
    embedding = again.visual_projection.token_embedding
    assert embedding is again.text_model.get_input_embeddings() is not model.text_model.get_input_embeddings()


def test_threads_that_share_a_model_have_texts_of_their_own_lengths() -> None:
    model = toy()
    batches = [batch_of(), {name: tensor[:, :3] if tensor.dim() == 2 else tensor for name, tensor in batch_of(1).items()}]
    expected = [model(**batch)["losses"] for batch in batches]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda number: model(**batches[number % 2])["losses"], range(40)))
    assert all(torch.equal(losses, expected[number % 2]) for number, losses in enumerate(found))


def test_an_item_does_not_depend_on_a_pair_in_its_batch() -> None:
    """Where a batch mixes items of one image and of two, those of one are padded by an image that nothing sees."""
    routed = [("lora", {"r": 4, "routing": "mul"}), ("adapter", {"r": 4, "routing": "attn"}), ("lora", TEXT_ALONE)]
    for method, options in (("bitfit", {}), *routed):
        model = shaken(toy(method, **options))
        one, two = batch_of(), batch_of(1, images=2)
        mask = torch.ones(6, 2 * GRID, dtype=torch.int64)
        mask[:3, GRID:] = 0
        padded = torch.stack([one["image"], torch.full_like(one["image"], 9.0)], dim=1)
        mixed = {name: torch.cat([one[name], two[name]]) for name in one if name != "image"}
        together = model(**mixed, image=torch.cat([padded, two["image"]]), visual_mask=mask)["losses"]
        alone = torch.cat([model(**one)["losses"], model(**two)["losses"]])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
