"""What peft and transformers offer on an adapted model: done right by the routed methods, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import B, D, L, gpt2, roberta
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from routevl.conditioning import Call
from routevl.errors import RoutevlError
from routevl.methods import RoutedAdapterConfig, RoutedLoraConfig

CONFIGS = [RoutedLoraConfig, RoutedAdapterConfig]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with its adapters' tensors moved, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_B", "adapter_up", "visual_projection")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(config: type, base: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return shaken(get_peft_model(base or gpt2(), config(**{"r": 4, "routing": "mul", **options})))


def fresh(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return gpt2()


def inputs(width: int = D, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 48, (B, L), generator=generator)
    return {"input_ids": ids, "visual_features": torch.randn(B, 2, width, generator=generator)}


# --------------------------------------------------------------------------- the table of what is refused


def mixed_load(model: PeftModel, config: type, folder: Path) -> None:
    model.save_pretrained(folder)
    PeftMixedModel.from_pretrained(gpt2(), folder)


def swap(model: PeftModel, config: type, folder: Path) -> None:
    model.save_pretrained(folder)
    hotswap_adapter(model, str(folder), "default")


def other_load(model: PeftModel, config: type, folder: Path) -> None:
    get_peft_model(gpt2(), LoraConfig(r=4)).save_pretrained(folder)
    model.load_adapter(folder, "other")


def rescale(model: PeftModel, config: type, folder: Path) -> None:
    with rescale_adapter_scale(model, 0.5):
        pass


def transformers_load(model: PeftModel, config: type, folder: Path) -> None:
    model.save_pretrained(folder)
    gpt2().load_adapter(str(folder))


# what is asked for -> the question, and what the refusal names
REFUSED = {
    "adapter_names": (lambda m, c, f: m(**inputs(), adapter_names=["default", "__base__", "default"]), "adapter_names"),
    "adapter_names in generate": (
        lambda m, c, f: m.generate(**inputs(), adapter_names=["default"] * B, max_new_tokens=2),
        "adapter_names",
    ),
    "alora_offsets": (lambda m, c, f: m(**inputs(), alora_offsets=[1] * B), "alora_offsets"),
    "hotswap_adapter": (swap, "TYPE|Hotswapping"),
    "mixed=True": (lambda m, c, f: get_peft_model(gpt2(), c(r=4), mixed=True), "TYPE"),
    "PeftMixedModel.from_pretrained": (mixed_load, "TYPE"),
    "add_adapter of another type": (lambda m, c, f: m.add_adapter("other", LoraConfig(r=4)), "TYPE"),
    "load_adapter of another type": (other_load, "TYPE"),
    "add_weighted_adapter": (lambda m, c, f: m.add_weighted_adapter(["default"], [1.0], "sum"), "add_weighted_adapter.*routed"),
    "subtract_mutated_init": (lambda m, c, f: m.subtract_mutated_init({}, "default"), "subtract_mutated_init.*routed"),
    "merge_adapter": (lambda m, c, f: m.merge_adapter(), "TYPE.*merge_adapter"),
    "unmerge_adapter": (lambda m, c, f: m.unmerge_adapter(), "TYPE.*unmerge_adapter"),
    "merge_and_unload": (lambda m, c, f: m.merge_and_unload(), "TYPE.*merge_and_unload"),
    "save_pretrained by an initial model": (
        lambda m, c, f: m.save_pretrained(f, path_initial_model_for_weight_conversion=str(f / "start")),
        "path_initial_model_for_weight_conversion.*Routed",
    ),
    "inject_adapter_in_model": (lambda m, c, f: inject_adapter_in_model(c(r=4), gpt2()), "inject_adapter_in_model.*TYPE"),
    "transformers' add_adapter": (lambda m, c, f: gpt2().add_adapter(c(r=4)), "TYPE"),
    "transformers' load_adapter": (transformers_load, "TYPE"),
    "rescale_adapter_scale": (rescale, "[Ll]ora"),
    "convert_to_lora": (lambda m, c, f: convert_to_lora(m, rank=2), "LoRA"),
    "rank_pattern": (lambda m, c, f: c(rank_pattern={"c_attn": 2}), "rank_pattern"),
    "target_parameters": (lambda m, c, f: c(target_parameters=["c_attn.weight"]), "target_parameters"),
    "trainable_token_indices": (lambda m, c, f: c(trainable_token_indices=[1]), "trainable_token_indices"),
    "layer_replication": (lambda m, c, f: c(layer_replication=[(0, 1)]), "layer_replication"),
}


@every_config
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("question", REFUSED)
def test_h01_h33_what_is_not_possible_is_refused_by_name(
    config: type, task_type: str | None, question: str, tmp_path: Path
) -> None:
    model = adapted(config, task_type=task_type)
    before = model(**inputs()).logits
    ask, named = REFUSED[question]
    refusals, named = (ValueError, NotImplementedError, AttributeError, TypeError), named.replace("TYPE", config.PEFT_TYPE.value)
    with pytest.raises(refusals, match=f"(?s){named}"):
        ask(model, config, tmp_path)
    assert torch.equal(model(**inputs()).logits, before)


# ----------------------------------------------------------------------------------- what is possible


@every_config
def test_h33_status_names_the_method(config: type, tmp_path: Path) -> None:
    model = adapted(config)
    model.add_adapter("other", config(r=2))
    status, name = get_model_status(model), config.PEFT_TYPE.value
    assert status.peft_types == {"default": name, "other": name} and type(name) is str
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.available_adapters == ["default", "other"] and status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.requires_grad == {"default": True, "other": False}
    assert {layer.module_type for layer in model.get_layer_status()} == {model.base_model.tuner_layer_cls.__name__}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert record["peft_type"] == name == PeftConfig.from_pretrained(tmp_path).peft_type
    assert config(r=4).to_dict()["peft_type"] == name and {name: 1}[config.PEFT_TYPE] == 1


@every_config
def test_h33_set_requires_grad_deleting_and_loading_beside_leave_trainability_right(config: type, tmp_path: Path) -> None:
    """The visual projection is on no layer, and follows the layers."""
    model = adapted(config, visual_width=20)
    model.save_pretrained(tmp_path)

    def trained(adapter: str) -> set[bool]:
        return {p.requires_grad for n, p in model.named_parameters() if f".{adapter}." in n}

    assert trained("default") == {True}
    model.load_adapter(tmp_path, "other")
    assert (trained("default"), trained("other")) == ({True}, {False})
    model.set_requires_grad("default", False)
    assert trained("default") == {False}
    model.set_requires_grad(["default", "other"])
    assert (trained("default"), trained("other")) == ({True}, {True})
    model.set_requires_grad("other", False)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and trained("other") == {True}
    assert not [name for name, _ in model.named_parameters() if ".default." in name]
    model.set_adapter("other", inference_mode=True)
    assert trained("other") == {False}
    model.delete_adapter("other")
    ids = inputs()["input_ids"]
    assert torch.equal(model.unload()(ids).logits, fresh().eval()(ids).logits)


@every_config
@pytest.mark.parametrize("autocast", [True, False])
def test_h33_autocast_adapter_dtype_holds_for_the_projection(config: type, autocast: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    half = gpt2().to(torch.bfloat16)
    model = get_peft_model(half, config(r=4, routing="mul", visual_width=20), autocast_adapter_dtype=autocast).eval()
    own = {p.dtype for n, p in model.named_parameters() if ".default." in n}
    assert own == {torch.float32 if autocast else torch.bfloat16}
    assert model(**inputs(20)).logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast)
    assert {p.dtype for n, p in again.named_parameters() if ".default." in n} == own
    assert torch.equal(again(**inputs(20)).logits, model(**inputs(20)).logits)


@every_config
def test_h33_input_dtype_casting_can_be_turned_off(config: type) -> None:
    model = adapted(config, base=gpt2().to(torch.bfloat16), routing="none")
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(inputs()["input_ids"])  # float32 adapters, bfloat16 text
    assert model(inputs()["input_ids"]).logits.isfinite().all()


@every_config
def test_h33_an_injection_that_fails_leaves_nothing_behind(config: type, tmp_path: Path) -> None:
    """The cell is mended and run again: on the same base, and under the same name."""
    base, ids = fresh().eval(), inputs()["input_ids"]
    expected = base(ids).logits
    wrong = {"target_modules": ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}
    with pytest.raises(RoutevlError, match="works on width"):
        get_peft_model(base, config(r=4, routing="mul", **wrong))
    assert torch.equal(base(ids).logits, expected) and not hasattr(base, "peft_config")
    assert not base._forward_hooks and "generate" not in vars(base)
    model = adapted(config, base=base)
    before = model(**inputs()).logits
    with pytest.raises(RoutevlError, match="works on width"):
        model.add_adapter("other", config(r=4, routing="mul", **wrong))
    assert list(model.peft_config) == ["default"] == model.active_adapters
    assert torch.equal(model(**inputs()).logits, before)
    model.add_adapter("other", config(r=4, routing="mul", visual_width=20))
    model.set_adapter("other")
    assert torch.equal(model(**inputs(20)).logits, expected)


@every_config
def test_h33_low_cpu_mem_usage_and_offload_arguments(config: type, tmp_path: Path) -> None:
    model = adapted(config, visual_width=20)
    expected = model(**inputs(20)).logits
    model.save_pretrained(tmp_path)
    for options in ({"low_cpu_mem_usage": True}, {"ephemeral_gpu_offload": True}, {"is_trainable": True}):
        again = PeftModel.from_pretrained(fresh(), tmp_path, **options).eval()
        assert torch.equal(again(**inputs(20)).logits, expected), options
        again.load_adapter(tmp_path, "other", **options)
        again.set_adapter("other")
        assert torch.equal(again.eval()(**inputs(20)).logits, expected), options
        assert not [name for name, parameter in again.named_parameters() if parameter.is_meta]


def test_a_module_that_is_read_but_not_called_is_refused() -> None:
    """nn.MultiheadAttention reads the weight of its output projection: an adapter there would do nothing."""
    for config in CONFIGS:
        with pytest.raises(RoutevlError, match=r"self_attn.out_proj is a NonDynamicallyQuantizableLinear.*MultiheadAttention"):
            get_peft_model(nn.TransformerEncoderLayer(D, 4), config(target_modules=["out_proj"]))


# ---------------------------------------------------------------------------------------- faults of others


def update_of(model: PeftModel, layer: nn.Module, x: Tensor, features: Tensor) -> Tensor:
    conditioning = model.base_model.conditioning
    return conditioning.run_with(Call(conditioning.prepare({"visual_features": features})), layer, x) - layer.base_layer(x)


@pytest.mark.parametrize(
    ("first", "second", "width"),
    [
        ({"routing": "mul"}, {"routing": "attn", "r": 2}, D),
        ({"routing": "mul"}, {"routing": "none"}, D),
        ({"routing": "mul", "visual_width": 20}, {"routing": "expand", "visual_width": 20, "visual_scale": "tanh"}, 20),
        ({"routing": "mul"}, {"routing": "mul", "visual_width": 20}, 20),
    ],
    ids=["two-routings", "routed-and-plain", "two-projections", "two-widths"],
)
def test_h23_two_active_adapters_give_the_sum_of_their_updates(first: dict, second: dict, width: int) -> None:
    model = adapted(RoutedLoraConfig, base=roberta(), **first)
    model.add_adapter("second", RoutedLoraConfig(**{"r": 4, **second}))
    shaken(model)
    layer, x = model.base_model.model.encoder.layer[0].attention.self.query, torch.randn(B, L, D)
    features = inputs(width)["visual_features"]
    model.base_model.set_adapter(["default", "second"])
    if first.get("visual_width", D) != second.get("visual_width", D):
        with pytest.raises(RoutevlError, match="set visual_width"):
            model(**inputs(width))
        return
    together = update_of(model, layer, x, features)
    assert model(**inputs(width))[0].isfinite().all()
    parts = 0
    for name in ("default", "second"):
        model.base_model.set_adapter(name)
        part = update_of(model, layer, x, features)
        assert part.abs().max() > 1e-3
        parts = parts + part
    torch.testing.assert_close(together, parts, rtol=0, atol=1e-5)


@pytest.mark.slow
@every_config
@pytest.mark.filterwarnings("ignore")
def test_h04_transformers_trainer_trains_resumes_and_loads_the_best(config: type, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [
        {"input_ids": torch.randint(2, 48, (6,), generator=generator), "visual_features": torch.randn(1, 20, generator=generator)}
        for _ in range(16)
    ]
    rows = [row | {"labels": row["input_ids"]} for row in rows]

    def trainer(steps: int, **options: Any) -> Trainer:
        arguments = TrainingArguments(
            tmp_path / "out", per_device_train_batch_size=4, max_steps=steps, eval_strategy="steps", eval_steps=2, save_steps=2,
            load_best_model_at_end=True, learning_rate=5e-2, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
            label_names=["labels"], **options,
        )  # fmt: skip
        model = get_peft_model(fresh(), config(r=4, routing="mul", visual_width=20, task_type="CAUSAL_LM"))
        return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8])

    with pytest.raises((RoutevlError, ValueError), match="visual_features|remove_unused_columns"):
        trainer(4).train()  # its default drops what is not in the model's signature
    run = trainer(6, remove_unused_columns=False, gradient_checkpointing=True)
    run.train()
    batch = {name: rows[0][name][None] for name in ("input_ids", "visual_features")}
    best = PeftModel.from_pretrained(fresh(), run.state.best_model_checkpoint).eval()
    assert torch.equal(run.model.eval()(**batch).logits, best(**batch).logits)
    start = get_peft_model(fresh(), config(r=4, routing="mul", visual_width=20)).base_model.visual_projection["default"]
    assert not torch.equal(best.base_model.visual_projection["default"].weight, start.weight)
    resumed = trainer(8, remove_unused_columns=False)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


@every_config
@pytest.mark.parametrize("saved", [["wte"], ["wte", "lm_head"]], ids="+".join)
@pytest.mark.filterwarnings("ignore")
def test_h06_new_tokens_and_saved_embeddings(config: type, saved: list[str], tmp_path: Path) -> None:
    def base(size: int) -> nn.Module:
        model = fresh()
        torch.manual_seed(1)
        model.resize_token_embeddings(size)
        return model

    ids = torch.tensor([[51, 3, 52, 4], [1, 50, 50, 7]])
    features = inputs()["visual_features"][:2]
    model = get_peft_model(base(53), config(r=4, routing="mul", modules_to_save=saved, task_type="CAUSAL_LM"))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=ids, labels=ids, visual_features=features).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(53), tmp_path).eval()
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 49,
        "num_beams": 2,
    }
    logits = [m(input_ids=ids, visual_features=features).logits for m in (model, again)]
    assert torch.equal(*logits)
    assert torch.equal(*(m.generate(input_ids=ids, visual_features=features, **options) for m in (model, again)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(fresh(), tmp_path)


@pytest.mark.parametrize("width", [D, 20])
@pytest.mark.filterwarnings("ignore")
def test_h07_one_call_loaders_give_the_same_or_are_refused_by_name(width: int, tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path / "base")
    for task_type in (None, "CAUSAL_LM"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = adapted(RoutedLoraConfig, base=base, task_type=task_type, visual_width=None if width == D else width)
        folder = str(tmp_path / f"adapter-{task_type}")
        model.save_pretrained(folder)
        expected = model(**inputs(width)).logits
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(folder).eval()(**inputs(width)).logits, expected)
        for load in (
            lambda folder=folder: AutoModelForCausalLM.from_pretrained(folder),
            lambda folder=folder: AutoModelForCausalLM.from_pretrained(tmp_path / "base").load_adapter(folder),
        ):
            with pytest.raises(ValueError, match="ROUTED_LORA.*get_peft_model"):
                load()


@every_config
def test_b25_an_adapter_file_of_another_model_or_with_a_gap_is_an_error(config: type, tmp_path: Path) -> None:
    """peft itself only warns of what is missing, and says nothing of what is too much."""
    model = adapted(config, visual_width=20)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    for name in (min(whole), max(whole), *(n for n in whole if "visual_projection" in n)):
        save_file({n: t for n, t in whole.items() if n != name}, path)
        with pytest.raises(RoutevlError, match=f"{config.PEFT_TYPE.value}: the adapter lacks .*{name.split('.')[-2]}"):
            PeftModel.from_pretrained(fresh(), tmp_path)
    deeper = {n.replace(".h.1.", ".h.2."): t.clone() for n, t in whole.items()}
    save_file(whole | deeper, path)
    with pytest.raises(RoutevlError, match=r"the adapter has .*\.h\.2\..*, which the model has not"):
        PeftModel.from_pretrained(fresh(), tmp_path)
