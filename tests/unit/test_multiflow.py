"""MULTIFLOW: norms, scores and masks against recorded and computed numbers; folders; zeros that training leaves at zero."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from cases import B, batch_of
from conftest import SmallWorld, run_stage
from recorded import assert_agrees, needs_reference, put, recorded
from runs import new_run
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from routevl.backbones.folder import origin_of
from routevl.backbones.matrices import turned
from routevl.backbones.multiflow import input_norms, modalities_of, pruned_entries, scores
from routevl.backbones.pruning import keep_zeros, prunable, pruned_weights
from routevl.backbones.text import load_text_backbone
from routevl.errors import RoutevlError
from routevl.methods.table import new_method
from routevl.training.load import load_run

SPARSITIES = (0.63, 0.75, 0.9)


class Recorded(nn.Module):
    """The recorded network: two layers of each modality."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name in ("vision_1", "vision_2", "text_1", "text_2", "fusion_1", "fusion_2"):
            weight, bias = (tensors[f"param.{name}.{part}"] for part in ("weight", "bias"))
            self.add_module(name, nn.Linear(*reversed(weight.shape)))
            put(self.get_submodule(name).weight, weight)
            put(self.get_submodule(name).bias, bias)

    def forward(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        v = self.vision_2(torch.tanh(self.vision_1(image)))
        t = self.text_2(torch.tanh(self.text_1(text)))
        return self.fusion_1(t).mean(1) + self.fusion_2(v).mean(1)


@needs_reference
def test_recorded_norms_scores_and_masks() -> None:
    tensors, _ = recorded("multiflow")
    model = Recorded(tensors)
    batches = [
        {"image": tensors[f"batch{n}.image"], "text": tensors[f"batch{n}.text"], "attention_mask": tensors[f"batch{n}.text_mask"]}
        for n in (0, 1)
    ]
    modules = prunable(model)
    norms = input_norms(modules, model, batches)
    weights = {name: turned(module, module.weight.detach()) for name, module in modules.items()}
    for name, weight in weights.items():
        assert_agrees(norms[name].float(), tensors[f"{name}.weight.input_norm_n"])
        assert_agrees(scores(weight, norms[name]).float(), tensors[f"{name}.weight.score"])
    modalities = {name: name.partition("_")[0] for name in modules}
    for sparsity in SPARSITIES:
        for name, pruned in pruned_entries(weights, norms, modalities, sparsity).items():
            of_layer = f"sparsity{round(100 * sparsity)}.{name}.weight"
            assert int(pruned.sum()) == tensors[f"{of_layer}.pruned_in_layer"]
            assert torch.equal(~pruned, tensors[f"{of_layer}.mask_with_exact_count"])


# ---------------------------------------------------------------------------------------- computed numbers


def test_scores_are_the_formula_entry_by_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(3, 4, generator=generator).double(), torch.rand(4, generator=generator).double()
    found = scores(weight, norms)
    for i in range(3):
        for j in range(4):
            through_output = sum(abs(weight[i, k]) * norms[k] for k in range(4)) / 4
            through_input = sum(abs(weight[k, j]) * norms[j] for k in range(3)) / 3
            assert math.isclose(found[i, j], abs(weight[i, j]) * through_output * through_input, rel_tol=1e-12)


def texts(n: int, length: int) -> dict[str, Tensor]:
    """n texts of 1 to `length` tokens."""
    generator = torch.Generator().manual_seed(length)
    lengths = torch.randint(1, length + 1, (n,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": torch.randint(0, 30, (n, length), generator=generator), "attention_mask": mask}


def gpt2() -> GPT2Model:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=30, n_positions=12, n_embd=8, n_layer=2, n_head=2)).eval()


def test_norms_are_per_example_and_do_not_depend_on_batches_or_padding() -> None:
    model, batch = gpt2(), texts(7, 6)
    modules = prunable(model)
    whole = input_norms(modules, model, [batch])
    assert whole.keys() == modules.keys() and len(modules) == 8
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(2), slice(2, None))]
    more = [{name: nn.functional.pad(tensor, (0, 5)) for name, tensor in half.items()} for half in halves]
    for other in (input_norms(modules, model, halves), input_norms(modules, model, more)):
        for name, norms in whole.items():
            torch.testing.assert_close(other[name], norms, rtol=1e-6, atol=1e-9)
    first = model.h[0]
    read = first.ln_1(model.wte(batch["input_ids"]) + model.wpe(torch.arange(6)))[batch["attention_mask"].bool()]
    torch.testing.assert_close(whole["h.0.attn.c_attn"].float(), (read.square().sum(0) / 7).sqrt(), rtol=1e-5, atol=1e-6)


def test_layers_lose_as_many_as_by_magnitude_and_each_modality_its_share_to_the_entry() -> None:
    """Also where scores are equal: inputs that nothing flows through."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(5, 6, generator=generator) * scale for name, scale in (("a", 1), ("b", 3), ("c", 0.1))}
    norms = {name: torch.rand(6, generator=generator).double() for name in weights}
    norms["a"][:4] = 0
    modalities = {"a": "text", "b": "text", "c": "fusion"}
    for sparsity in (*SPARSITIES, 0.001):
        pruned = pruned_entries(weights, norms, modalities, sparsity)
        of_text = torch.cat([weights["a"].flatten(), weights["b"].flatten()]).abs()
        lowest = of_text.sort().values[: int(sparsity * 60)]
        assert [int(pruned[name].sum()) for name in weights] == [
            int(torch.isin(weights["a"].abs(), lowest).sum()),
            int(torch.isin(weights["b"].abs(), lowest).sum()),
            int(sparsity * 30),
        ]


# ------------------------------------------------------------------------------------------------ folders

PARTS = {  # what is pruned, by the names in the files, and the modality
    "roberta": r"roberta\.encoder\.layer\.\d\.(attention\.(self\.(query|key|value)|output\.dense)|(intermediate|output)\.dense)",
    "gpt2": r"transformer\.h\.\d\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)",
    "bart": r"model\.(encoder|decoder)\.layers\.\d\.((self_attn|encoder_attn)\.(q|k|v|out)_proj|fc1|fc2)",
    "vit": r"blocks\.\d\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)",
}


def sources(world: SmallWorld) -> dict[str, Path]:
    text = {"roberta": "vqa", "gpt2": "caption", "bart": "multitask"}
    return {"vit": world.vision[16], **{name: world.text[task] for name, task in text.items()}}


def derive(source: Path, output: Path, *more: object, by: str = "multiflow", sparsity: float = 0.75) -> Path:
    options = ("--options", f"sparsity={sparsity}", *(["examples=9"] if by == "multiflow" else []))
    run_stage("derive-backbone", "--by", by, "--source", source, *options, *more, "--output", output)
    return output


@pytest.mark.parametrize("kind", PARTS)
def test_a_folder_is_pruned_by_modality_and_nothing_else_changes(small_world: SmallWorld, tmp_path: Path, kind: str) -> None:
    source = sources(small_world)[kind]
    pairs = {"vit": "captions", "gpt2": "captions"}.get(kind, "questions")
    derived = derive(source, tmp_path / "derived", f"pairs={pairs}", "--data", small_world.data)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, derived))
    linear = [name for name in before if re.fullmatch(PARTS[kind] + r"\.weight", name)]
    assert before.keys() == after.keys() and linear
    modalities = {name: "vision" if kind == "vit" else "fusion" if ".decoder." in name else "text" for name in linear}
    for name, tensor in before.items():
        kept = after[name] != 0 if name in linear else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(after[name][kept], tensor[kept])
    record = json.loads((derived / "derived.json").read_text())
    assert record["pairs"] == 9
    for modality in set(modalities.values()):
        own = [after[name] for name in linear if modalities[name] == modality]
        entries, zero = (sum(f(t) for t in own) for f in (Tensor.numel, lambda t: int((t == 0).sum())))
        assert (record[f"{modality}_entries"], record[f"{modality}_zero"], zero) == (entries, zero, int(0.75 * entries))
    if kind != "bart":  # of one modality: as many in each layer as by magnitude, but not the same ones
        control = load_file(derive(source, tmp_path / "control", by="magnitude") / "model.safetensors")
        assert all((after[name] == 0).sum() == (control[name] == 0).sum() for name in linear)
        assert any(not torch.equal(after[name], control[name]) for name in linear)
    again = derive(source, tmp_path / "again", f"pairs={pairs}", "--data", small_world.data)
    assert (again / "model.safetensors").read_bytes() == (derived / "model.safetensors").read_bytes()
    other = derive(source, tmp_path / "other", f"pairs={pairs}", "seed=1", "--data", small_world.data)
    assert (other / "model.safetensors").read_bytes() != (derived / "model.safetensors").read_bytes()


def test_modalities_of_a_plain_text_model_are_one() -> None:
    assert set(modalities_of(gpt2()).values()) == {"text"}


def test_data_that_are_missing_or_too_much_are_named(small_world: SmallWorld, tmp_path: Path) -> None:
    source = sources(small_world)["gpt2"]
    with pytest.raises(RoutevlError, match="--by multiflow: the derivation calibrates with prepared data, and --data is missing"):
        derive(source, tmp_path / "derived")
    with pytest.raises(RoutevlError, match="--by magnitude: the derivation reads no data: drop --data"):
        derive(source, tmp_path / "derived", "--data", small_world.data, by="magnitude")
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "captions.json").write_text('{"annotations": []}')
    with pytest.raises(RoutevlError, match=r"captions\.json: no captions, so nothing to run the model on; .* option pairs"):
        derive(source, tmp_path / "derived", "--data", tmp_path / "data")
    assert not (tmp_path / "derived").exists()


# ----------------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("method", ["full", "peft_lora", "lora"])
def test_pruned_entries_stay_zero_in_training_and_adapters_are_not_merged(
    small_world: SmallWorld, tmp_path: Path, method: str
) -> None:
    derived = derive(sources(small_world)["gpt2"], tmp_path / "derived", "--data", small_world.data)
    assert origin_of(derived).is_pruned and not origin_of(sources(small_world)["gpt2"]).is_pruned
    text_model, _ = load_text_backbone(derived, "decoder")
    pruned = pruned_weights(text_model)
    before = [weight.clone() for weight in pruned]
    built = new_method(method, {} if method == "full" else {"r": 2}, "test").build(text_model, {}, [])
    keep_zeros(built, pruned)
    trained = [parameter for parameter in built.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    batch = {name: tensor[:B] % 20 for name, tensor in batch_of("gpt2").items() if name == "input_ids"}
    for _ in range(3):
        optimiser.zero_grad()
        built(**batch, labels=batch["input_ids"]).loss.backward()
        optimiser.step()
    for weight, was in zip(pruned, before, strict=True):
        assert torch.equal(weight[was == 0].view(torch.int32), was[was == 0].view(torch.int32))
        assert (not torch.equal(weight, was)) is (method == "full")
    if method != "full":
        for merge in (built.merge_and_unload, built.merge_adapter):
            with pytest.raises(RoutevlError, match="the backbone is pruned" if method == "peft_lora" else "merge"):
                merge()


def test_a_run_on_a_pruned_backbone_keeps_its_zeros_and_loads_without_merging(small_world: SmallWorld, tmp_path: Path) -> None:
    derived = derive(sources(small_world)["gpt2"], tmp_path / "derived", "--data", small_world.data)
    weights = load_file(derived / "model.safetensors")
    run = new_run(small_world, tmp_path / "full", "caption", method="full", text_backbone=derived, epochs=1).train()
    trained = load_file(run.model / "method.safetensors")
    for name in (name for name in weights if re.fullmatch(PARTS["gpt2"] + r"\.weight", name)):
        assert not trained[name][weights[name] == 0].view(torch.int32).any()
        assert not torch.equal(trained[name], weights[name])
    plain = new_run(small_world, tmp_path / "lora", "caption", method="peft_lora", text_backbone=derived, epochs=1).train()
    loaded = load_run(load_text_backbone(derived, "decoder")[0], plain.model)
    with pytest.raises(RoutevlError, match="the backbone is pruned, and an adapter that is merged would fill its zeros"):
        loaded.merge_and_unload()


def test_a_backbone_that_is_not_pruned_has_no_weights_to_keep(small_world: SmallWorld) -> None:
    text_model, _ = load_text_backbone(sources(small_world)["gpt2"], "decoder")
    assert pruned_weights(text_model) == []
