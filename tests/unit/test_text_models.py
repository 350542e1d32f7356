"""Text models of any architecture: their parts, what is refused, and that what is not refused learns."""

from __future__ import annotations

import dataclasses
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DebertaV2Config, DebertaV2Model

from routevl.backbones.fetch import FILES_OF_A_BACKBONE
from routevl.backbones.structure import KEY, QUERY, VALUE, structure_of, targets
from routevl.backbones.text import load_text_backbone
from routevl.errors import RoutevlError
from routevl.methods import RoutedAdapterConfig, RoutedLoraConfig
from routevl.tasks.base import Task
from routevl.tasks.table import TASKS, task_class
from routevl.training.check import IMAGES, write_data

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow"))
from text_models import ARCHITECTURES, METHODS, Architecture, outcome, settings_for, write_vision_folder

D = 32
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
# of each kind one: plain, fused side by side and head by head, grouped, narrow embeddings, no first token, refused
QUICK = ("Roberta", "Albert", "ModernBert", "DebertaV2", "GPT2", "GPTNeoX", "OPT", "Qwen2", "Falcon", "Mixtral", "FNet")
WIDTH, LENGTH = 192, 1  # of the vision model of the table

every_architecture = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=() if a.name in QUICK else pytest.mark.slow, id=a.name) for a in ARCHITECTURES],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training split of the check, and a vision model."""
    folder = tmp_path_factory.mktemp("models")
    write_data(folder / "data")
    write_vision_folder(folder / "vision")
    return folder


def text_folder(architecture: Architecture, folder: Path) -> Path:
    """The folder of an architecture, with random weights."""
    path = folder / architecture.name
    if not path.exists():
        config = architecture.write_folder(path)
        torch.manual_seed(0)
        (AutoModel if architecture.task == "vqa" else AutoModelForCausalLM).from_config(config).save_pretrained(path)
    return path


class RandomFeatures:
    """A visual source of normal numbers."""

    def __init__(self) -> None:
        self.length, self.width, self.image_ids, self.encoder = LENGTH, WIDTH, torch.tensor(IMAGES), nn.Identity()

    def of(self, image_ids: list[int]) -> Tensor:
        return torch.randn(len(image_ids), LENGTH, WIDTH, generator=torch.Generator().manual_seed(image_ids[0]))


def build(architecture: Architecture, method: str, folder: Path) -> Task:
    settings = settings_for(architecture, method)
    text_model, tokenizer = load_text_backbone(text_folder(architecture, folder), TASKS[architecture.task].text_model)
    torch.manual_seed(0)
    return task_class(settings.task)(
        settings, settings.new_method(), {}, text_model, tokenizer, RandomFeatures(), folder / "data"
    )


@every_architecture
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_refused_before_anything_runs_learns(architecture: Architecture, method: str, folder: Path) -> None:
    text_folder(architecture, folder)
    early = outcome(architecture, method, folder)
    if early != "works":
        with pytest.raises(RoutevlError) as refused:
            build(architecture, method, folder)
        if method != "ia3" and architecture.name != "Mamba":  # which fails otherwise where it has weights
            assert early == "refused: " + str(refused.value).partition("; ")[0]
        return
    task = build(architecture, method, folder)
    batch = task.collate(list(task.examples("train")))
    optimiser = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(8):
        loss = task.model.eval()(**batch)["loss"]  # no dropout, so that the loss falls for sure
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    parts = {"lora": ("lora_A", "lora_B"), "adapter": ("adapter_down", "adapter_up"), "ia3": ("ia3_l",)}[method]
    own = {name: p for name, p in trained.items() if any(f".{part}." in name for part in parts)}
    assert own and all(p.grad is not None and p.grad.abs().max() > 0 for p in own.values())
    other_image = {**batch, "image": batch["image"].flip(-1)}
    with torch.no_grad():
        assert task.model(**batch)["losses"][0] != task.model(**other_image)["losses"][0]
        alone = {name: tensor[:1, : (batch["attention_mask"][0].sum() if tensor.dim() == 2 and name != "answer_scores" else None)]
                 for name, tensor in batch.items()}  # fmt: skip
        torch.testing.assert_close(task.model(**alone)["losses"], task.model(**batch)["losses"][:1], rtol=1e-4, atol=1e-5)
    items = list(task.to_predict("train"))
    assert len(task.predict(task.model, task.collate(items))) == len(items)


@every_architecture
def test_default_targets_are_those_that_a_reader_of_the_model_names(architecture: Architecture, folder: Path) -> None:
    for config_class, expected in ((RoutedLoraConfig, architecture.query_value), (RoutedAdapterConfig, architecture.outputs)):
        if not expected:
            continue
        text_model, _ = load_text_backbone(text_folder(architecture, folder), TASKS[architecture.task].text_model)
        config = get_peft_model(text_model, config_class(r=2)).peft_config["default"]
        assert config.target_modules == sorted(expected)
        if config_class is RoutedLoraConfig and architecture.fused:
            groups, widths, order = architecture.fused
            layout = {"groups": groups, "widths": list(widths), "adapted": [role in "qv" for role in order]}
            assert config.fused_projections == {expected[0]: layout}
        elif config_class is RoutedLoraConfig:
            assert config.fused_projections == {}


def test_the_bottlenecks_of_a_module_that_holds_all_heads_write_to_query_and_value(folder: Path) -> None:
    """GPT-NeoX has, head by head, 8 queries, 8 keys and 8 values."""
    text_model, _ = load_text_backbone(text_folder(BY_NAME["GPTNeoX"], folder), "decoder")
    adapted = get_peft_model(text_model, RoutedLoraConfig(r=2, lora_alpha=4, routing="add"))
    layer = adapted.base_model.model.gpt_neox.layers[0].attention.query_key_value
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(up)
    x, image = torch.randn(3, 5, D), torch.randn(3, 1, D)
    layer.conditioning.prepare({"visual_features": image})
    call = dataclasses.replace(layer.conditioning.call(), streams=layer.conditioning.prepare({"visual_features": image}))
    difference = layer.conditioning.run_with(call, layer, x) - layer.base_layer(x)
    query, value = ((x + image) @ part.T @ w.T * 2 for part, w in zip(down.chunk(2), up.chunk(2), strict=True))  # (3, 5, 32) each
    expected = torch.zeros(3, 5, 4, 24)
    expected[..., :8], expected[..., 16:] = query.unflatten(-1, (4, 8)), value.unflatten(-1, (4, 8))
    torch.testing.assert_close(difference, expected.flatten(-2), atol=1e-5, rtol=1e-5)


def test_the_parts_are_found_without_weights_and_the_model_is_left_as_it_was(folder: Path) -> None:
    model, _ = load_text_backbone(text_folder(BY_NAME["GPT2"], folder), "decoder")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    found = structure_of(model)
    assert all(module.training for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight), nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):  # positions are in what the sub-layers' outputs are added to
            nn.init.zeros_(module.weight)
    assert structure_of(model) == found


def test_the_parts_of_an_encoder_decoder() -> None:
    from cases import LAYERS, bart

    found = structure_of(model := bart())
    assert targets(model, found.computing(QUERY)) == ["encoder_attn.q_proj", "self_attn.q_proj"]
    assert targets(model, found.computing(KEY)) == ["encoder_attn.k_proj", "self_attn.k_proj"]
    assert targets(model, found.computing(VALUE)) == ["encoder_attn.v_proj", "self_attn.v_proj"]
    assert targets(model, found.attention_outputs) == ["self_attn.out_proj"] and len(found.attention_outputs) == 2 * LAYERS
    assert targets(model, found.cross_attention_outputs) == ["encoder_attn.out_proj"]
    assert targets(model, found.feed_forward_outputs) == ["fc2"] and not found.shared


def test_a_second_adapter_finds_the_parts_of_an_adapted_model(folder: Path) -> None:
    model, _ = load_text_backbone(text_folder(BY_NAME["Roberta"], folder), "encoder")
    adapted = get_peft_model(model, RoutedLoraConfig(r=2, routing="mul"))
    adapted.add_adapter("other", RoutedLoraConfig(r=4, routing="add"))
    assert adapted.peft_config["other"].target_modules == adapted.peft_config["default"].target_modules


def test_a_query_that_also_reads_positions_is_not_routed() -> None:
    """DeBERTa's relative positions go through the query's projection too."""
    sizes = BY_NAME["DebertaV2"].sizes
    model = DebertaV2Model(DebertaV2Config(**sizes, vocab_size=31)).eval()
    with pytest.raises(RoutevlError, match=r"query_proj also reads a table of positions, which no image belongs to"):
        get_peft_model(model, RoutedLoraConfig(r=2, routing="mul"))
    values = get_peft_model(model, RoutedLoraConfig(r=2, routing="mul", target_modules=["value_proj"]))
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "visual_features": torch.randn(1, 1, D)}
    assert values(**inputs).last_hidden_state.shape == (1, 3, D)
    values.unload()
    plain = get_peft_model(model, RoutedLoraConfig(r=2))
    assert plain.peft_config["default"].target_modules == ["attention.self.query_proj", "attention.self.value_proj"]


def test_b17_captions_of_a_model_without_a_first_token_and_of_one_without_a_last(folder: Path, tmp_path: Path) -> None:
    task = build(BY_NAME["Qwen2"], "lora", folder)
    assert task.tokenizer.bos_token_id is None and task.bos == task.tokenizer.eos_token_id
    first = task.examples("train")[0]["token_ids"]
    assert first[0] == first[-1] == task.tokenizer.eos_token_id
    endless = dataclasses.replace(BY_NAME["Qwen2"], tokenizer={"bos_token": None, "eos_token": None})
    with pytest.raises(RoutevlError, match=r"its tokenizer has no token \(eos_token\) that ends a caption"):
        build(endless, "lora", SimpleFolder(tmp_path, folder))


class SimpleFolder:
    """A folder of models of its own beside the data of another."""

    def __init__(self, models: Path, data: Path) -> None:
        self.models, self.data = models, data

    def __truediv__(self, name: str) -> Any:
        return self.data / name if name == "data" else self.models / name


def test_b17_generation_ends_at_the_tokenizers_last_token(folder: Path) -> None:
    """Whatever the model's generation_config says."""
    task = build(BY_NAME["Qwen2"], "lora", folder)
    given: dict[str, Any] = {}
    task.predict(SimpleNamespace(generate=lambda *_, **options: given.update(options) or torch.tensor([[3], [3]])),
                 task.collate(list(task.to_predict("train"))))  # fmt: skip
    assert given["eos_token_id"] == task.tokenizer.eos_token_id


def test_b17_a_tokenizer_that_is_sentencepieces_alone(tmp_path: Path) -> None:
    """As DeBERTa-v3's, which has no tokenizer.json; and the file is among those that are fetched of the hub."""
    folder = tmp_path / "deberta"
    folder.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["what colour is the sky", "is there a ball in front of the box"] * 50),
        model_prefix=str(folder / "spm"), vocab_size=40, hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        minloglevel=2,
    )  # fmt: skip
    (folder / "spm.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    DebertaV2Model(DebertaV2Config(**BY_NAME["DebertaV2"].sizes, vocab_size=64)).save_pretrained(folder)
    _, tokenizer = load_text_backbone(folder, "encoder")
    assert tokenizer.decode(tokenizer("what is the ball")["input_ids"], skip_special_tokens=True) == "what is the ball"
    assert any(fnmatch("spm.model", pattern) for pattern in FILES_OF_A_BACKBONE)
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in FILES_OF_A_BACKBONE)
