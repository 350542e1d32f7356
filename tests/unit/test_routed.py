"""The routed methods as peft sees them: formulas, several adapters, errors, the paper's parameter counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BartConfig, BartModel, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel
from transformers.pytorch_utils import Conv1D

from routevl.conditioning import Call
from routevl.errors import RoutevlError
from routevl.methods import RoutedAdapterConfig, RoutedLoraConfig
from routevl.routing import ROUTING, routing_function

B, L, D = 3, 6, 32


class PlainModel(nn.Module):
    """A model that transformers has never heard of: embedding, one Linear, one Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, D)
        self.first = nn.Linear(D, D)
        self.second = Conv1D(D, D)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.second(torch.tanh(self.first(self.embedding(input_ids)))),)


def roberta() -> nn.Module:
    config = RobertaConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, pad_token_id=0
    )
    return RobertaModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=D, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=49))


def bart() -> nn.Module:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartModel(BartConfig(vocab_size=50, d_model=D, encoder_ffn_dim=D, decoder_ffn_dim=D, **layers))


METHODS = {"lora": RoutedLoraConfig, "adapter": RoutedAdapterConfig}
MODELS = {"roberta": roberta, "gpt2": gpt2, "bart": bart, "plain": PlainModel}
TARGETS = {"plain": ["first", "second"]}  # for the others the method's own
EVERY = [(method, model) for method in METHODS for model in MODELS]


def build(method: str, model: str, routing: str = "attn", seed: int = 0, **options) -> PeftModel:
    """A small model with an adapter whose up-projections are not zero, in evaluation mode."""
    torch.manual_seed(seed)
    base = MODELS[model]()
    config = METHODS[method](r=4, routing=routing, target_modules=TARGETS.get(model), **options)
    adapted = get_peft_model(base, config).eval()
    shake(adapted, seed)
    return adapted


def shake(model: nn.Module, seed: int, adapter: str = "default") -> None:
    """Give an adapter's up-projections, which start at zero, random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}." in name or f"adapter_up.{adapter}." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def inputs(seed: int = 0, batch: int = B, visual_tokens: int = 1, width: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 48, (batch, L), generator=generator), torch.randn(batch, visual_tokens, width, generator=generator)


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("visual_tokens", [1, 5])
@pytest.mark.parametrize("routing", ROUTING)
def test_lora_layer_equals_the_formula(routing: str, visual_tokens: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(D, 24).double()
    model = nn.Sequential(layer)
    adapted = get_peft_model(model, RoutedLoraConfig(r=4, lora_alpha=6, routing=routing, target_modules=["0"])).double()
    shake(adapted, 1)
    x_h, x_r = torch.randn(B, L, D).double(), torch.randn(B, visual_tokens, D).double()
    down = adapted.base_model.model[0].lora_A["default"].weight.T
    up = adapted.base_model.model[0].lora_B["default"].weight.T
    route = routing_function(routing) or (lambda x_t, x_v, mask: x_t)
    expected = x_h @ layer.weight.T + layer.bias + 6 / 4 * route(x_h @ down, x_r @ down, None) @ up
    torch.testing.assert_close(adapted(x_h, visual_features=x_r), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("visual_tokens", [1, 5])
@pytest.mark.parametrize("routing", ROUTING)
def test_adapter_layer_equals_the_formula(routing: str, visual_tokens: int, residual: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, D).double()
    config = RoutedAdapterConfig(r=4, routing=routing, target_modules=["0"], residual=residual, activation="gelu")
    adapted = get_peft_model(nn.Sequential(layer), config).double()
    shake(adapted, 1)
    x, x_r = torch.randn(B, L, 24).double(), torch.randn(B, visual_tokens, D).double()
    wrapped = adapted.base_model.model[0]
    down, up = wrapped.adapter_down["default"], wrapped.adapter_up["default"]
    x_h = x @ layer.weight.T + layer.bias
    route = routing_function(routing) or (lambda x_t, x_v, mask: x_t)
    x_t, x_v = x_h @ down.weight.T + down.bias, x_r @ down.weight.T + down.bias
    expected = nn.functional.gelu(route(x_t, x_v, None)) @ up.weight.T + up.bias + (x_h if residual else 0)
    torch.testing.assert_close(adapted(x, visual_features=x_r), expected, rtol=0, atol=1e-6)


def test_lora_without_routing_is_peft_lora() -> None:
    model = build("lora", "roberta", routing="none", lora_alpha=6)
    torch.manual_seed(0)
    reference = get_peft_model(roberta(), peft.LoraConfig(r=4, lora_alpha=6)).eval()
    ours = {name: p for name, p in model.named_parameters() if "lora_" in name}
    theirs = {name: p for name, p in reference.named_parameters() if "lora_" in name}
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    input_ids, _ = inputs()
    torch.testing.assert_close(model(input_ids)[0], reference(input_ids)[0])


def test_gpt2_query_and_value_have_bottlenecks_of_their_own() -> None:
    """Changing the query's bottleneck changes the query alone, although c_attn is one module; the key is never adapted."""
    model = build("lora", "gpt2")
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape == (8, D) and up.shape == (2 * D, 4)  # two bottlenecks of rank 4; two outputs of width D
    x, (_, features) = torch.randn(B, L, D), inputs()
    conditioning = model.base_model.conditioning
    call = Call(conditioning.prepare({"visual_features": features}))
    before = conditioning.run_with(call, layer, x).chunk(3, -1)
    frozen = layer.base_layer(x).chunk(3, -1)
    with torch.no_grad():
        down[:4] += 1.0  # the query's bottleneck
    after = conditioning.run_with(call, layer, x).chunk(3, -1)
    assert torch.equal(before[1], frozen[1]) and torch.equal(after[1], frozen[1])
    assert not torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    x_t, x_v = x @ down[4:].T, features @ down[4:].T
    expected = frozen[2] + 8 / 4 * ((x_t @ x_v.transpose(1, 2)) @ x_v) @ up[D:].T
    torch.testing.assert_close(after[2], expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------- every method and model


@pytest.mark.parametrize(("method", "model"), EVERY)
def test_starts_as_the_base_model(method: str, model: str) -> None:
    torch.manual_seed(0)
    base = MODELS[model]().eval()
    input_ids, features = inputs()
    expected = base(input_ids)[0]
    adapted = get_peft_model(base, METHODS[method](r=4, routing="mul", target_modules=TARGETS.get(model))).eval()
    assert torch.equal(adapted(input_ids, visual_features=features)[0], expected)


RELOAD = """
import sys, torch
sys.path.insert(0, {tests!r})
from peft import PeftModel
import test_routed as t
torch.manual_seed(0)
model = PeftModel.from_pretrained(t.MODELS[{model!r}](), {folder!r}).eval()
ids, features = t.inputs()
torch.save(model(ids, visual_features=features)[0], {output!r})
"""


@pytest.mark.parametrize(("method", "model"), [("lora", "gpt2"), ("adapter", "roberta")])
def test_reloads_to_the_same_bits_in_a_new_process(method: str, model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = MODELS[model]()
    adapted = get_peft_model(base, METHODS[method](r=4, routing="mul", visual_scale="tanh")).eval()
    shake(adapted, 3)
    adapted.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin"))
    record = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert record["peft_type"] == METHODS[method].PEFT_TYPE and record["visual_scale"] == "tanh"
    output = str(tmp_path / "output.pt")
    script = RELOAD.format(tests=str(Path(__file__).parent), model=model, folder=str(tmp_path / "saved"), output=output)
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)
    input_ids, features = inputs()
    assert torch.equal(torch.load(output, weights_only=True), adapted(input_ids, visual_features=features)[0])


@pytest.mark.parametrize(("method", "model"), EVERY)
def test_reloads_and_refuses_another_models_adapter(method: str, model: str, tmp_path: Path) -> None:
    adapted = build(method, model, "mul", seed=5)
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(5)
    again = PeftModel.from_pretrained(MODELS[model](), tmp_path).eval()
    input_ids, features = inputs()
    assert torch.equal(again(input_ids, visual_features=features)[0], adapted(input_ids, visual_features=features)[0])
    assert trainable(again) == 0
    broken = json.loads((tmp_path / "adapter_config.json").read_text()) | {"r": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(broken))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(MODELS[model](), tmp_path)


@pytest.mark.parametrize(("method", "model"), EVERY)
def test_several_adapters(method: str, model: str) -> None:
    adapted = build(method, model, "mul")
    input_ids, features = inputs()
    first = adapted(input_ids, visual_features=features)[0]
    adapted.add_adapter("other", METHODS[method](r=2, routing="none", target_modules=TARGETS.get(model)))
    shake(adapted, 0, "other")
    assert torch.equal(adapted(input_ids, visual_features=features)[0], first)
    adapted.set_adapter("other")
    second = adapted(input_ids)[0]  # `none` needs no features, although the idle adapter does
    assert not torch.equal(first, second)
    adapted.set_adapter("default")
    assert torch.equal(adapted(input_ids, visual_features=features)[0], first)
    adapted.delete_adapter("other")
    assert torch.equal(adapted(input_ids, visual_features=features)[0], first)


@pytest.mark.parametrize(("method", "model"), EVERY)
def test_disable_and_unload_give_the_base_model_back(method: str, model: str) -> None:
    torch.manual_seed(0)
    base = MODELS[model]().eval()
    input_ids, features = inputs()
    expected = base(input_ids)[0]
    adapted = build(method, model)
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids)[0], expected)
        assert torch.equal(adapted(input_ids, visual_features=features)[0], expected)
    assert not torch.equal(adapted(input_ids, visual_features=features)[0], expected)
    with pytest.raises(RoutevlError, match="cannot be merged"):
        adapted.merge_and_unload()
    unloaded = adapted.unload()
    assert torch.equal(unloaded(input_ids)[0], expected)
    assert not unloaded._forward_pre_hooks and not unloaded._forward_hooks and "generate" not in vars(unloaded)


@pytest.mark.parametrize("method", METHODS)
def test_beam_search_with_cache_equals_beam_search_without(method: str) -> None:
    for routing in ROUTING:
        adapted = build(method, "gpt2", routing)
        input_ids, features = inputs()
        options = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False, "pad_token_id": 49}
        options["attention_mask"] = torch.ones_like(input_ids)
        cached = adapted.generate(input_ids=input_ids, visual_features=features, **options)
        plain = adapted.generate(input_ids=input_ids, visual_features=features, use_cache=False, **options)
        assert torch.equal(cached, plain)
        options["attention_mask"] = options["attention_mask"][1:2]
        alone = adapted.generate(input_ids=input_ids[1:2], visual_features=features[1:2], **options)[0]
        together = cached[1]
        length = min(len(alone), len(together))  # the longer one ends in padding
        assert torch.equal(alone[:length], together[:length])
        if routing != "none":
            with pytest.raises(RoutevlError, match="the call has none"):
                adapted.generate(input_ids=input_ids, **options | {"attention_mask": torch.ones_like(input_ids)})


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("method", "model"), EVERY)
def test_missing_or_wrong_features_are_clear_errors(method: str, model: str) -> None:
    adapted = build(method, model)
    input_ids, features = inputs()
    adapted(input_ids, visual_features=features)
    cases = [
        (None, "the call has none: pass visual_features"),  # and never the last batch's
        (features[:, :, :-1], f"width {D - 1} but adapter 'default' expects {D}: set visual_width"),
        (features[:2], f"batch size 2 but the text has {B}"),
        (features.repeat(2, 1, 1), f"batch size {2 * B} but the text has {B}"),
        (features[0], r"must have the shape \(batch, L_v, d\), not \(1, 32\)"),
    ]
    for wrong, message in cases:
        with pytest.raises(RoutevlError, match=message):
            adapted(input_ids, visual_features=wrong)
    with pytest.raises(RoutevlError, match="visual_mask must have the shape"):
        adapted(input_ids, visual_features=features, visual_mask=torch.ones(B, 3, dtype=torch.bool))


@pytest.mark.parametrize(("method", "model"), EVERY)
def test_features_of_another_width_get_one_trainable_projection(method: str, model: str, tmp_path: Path) -> None:
    adapted = build(method, model, "mul", visual_width=20)
    assert trainable(adapted) == trainable(build(method, model, "mul")) + 20 * D + D
    input_ids, features = inputs(width=20)
    output = adapted(input_ids, visual_features=features)[0]
    output.square().mean().backward()
    projection = adapted.base_model.visual_projection["default"].weight
    assert projection.grad.any()
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(MODELS[model](), tmp_path).eval()
    assert torch.equal(again(input_ids, visual_features=features)[0], output)
    with pytest.raises(RoutevlError, match=f"width {D} but adapter 'default' expects 20"):
        adapted(input_ids, visual_features=inputs()[1])


@pytest.mark.parametrize("method", METHODS)
def test_wrong_configurations(method: str) -> None:
    config = METHODS[method]
    for options, message in [
        ({"r": 0}, "r is 0, expected 1 or more"),
        ({"r": -2}, "r is -2, expected 1 or more"),
        ({"routing": "mull"}, "routing is 'mull', expected one of none, mul"),
        ({"visual_scale": "big"}, "visual_scale is 'big', expected one of none, tanh, layer_norm"),
        ({"visual_width": 0}, "visual_width must be a positive integer"),
    ]:
        with pytest.raises(RoutevlError, match=message):
            config(**options)
    with pytest.raises(TypeError, match="use_dora"):
        config(use_dora=True)
    with pytest.raises(RoutevlError, match="target module embedding is a Embedding"):
        get_peft_model(PlainModel(), config(target_modules=["embedding"], routing="mul"))
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(PlainModel(), config(target_modules=["third"]))


def test_modules_of_different_widths_cannot_route_the_same_features() -> None:
    with pytest.raises(RoutevlError, match="works on width 64 but others on 32"):
        get_peft_model(roberta(), RoutedLoraConfig(r=4, routing="mul", target_modules=["query", "output.dense"]))


def test_an_unregistered_method_does_not_load_as_plain_lora(tmp_path: Path) -> None:
    build("lora", "roberta").save_pretrained(tmp_path)
    script = (
        "from peft import PeftConfig\n"
        f"try: PeftConfig.from_pretrained({str(tmp_path)!r})\n"
        "except Exception as error: print('refused:', error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "refused: " in result.stdout and "ROUTED_LORA" in result.stdout


# --------------------------------------------------------------------------------- the paper's models


@pytest.mark.parametrize(
    ("method", "model", "rank", "layers", "expected"),
    [  # METHOD, section 3, in millions: counted from the official code, with q/v biases that are frozen here
        ("lora", "gpt2", 128, (12, 768), 4.78),
        ("lora", "gpt2", 128, (24, 1024), 12.75),
        ("adapter", "roberta", 64, (12, 768), 2.42),
        ("adapter", "roberta", 64, (24, 1024), 6.44),
        ("lora", "roberta", 128, (12, 768), 4.77),
        ("lora", "roberta", 128, (24, 1024), 12.73),
    ],
)
def test_parameter_counts_at_paper_size(method: str, model: str, rank: int, layers: tuple[int, int], expected: float) -> None:
    n, d = layers
    with init_empty_weights(include_buffers=False):
        if model == "gpt2":
            base = GPT2LMHeadModel(GPT2Config(n_embd=d, n_layer=n, n_head=d // 64))
            norms = ["ln_1", "ln_2", "ln_f"]
        else:
            sizes = {"hidden_size": d, "num_hidden_layers": n, "num_attention_heads": d // 64, "intermediate_size": 4 * d}
            base, norms = RobertaModel(RobertaConfig(vocab_size=50265, **sizes), add_pooling_layer=False), ["LayerNorm"]
    adapted = get_peft_model(base, METHODS[method](r=rank, routing="attn", modules_to_save=norms))
    biases = {"roberta": 2, "gpt2": 3}[model]  # GPT-2's query, key and value share one
    frozen_biases = biases * n * d if method == "lora" else 0
    assert (trainable(adapted) + frozen_biases) / 1e6 == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("routing", ["none", "mul"])
@pytest.mark.parametrize(
    ("method", "model"), [("lora", "roberta"), ("adapter", "roberta"), ("lora", "plain"), ("adapter", "gpt2")]
)
def test_each_example_has_the_adapter_of_its_task(method: str, model: str, routing: str) -> None:
    """As an adapter of one task does that has its tensors, for text and image alike."""
    several = build(method, model, routing, tasks=3)
    for name, parameter in several.named_parameters():
        if ".of_tasks." in name:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    ids, features = torch.randint(1, 50, (B, L)), torch.randn(B, 2, D)
    images = {} if routing == "none" else {"visual_features": features}
    task_id = torch.tensor([2, 0, 2])
    mixed = several(ids, **images, task_id=task_id)[0]
    for task in (0, 2):
        alone = build(method, model, routing)
        of_task = {name.replace(f".of_tasks.{task}.", "."): parameter for name, parameter in several.named_parameters()}
        for name, parameter in alone.named_parameters():
            parameter.data = of_task[name].data
        own = task_id == task
        torch.testing.assert_close(mixed[own], alone(ids, **images)[0][own])
        assert not torch.allclose(mixed[~own], alone(ids, **images)[0][~own], atol=1e-3)


def test_wrong_tasks_of_a_routed_adapter_are_errors() -> None:
    several, one = build("lora", "roberta", "none", tasks=2), build("lora", "roberta", "none")
    ids = torch.randint(1, 50, (B, L))
    for model, task_id, message in [
        (several, None, "reads task_id, but the call has none"),
        (several, torch.tensor([0, 2, 1]), "task_id has a 2, but the model knows the tasks 0 to 1"),
        (several, torch.tensor([0, 1]), "task_id has batch size 2 but the text has 3"),
        (one, torch.tensor([0, 1, 0]), "task_id has a 1, but the model knows the tasks 0 to 0"),
    ]:
        with pytest.raises(RoutevlError, match=message):
            model(ids, task_id=task_id)
