"""One table of methods × text models × behaviours. A new method gets all of them by its row in the list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    LAYERS,
    REFUSED,
    SMALL,
    TEXT_MODELS,
    B,
    D,
    L,
    batch_of,
    build,
    name_of,
    one_step,
    rows,
    scores_of,
    shaken,
    trains_norms,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from routevl.errors import RoutevlError
from routevl.methods.base import layer_norms
from routevl.methods.table import METHODS, free_options, method_class, new_method
from routevl.routing import ROUTING
from routevl.tasks.vqa import VqaModel

every_case = pytest.mark.parametrize("case", CASES, ids=name_of)


@every_case
def test_trains_and_only_its_own_parameters_change(case: tuple[str, str, dict[str, Any]]) -> None:
    method, kind, options = case
    model = build(method, kind, options)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = batch_of(kind)
    first = model(**batch)["loss"].item()
    for _ in range(6):
        one_step(model, batch)
    assert model(**batch)["loss"].item() < first
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed <= trained
    assert any(name.startswith("text_model.") for name in changed)
    assert trained <= model.tensors().keys()
    counts = model.trainable_params_by_part()
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    grouped = [p for group in model.method.groups(model, 0.1) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad} and len(grouped) == len(trained)


@every_case
def test_an_example_does_not_depend_on_its_batch_mates(case: tuple[str, str, dict[str, Any]]) -> None:
    method, kind, options = case
    model = shaken(build(method, kind, options, width=20)).double()
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch_of(kind, width=20, visual_tokens=2).items()}
    together = model(**batch)["losses"]
    torch.testing.assert_close(model(**rows(batch, 1))["losses"], together[1:2], rtol=0, atol=1e-10)
    others = batch | {"image": torch.cat([batch["image"][:1].flip(-1) * 9, batch["image"][1:]])}
    torch.testing.assert_close(model(**others)["losses"][1:], together[1:], rtol=0, atol=1e-10)
    assert (model(**others)["losses"][0] - together[0]).abs() > 1e-7  # the image matters, by the prefix at least


@every_case
def test_the_image_matters_in_training_and_in_prediction(case: tuple[str, str, dict[str, Any]]) -> None:
    """Under prompts, too: peft's own `generate` would drop what stands before the text."""
    method, kind, options = case
    model = shaken(build(method, kind, options))
    batch = batch_of(kind)
    other = batch | {"image": -3 * batch["image"]}
    assert not torch.equal(model(**batch)["losses"], model(**other)["losses"])
    if kind == "roberta":
        answers = (model(**{k: v for k, v in b.items() if k != "answer_scores"})["logits"] for b in (batch, other))
    else:
        options = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": 49}
        answers = (model.generate(0, **to_write(b), do_sample=False, **options).scores[0] for b in (batch, other))
    assert not torch.allclose(*answers)


def to_write(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a batch's captions are generated from."""
    return {name: tensor for name, tensor in batch.items() if name in ("image", "task_id")}


@pytest.mark.parametrize("case", [case for case in CASES if case[1] == "gpt2"], ids=name_of)
def test_prediction_goes_on_as_training_reads(case: tuple[str, str, dict[str, Any]]) -> None:
    """Generated step by step with a cache, the next token is the one that a forward pass over all before it finds."""
    method, kind, options = case
    model = shaken(build(method, kind, options, width=20))
    image = batch_of(kind, width=20, visual_tokens=3)["image"]
    generated = model.generate(0, image, max_new_tokens=5, do_sample=False, pad_token_id=49, eos_token_id=None)
    ids = torch.zeros(B, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(5):
            inputs = model.text_inputs(ids, torch.ones_like(ids), image)
            ids = torch.cat([ids, model.text_model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated[:, -5:], ids[:, 1:])


@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "roberta"], ids=name_of)
def test_beam_search_gives_each_image_its_own_caption(case: tuple[str, str, dict[str, Any]]) -> None:
    method, kind, options = case
    model = shaken(build(method, kind, options))
    batch = to_write(batch_of(kind))
    batch["image"] *= 3
    search = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False, "pad_token_id": 49}
    together = model.generate(0, **batch, **search)
    for index in range(B):
        alone = model.generate(0, **rows(batch, index), **search)[0]
        length = min(len(alone), together.shape[1])  # the longer one ends in padding
        assert torch.equal(together[index, :length], alone[:length])


RELOAD = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from cases import *
for number, (method, kind, options) in enumerate(CASES):
    model = build(method, kind, options, seed=7, width=20)
    torch.manual_seed(99)
    for tensor in model.tensors().values():
        if tensor.is_floating_point(): tensor.normal_()
    model.load(Path({folder!r}) / str(number))
    torch.save(model(**batch_of(kind, width=20))["losses"], Path({folder!r}) / (str(number) + ".pt"))
"""


def test_all_save_and_reload_to_the_same_bits_in_a_new_process(tmp_path: Path) -> None:
    expected = []
    for number, (method, kind, options) in enumerate(CASES):
        model = shaken(build(method, kind, options, seed=7, width=20), number)
        (tmp_path / str(number)).mkdir()
        model.save(tmp_path / str(number))
        assert not [path for path in (tmp_path / str(number)).iterdir() if path.suffix not in (".safetensors", ".json", ".md")]
        expected.append(model(**batch_of(kind, width=20))["losses"])
    script = RELOAD.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=300)
    for number, case in enumerate(CASES):
        assert torch.equal(torch.load(tmp_path / f"{number}.pt", weights_only=True), expected[number]), name_of(case)


@every_case
def test_files_of_another_model_are_refused(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    method, kind, options = case
    build(method, kind, options, width=20).save(tmp_path)
    with pytest.raises(RoutevlError, match="an adapter of another model, or damaged"):
        build(method, kind, options, width=D).load(tmp_path)  # needs no visual projection
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RoutevlError, match="an adapter of another model, or damaged"):
        build(method, kind, options, width=20).load(tmp_path)


@every_case
def test_b25_a_file_that_lacks_a_tensor_is_refused(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    """Each of a run's files, without its first and without its last tensor: nothing is predicted with an initial value."""
    method, kind, options = case
    model = shaken(build(method, kind, options, width=20))
    model.save(tmp_path)
    whole = {file: load_file(file) for file in tmp_path.glob("*.safetensors")}
    assert sum(len(tensors) for tensors in whole.values()) >= len([p for p in model.parameters() if p.requires_grad])
    again = build(method, kind, options, width=20)
    for file, tensors in whole.items():
        for lost in {min(tensors), max(tensors)} if tensors else ():
            save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
            with pytest.raises(RoutevlError, match="an adapter of another model, or damaged"):
                again.load(tmp_path)
        save_file(tensors, file)
    again.load(tmp_path)


def test_b25_what_was_prepared_without_a_parameter_is_refused() -> None:
    text_model = TEXT_MODELS["roberta"]()
    scores = scores_of(text_model)
    lost = next(name for name in scores if name.endswith("query.weight"))
    del scores[lost]
    arguments = (
        text_model,
        new_method("gradient_norm", {}, "test"),
        scores,
        [],
        SimpleNamespace(width=D, encoder=nn.Identity()),
        True,
    )
    with pytest.raises(RoutevlError, match=f"--prepared was found for another text model: it has no '{lost}'"):
        VqaModel(7, *arguments)


@every_case
def test_disabled_it_is_the_base_model(case: tuple[str, str, dict[str, Any]]) -> None:
    method, kind, options = case
    model = shaken(build(method, kind, options, norms=False))
    if method == "lora_bias" or not hasattr(model.text_model, "disable_adapter"):
        pytest.skip(f"{method} is no adapter of peft, or changes the text model's own parameters")
    if METHODS[method].family == "prompt" and kind == "roberta":
        pytest.skip("peft disables prompts only where the model can generate")
    batch = batch_of(kind)
    base = build("full", kind, {}, norms=False)  # the same seed, and nothing added
    inputs = model.text_inputs(**{name: tensor for name, tensor in batch.items() if name != "answer_scores"})
    own = {"inputs_embeds": inputs["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
    decoder = {"decoder_input_ids": batch["input_ids"]} if kind == "bart" else {}
    with model.text_model.disable_adapter(), torch.no_grad():
        disabled = model.text_model(**own, **decoder)[0]
    with torch.no_grad():
        assert torch.equal(disabled, base.text_model(**own, **decoder)[0])
        assert not torch.equal(disabled[:, -1], model.text_model(**inputs, **decoder)[0][:, -1])


@every_case
def test_bfloat16_autocast(case: tuple[str, str, dict[str, Any]]) -> None:
    method, kind, options = case
    model = shaken(build(method, kind, options))
    batch = batch_of(kind)
    exact = model(**batch)["losses"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**batch)
    assert torch.linalg.norm(rough["losses"].float() - exact) < 0.05 * torch.linalg.norm(exact)
    rough["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_case
def test_gradient_checkpointing_gives_the_same_gradients(case: tuple[str, str, dict[str, Any]]) -> None:
    """Two forward passes before one backward pass: each recomputation must see what travelled beside its own pass."""
    method, kind, options = case
    if "gradient_checkpointing" in method_class(method).refuses:
        pytest.skip(method_class(method).refuses["gradient_checkpointing"])
    gradients = []
    for checkpointing in (False, True):
        model = shaken(build(method, kind, options, width=20, checkpointing=checkpointing)).train()
        sum(model(**batch_of(kind, seed, width=20))["loss"] for seed in (0, 1)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


FFN = {"roberta": 64, "gpt2": 4 * D, "bart": 64}
NORMS = {"roberta": 2 * D * (1 + 2 * LAYERS), "gpt2": 2 * D * (2 * LAYERS + 1), "bart": 2 * D * (2 + 2 * LAYERS + 3 * LAYERS)}
ATTENTIONS = {"roberta": LAYERS, "gpt2": LAYERS, "bart": 3 * LAYERS}  # encoder, decoder, cross
STACKS = {"roberta": LAYERS, "gpt2": LAYERS, "bart": 2 * LAYERS}  # layers with a feed-forward part
BIASES = {kind: ATTENTIONS[kind] * 4 * D + STACKS[kind] * (FFN[kind] + D) for kind in FFN}


def norms_by_hand(method: str, kind: str) -> int:
    """Parameters of the layer norms that are trained: of VL-PET the encoder's, of DAS those of layers that are run."""
    if not trains_norms(method):
        return 0
    if method == "das":  # not those of the layer that is skipped
        return NORMS[kind] - 2 * 2 * D
    return 2 * D * (1 + 2 * LAYERS) if method.startswith("vl_pet") and kind == "bart" else NORMS[kind]


def side_network(kind: str, w: int) -> int:
    """LST's: layers of width w as the text model's, what leads from its layers and embeddings to them, and back."""
    norms, inner = {"roberta": 2 * LAYERS, "gpt2": 2 * LAYERS + 1, "bart": 5 * LAYERS}[kind], FFN[kind] * w // D
    down = D * w + w
    layers = ATTENTIONS[kind] * 4 * (w * w + w) + STACKS[kind] * (2 * w * inner + inner + w) + norms * 2 * w
    return layers + STACKS[kind] * (down + 1) + (2 if kind == "bart" else 1) * down + w * D + D


def generator(kind: str, tasks: int, plain: int) -> int:
    """HyperFormer's: for each stack what makes codes of width 8, then what makes all of a bottleneck, for each kind of place."""
    stacks, places = (2, 5) if kind == "bart" else (1, 2)
    code = LAYERS * 512 + 1024 * 128 + 128 + 128 * 8 + 8 + 2 * 8
    return tasks * 512 + stacks * code + places * (8 * plain + plain)


def chosen_by_hand(kind: str) -> int:
    """SPT's without its modules: all biases, three entries of each of the other matrices and of the norms' weights."""
    return BIASES[kind] + NORMS[kind] // 2 + 3 * (2 * STACKS[kind] + NORMS[kind] // (2 * D))


def in_contexts(kind: str, outer: int, inner: int, feed_forward: int) -> int:
    """Context-PEFT's, of what query and output, key and value, and a feed-forward part have for one context. The image's is left
    out where nothing can see it: in the last layer of a model without a decoder beside it, and in a decoder's own positions."""
    layer = outer + inner + feed_forward
    if kind == "bart":
        return LAYERS * 2 * layer + LAYERS * (layer + outer + 2 * inner)
    return LAYERS * layer + (LAYERS - 1) * layer + inner


def prototypes(kind: str, tasks: int, plain: int) -> int:
    """PHA's: what makes codes of width 64 and of them bottlenecks, a BART's ordinary ones, and what makes vectors of examples."""
    code = tasks * 64 + LAYERS * 64 + 128 * 128 + 128 + 128 * 64 + 64 + 2 * 64
    instances = D * 128 + 128 + 128 * 64 + 64 if tasks > 1 else 0
    return code + 64 * plain + plain + (LAYERS * plain if kind == "bart" else 0) + instances


def counted_by_hand(method: str, kind: str, options: dict[str, Any]) -> int:
    """Trained parameters of the text model at width D, without the layer norms."""
    attentions, stacks, r, tasks = ATTENTIONS[kind], STACKS[kind], 4, options.get("tasks", 1)
    fused = kind == "gpt2"  # peft adapts query, key and value as one module there
    lora = attentions * (r * (D + 3 * D) if fused else 2 * r * (D + D))
    per_module = attentions * (1 if fused else 2)
    bottleneck = options.get("bottleneck", "shared")
    down = {"split": 2 * (D * r // 4 + r // 4 * r), "cross_attention": D * r + 4 * r * r}.get(bottleneck, D * r)
    biases = 2 * r if bottleneck == "split" else r
    plain, sub_layers = 2 * D * r + r + D, attentions + stacks
    vl_pet = 2 * LAYERS * plain + (LAYERS * plain if kind == "bart" else 0)  # the encoder's; the decoder's values
    return {
        "lora": tasks * attentions * 2 * (down + r * D),
        "adapter": tasks * 2 * stacks * (down + biases + r * D + D),  # not after BART's cross-attention
        "houlsby": tasks * 2 * stacks * plain,
        "pfeiffer": tasks * stacks * plain,
        "vl_adapter": tasks * sub_layers * plain,
        "phm_adapter": tasks * sub_layers * (2 * (2 * (D // 2) * (r // 2) + 2**3) + r + D),
        "compacter": tasks * sub_layers * (2 * (D + r) + r + D) + 4**3,  # factors, biases, one rule
        "hyperformer": generator(kind, tasks, plain),
        "pha": prototypes(kind, tasks, plain),
        "vl_pet_large": vl_pet + 2 * LAYERS * plain,
        "vl_pet_middle_x": vl_pet + 2 * LAYERS * (D + 1),
        "vl_pet_middle_y": vl_pet + 2 * LAYERS * D,
        "vl_pet_small": vl_pet + 2 * LAYERS * (2 * D + 1),
        "peft_lora": lora,
        "lora_bias": lora + BIASES[kind],
        "dora": lora + attentions * (3 * D if fused else 2 * D),
        "vera": per_module * 16 + attentions * (3 * D if fused else 2 * D),
        "fourierft": per_module * 50,
        "das": (sub_layers - 2) * (2 * D + plain) + 2 * D + 2 * D * 12 + 12 + D,  # its first layer is skipped
        "genft": 4 * D * 4 + 2 * (4 + 2 + D) + 2 * attentions * 2 * 2 * D,  # biases; a and b of each query and value
        "genft_vision": 4 * D * 4 + attentions * 2 * 3 * D,
        "context_lora": in_contexts(kind, 2 * (2 * D * r + D), 2 * (2 * D * r + D), 2 * r * (D + FFN[kind]) + D + FFN[kind]),
        "context_ia3": in_contexts(kind, 0, 2 * D, FFN[kind]),
        "context_bitfit": in_contexts(kind, 2 * D, 2 * D, D + FFN[kind]),
        "ia3": {
            "roberta": LAYERS * (D + D + D + 64),  # key, value, and the input of both modules called output.dense
            "gpt2": LAYERS * (3 * D + 4 * D),
            "bart": attentions * 2 * D + stacks * 64,
        }[kind],
        "ln_tuning": 0,
        "bitfit": BIASES[kind],
        "spt_lora": chosen_by_hand(kind) + attentions * 4 * r * 2 * D,
        "spt_adapter": chosen_by_hand(kind) + attentions * 4 * plain,
        "adapeft": attentions * 2 * r * 2 * D + BIASES[kind] + NORMS[kind] - 2 * D * (2 if kind == "bart" else 1),
        "prompt_tuning": 3 * D,
        "prefix_tuning": 3 * LAYERS * 2 * D,
        "vpt": 0,  # its prompts are the vision model's
        "vfpt": 0,
        "vl_prompt": tasks * (3 * D + D * 16 + 16 + 16 * D + D),
        "lst": side_network(kind, D // 4),
    }[method]


@every_case
def test_parameters_are_counted_as_by_hand(case: tuple[str, str, dict[str, Any]]) -> None:
    method, kind, options = case
    counts = build(method, kind, options).trainable_params_by_part()
    everything = sum(p.numel() for p in TEXT_MODELS[kind]().parameters())
    if method in ("full", "full_both"):
        assert counts["method"] == everything - NORMS[kind]
    elif method == "gradient_norm":  # a budget, filled as far as whole tensors allow
        assert 0 < counts["method"] <= options["share"] * (everything - NORMS[kind])
    else:
        assert counts["method"] == counted_by_hand(method, kind, options)
    assert counts["layer_norm"] == norms_by_hand(method, kind)
    without = build(method, kind, options, norms=False).trainable_params_by_part()
    assert without["method"] + without["layer_norm"] - counts["method"] == {
        "ln_tuning": NORMS[kind], "full": NORMS[kind], "full_both": NORMS[kind], "bitfit": NORMS[kind] // 2,
    }.get(method, without["method"] - counts["method"])  # fmt: skip


def test_tasks_that_a_routed_method_cannot_have_apart_are_errors() -> None:
    for bottleneck, routing in (("split", "mul"), ("after_up", "mul"), ("cross_attention", "none")):
        with pytest.raises(RoutevlError, match=f"tasks is 2, but bottleneck={bottleneck} is for one: set bottleneck=shared"):
            new_method("lora", {"r": 4, "bottleneck": bottleneck, "routing": routing, "tasks": 2}, "test")
    with pytest.raises(RoutevlError, match="c_attn holds several projections, which are adapted for one task alone"):
        build("lora", "gpt2", {"r": 4, "tasks": 2})


@pytest.mark.parametrize("method", [name for name in METHODS if "bottleneck" in free_options(name)])
def test_routing_adds_no_parameter(method: str) -> None:
    for kind in TEXT_MODELS:
        chosen = [{"routing": routing} for routing in ROUTING] + [{"routing": "mul", "bottleneck": "after_up"}]
        counts = {str(build(method, kind, SMALL[method] | options).trainable_params_by_part()) for options in chosen}
        assert len(counts) == 1


# ------------------------------------------------------------------------- layer norms (B16), positions (B22)


class Numbered(nn.Module):
    """A text model whose layer norm is called "1", as in nn.Sequential."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
        self.add_module("1", norm(D))
        self.config = SimpleNamespace(hidden_size=D, to_dict=dict)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.get_submodule("1")(self.layers(inputs_embeds))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


@pytest.mark.parametrize("method", ["lora", "peft_lora", "ln_tuning", "bitfit"])
def test_b16_norms_of_any_class_are_trained_and_nothing_else(method: str) -> None:
    """LLaMA, Qwen and Mistral have RMSNorm classes of their own."""
    text_model = llama().requires_grad_(False)
    norms = layer_norms(text_model)
    assert len(norms) == 2 * LAYERS + 1 and "model.norm" in norms
    chosen = new_method(method, {"r": 4} if "lora" in method else {}, "test")
    built = chosen.build(text_model, {}, norms)
    trained = {n: p for n, p in built.named_parameters() if p.requires_grad}
    assert sum(p.numel() for n, p in trained.items() if chosen.part_of(n) == "layer_norm") == D * (2 * LAYERS + 1)
    assert all("norm" in n or "lora_" in n or n.endswith("bias") for n in trained)


def test_b16_a_model_without_norms_is_an_error() -> None:
    with pytest.raises(RoutevlError, match="Numbered has no layer norm .* set freeze_layer_norm"):
        layer_norms(Numbered(nn.Identity))
    with pytest.raises(RoutevlError, match="has no layer norm"):
        layer_norms(Numbered(lambda d: nn.LayerNorm(d, elementwise_affine=False)))  # nothing to train in it


def test_b16_a_norm_whose_name_ends_others_trains_no_other_module() -> None:
    """peft would train `layers.1` whole for a norm that is called "1"."""
    assert layer_norms(Numbered()) == ["1"]
    for method, options in (("lora", {"r": 4}), ("peft_lora", {}), ("ln_tuning", {})):
        with pytest.raises(RoutevlError, match="layers.1 would be trained as a layer norm.*called '1'"):
            new_method(method, options, "test").build(Numbered(), {}, ["1"])
    built = new_method("bitfit", {}, "test").build(Numbered(), {}, ["1"])
    assert {n for n, p in built.named_parameters() if p.requires_grad} == {"1.weight", "1.bias", "layers.0.bias", "layers.1.bias"}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "peft_lora"])
def test_b22_the_head_reads_the_first_text_position(method: str, prefix: bool) -> None:
    """Behind the visual prefix and behind trained prompts, which stand before both."""
    model, batch = shaken(build(method, "roberta", SMALL.get(method, {}), prefix=prefix)), batch_of("roberta", visual_tokens=2)
    read: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(**batch)
    inputs = model.text_inputs(batch["input_ids"], batch["attention_mask"], batch["image"])
    states = model.text_model(**inputs).last_hidden_state
    before = 2 * prefix + (3 if method == "prompt_tuning" else 0)
    assert states.shape[1] == before + L and torch.equal(read[0], states[:, before])


@pytest.mark.parametrize(("method", "kind"), REFUSED)
def test_what_a_method_refuses_has_a_reason(method: str, kind: str) -> None:
    assert len(method_class(method).refuses[kind]) > 10


def test_a_probe_ranks_by_the_mean_squared_gradient() -> None:
    """GradientNorm.prepare against gradients computed apart, and the choice against the definition."""
    method = new_method("gradient_norm", {"share": 0.1, "batches": 2}, "test")
    batches = [batch_of("roberta", seed) for seed in range(3)]
    model = build("full", "roberta", {})
    scores = method.prepare(type("Task", (), {"model": model})(), iter(batches))
    expected = {name: torch.zeros(()) for name, _ in model.text_model.named_parameters()}
    for batch in batches[:2]:
        named = dict(model.text_model.named_parameters())
        gradients = torch.autograd.grad(model(**batch)["loss"], list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                expected[name] += (gradient**2).sum() / gradient.numel()
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name])
    parameters = dict(model.text_model.named_parameters())
    chosen = method.chosen(parameters, scores)
    budget = 0.1 * sum(p.numel() for p in parameters.values())
    assert 0 < sum(parameters[name].numel() for name in chosen) <= budget
    left = budget - sum(parameters[name].numel() for name in chosen)
    skipped = [name for name in parameters if name not in chosen and parameters[name].numel() <= left]
    assert not skipped, "what still fits is taken"
    best = max(parameters, key=lambda name: scores[name])
    assert best in chosen or parameters[best].numel() > budget
    assert scores_of(model.text_model).keys() == parameters.keys()


def test_the_shapes_of_the_cases_are_those_of_the_counts() -> None:
    assert all(model().config.hidden_size == D for model in TEXT_MODELS.values()) and L < 40
