"""The ablations of the routed methods: other bottlenecks, starts, places, layers, positions and features."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYERS, SMALL, TEXT_MODELS, B, D, L, batch_of, build, one_step, rows, shaken
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from routevl.conditioning import Call
from routevl.errors import RoutevlError
from routevl.methods import RoutedAdapterConfig, RoutedLoraConfig
from routevl.methods.routed.layer import RoutedLayer
from routevl.methods.table import new_method
from routevl.routing import routing_function

R = 8
CONFIGS = {"lora": RoutedLoraConfig, "adapter": RoutedAdapterConfig}
ROUTED = pytest.mark.parametrize("method", CONFIGS)
Linear = Mapping[str, Tensor]  # weight (out, in), and a bias or none


def linear(x: Tensor, own: Linear) -> Tensor:
    return x @ own["weight"].T + own.get("bias", torch.zeros(()))


def named(module: nn.Module) -> Linear:
    return dict(module.named_parameters())


def mixed(options: Mapping[str, Any], x_t: Tensor, x_v: Tensor, mask: Tensor | None, mixer: nn.Module) -> Tensor:
    """A routing function; or the formula of softmax attention, one head and example at a time."""
    if options.get("bottleneck") != "cross_attention":
        return routing_function(options["routing"])(x_t, x_v, mask)
    q, k, v = (x @ part.weight.T for x, part in ((x_t, mixer.query), (x_v, mixer.key), (x_v, mixer.value)))
    out = torch.zeros_like(q)
    for example in range(len(q)):
        real = slice(None) if mask is None else mask[example]
        for head in range(4):
            place = slice(head * R // 4, (head + 1) * R // 4)
            scores = q[example, :, place] @ k[example, real][:, place].T / math.sqrt(R / 4)
            out[example, :, place] = scores.softmax(-1) @ v[example, real][:, place]
    return out @ mixer.output.weight.T


def bottleneck(
    layer: RoutedLayer, options: Mapping[str, Any], x_h: Tensor, x_r: Tensor, mask: Tensor | None, part: int = 0
) -> Tensor:
    """The update of one of a layer's bottlenecks without LoRA's scaling, by the formulas."""
    down, up = (getattr(layer, name)["default"] for name in layer.adapter_layer_names[:2])
    activation = layer.activation["default"] if hasattr(layer, "activation") else nn.Identity()
    rank = slice(part * R, (part + 1) * R)
    if options.get("bottleneck") == "split":
        x_t, x_v = (linear(linear(x, named(of[part][0])), named(of[part][1])) for x, of in ((x_h, down.text), (x_r, down.image)))
    else:
        x_t, x_v = (linear(x, named(down))[..., rank] for x in (x_h, x_r))
    width = len(up.weight) // layer.parts["default"]  # all parts of these tests are of one width
    own = {name: p[part * width : (part + 1) * width] for name, p in up.named_parameters()}
    mixer = layer.mixers["default"][part]
    if options.get("bottleneck") == "after_up":
        return mixed(options, linear(activation(x_t), own), linear(activation(x_v), own), mask, mixer)
    return linear(activation(mixed(options, x_t, x_v, mask, mixer)), own)


BOTTLENECKS = [
    {"bottleneck": "split", "routing": "mul"},
    {"bottleneck": "split", "routing": "attn"},
    {"bottleneck": "after_up", "routing": "mul"},
    {"bottleneck": "after_up", "routing": "attn"},
    {"bottleneck": "cross_attention"},
]


@ROUTED
@pytest.mark.parametrize("visual_tokens", [1, 5])
@pytest.mark.parametrize("options", BOTTLENECKS, ids=lambda o: "-".join(o.values()))
def test_bottlenecks_equal_the_formulas(method: str, options: dict[str, Any], visual_tokens: int) -> None:
    """With a mask, which hides tokens of the first image alone."""
    torch.manual_seed(0)
    config = CONFIGS[method](r=R, target_modules=["0"], up_init="random", **options)
    adapted = get_peft_model(nn.Sequential(nn.Linear(D, D)), config).double()
    layer = adapted.base_model.model[0]
    x, x_r = torch.randn(B, L, D).double(), torch.randn(B, visual_tokens, D).double()
    mask = torch.ones(B, visual_tokens, dtype=torch.bool)
    mask[0, 1:] = False
    base = layer.base_layer(x)
    for given in (None, mask):
        update = bottleneck(layer, options, x if method == "lora" else base, x_r, given)
        expected = base + update * (layer.scaling["default"] if method == "lora" else 1)
        torch.testing.assert_close(adapted(x, visual_features=x_r, visual_mask=given), expected, rtol=0, atol=1e-9)
    hidden = x_r.clone()
    hidden[0, 1:] = 9
    again = adapted(x, visual_features=hidden, visual_mask=mask)
    torch.testing.assert_close(again, adapted(x, visual_features=x_r, visual_mask=mask), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", BOTTLENECKS, ids=lambda o: "-".join(o.values()))
def test_gpt2_query_and_value_are_mixed_apart(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = RoutedLoraConfig(r=R, lora_alpha=6, up_init="random", **options)
    adapted = get_peft_model(TEXT_MODELS["gpt2"](), config).double()
    layer = adapted.base_model.model.transformer.h[0].attn.c_attn
    x, x_r = torch.randn(B, L, D).double(), torch.randn(B, 3, D).double()
    conditioning = adapted.base_model.conditioning
    call = Call(conditioning.prepare({"visual_features": x_r}))
    query, key, value = (conditioning.run_with(call, layer, x) - layer.base_layer(x)).chunk(3, -1)
    assert not key.any()
    for part, found in enumerate((query, value)):
        torch.testing.assert_close(found, 6 / R * bottleneck(layer, options, x, x_r, None, part), rtol=0, atol=1e-9)


@ROUTED
@pytest.mark.parametrize("routing", ["mul", "attn"])
def test_after_up_cannot_leave_zero(method: str, routing: str) -> None:
    """Both streams of the mixture are zero, so that no parameter of any bottleneck has a gradient, the Adapter's bias included;
    from another start there is one, and a bias alone would do."""
    options = SMALL[method] | {"routing": routing, "bottleneck": "after_up"}

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model(**batch_of("roberta"))["loss"].backward()
        return {name: p.grad for name, p in model.named_parameters() if f"{method}_" in name}

    stuck = gradients(build(method, "roberta", options))
    assert stuck and not any(gradient.any() for gradient in stuck.values())
    assert all(gradient.any() for gradient in gradients(build(method, "roberta", options | {"up_init": "random"})).values())
    if method == "adapter":
        model = build(method, "roberta", options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("adapter_up.default.bias"):
                    parameter.fill_(0.1)
        assert all(gradient.any() for name, gradient in gradients(model).items() if "adapter_up" in name)


@ROUTED
def test_how_the_up_projection_starts(method: str) -> None:
    def starts_at_zero(**options: Any) -> bool:
        config = CONFIGS[method](target_modules=["0"], **options)
        [layer] = get_peft_model(nn.Sequential(nn.Linear(D, D)), config).base_model.model
        return not layer.get_submodule(layer.adapter_layer_names[1])["default"].weight.any()

    assert starts_at_zero() and starts_at_zero(up_init="zero") and not starts_at_zero(up_init="random")
    if method == "adapter":  # a zero output would erase the module
        assert not starts_at_zero(residual=False) and starts_at_zero(residual=False, up_init="zero")


# ------------------------------------------------------------------------------------------- places


def adapted_modules(method: str, text_model: nn.Module, **options: Any) -> list[str]:
    model = get_peft_model(text_model, CONFIGS[method](r=R, **options)).base_model.model
    return [name for name, module in model.named_modules() if isinstance(module, RoutedLayer)]


OF_A_LAYER = {  # of layer 0 of each stack: LoRA's, then the Adapter's, of attention and feed-forward
    "roberta": {
        "lora": (["encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.value"],
                 ["encoder.layer.0.intermediate.dense"]),
        "adapter": (["encoder.layer.0.attention.output.dense"], ["encoder.layer.0.output.dense"]),
    },
    "gpt2": {
        "lora": (["transformer.h.0.attn.c_attn"], ["transformer.h.0.mlp.c_fc"]),
        "adapter": (["transformer.h.0.attn.c_proj"], ["transformer.h.0.mlp.c_proj"]),
    },
    "bart": {
        "lora": ([f"model.{attention}.{p}_proj" for p in "vq" for attention in
                  ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn")],
                 ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"]),
        "adapter": (["model.encoder.layers.0.self_attn.out_proj", "model.decoder.layers.0.self_attn.out_proj"],
                    ["model.encoder.layers.0.fc2", "model.decoder.layers.0.fc2"]),
    },
}  # fmt: skip


@ROUTED
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_places_and_layers(method: str, kind: str) -> None:
    attention, feed_forward = OF_A_LAYER[kind][method]
    expected = {"attention": attention, "ffn": feed_forward, "both": attention + feed_forward}
    for places, names in expected.items():
        found = adapted_modules(method, TEXT_MODELS[kind](), places=places, routing="mul", layers_to_transform=[0])
        assert sorted(found) == sorted(names)
        everywhere = adapted_modules(method, TEXT_MODELS[kind](), places=places, routing="mul")
        assert sorted(everywhere) == sorted(name.replace(".0.", f".{n}.", 1) for name in names for n in range(LAYERS))
        chosen = SMALL[method] | {"places": places}
        counts = [build(method, kind, chosen | layers).trainable_params_by_part()["method"]
                  for layers in ({"layers_to_transform": "1"}, {})]  # fmt: skip
        assert counts[0] * LAYERS == counts[1]


def test_a_gated_feed_forward_part_has_two_beginnings() -> None:
    sizes = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    found = adapted_modules("lora", LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), places="ffn", layers_to_transform=1)
    assert found == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]


@ROUTED
def test_a_layer_that_is_not_there_is_refused(method: str) -> None:
    for layers, modules in (("0,2", None), ("7", None), ("0,2", "dense"), ("7", "dense")):
        with pytest.raises(RoutevlError, match="layers_to_transform"):
            build(method, "roberta", SMALL[method] | {"layers_to_transform": layers, "target_modules": modules})
    with pytest.raises(RoutevlError, match=r"layer 2 has no module to adapt \(layers with some: 0, 1\)"):
        build(method, "roberta", SMALL[method] | {"layers_to_transform": "0,2"})


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_adapters_after_the_norms(kind: str, tmp_path: Path) -> None:
    """On every norm of every layer, of BART's attention over the encoder too; none on those of the embeddings and the end."""
    options = {"r": 4, "position": "after_norm", "routing": "mul"}
    with pytest.raises(RoutevlError, match="position=after_norm adapts the layer norms.*: set freeze_layer_norm"):
        build("adapter", kind, options)
    model = shaken(build("adapter", kind, options, norms=False, width=20))
    norms = {"roberta": 2 * LAYERS, "gpt2": 2 * LAYERS, "bart": 5 * LAYERS}[kind]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}
    assert len(layers) == norms and all("norm" in name.lower() or ".ln_" in name for name in layers)
    assert model.trainable_params_by_part()["method"] == norms * (2 * D * 4 + 4 + D)
    layer, x, x_r = next(iter(layers.values())), torch.randn(B, L, D), torch.randn(B, 1, D)
    call = Call({("visual_features", "default"): x_r, "visual_mask": None})
    normed = layer.base_layer(x)
    found = layer.conditioning.run_with(call, layer, x)
    down, up = layer.adapter_down["default"], layer.adapter_up["default"]
    torch.testing.assert_close(found, normed + up(nn.functional.gelu(down(normed) * down(x_r))), rtol=0, atol=1e-6)
    model.save(tmp_path)
    again = build("adapter", kind, options, norms=False, width=20, seed=0)
    again.load(tmp_path)
    batch = batch_of(kind, width=20)
    assert torch.equal(again(**batch)["losses"], model(**batch)["losses"])
    torch.testing.assert_close(model(**rows(batch, 1))["losses"], model(**batch)["losses"][1:2])
    first = model(**batch)["loss"].item()
    for _ in range(4):
        one_step(model, batch)
    assert model(**batch)["loss"].item() < first


# ----------------------------------------------------------------------------------------- features


def test_routed_text_is_the_mean_of_each_texts_own_embeddings() -> None:
    options = SMALL["lora"] | {"routing": "mul", "routed_features": "text"}
    batch = batch_of("roberta", visual_tokens=2)
    batch["attention_mask"][0, 4:] = 0
    for prefix in (True, False):
        model = shaken(build("lora", "roberta", options, prefix=prefix))
        assert not model.method.uses_image  # so that it is blind without the prefix
        given = model.text_inputs(batch["input_ids"], batch["attention_mask"], batch["image"])["visual_features"]
        embeddings = model.text_model.get_input_embeddings()(batch["input_ids"])
        expected = torch.stack([embeddings[0, :4].mean(0), embeddings[1].mean(0), embeddings[2].mean(0)])[:, None]
        torch.testing.assert_close(given, expected)
        short = rows(batch, 0)
        short = {**short, **{name: short[name][:, :4] for name in ("input_ids", "attention_mask")}}
        torch.testing.assert_close(model(**short)["losses"], model(**batch)["losses"][:1])
        same = torch.equal(model(**batch)["losses"], model(**batch | {"image": -batch["image"]})["losses"])
        assert same is not prefix


def test_routed_text_is_refused_where_it_tells_what_comes() -> None:
    for kind in ("gpt2", "bart"):
        options = SMALL["adapter"] | {"routing": "mul", "routed_features": "text"}
        if kind == "bart":
            assert build("adapter", kind, options, norms=False)(**batch_of(kind))["loss"].isfinite()
        else:
            with pytest.raises(RoutevlError, match="routed_features=text would show GPT2LMHeadModel"):
                build("adapter", kind, options)


@ROUTED
@pytest.mark.parametrize("width", [D, 20])
def test_the_method_reads_a_stand_in_and_the_prefix_the_image(method: str, width: int) -> None:
    options = SMALL[method] | {"routing": "attn", "routed_features": "shuffled"}
    model, batch = shaken(build(method, "gpt2", options, width=width)), batch_of("gpt2", width=width)
    routed = batch["image"].roll(1, 0)
    given = model.text_inputs(batch["input_ids"], batch["attention_mask"], batch["image"], routed)
    real = model.text_inputs(batch["input_ids"], batch["attention_mask"], batch["image"], batch["image"])
    assert torch.equal(given["inputs_embeds"], real["inputs_embeds"])
    assert torch.equal(given["visual_features"], real["visual_features"].roll(1, 0))
    assert not torch.equal(model(**batch, routed_image=routed)["losses"], model(**batch, routed_image=batch["image"])["losses"])
    generate = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 49}
    together = model.generate(0, batch["image"], routed, **generate)
    alone = model.generate(0, batch["image"][1:2], routed[1:2], **generate)[0]
    length = min(len(alone), together.shape[1])
    assert torch.equal(together[1, :length], alone[:length])
    with pytest.raises((RoutevlError, TypeError)):  # never the image in its place
        model(**batch)


@ROUTED
@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_the_mean_of_an_images_tokens_can_be_routed_in_any_task(method: str, kind: str) -> None:
    options = SMALL[method] | {"routing": "attn", "routed_tokens": "mean"}
    model, batch = shaken(build(method, kind, options, width=20)), batch_of(kind, width=20, visual_tokens=5)
    arguments = batch["input_ids"], batch["attention_mask"]
    given = model.text_inputs(*arguments, batch["image"])
    of_all = shaken(build(method, kind, options | {"routed_tokens": None}, width=20)).text_inputs(*arguments, batch["image"])
    assert torch.equal(given["inputs_embeds"], of_all["inputs_embeds"])  # the prefix has all tokens
    assert torch.equal(of_all["visual_features"], batch["image"])
    torch.testing.assert_close(given["visual_features"], batch["image"].mean(1, keepdim=True))


# ---------------------------------------------------------------------------------------- positions


@ROUTED
@pytest.mark.parametrize("options", [{}, {"bottleneck": "after_up"}], ids=["shared", "after_up"])
def test_the_images_positions_keep_x_t_where_the_text_alone_is_routed(method: str, options: dict[str, str]) -> None:
    """By the formulas, position by position; no gradient reaches x_R from there."""
    torch.manual_seed(0)
    options = {"routing": "mul", **options}
    config = CONFIGS[method](r=R, target_modules=["0"], up_init="random", routed_positions="text", **options)
    adapted = get_peft_model(nn.Sequential(nn.Linear(D, D)), config).double()
    layer = adapted.base_model.model[0]
    x, x_r = torch.randn(B, L, D).double(), torch.randn(B, 1, D).double().requires_grad_()
    of_image = torch.arange(L).expand(B, -1) < torch.tensor([[2], [0], [L]])
    base = layer.base_layer(x)
    given = x if method == "lora" else base
    down, up = (named(getattr(layer, name)["default"]) for name in layer.adapter_layer_names[:2])
    activation = layer.activation["default"] if method == "adapter" else nn.Identity()
    plain, routed = linear(activation(linear(given, down)), up), bottleneck(layer, options, given, x_r, None)
    scaling = layer.scaling["default"] if method == "lora" else 1
    found = adapted(x, visual_features=x_r, image_positions=of_image)
    torch.testing.assert_close(found, base + scaling * torch.where(of_image[..., None], plain, routed), rtol=0, atol=1e-9)
    for positions, reaches in ((of_image, False), (~of_image, True)):
        [gradient] = torch.autograd.grad(found[positions].square().sum(), x_r, retain_graph=True)
        assert gradient.any() == reaches
    for wrong, message in (
        (None, "reads image_positions, but the call has none: pass image_positions"),
        (of_image[:, :-1], f"image_positions has {L - 1} positions but the text has {L}"),
        (of_image[:2], f"image_positions has batch size 2 but the text has {B}"),
        (of_image.long(), r"image_positions must be \(batch, length\) bool, not \(3, 6\) torch.int64"),
    ):
        with pytest.raises(RoutevlError, match=message):
            adapted(x, visual_features=x_r, image_positions=wrong)


@ROUTED
def test_captions_with_the_text_alone_routed_are_the_same_with_and_without_a_cache(method: str) -> None:
    """Positions that are generated are text, of every beam."""
    options = SMALL[method] | {"routing": "attn"}
    models = [shaken(build(method, "gpt2", options | {"routed_positions": positions})) for positions in ("text", "all")]
    image = batch_of("gpt2", visual_tokens=3)["image"]
    search = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 49, "eos_token_id": None}
    search |= {"return_dict_in_generate": True, "output_logits": True}
    text, everything = (model.generate(0, image, **search) for model in models)
    uncached, alone = models[0].generate(0, image, use_cache=False, **search), models[0].generate(0, image[1:2], **search)
    assert torch.equal(uncached.sequences, text.sequences) and torch.equal(alone.sequences[0], text.sequences[1])
    for cached, plain, of_all in zip(text.logits, uncached.logits, everything.logits, strict=True):
        torch.testing.assert_close(cached, plain)
        assert not torch.allclose(cached, of_all, atol=1e-4)


@ROUTED
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_without_a_prefix_there_is_no_position_to_leave_out(method: str, kind: str) -> None:
    model = build(method, kind, SMALL[method] | {"routing": "mul", "routed_positions": "text"}, prefix=False)
    with pytest.raises(RoutevlError, match="routed_positions=text .* no visual prefix: set prefix, or routed_positions=all"):
        model(**batch_of(kind))


# ---------------------------------------------------------------------------------- what does not go together


@ROUTED
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": "split"}, "bottleneck=split needs a routing function: set routing"),
        ({"bottleneck": "after_up"}, "bottleneck=after_up needs a routing function: set routing"),
        ({"bottleneck": "cross_attention", "routing": "mul"}, "stands in the place of a routing function: set routing=none"),
        ({"bottleneck": "split", "routing": "mul", "r": "6"}, "r is 6, and bottleneck=split needs a multiple of 4"),
        ({"bottleneck": "cross_attention", "r": "6"}, "r is 6, and bottleneck=cross_attention needs a multiple of 4"),
        ({"routed_features": "noise"}, "routed_features=noise needs a routing function: set routing"),
        ({"routed_positions": "text"}, "routed_positions=text needs a routing function: set routing"),
        ({"routed_tokens": "all"}, "routed_tokens=all needs a routing function that reads the image"),
        ({"routed_tokens": "mean", "routing": "mul", "routed_features": "text"}, "routing function that reads the image"),
        ({"layers_to_transform": "0,x"}, "layers_to_transform is '0,x', expected numbers of layers"),
        ({"layers_to_transform": ""}, "layers_to_transform is '', expected numbers of layers"),
        ({"target_modules": "query", "places": "ffn"}, "target_modules names the modules to adapt: leave places out"),
    ],
)
def test_options_that_do_not_go_together(method: str, options: dict[str, str], message: str) -> None:
    """Said when the run sheet is read, and by the peft config."""
    with pytest.raises(RoutevlError, match=f"^here: method {method}: .*{message}"):
        new_method(method, options, "here")
    if not options.keys() & {"layers_to_transform", "target_modules"}:
        with pytest.raises(RoutevlError, match=message):
            CONFIGS[method](**{name: int(value) if name == "r" else value for name, value in options.items()})


def test_options_of_the_adapter_that_do_not_go_together() -> None:
    for options, message in (
        ({"position": "after_norm", "places": "ffn"}, "position=after_norm adapts all norms of a layer: leave places out"),
        ({"position": "after_norm", "target_modules": "output.dense"}, "leave position out, or target_modules"),
    ):
        with pytest.raises(RoutevlError, match=message):
            new_method("adapter", options, "here")


@ROUTED
def test_an_adapter_of_an_earlier_version_is_the_papers(method: str, tmp_path: Path) -> None:
    """Without the fields of the ablations in its config, and with the same names of tensors."""
    model = shaken(build(method, "gpt2", SMALL[method] | {"routing": "attn"}, norms=False)).text_model
    names = {name.partition(f"{method}_")[2] for name in model.state_dict() if f"{method}_" in name}
    own = {"lora": {"A.default.weight", "B.default.weight"},
           "adapter": {f"{part}.default.{kind}" for part in ("down", "up") for kind in ("weight", "bias")}}  # fmt: skip
    assert names == own[method]
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    known = json.loads(path.read_text())
    new = {"bottleneck", "up_init", "places", "position", "routed_features", "routed_tokens", "routed_positions"}
    assert known.keys() & new == new - ({"position"} if method == "lora" else set())
    path.write_text(json.dumps({name: value for name, value in known.items() if name not in new}))
    again = PeftModel.from_pretrained(TEXT_MODELS["gpt2"](), tmp_path)
    config = again.peft_config["default"]
    assert (config.bottleneck, config.routed_features) == ("shared", "image")
    saved = {name: tensor for name, tensor in model.state_dict().items() if f"{method}_" in name}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in saved.items())
