"""Context-PEFT against recorded numbers and formulas: contexts of positions, places, generation, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest
import torch
from cases import B, D, L, bart, batch_of, build, gpt2, roberta, shaken
from peft import LoraConfig, get_peft_model
from recorded import assert_agrees, needs_reference, put, recorded
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, LlamaConfig, LlamaForCausalLM

from routevl.errors import RoutevlError
from routevl.methods.bottleneck.layer import add_in_parallel, change_input, change_output
from routevl.methods.context_peft.layer import IMAGE, TEXT, InContext, Lora, Scaled, Vector, streams_of_contexts
from routevl.methods.lora.layer import Fused
from routevl.methods.table import new_method

METHODS = ("context_lora", "context_bitfit", "context_ia3")
CPU = torch.device("cpu")


def adapted(method: str, text_model: nn.Module, **options: Any) -> nn.Module:
    """A frozen text model with a method, in evaluation mode, and what is trained moved away from zero."""
    model = new_method(method, options, "test").build(text_model.requires_grad_(False).eval(), {}, [])
    for number, parameter in enumerate(model.parameters()):
        parameter.data += normal(*parameter.shape, seed=number) / 5 if parameter.requires_grad else 0
    return model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_model(
    linear: nn.Linear, put_in: Callable[..., None], of_contexts: Mapping[str, nn.Module], scaled: bool = False
) -> nn.Module:
    """A model of one linear module with something for each context."""
    model = nn.Sequential(linear)
    adapter = InContext(of_contexts, streams_of_contexts(model))
    put_in(linear, Scaled(adapter) if scaled else adapter)
    return model


# ------------------------------------------------------------------------- against the recorded numbers


def recorded_linear() -> tuple[nn.Linear, dict[str, Tensor], Tensor, dict[str, Any]]:
    """The recorded linear module, the other tensors, and the contexts of their tokens."""
    tensors, meta = recorded("context_peft")
    linear = nn.Linear(*tensors["W"].shape[::-1])
    put(linear.weight, tensors["W"])
    put(linear.bias, tensors["bias"])
    context = (tensors["token_ids"] == meta["image_placeholder_id"]).long()
    assert torch.equal(context, tensors["image_mask"].long()) and torch.equal(1 - context, tensors["text_mask"].long())
    return linear, tensors, context, meta


@needs_reference
@pytest.mark.parametrize(("contexts", "name"), [((TEXT, IMAGE), "lora.y"), ((TEXT,), "lora.y_text_adaptor_only")])
def test_lora_gives_the_recorded_outputs(contexts: tuple[str, ...], name: str) -> None:
    linear, tensors, context, meta = recorded_linear()
    updates = {}
    for of in contexts:
        facts = meta["lora_configs"][of]
        fields = {"r": facts["r"], "lora_alpha": float(facts["lora_alpha"]), "use_rslora": facts["use_rslora"]}
        method = new_method("context_lora", fields | {"image_scale": facts["scale_multiplier"]}, "test")
        updates[of] = update = Lora(linear, None, facts["r"], method.scaling(of), bias=True)
        assert update.scaling == pytest.approx(tensors[f"lora.{of}.scaling"].item(), rel=1e-12)
        put(update.downs[0].weight, tensors[f"lora.{of}.A"])
        put(update.ups[0].weight, tensors[f"lora.{of}.B"])
        put(update.bias.vector, tensors[f"lora.{of}.bias"])
    model = in_model(linear, add_in_parallel, updates)
    assert_agrees(model(tensors["x"], token_context=context), tensors[name])


RECORDED = [("bitfit", add_in_parallel, "b"), ("ia3_output", change_output, "l"), ("ia3_feedforward_input", change_input, "l")]


@needs_reference
@pytest.mark.parametrize(("name", "put_in", "letter"), RECORDED)
def test_bitfit_and_ia3_give_the_recorded_outputs(name: str, put_in: Callable[..., None], letter: str) -> None:
    linear, tensors, context, _ = recorded_linear()
    vectors = {}
    for of in (TEXT, IMAGE):
        value = tensors[f"{name}.{of}.{letter}"]
        vectors[of] = Vector(len(value), None, CPU)
        put(vectors[of].vector, value)
    model = in_model(linear, put_in, vectors, scaled=letter == "l")
    assert_agrees(model(tensors["x"], token_context=context), tensors[f"{name}.y"])


# --------------------------------------------------------------------------------- against the formulas


def test_two_contexts_are_two_loras_on_the_split_sequence() -> None:
    linear, x = nn.Linear(6, 9).double(), normal(2, 5, 6).double()
    layout = Fused(1, [2, 3, 4], [True, False, True])  # its second projection is not adapted
    updates = {of: Lora(linear, layout, 2, scaling, bias=True).double() for of, scaling in ((TEXT, 0.5), (IMAGE, 3.0))}
    for number, parameter in enumerate(p for update in updates.values() for p in update.parameters()):
        parameter.data = normal(*parameter.shape, seed=number).double()
    context = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 0]])
    found = in_model(linear, add_in_parallel, updates)(x, token_context=context).detach().numpy()
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    for row in range(2):
        for place in range(5):
            vector, own = x[row, place].numpy(), updates[(TEXT, IMAGE)[context[row, place]]]
            pieces = [own.scaling * up.weight.detach().numpy() @ (down.weight.detach().numpy() @ vector)
                      for down, up in zip(own.downs, own.ups, strict=True)]  # fmt: skip
            beta = own.bias.vector.detach().numpy()
            change = numpy.concatenate([pieces[0] + beta[:2], numpy.zeros(3), pieces[1] + beta[2:]])
            numpy.testing.assert_allclose(found[row, place], weight @ vector + bias + change, rtol=0, atol=1e-12)


def test_of_text_alone_it_is_pefts_lora() -> None:
    base = roberta()
    names = [
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "layer.0.output.dense",
        "layer.1.output.dense",
    ]
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, target_modules=names)).eval()
    model = adapted("context_lora", base, r=4, lora_alpha=6.0, use_bias=False)
    for name, module in model.named_modules():
        if name.endswith(".adapter"):
            own, other = module.of_contexts[TEXT], theirs.base_model.model.get_submodule(name.removesuffix(".adapter"))
            put(other.lora_A["default"].weight, own.downs[0].weight)
            put(other.lora_B["default"].weight, own.ups[0].weight)
    ids = torch.randint(4, 48, (3, 6))
    text = model(ids, token_context=torch.zeros_like(ids))[0]
    torch.testing.assert_close(text, theirs(ids)[0])
    assert not torch.allclose(text, model(ids, token_context=torch.ones_like(ids))[0], atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_the_frozen_model(method: str) -> None:
    for base in (roberta(), gpt2(), bart()):
        base.eval()
        ids = torch.randint(4, 48, (3, 6))
        text = {"input_ids": ids, **({"decoder_input_ids": ids} if base.config.is_encoder_decoder else {})}
        before = base(**text)[0]
        model = new_method(method, {}, "test").build(base, {}, [])
        assert torch.equal(model(**text, token_context=torch.tensor([[1, 1, 0, 0, 0, 0]] * 3))[0], before)


def test_how_lora_starts_and_is_scaled() -> None:
    scalings = {
        of: new_method("context_lora", {"r": 4, "lora_alpha": 6.0, "image_scale": 0.5}, "test").scaling(of)
        for of in (TEXT, IMAGE)
    }
    assert scalings == {TEXT: 1.5, IMAGE: 0.75}
    assert new_method("context_lora", {"r": 4, "lora_alpha": 6.0, "use_rslora": True}, "test").scaling(TEXT) == 3
    torch.manual_seed(0)
    lora = Lora(nn.Linear(400, 100), None, 50, 1.0, bias=True)
    bound = 400**-0.5
    assert 0.99 * bound < lora.downs[0].weight.abs().max() <= bound
    assert not lora.ups[0].weight.any() and not lora.bias.vector.any()


# ------------------------------------------------------------------------------- positions and places


def changes(model: nn.Module, name: str, call: dict[str, Tensor], inner: bool = False) -> Tensor:
    """What an adapter changes of what a module gives, or of what it reads, at each position: (B, L, d)."""
    module, seen = model.get_submodule(name), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=True)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    model(**call)
    handle.remove()
    before, after, output = seen[:3]
    return after - before if inner else output - module.forward(after)


def changed(model: nn.Module, name: str, call: dict[str, Tensor], context: Tensor, inner: bool = False) -> dict[str, bool]:
    """Whether the positions of a context are changed: all or none of them."""
    moved = changes(model, name, call, inner).abs().amax(-1) > 1e-6  # (B, L)
    found = {of: moved[context == number] for number, of in enumerate((TEXT, IMAGE))}
    assert all(of.all() or not of.any() for of in found.values())
    return {of: bool(moved.any()) for of, moved in found.items()}


CONTEXT = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0]])
BOTH, ONE = {TEXT: True, IMAGE: True}, {TEXT: True, IMAGE: False}


@pytest.mark.parametrize("method", ["context_lora", "context_bitfit"])
def test_in_the_last_layer_the_image_has_keys_and_values_alone(method: str) -> None:
    model = adapted(method, roberta())
    call = {"input_ids": torch.randint(4, 48, (3, 6)), "token_context": CONTEXT}
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense")
    for part in (*parts, "output.dense"):
        assert changed(model, f"encoder.layer.0.{part}", call, CONTEXT) == BOTH
        last = BOTH if part in parts[1:3] else ONE
        assert changed(model, f"encoder.layer.1.{part}", call, CONTEXT) == last


def test_of_gpt2s_one_module_the_image_has_two_thirds_in_the_last_layer() -> None:
    model = adapted("context_lora", gpt2())
    call = {"input_ids": torch.randint(4, 48, (3, 6)), "token_context": CONTEXT}
    for layer, expected in ((0, [True] * 3), (1, [False, True, True])):
        moved = changes(model, f"transformer.h.{layer}.attn.c_attn", call).unflatten(-1, (3, D)).abs().amax(-1) > 1e-6
        assert moved[CONTEXT == 0].all()
        assert moved[CONTEXT == 1].all(0).tolist() == moved[CONTEXT == 1].any(0).tolist() == expected


def test_ia3_changes_keys_and_values_and_what_the_last_matrix_reads() -> None:
    model = adapted("context_ia3", gpt2())
    call = {"input_ids": torch.randint(4, 48, (3, 6)), "token_context": CONTEXT}
    moved = changes(model, "transformer.h.0.attn.c_attn", call).unflatten(-1, (3, D)).abs().amax(-1) > 1e-6
    assert moved.flatten(0, 1).all(0).tolist() == moved.flatten(0, 1).any(0).tolist() == [False, True, True]
    assert changed(model, "transformer.h.0.mlp.c_proj", call, CONTEXT, inner=True) == BOTH
    assert changed(model, "transformer.h.1.mlp.c_proj", call, CONTEXT, inner=True) == ONE
    assert not any(hasattr(model.get_submodule(f"transformer.h.0.{name}"), "adapter") for name in ("attn.c_proj", "mlp.c_fc"))


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_beside_an_encoder_reads_its_contexts_by_keys_and_values(method: str) -> None:
    model = adapted(method, bart())
    ids = torch.randint(4, 48, (3, 6))
    call = {"input_ids": ids, "decoder_input_ids": ids[:, :4], "token_context": CONTEXT}
    everywhere = torch.zeros(3, 4, dtype=torch.int64)
    for name, context, expected in [
        ("encoder.layers.1.self_attn.v_proj", CONTEXT, BOTH),
        ("decoder.layers.1.encoder_attn.k_proj", CONTEXT, BOTH),
        ("decoder.layers.1.encoder_attn.v_proj", CONTEXT, BOTH),
        ("decoder.layers.0.self_attn.v_proj", everywhere, ONE),
    ]:
        assert changed(model, f"model.{name}", call, context) == expected
    if method != "context_ia3":
        assert changed(model, "model.encoder.layers.1.fc1", call, CONTEXT) == BOTH  # its states are read by the decoder
        assert changed(model, "model.decoder.layers.1.encoder_attn.q_proj", call, everywhere) == ONE
    of_image = [name for name, p in model.named_parameters() if p.requires_grad and f".{IMAGE}." in name]
    assert all(".encoder.layers." in name or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name for name in of_image)


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "bart"])
def test_the_prefix_is_image_and_all_else_text_padding_too(kind: str) -> None:
    model, batch = build("context_lora", kind, {"r": 4}), batch_of(kind, visual_tokens=2)
    batch["attention_mask"][1, 4:] = 0
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "image")}
    assert model.text_inputs(**inputs)["token_context"].tolist() == [[1] * 2 + [0] * L] * B
    there = torch.tensor([[1, 1], [1, 0], [1, 1]])  # a token that pads an image is of the image
    assert model.text_inputs(**inputs, visual_mask=there)["token_context"].tolist() == [[1] * 2 + [0] * L] * B
    blind = build("context_lora", kind, {"r": 4}, prefix=False)
    assert blind.text_inputs(**inputs)["token_context"].tolist() == [[0] * L] * B


# -------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("method", METHODS)
def test_a_bart_generates_with_its_cache_what_it_would_without(method: str) -> None:
    model = shaken(build(method, "bart", {"r": 4} if method == "context_lora" else {}))
    batch = batch_of("bart", visual_tokens=2)
    written = model.generate(0, batch["image"], max_new_tokens=5, do_sample=False, eos_token_id=None)
    ids = written[:, :1]
    start = torch.zeros(B, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(5):
            inputs = model.text_inputs(start, torch.ones_like(start), batch["image"])
            logits = model.text_model(**inputs, decoder_input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, ids)


def test_a_context_that_no_position_has_is_not_computed() -> None:
    model = adapted("context_lora", gpt2(), r=4)
    used: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if isinstance(module, Lora):
            module.register_forward_hook(lambda _, args, __, of=name: used.append((of.rpartition(".")[2], args[0].shape[1])))
    ids = torch.randint(4, 48, (3, 6))
    model.generate(ids, token_context=CONTEXT, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=49)
    assert {length for of, length in used if of == IMAGE} == {6}
    assert {length for of, length in used if of == TEXT} == {6, 1}
    used.clear()
    model(ids, token_context=torch.zeros_like(ids))
    assert {of for of, _ in used} == {TEXT}


# ---------------------------------------------------------------------------------------------- refusals


def test_wrong_contexts_are_errors() -> None:
    model, ids = adapted("context_bitfit", gpt2()), torch.randint(4, 48, (3, 6))
    for context, message in [
        (None, "reads token_context, but the call has none: pass token_context to it"),
        (torch.full((3, 6), 2), r"token_context has a 2, but the contexts are 0 \(text\), 1 \(image\)"),
        (torch.zeros(3, 6), r"token_context must be \(batch, positions\) int64, not \(3, 6\) torch.float32"),
        (torch.zeros(3, dtype=torch.int64), r"token_context must be \(batch, positions\) int64, not \(3,\)"),
        (torch.zeros(3, 5, dtype=torch.int64), "token_context has 5 positions but the text has 6"),
        (torch.zeros(2, 6, dtype=torch.int64), "token_context has batch size 2 but the text has 3"),
    ]:
        with pytest.raises(RoutevlError, match=message):
            model(ids, token_context=context)


def test_models_that_cannot_have_contexts_are_refused() -> None:
    sizes = {"vocab_size": 50, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    relative = DebertaV2Model(DebertaV2Config(**sizes, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True))
    with pytest.raises(RoutevlError, match="query_proj also reads a table of positions, which has no context"):
        adapted("context_lora", relative)
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    with pytest.raises(RoutevlError, match="LlamaForCausalLM has no biases in its attention and feed-forward parts"):
        adapted("context_bitfit", llama)
    assert not any(isinstance(module, Vector) for module in adapted("context_lora", llama).modules())
