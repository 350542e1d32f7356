"""VL-Adapter, Compacter, HyperFormer and VL-PET: layers against recorded numbers and formulas, places, sizes, tasks and gates."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cases import TEXT_MODELS, D, bart, gpt2, roberta
from numpy import ndarray
from recorded import assert_agrees, needs_reference, put, recorded
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    BloomConfig,
    BloomForCausalLM,
    FNetConfig,
    FNetModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from routevl.backbones.skeleton import no_weights
from routevl.backbones.structure import structure_of
from routevl.conditioning import Call
from routevl.errors import RoutevlError
from routevl.methods.base import WEIGHTS, layer_norms
from routevl.methods.bottleneck.layer import Bottleneck, plain_bottleneck
from routevl.methods.compacter.layer import PhmLinear, full_weights, new_rule, rank_one_weights
from routevl.methods.hyperformer.layer import Code, Generated, Head, task_vectors
from routevl.methods.table import new_method
from routevl.methods.vl_adapter.layer import Adapter
from routevl.methods.vl_pet.layer import GatedBottleneck, LargeGate, MiddleXGate, MiddleYGate, SmallGate

VL_PET = ("vl_pet_large", "vl_pet_middle_x", "vl_pet_middle_y", "vl_pet_small")
OWN = ("vl_adapter", "phm_adapter", "compacter", "hyperformer", *VL_PET)
CPU = torch.device("cpu")


def adapted(method: str, text_model: nn.Module, norms: bool = True, **options: Any) -> nn.Module:
    """A frozen text model with a method, in evaluation mode."""
    text_model.requires_grad_(False).eval()
    return new_method(method, options, "test").build(text_model, {}, layer_norms(text_model) if norms else [])


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trained(module).values())


def moved(module: nn.Module, scale: float = 0.2) -> nn.Module:
    """The same module with its trained tensors moved away from where they start."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trained(module).values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def t5(layers: int = 1) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=D, d_kv=8, d_ff=64, num_layers=layers, num_heads=4))


def ids_of(model: nn.Module, rows: int = 3, length: int = 6) -> dict[str, Tensor]:
    """A call's text, the same for the decoder."""
    ids = torch.randint(4, 48, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


# ------------------------------------------------------------------------- against the recorded numbers


def put_linear(layer: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Set a linear layer to a recorded one, or to recorded heads side by side."""
    layers = [n.removesuffix(".weight") for n in tensors if n.startswith(f"{name}.") and n.endswith(".weight")]
    put(layer.weight, torch.cat([tensors[f"{n}.weight"] for n in layers]))
    put(layer.bias, torch.cat([tensors[f"{n}.bias"] for n in layers]))


@needs_reference
@pytest.mark.parametrize("sharing", ["single", "half_shared", "multiple"])
def test_vl_adapter_gives_the_recorded_outputs(sharing: str) -> None:
    tensors, meta = recorded("vl_adapter")
    tasks = 1 if sharing == "single" else len(meta["tasks"])
    model = adapted("vl_adapter", small_bart(meta["d"], 24), False, r=meta["bottleneck"], sharing=sharing, tasks=tasks)
    adapter = model.encoder.layers[0].fc2.adapter
    assert count(adapter) == tensors[f"{sharing}.trainable_parameters"]
    known = [number for number, task in enumerate(meta["tasks"]) if f"{sharing}.{task}.y" in tensors]
    for number in known:
        for name, parameter in adapter.bottlenecks[number].named_parameters():
            put(parameter, tensors[f"{sharing}.{meta['tasks'][number]}.{name.replace('.', '_')}"])
    for number in known:
        assert_agrees(of_task(adapter, tensors["x"], number), tensors[f"{sharing}.{meta['tasks'][number]}.y"])


def of_task(adapter: Adapter, hidden_states: Tensor, task: int) -> Tensor:
    """What an adapter makes of hidden states of one task."""
    if adapter.conditioning is None:
        return adapter(hidden_states)
    call = Call(adapter.conditioning.prepare({"task_id": torch.full((len(hidden_states),), task)}))
    return adapter.conditioning.run_with(call, adapter, hidden_states)


@needs_reference
@pytest.mark.parametrize("case", ["full_n2", "factorized_n4", "kronecker_code_path"])
def test_compacter_gives_the_recorded_outputs(case: str) -> None:
    tensors, meta = recorded("compacter")
    facts = meta["cases"][case]
    adapter = phm_adapter(facts["n"], meta["d"], meta["bottleneck"], facts["factorized_phm"])
    assert count(adapter) == facts["parameters"]
    for layer, name in ((adapter.bottlenecks[0].down, "down_sampler"), (adapter.bottlenecks[0].up, "up_sampler")):
        parts = ("W_left", "W_right") if facts["factorized_phm"] else ("W",)
        for parameter, part in zip((layer.rule, layer.bias, *layer.weights), ("phm_rule", "b", *parts), strict=True):
            put(parameter, tensors[f"{case}.param.{name}.{part}"])
    assert_agrees(adapter(tensors["x"]), tensors[f"{case}.y"])


def phm_adapter(n: int, width: int, rank: int, factorised: bool) -> Adapter:
    weights = rank_one_weights if factorised else full_weights
    down, up = (PhmLinear(new_rule(n, CPU), weights(n, *widths, CPU)) for widths in ((width, rank), (rank, width)))
    return Adapter([Bottleneck(down, up)], None)


@needs_reference
@pytest.mark.parametrize("method", VL_PET)
def test_vl_pet_gives_the_recorded_encoder_layer(method: str) -> None:
    tensors, meta = recorded("vl_pet")
    options = {"masked_mean": False} if method == "vl_pet_small" else {}
    model = adapted(method, small_bart(meta["d"], meta["ffn"]), norms=False, r=meta["adapter_rank"], **options)
    layer = model.encoder.layers[0]
    for name, parameter in layer.named_parameters():
        if ".adapter." not in name:
            put(parameter, tensors[f"param.{name}"])
    kind = {"vl_pet_middle_x": "middleX", "vl_pet_middle_y": "middleY"}.get(method, method.removeprefix("vl_pet_"))
    seen = {}
    for output, sub_layer, gate in ((layer.self_attn.out_proj, "attn", "attention_gate"), (layer.fc2, "ff", "ffn_gate")):
        put_linear(output.adapter.bottleneck.down, tensors, f"param.{sub_layer}_adapter_multihead_down")
        put_linear(output.adapter.bottleneck.up, tensors, f"param.{sub_layer}_adapter_multihead_up")
        name = f"{kind}.param.encoder_{sub_layer}_adapter_gating"
        if kind == "large":
            output.adapter.gate = LargeGate(meta["d"], meta["gate_rank"], CPU)
            put_linear(output.adapter.gate.bottleneck.down, tensors, f"{name}_large_x_down")
            put_linear(output.adapter.gate.bottleneck.up, tensors, f"{name}_large_x_up")
        elif kind == "middleY":
            put(output.adapter.gate.offset, tensors[f"{name}_middle_ia3_add"])
        else:
            put_linear(output.adapter.gate.score, tensors, f"{name}_{'middle_xy_add' if kind == 'middleX' else 'small_xy_cat'}")
        output.adapter.gate.register_forward_hook(lambda _, __, given, gate=gate: seen.update({gate: given}))
    layer.self_attn_layer_norm.register_forward_hook(lambda _, __, given: seen.update(after_attention_norm=given))
    assert count(layer) == meta["pet_parameters_per_encoder_layer"][kind]
    seen["y"] = layer(tensors["x"], hidden_keys(tensors["key_mask"], tensors["x"].shape[1]))
    for name, value in seen.items():
        assert_agrees(value, tensors[f"{kind}.{name}"])


def hidden_keys(mask: Tensor, queries: int) -> Tensor:
    """(B, S), 1 where a key is real -> what an attention adds to its scores, (B, 1, T, S)."""
    return ((1 - mask.float()) * torch.finfo(torch.float32).min)[:, None, None, :].expand(-1, 1, queries, -1)


@needs_reference
def test_vl_pet_gives_the_recorded_values_of_the_decoder() -> None:
    tensors, meta = recorded("vl_pet")
    rank = len(tensors["decoder.param.attn_value_parallel_adapter.down_sampler.bias"])
    model = adapted("vl_pet_large", small_bart(meta["d"], meta["ffn"]), norms=False, r=rank)
    attention = model.decoder.layers[0].encoder_attn
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        put_linear(getattr(attention, name), tensors, f"decoder.param.{name}")
    put_linear(attention.v_proj.adapter.down, tensors, "decoder.param.attn_value_parallel_adapter.down_sampler")
    put_linear(attention.v_proj.adapter.up, tensors, "decoder.param.attn_value_parallel_adapter.up_sampler")
    hidden_states, states = tensors["decoder.hidden_states"], tensors["decoder.encoder_states"]
    assert_agrees(attention.v_proj(states), tensors["decoder.value"])
    mask = hidden_keys(tensors["decoder.key_mask"], hidden_states.shape[1])
    output, _ = attention(hidden_states, key_value_states=states, attention_mask=mask)
    assert_agrees(output, tensors["decoder.cross_attention_output"])


def small_bart(width: int, inner: int) -> BartModel:
    """One layer on each side, 4 heads, without dropout."""
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             {"layers": 1, "attention_heads": 4, "ffn_dim": inner}.items()}  # fmt: skip
    torch.manual_seed(0)
    return BartModel(BartConfig(vocab_size=50, d_model=width, max_position_embeddings=40, dropout=0, **sides))


# --------------------------------------------------------------------------------- against the formulas


def arrays(module: nn.Module) -> dict[str, ndarray]:
    """A module's parameters, which become random float64 numbers, by name."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=number).double() / 2
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def bottleneck(of: Mapping[str, ndarray], name: str, x: ndarray) -> ndarray:
    """U gelu_new(D x) with its biases."""
    z = x @ of[f"{name}.down.weight"].T + of[f"{name}.down.bias"]
    z = z / 2 * (1 + numpy.tanh(numpy.sqrt(2 / numpy.pi) * (z + 0.044715 * z**3)))
    return z @ of[f"{name}.up.weight"].T + of[f"{name}.up.bias"]


def sigmoid(x: ndarray) -> ndarray:
    return 1 / (1 + numpy.exp(-x))


def assert_equals(ours: Tensor, formula: ndarray) -> None:
    numpy.testing.assert_allclose(ours.detach().numpy(), formula, rtol=0, atol=1e-12)


def test_vl_adapter_equals_the_formula() -> None:
    adapter = Adapter([plain_bottleneck(D, 4, D, CPU)], None)
    of, h = arrays(adapter), normal(3, 5, D).double()
    assert_equals(adapter(h), h.numpy() + bottleneck(of, "bottlenecks.0", h.numpy()))


@pytest.mark.parametrize("weights", [full_weights, rank_one_weights])
@pytest.mark.parametrize(("n", "width", "width_out"), [(1, 6, 3), (2, 8, 4), (4, 8, 12), (3, 9, 27)])
def test_a_phm_layer_equals_the_sum_of_kronecker_products(n: int, width: int, width_out: int, weights: Callable) -> None:
    layer = PhmLinear(new_rule(n, CPU), weights(n, width, width_out, CPU))
    of, x = arrays(layer), normal(3, 5, width).double()
    w = of["weights.0"] if weights is full_weights else of["weights.0"] @ of["weights.1"]
    h = sum(numpy.kron(of["rule"][i], w[i]) for i in range(n))
    assert_equals(layer.matrix(), h)
    assert_equals(layer(x), x.numpy() @ h + of["bias"])


GATES = {
    LargeGate: ((D, 6, CPU), lambda of, x, h: sigmoid(bottleneck(of, "gate.bottleneck", x))),
    MiddleXGate: ((D, CPU), lambda of, x, h: sigmoid((x + h) @ of["gate.score.weight"].T + of["gate.score.bias"])),
    MiddleYGate: ((D, CPU), lambda of, x, h: 1 + of["gate.offset"]),
    SmallGate: (
        (D, CPU, None),
        lambda of, x, h: sigmoid(numpy.concatenate([x, h], -1) @ of["gate.score.weight"].T + of["gate.score.bias"]).mean(
            1, keepdims=True
        ),
    ),
}


@pytest.mark.parametrize("gate", GATES)
def test_vl_pet_equals_the_formula(gate: type[nn.Module]) -> None:
    arguments, formula = GATES[gate]
    layer = GatedBottleneck(plain_bottleneck(D, 4, D, CPU), gate(*arguments))
    of, h, x = arrays(layer), normal(3, 5, D, seed=1).double(), normal(3, 5, D, seed=2).double()
    adapted = h.numpy() + bottleneck(of, "bottleneck", h.numpy())
    assert_equals(layer(h, x), formula(of, x.numpy(), adapted) * adapted)


def test_how_they_start() -> None:
    """Weights from N(0, 0.02²), the rule from N(0, 0.01²), Glorot's bounds times √2, no biases."""
    torch.manual_seed(0)
    plain = plain_bottleneck(400, 100, 400, CPU)
    for layer in (plain.down, plain.up):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and not layer.bias.any()
    assert new_rule(20, CPU).std().item() == pytest.approx(0.01, rel=0.05)
    (whole,), (left, right) = full_weights(4, 400, 100, CPU), rank_one_weights(4, 400, 100, CPU)
    for matrices in (whole, left, right):
        bound = (2 * 6 / sum(matrices.shape[1:])) ** 0.5
        assert 0.9 * bound < matrices.abs().max() <= bound and not torch.equal(matrices[0], matrices[1])
    assert MiddleYGate(5000, CPU).offset.std().item() == pytest.approx(0.02, rel=0.05)


# ------------------------------------------------------------------------------------- places and sizes


def places(model: nn.Module) -> list[str]:
    return [name.removesuffix(".adapter") for name, _ in model.named_modules() if name.endswith(".adapter")]


@pytest.mark.parametrize("method", ["vl_adapter", "phm_adapter", "compacter", "hyperformer"])
def test_every_sub_layer_has_an_adapter(method: str) -> None:
    found = places(adapted(method, bart()))
    encoder = [f"model.encoder.layers.{n}.{part}" for n in range(2) for part in ("self_attn.out_proj", "fc2")]
    decoder = ("self_attn.out_proj", "encoder_attn.out_proj", "fc2")
    assert found == encoder + [f"model.decoder.layers.{n}.{part}" for n in range(2) for part in decoder]
    assert places(adapted(method, gpt2())) == [f"transformer.h.{n}.{part}.c_proj" for n in range(2) for part in ("attn", "mlp")]


@pytest.mark.parametrize("method", VL_PET)
def test_vl_pet_gates_the_encoder_and_adapts_the_values_of_the_cross_attention(method: str) -> None:
    model = adapted(method, bart())
    encoder = [f"model.encoder.layers.{n}.{part}" for n in range(2) for part in ("self_attn.out_proj", "fc2")]
    assert places(model) == encoder + [f"model.decoder.layers.{n}.encoder_attn.v_proj" for n in range(2)]
    norms = {name.rpartition(".")[0] for name in trained(model) if ".adapter." not in name}
    assert norms and all(name.startswith("model.encoder.") for name in norms)
    assert len(places(adapted(method, roberta()))) == 4


# SYSTEMS of bart-base: trainable parameters beside the visual embedding, layer norms included; of one place
VISUAL_EMBEDDING, ONE = 1_582_848, 148_320
BART_BASE = [
    ("vl_adapter", {}, 6_081_600, {"encoder.layers.0.fc2": ONE, "decoder.layers.5.encoder_attn.out_proj": ONE}),
    ("vl_adapter", {"sharing": "half_shared", "tasks": 4}, 12_786_240, {"encoder.layers.0.fc2": 73_824 + 4 * 74_496}),
    ("vl_adapter", {"sharing": "multiple", "tasks": 4}, 19_430_400, {"encoder.layers.0.fc2": 4 * ONE}),
    ("phm_adapter", {}, 3_870_240, {"decoder.layers.0.self_attn.out_proj": 74_608}),
    ("phm_adapter", {"sharing": "multiple", "tasks": 4}, 10_584_960, {}),
    ("vl_pet_large", {}, 6_052_416, {"encoder.layers.0.fc2": 2 * ONE, "decoder.layers.0.encoder_attn.v_proj": ONE}),
    ("vl_pet_middle_x", {}, 4_281_804, {"encoder.layers.0.fc2": ONE + 769}),
    ("vl_pet_middle_y", {}, 4_281_792, {"encoder.layers.0.self_attn.out_proj": ONE + 768}),
    ("vl_pet_small", {}, 4_291_020, {"encoder.layers.5.fc2": ONE + 1_537}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "expected", "of_places"), BART_BASE)
def test_parameter_counts_at_bart_base(method: str, options: dict[str, Any], expected: int, of_places: dict[str, int]) -> None:
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}.items()}  # fmt: skip
    with no_weights():
        model = BartModel(BartConfig(d_model=768, **sides))
    model = adapted(method, model, **options)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(places(model)) == (30 if method in ("vl_adapter", "phm_adapter") else 18)
    assert count(model) + VISUAL_EMBEDDING == expected
    assert {name: count(model.get_submodule(name).adapter) for name in of_places} == of_places


def test_widths_follow_the_model_or_are_given() -> None:
    for options, width in (({}, D // 8), ({"r": 6}, 6)):
        model = adapted("vl_adapter", roberta(), **options)
        assert model.encoder.layer[0].output.dense.adapter.bottlenecks[0].down.weight.shape == (width, D)


# ------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("method", ["vl_adapter", "phm_adapter", "compacter"])
@pytest.mark.parametrize("sharing", ["half_shared", "multiple"])
def test_a_batch_of_one_task_trains_the_adapters_of_this_task_alone(sharing: str, method: str) -> None:
    model = adapted(method, gpt2(), norms=False, sharing=sharing, tasks=3)
    model(**ids_of(model), task_id=torch.tensor([1, 1, 1])).logits.square().mean().backward()
    with_gradient = {name for name, parameter in trained(model).items() if parameter.grad is not None}
    of_task = {name for name in trained(model) if ".bottlenecks.1." in name}
    shared = {name for name in trained(model) if sharing == "half_shared" and ".down." in name or name.endswith(".rule")}
    assert of_task and of_task <= with_gradient <= of_task | shared
    assert shared <= with_gradient or method == "phm_adapter"  # where each task's up-projection has a rule of its own
    assert all(trained(model)[name].grad.any() for name in of_task)


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_each_example_of_a_mixed_batch_has_the_adapters_of_its_task(kind: str) -> None:
    model = moved(adapted("vl_adapter", TEXT_MODELS[kind](), sharing="multiple", tasks=3))
    batch, task_id = ids_of(model), torch.tensor([2, 0, 2])
    mixed = model(**batch, task_id=task_id)[0]
    for task in (0, 1, 2):
        alike = model(**batch, task_id=torch.full((3,), task))[0]
        for row in range(3):
            assert torch.allclose(mixed[row], alike[row], atol=1e-5) == (task_id[row] == task)


@pytest.mark.parametrize("base", [gpt2, bart])
def test_beams_have_the_task_of_their_example(base: Callable[[], nn.Module]) -> None:
    model = moved(adapted("vl_adapter", base(), sharing="half_shared", tasks=3))
    ids, task_id = ids_of(model)["input_ids"], torch.tensor([2, 0, 1])
    search = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 49, "eos_token_id": None}
    together = model.generate(ids, task_id=task_id, **search)
    for row in range(3):
        assert torch.equal(model.generate(ids[row : row + 1], task_id=task_id[row : row + 1], **search)[0], together[row])


def test_wrong_tasks_are_errors() -> None:
    with pytest.raises(RoutevlError, match="tasks is 2, but with sharing=single all have the same adapters"):
        new_method("vl_adapter", {"tasks": 2}, "test")
    model = adapted("vl_adapter", gpt2(), sharing="multiple", tasks=3)
    for task_id, message in [
        (None, "reads task_id, but the call has none"),
        (torch.tensor([0, 3, 1]), "task_id has a 3, but the model knows the tasks 0 to 2"),
        (torch.tensor([0, -1, 1]), "task_id has a -1"),
        (torch.tensor([0.0, 1.0, 1.0]), r"task_id must be \(batch,\) int64, not \(3,\) torch.float32"),
        (torch.tensor([[0], [1], [1]]), r"task_id must be \(batch,\) int64, not \(3, 1\)"),
        (torch.tensor([0, 1]), "task_id has batch size 2 but the text has 3"),
    ]:
        with pytest.raises(RoutevlError, match=message):
            model(**ids_of(model), task_id=task_id)


# ------------------------------------------------------------------------------- HyperFormer's generator


@pytest.mark.parametrize("base", [roberta, bart, partial(t5, 2)])
def test_layers_of_a_stack_and_places_of_a_kind_have_what_generates_in_common(base: Callable[[], nn.Module]) -> None:
    model = adapted("hyperformer", base(), tasks=2)
    generated = {name: module for name, module in model.named_modules() if isinstance(module, Generated)}
    by_place: dict[str, list[Generated]] = {}
    for name, module in generated.items():
        place = re.sub(r"\.[01](.*)\.adapter\.bottlenecks\.[01]\.", r"\1.", name, count=1)
        by_place.setdefault(place, []).append(module)
    decoder = model.config.is_encoder_decoder
    assert len(by_place) == (10 if decoder else 4) and {len(modules) for modules in by_place.values()} == {2 * 2}
    for modules in by_place.values():
        assert len({id(module.head) for module in modules}) == len({id(module.code) for module in modules}) == 1
        assert sorted((module.task, module.layer) for module in modules) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({id(module.head) for module in generated.values()}) == len(by_place)
    codes = {id(module.code): module.code for module in generated.values()}.values()
    assert len(codes) == 1 + decoder and len({id(code.tasks) for code in codes}) == 1


def test_a_generated_adapter_is_that_of_its_task_and_layer() -> None:
    code, head = Code(task_vectors(2, CPU), 3, CPU), Head(6, 4, CPU)
    of, x = arrays(nn.ModuleDict({"code": code, "head": head})), normal(2, 5, 6).double()
    for task in range(2):
        for layer in range(3):
            z = numpy.concatenate([of[f"code.tasks.{task}"], of["code.layers"][layer]])
            z = numpy.maximum(z @ of["code.network.0.weight"].T + of["code.network.0.bias"], 0)
            z = z @ of["code.network.2.weight"].T + of["code.network.2.bias"]
            z = (z - z.mean()) / numpy.sqrt(z.var() + 1e-6) * of["code.network.3.weight"] + of["code.network.3.bias"]
            weight, bias = (of[f"head.{part}.weight"] @ z + of[f"head.{part}.bias"] for part in ("weight", "bias"))
            assert_equals(Generated(code, head, task, layer)(x), x.numpy() @ weight.reshape(4, 6).T + bias)
    assert [t.std().item() for t in task_vectors(2, CPU)] == pytest.approx([1, 1], abs=0.1)


# ------------------------------------------------------------------------------------- Compacter's rule


def test_the_rule_of_compacter_is_one_tensor_also_after_copying_and_saving(tmp_path: Path) -> None:
    method = new_method("compacter", {}, "test")
    model = moved(method.build(bart().requires_grad_(False), {}, []))
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        rules = {id(module.rule) for module in one.modules() if isinstance(module, PhmLinear)}
        assert len(rules) == 1 and len([name for name in trained(one) if name.endswith(".rule")]) == 1
    method.save(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as saved:
        assert len([name for name in saved.keys() if name.endswith(".rule")]) == 1  # noqa: SIM118 (no mapping)
    other = method.build(bart().requires_grad_(False), {}, [])
    method.load(other, tmp_path)
    last = [module for module in other.modules() if isinstance(module, PhmLinear)][-1]
    assert torch.equal(last.rule, next(tensor for name, tensor in trained(model).items() if name.endswith(".rule")))


@pytest.mark.parametrize(("method", "options"), [("compacter", {"r": 6}), ("phm_adapter", {"n": 3}), ("phm_adapter", {"r": 3})])
def test_widths_that_cannot_be_divided_are_errors(method: str, options: dict[str, int]) -> None:
    with pytest.raises(RoutevlError, match=r"n is \d, which does not divide the width \d+: set another n or r"):
        adapted(method, roberta(), **options)


# ------------------------------------------------------------------------------------- VL-PET's gates

# the sub-layers of one layer: the module that gives the output, one that reads x, and one that reads x + the gated output
SUB_LAYERS = {
    "roberta": [
        ("encoder.layer.1.attention.output.dense", "encoder.layer.1", "encoder.layer.1.attention.output.LayerNorm"),
        ("encoder.layer.1.output.dense", "encoder.layer.1.intermediate", "encoder.layer.1.output.LayerNorm"),
    ],
    "gpt2": [
        ("transformer.h.0.attn.c_proj", "transformer.h.0", "transformer.h.0.ln_2"),
        ("transformer.h.0.mlp.c_proj", "transformer.h.0.ln_2", "transformer.h.1"),
    ],
    "bart": [
        ("model.encoder.layers.1.self_attn.out_proj", "model.encoder.layers.1", "model.encoder.layers.1.self_attn_layer_norm"),
        ("model.encoder.layers.1.fc2", "model.encoder.layers.1.fc1", "model.encoder.layers.1.final_layer_norm"),
    ],
}


@pytest.mark.parametrize("kind", SUB_LAYERS)
def test_a_gate_reads_the_input_of_its_sub_layer_and_multiplies_all_that_is_added_to_it(kind: str) -> None:
    model = moved(adapted("vl_pet_large", TEXT_MODELS[kind]()))
    read: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]} if args else {}))
    model(**ids_of(model))
    for output, reads_input, reads_sum in SUB_LAYERS[kind]:
        module, x = model.get_submodule(output), read[reads_input]
        frozen = module.forward(read[output])  # without hooks
        torch.testing.assert_close(read[reads_sum], x + module.adapter(frozen, x))


def test_what_a_sub_layers_output_is_added_to_is_found_in_any_model() -> None:
    sizes = {"vocab_size": 50, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=64, **sizes))
    bloom = BloomForCausalLM(BloomConfig(**sizes))  # whose first norm reads what is normalised already
    opt = OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=D, max_position_embeddings=40, **sizes))  # flattens positions
    assert structure_of(llama).sub_layer_inputs == {
        "model.layers.0.self_attn.o_proj": "model.layers.0.input_layernorm",
        "model.layers.0.mlp.down_proj": "model.layers.0.post_attention_layernorm",
    }
    assert structure_of(bloom).sub_layer_inputs == {
        "transformer.h.0.self_attention.dense": "transformer.h.0.input_layernorm",
        "transformer.h.0.mlp.dense_4h_to_h": "transformer.h.0.post_attention_layernorm",
    }
    assert structure_of(opt).sub_layer_inputs == {
        "model.decoder.layers.0.self_attn.out_proj": "model.decoder.layers.0.self_attn_layer_norm",
        "model.decoder.layers.0.fc2": "model.decoder.layers.0.final_layer_norm",
    }
    assert structure_of(t5()).sub_layer_inputs == {
        "encoder.block.0.layer.0.SelfAttention.o": "encoder.block.0.layer.0.layer_norm",
        "encoder.block.0.layer.1.DenseReluDense.wo": "encoder.block.0.layer.1.layer_norm",
        "decoder.block.0.layer.0.SelfAttention.o": "decoder.block.0.layer.0.layer_norm",
        "decoder.block.0.layer.1.EncDecAttention.o": "decoder.block.0.layer.1.layer_norm",
        "decoder.block.0.layer.2.DenseReluDense.wo": "decoder.block.0.layer.2.layer_norm",
    }
    assert structure_of(t5()).cross_attention_values == ("decoder.block.0.layer.1.EncDecAttention.v",)
    for text_model in (llama, bloom, opt, t5()):
        before = text_model.eval()(**ids_of(text_model)).logits
        model = moved(adapted("vl_pet_large", text_model))
        assert not torch.allclose(model(**ids_of(model)).logits, before, atol=1e-3)


@pytest.mark.parametrize("base", [roberta, bart])
def test_padding_moves_the_small_gate_only_in_the_original(base: Callable[[], nn.Module]) -> None:
    """The same text alone, and padded beside a longer one."""
    for masked_mean in (True, False):
        model = moved(adapted("vl_pet_small", base(), masked_mean=masked_mean))
        text = ids_of(model)["input_ids"]
        decoder = {"decoder_input_ids": text} if model.config.is_encoder_decoder else {}
        padded = torch.cat([text, torch.ones(3, 4, dtype=torch.int64)], dim=1)
        outputs = []
        for ids in (text, padded):
            mask = (torch.arange(ids.shape[1]) < text.shape[1]).long().expand(ids.shape)
            beside = {"token_mask": mask} if masked_mean else {}
            outputs.append(model(input_ids=ids, attention_mask=mask, **decoder, **beside)[0][:, : text.shape[1]])
        assert torch.allclose(*outputs, atol=1e-5) == masked_mean


def test_threads_that_share_a_model_do_not_share_the_input_of_a_sub_layer() -> None:
    """Each waits, with the first sub-layer's input noted, until the other is there too."""
    model = moved(adapted("vl_pet_large", roberta()))
    texts = [torch.full((1, 6), number) for number in (7, 30)]
    expected = [model(input_ids=ids)[0] for ids in texts]
    barrier = threading.Barrier(2, timeout=30)

    def wait(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        barrier.wait()

    model.encoder.layer[0].attention.output.dense.register_forward_pre_hook(wait)
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: model(input_ids=texts[n])[0]})) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in (0, 1))


def test_models_that_vl_pet_cannot_gate_are_refused() -> None:
    sizes = {"vocab_size": 50, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    parallel = GPTNeoXForCausalLM(GPTNeoXConfig(use_parallel_residual=True, **sizes))
    with pytest.raises(RoutevlError, match="attention.dense: what its output is added to, .* is not found in this model"):
        adapted("vl_pet_large", parallel)
    with pytest.raises(RoutevlError, match="VL-PET small refuses LlamaForCausalLM: .* would see those that it is to predict"):
        adapted("vl_pet_small", LlamaForCausalLM(LlamaConfig(**sizes)))


# ------------------------------------------------------------------------------------- what they share


@pytest.mark.parametrize("method", OWN)
def test_the_frozen_model_is_left_as_it_was_beneath_the_adapters(method: str) -> None:
    """Its parameters keep their names and values; without what was put in, it gives the same bits."""
    torch.manual_seed(0)
    base = bart().eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    options = {"masked_mean": False} if method == "vl_pet_small" else {}
    expected = base(**ids_of(base)).logits
    model = moved(adapted(method, base, norms=False, **options))
    assert not torch.allclose(model(**ids_of(model)).logits, expected, atol=1e-3)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    for module in model.modules():
        module._forward_hooks.clear()
    assert torch.equal(model(**ids_of(model)).logits, expected)


@pytest.mark.parametrize("method", OWN)
def test_a_copied_or_pickled_model_has_adapters_of_its_own(method: str) -> None:
    options = {"masked_mean": False} if method == "vl_pet_small" else {}
    model = moved(adapted(method, roberta(), **options))
    expected = model(**ids_of(model))[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**ids_of(model))[0], expected)
        moved(other)
        assert not torch.allclose(other(**ids_of(model))[0], expected)
        assert torch.equal(model(**ids_of(model))[0], expected)


@pytest.mark.parametrize("method", OWN)
def test_a_model_whose_parts_are_not_found_is_refused_without_advice_that_does_not_help(method: str) -> None:
    mixing = FNetModel(FNetConfig(vocab_size=50, hidden_size=D, num_hidden_layers=1, intermediate_size=64))
    with pytest.raises(RoutevlError, match="FNetModel has no attention") as refused:
        adapted(method, mixing)
    assert "target_modules" not in str(refused.value)
