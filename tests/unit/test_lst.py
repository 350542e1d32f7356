"""Ladder side-tuning: the ladder and the cut against recorded and computed numbers, what the backbone reads, what is kept."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from cases import TEXT_MODELS, B, D, batch_of, build, rows, shaken
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration

from routevl.backbones.skeleton import layers_of, stacks_of
from routevl.errors import RoutevlError
from routevl.methods.lst.cut import cut, row_scores
from routevl.methods.lst.ladder import Rung, _new_stack, climbed, climbing, put_beside, side_config
from routevl.methods.table import new_method
from routevl.tasks.base import VisionLanguageModel

REFERENCE = Path(os.environ.get("ROUTEVL_REFERENCE", "."))
needs_reference = pytest.mark.skipif(
    "ROUTEVL_REFERENCE" not in os.environ, reason="ROUTEVL_REFERENCE names no folder of reference data"
)
SMALL = {"reduction": 4, "dropout": 0.0}
W = D // 4


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with numpy.load(REFERENCE / "systems" / "lst.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}


@pytest.fixture(scope="module")
def meta() -> dict:
    with numpy.load(REFERENCE / "systems" / "lst.npz") as arrays:
        return json.loads(str(arrays["meta"]))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------- the ladder


class Tanh(nn.Module):
    """What stands in for a side layer in the recorded numbers: tanh(x Wᵀ + b)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.read = hidden_states
        return torch.tanh(nn.functional.linear(hidden_states, self.weight, self.bias))


@needs_reference
def test_recorded_ladder(golden: dict[str, Tensor], meta: dict) -> None:
    """Three gates, from the embeddings to the output."""
    rungs = []
    for number in range(meta["layers"]):
        of = {name.split(".")[1]: tensor for name, tensor in golden.items() if name.startswith(f"layer{number}.")}
        rung = Rung(Tanh(of["side_weight"], of["side_bias"]), number, meta["d"], meta["side"])
        rung.load_state_dict(
            {"gate": of["gate_parameter"].reshape(()), "down.weight": of["down_weight"], "down.bias": of["down_bias"]}
        )
        rungs.append(rung)
    with climbing() as climb, torch.no_grad():
        climb.states = [golden[f"layer{number}.backbone_output"] for number in range(meta["layers"])]
        climb.start = nn.functional.linear(golden["embeddings"], golden["first_down_weight"], golden["first_down_bias"])
        close(climb.start, golden["side_input"])
        hidden_states = torch.full_like(climb.start, torch.nan)  # the first rung does not read it
        for number, rung in enumerate(rungs):
            hidden_states = rung(hidden_states)
            close(rung.layer.read, golden[f"layer{number}.mixed"])
            close(hidden_states, golden[f"layer{number}.side_output"])
    close(nn.functional.linear(hidden_states, golden["up_weight"], golden["up_bias"]), golden["output"])


@needs_reference
def test_recorded_zeros_at_the_positions_of_the_image(golden: dict[str, Tensor]) -> None:
    """Recorded with the text first; here the image is."""
    text = golden["layer1.backbone_output"].shape[1]
    first = {name: golden[f"vision_language.{name}"].roll(-text, 1) for name in ("side_before", "mixed")}
    update = nn.functional.linear(golden["layer1.backbone_output"], golden["layer1.down_weight"], golden["layer1.down_bias"])
    close(climbed(first["side_before"], golden["layer1.gate_parameter"].reshape(()), update), first["mixed"])


def test_the_ladder_by_its_formula() -> None:
    random = numpy.random.default_rng(0)
    side, update, gate = random.standard_normal((2, 5, 4)), random.standard_normal((2, 3, 4)), 0.07
    share = 1 / (1 + numpy.exp(-gate / 0.1))
    expected = share * side
    expected[:, 2:] += (1 - share) * update
    found = climbed(torch.from_numpy(side), torch.tensor(gate, dtype=torch.float64), torch.from_numpy(update))
    numpy.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)


# ---------------------------------------------------------------------------------------------------- the cut


@needs_reference
def test_recorded_cut(golden: dict[str, Tensor], meta: dict) -> None:
    """One encoder and one decoder block of T5, by the importances that were recorded with them."""
    of = {
        part: {n.removeprefix(f"pruning.{part}."): t for n, t in golden.items() if n.startswith(f"pruning.{part}.")}
        for part in ("backbone", "importance", "side")
    }
    vocabulary, width = of["backbone"]["shared.weight"].shape
    inner = len(of["backbone"]["encoder.block.0.layer.1.DenseReluDense.wi.weight"])
    sizes = {"d_model": width, "d_kv": width // 2, "num_heads": 2, "d_ff": inner, "num_layers": 1, "vocab_size": vocabulary}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model.load_state_dict(of["backbone"], strict=False)
    reduction = meta["pruning"]["reduction"]
    importance = {name: of["importance"].get(name, torch.zeros_like(p)) for name, p in model.named_parameters()}
    sides = {n: _new_stack(type(stack), side_config(stack.config, reduction)) for n, stack in stacks_of(model).items()}
    cut(model, sides, row_scores(model, importance, reduction), reduction)
    for name, expected in of["side"].items():
        stack, _, own = name.partition(".")
        assert torch.equal(sides[stack].get_parameter(own), expected), name


def largest(scores: numpy.ndarray) -> numpy.ndarray:
    return numpy.sort(numpy.argsort(-scores, kind="stable")[: len(scores) // 4])


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_the_cut_by_its_definition(kind: str) -> None:
    """The first layer's matrices against numpy: the product over query, key and value, GPT-2's thirds among them."""
    torch.manual_seed(0)
    model = TEXT_MODELS[kind]()
    weights = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    if kind == "gpt2":
        layer = "transformer.h.0"
        attention = numpy.split(weights[f"{layer}.attn.c_attn.weight"].T, 3)
        rest = [weights[f"{layer}.{name}.weight"].T for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
        embeddings, norm = "transformer.wte.weight", "ln_2"
    else:
        layer = "encoder.layer.0"
        attention = [weights[f"{layer}.attention.self.{name}.weight"] for name in ("query", "key", "value")]
        rest = [weights[f"{layer}.{name}.dense.weight"] for name in ("attention.output", "intermediate", "output")]
        embeddings, norm = "embeddings.word_embeddings.weight", "attention.output.LayerNorm"
    with torch.no_grad():  # all norms are ones at the start
        model.get_submodule(f"{layer}.{norm}").weight.copy_(torch.arange(D))
    build_of(model)
    side = layers_of(stacks_of(model)[layer.split(".")[0] if kind == "gpt2" else ""].ladder.side)[0].layer

    columns = largest(numpy.abs(weights[embeddings]).sum(0))
    kept = largest(numpy.prod([numpy.abs(matrix) for matrix in attention], axis=0)[:, columns].sum(1))
    cut_out = [matrix[kept][:, columns] for matrix in attention]
    if kind == "gpt2":
        numpy.testing.assert_array_equal(numpy.concatenate(cut_out), side.attn.c_attn.weight.detach().T)
        found = [side.attn.c_proj.weight.T, side.mlp.c_fc.weight.T, side.mlp.c_proj.weight.T]
    else:
        for name, expected in zip(("query", "key", "value"), cut_out, strict=True):
            numpy.testing.assert_array_equal(side.attention.self.get_submodule(name).weight.detach(), expected)
        found = [side.attention.output.dense.weight, side.intermediate.dense.weight, side.output.dense.weight]
    for number, (own, matrix) in enumerate(zip(found, rest, strict=True)):
        columns, kept = kept, largest(numpy.abs(matrix)[:, kept].sum(1))
        numpy.testing.assert_array_equal(own.detach(), matrix[kept][:, columns])
        if number == 0:
            numpy.testing.assert_array_equal(side.get_submodule(norm).weight.detach(), kept)


def build_of(model: nn.Module, **options: float) -> nn.Module:
    """A text model with the side network that its largest weights give it."""
    importance = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    return put_beside(model.requires_grad_(False), row_scores(model, importance, 4), 4, options.get("dropout", 0.0))


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_the_phase_before_training_squares_the_gradient_of_each_example(kind: str) -> None:
    """Of the first so many, and never of a batch's mean."""
    method = new_method("lst", SMALL | {"samples": B + 1}, "test")
    batches = [batch_of(kind, seed) for seed in range(3)]
    model = build("full", kind, {})
    found = method.prepare(SimpleNamespace(model=model), iter(batches))
    parameters = dict(model.text_model.named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example in [rows(batches[0], place) for place in range(B)] + [rows(batches[1], 0)]:
        gradients = torch.autograd.grad(model(**example)["loss"], list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            squares[name] += 0 if gradient is None else gradient**2
    expected = row_scores(model.text_model, squares, 4)
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores)


# -------------------------------------------------------------------------------------- the frozen backbone


def outputs_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """What the modules are going to put out, in the order of their calls."""
    outputs: list[Tensor] = []
    for module in modules:
        module.register_forward_hook(lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output))
    return outputs


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_the_backbone_reads_the_text_alone(kind: str) -> None:
    """As without the image, to the bit, although the prefix stands before the text and in its mask."""
    batch = batch_of(kind, visual_tokens=2)
    batch["attention_mask"][1, -2:] = 0
    model, bare = shaken(build("lst", kind, SMALL)), build("full", kind, {}, prefix=False)
    found, expected = (outputs_of(layers_of(s)[-1] for s in stacks_of(m.text_model).values()) for m in (model, bare))
    model(**batch), bare(**batch)
    real = batch["attention_mask"].bool()
    for own, alone in zip(found, expected, strict=True):
        assert torch.equal(own[real], alone[real])


def test_two_threads_and_a_copy_use_one_model_each_with_its_own_image() -> None:
    model = shaken(build("lst", "roberta", SMALL))
    batches = [batch_of("roberta", seed, visual_tokens=1 + seed) for seed in range(2)]
    expected = [model(**batch)["losses"] for batch in batches]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda number: model(**batches[number % 2])["losses"], range(60)))
    assert all(torch.equal(losses, expected[number % 2]) for number, losses in enumerate(found))
    copied = copy.deepcopy(model)
    for tensor in copied.tensors().values():
        tensor.zero_()
    assert torch.equal(model(**batches[0])["losses"], expected[0])
    assert not torch.equal(copied(**batches[0])["losses"], expected[0])


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_without_the_prefix_it_is_blind(kind: str) -> None:
    model, batch = shaken(build("lst", kind, SMALL, prefix=False)), batch_of(kind)
    assert not model.sees_image
    assert torch.equal(model(**batch)["losses"], model(**batch | {"image": -batch["image"]})["losses"])


def test_an_encoder_decoder_generates_with_a_cache_what_it_reads_at_once() -> None:
    """Both halves of the decoder, each with its own half of the encoder's states."""
    model, image = shaken(build("lst", "bart", SMALL)), batch_of("bart", visual_tokens=2)["image"]
    generated = model.generate(0, image, max_new_tokens=5, do_sample=False, pad_token_id=49, eos_token_id=None)
    ids = torch.zeros(B, 1, dtype=torch.int64)
    inputs = model.text_inputs(ids, torch.ones_like(ids), image)
    for place in range(1, generated.shape[1]):
        with torch.no_grad():
            logits = model.text_model(**inputs, decoder_input_ids=generated[:, :place], use_cache=False).logits
        assert torch.equal(logits[:, -1].argmax(-1), generated[:, place])


def test_a_cache_counts_the_positions_of_the_image() -> None:
    """Continued by hand: the positions behind those in the cache, with a mask of all, as read at once."""
    model, batch = shaken(build("lst", "gpt2", SMALL)), batch_of("gpt2", visual_tokens=2)
    inputs = model.text_inputs(batch["input_ids"], batch["attention_mask"], batch["image"])
    with torch.no_grad():
        expected = model.text_model(**inputs, use_cache=False).logits[:, -2:]
        first = {name: tensor[:, :-2] for name, tensor in inputs.items() if name != "visual_tokens"}
        cache = model.text_model(**first, visual_tokens=inputs["visual_tokens"]).past_key_values
        assert cache.get_seq_length() == first["inputs_embeds"].shape[1]
        then = inputs | {"inputs_embeds": inputs["inputs_embeds"][:, -2:]}
        torch.testing.assert_close(model.text_model(**then, past_key_values=cache).logits, expected)
    assert cache.get_seq_length() == inputs["inputs_embeds"].shape[1]


def test_padding_between_the_image_and_a_prompt_changes_nothing_that_is_generated() -> None:
    model, batch = shaken(build("lst", "gpt2", SMALL)), batch_of("gpt2", visual_tokens=2)
    batch["attention_mask"][0, :3] = 0  # on the left
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 49, "eos_token_id": None}
    inputs = model.text_inputs(batch["input_ids"], batch["attention_mask"], batch["image"])
    alone = model.text_inputs(batch["input_ids"][:1, 3:], batch["attention_mask"][:1, 3:], batch["image"][:1])
    scores = {"output_scores": True, "return_dict_in_generate": True}
    padded, bare = (model.text_model.generate(**given, **options, **scores).scores for given in (inputs, alone))
    for of_batch, of_one in zip(padded, bare, strict=True):
        torch.testing.assert_close(of_batch[:1], of_one)


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_no_gradient_passes_through_the_backbone(kind: str) -> None:
    """No tensor in it has a grad_fn, with a trained visual projection and in training; and the image's tokens do get one."""
    model = build("lst", kind, SMALL, width=20).train()
    frozen = [layer for stack in stacks_of(model.text_model).values() for layer in layers_of(stack)]
    outputs = outputs_of(module for layer in frozen for module in layer.modules())
    model(**batch_of(kind, width=20))["loss"].backward()
    assert len(outputs) > 10 * len(frozen) / 2 and not any(output.requires_grad or output.grad_fn for output in outputs)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".ladder." in name or not name.startswith("text_model.") for name in trained)
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


def bytes_kept(model: VisionLanguageModel, batch: dict[str, Tensor]) -> int:
    """Bytes of the activations that a forward pass keeps for the backward pass; parameters are there anyway."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(**batch)["loss"]
    assert loss.requires_grad  # and with it all that was kept is alive until here
    return sum(kept.values())


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_less_is_kept_for_the_backward_pass_than_with_lora(kind: str) -> None:
    batch = batch_of(kind)
    ladder, lora = (bytes_kept(build(m, kind, o, norms=False), batch) for m, o in (("lst", SMALL), ("lora", {"r": 1})))
    assert ladder < 0.65 * lora  # though these layers, of width 32, keep much that does not become less, such as masks


# ------------------------------------------------------------------------------------------------ other models


def llama(**sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, bos_token_id=0, eos_token_id=49, **config)).eval()


def qwen() -> Qwen3ForCausalLM:
    """Its queries and keys are normalised head by head."""
    sizes = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=50, num_key_value_heads=4, **sizes))


def test_rotary_positions_and_a_gated_feed_forward_part() -> None:
    """LLaMA: generated with a cache as read at once; positions of the text that do not count the image in the backbone."""
    model = build_of(llama())
    visual, text = torch.randn(B, 2, D), model.get_input_embeddings()(torch.randint(0, 50, (B, 1)))
    embeds = torch.cat([visual, text], 1)
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(B, 3, dtype=torch.int64), "visual_tokens": visual}
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=49, eos_token_id=None)
    for place in range(4):
        inputs["inputs_embeds"] = torch.cat([embeds, model.get_input_embeddings()(generated[:, :place])], 1)
        inputs["attention_mask"] = torch.ones(B, 3 + place, dtype=torch.int64)
        with torch.no_grad():
            assert torch.equal(model(**inputs, use_cache=False).logits[:, -1].argmax(-1), generated[:, place])
    side = layers_of(model.model.ladder.side)[0].layer
    assert side.mlp.gate_proj.weight.shape == (16, W) and side.self_attn.q_proj.weight.shape == (W, W)


@pytest.mark.parametrize(
    ("model", "reduction", "message"),
    [
        (TEXT_MODELS["roberta"], 3, "hidden_size 32 does not divide by reduction=3"),
        (TEXT_MODELS["gpt2"], 16, "side network's width 2 does not divide by the text backbone's 4 heads"),
        (lambda: llama(num_key_value_heads=2), 4, "have not equally many rows"),
        (qwen, 4, "layers.0.self_attn.q_norm has width 8, not 32"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(model: Callable[[], nn.Module], reduction: int, message: str) -> None:
    """Before the examples are looked at."""
    task = SimpleNamespace(model=SimpleNamespace(text_model=model()))
    with pytest.raises(RoutevlError, match=message):
        new_method("lst", {"reduction": reduction, "importance": "magnitude"}, "test").prepare(task, iter(()))


def test_the_norms_of_the_backbone_cannot_be_trained() -> None:
    with pytest.raises(RoutevlError, match="no gradient passes through the backbone.*set freeze_layer_norm"):
        new_method("lst", SMALL, "test").build(TEXT_MODELS["roberta"](), {}, ["embeddings.LayerNorm"])


def test_an_image_with_token_ids_is_refused() -> None:
    model, batch = build("lst", "roberta", SMALL), batch_of("roberta")
    with pytest.raises(RoutevlError, match="visual_tokens are the first positions of inputs_embeds"):
        model.text_model(input_ids=batch["input_ids"], visual_tokens=batch["image"])


def test_scores_of_another_model_are_refused() -> None:
    roberta = TEXT_MODELS["roberta"]()
    scores = row_scores(roberta, {name: parameter.detach() for name, parameter in roberta.named_parameters()}, 4)
    name = "encoder.layer.1.output.dense.weight"
    for wrong, error in ({**scores, name: scores[name][1:]}, RoutevlError), ({}, KeyError):
        with pytest.raises(error, match="32 rows, not 31" if wrong else "word_embeddings"):
            put_beside(TEXT_MODELS["roberta"]().requires_grad_(False), wrong, 4, 0.0)
