"""The check of models before anything is computed: what it builds, and what it says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    ViTConfig,
    ViTImageProcessor,
)

from routevl.backbones.pretrain_text import write_untrained
from routevl.backbones.text import text_skeleton
from routevl.errors import RoutevlError
from routevl.files import read_json, write_json
from routevl.sheet import COLUMNS, read_sheet
from routevl.tasks.clip_bart.visual_embedding import EXTRA_TOKENS
from routevl.tasks.table import TASKS
from routevl.training import check

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT / "workflow"))
sys.path.insert(0, str(PROJECT / "tests"))
from text_models import ARCHITECTURES, tokenizer_of_letters, write_vision_folder  # noqa: E402
from tiny_project import row  # noqa: E402

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
USED = {"roberta": "Roberta", "gpt2": "GPT2", "deberta": "DebertaV2", "fnet": "FNet"}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    for architecture in USED.values():
        BY_NAME[architecture].write_folder(tmp_path / architecture)
    write_vision_folder(tmp_path / "vit")
    return {name: str(tmp_path / architecture) for name, architecture in USED.items()} | {"vit": str(tmp_path / "vit")}


def run_check(tmp_path: Path, folders: dict[str, str], *rows: str, **changed: Any) -> list[dict[str, Any]]:
    """The stage on a sheet of these rows, with the demo's configuration."""
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text("\n".join(["\t".join(COLUMNS), *rows]) + "\n")
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text()) | {"experiments": str(sheet)}
    config["backbones"]["text"] = {name: {"path": folder} for name, folder in folders.items() if name != "vit"}
    config["backbones"]["vision"] = {"vit": {"path": folders["vit"]}}
    for name, modules in changed.items():
        config["backbones"]["text"][name]["target_modules"] = modules
    return checked(config, tmp_path)


def checked(config: dict[str, Any], tmp_path: Path) -> list[dict[str, Any]]:
    """What the stage writes for a configuration."""
    write_json(tmp_path / "config.json", config)
    output = str(tmp_path / "checked.json")
    check.run(argparse.Namespace(configuration=str(tmp_path / "config.json"), asked="1", output=output))
    return read_json(output)["checked"]


def test_each_combination_is_built_once_and_its_parameters_are_counted(tmp_path: Path, folders: dict[str, str]) -> None:
    checked = run_check(
        tmp_path,
        folders,
        row("a", "vqa", "routing=mul"),
        row("b", "vqa", "routing=add"),  # another function has no other shapes
        row("c", "vqa", "routing=mul", method="adapter", seeds="1,2"),
        row("d", "caption", "routing=mul", prefix="no"),
        row("e", "caption", prefix="no"),  # blind: other shapes than with an image
    )
    assert [entry["experiment"] for entry in checked] == ["a", "c", "d", "e"]
    counts = [entry["trainable_params_by_part"] for entry in checked]
    assert counts[0]["method"] == 2 * 2 * 2 * (2 * 32)  # layers x (query, value) x r x (d + d_out)
    assert counts[1]["method"] == 2 * 2 * (2 * 2 * 32 + 2 + 32)
    assert counts[2]["visual_projection"] == 192 * 32 + 32 and counts[3]["visual_projection"] == 0


def test_every_fault_has_one_line_that_names_experiment_model_and_key(
    tmp_path: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row("good", "vqa"),
        row("positions", "vqa", "routing=mul", text_backbone="deberta"),
        row("nothing", "vqa", "", text_backbone="fnet"),
        row("long", "caption", "max_text_tokens=5000"),
        row("wrong", "caption", "target_modules=no_such_module", text_backbone="gpt2"),
    ]
    with pytest.raises(RoutevlError) as last:
        run_check(tmp_path, folders, *rows)
    assert not (tmp_path / "checked.json").exists()
    lines = [line.partition("error: ")[2] for line in capsys.readouterr().err.splitlines() if "error: " in line] + [
        str(last.value)
    ]
    expected = [("positions", folders["deberta"], "target_modules"), ("nothing", folders["fnet"], "target_modules"),
                ("long", folders["gpt2"], "max_text_tokens"), ("wrong", folders["gpt2"], "target_modules")]  # fmt: skip
    for line, (experiment, folder, key) in zip(lines, expected, strict=True):
        assert line.startswith(f"experiment '{experiment}': ") and folder in line and key in line and "\n" not in line


def test_target_modules_of_a_backbone_mend_what_is_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    deberta = row("a", "vqa", "routing=mul", text_backbone="deberta")
    [entry] = run_check(tmp_path, folders, deberta, deberta={"lora": ["value_proj"]})
    assert entry["trainable_params_by_part"]["method"] == 2 * 2 * (2 * 32)
    of_the_row = row("a", "vqa", "routing=mul target_modules=key_proj", text_backbone="deberta")
    with pytest.raises(RoutevlError, match="visual_features has batch size"):
        run_check(tmp_path, folders, of_the_row, deberta={"lora": ["value_proj"]})


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"loar": ["query"]}, "backbones.text.roberta.target_modules: 'loar' is not a method"),
        ({"bitfit": ["query"]}, "the method bitfit has no option 'target_modules'"),
    ],
)
def test_wrong_target_modules_are_refused(tmp_path: Path, folders: dict[str, str], modules: Any, message: str) -> None:
    with pytest.raises(RoutevlError, match=message):
        run_check(tmp_path, folders, row("a", "vqa"), roberta=modules)


def test_ablations_that_cannot_be_had_are_refused_in_a_line_each(
    tmp_path: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each ablation is built for itself, for it may fail for itself."""
    good = [
        row("noise", "caption", "routing=mul routed_features=noise"),
        row("feed_forward", "vqa", "routing=mul places=ffn layers_to_transform=1"),
        row("text", "caption", "routing=mul routed_positions=text routed_tokens=mean"),
    ]
    assert [entry["experiment"] for entry in run_check(tmp_path, folders, *good)] == ["noise", "feed_forward", "text"]
    (tmp_path / "checked.json").unlink()
    rows = [
        row("norms", "vqa", "routing=mul position=after_norm", method="adapter"),
        row("causal", "caption", "routing=mul routed_features=text"),
        row("high", "vqa", "layers_to_transform=0,9"),
        row("none", "caption", "routing=mul routed_positions=text", prefix="no"),
    ]
    with pytest.raises(RoutevlError) as last:
        run_check(tmp_path, folders, *good, *rows)
    assert not (tmp_path / "checked.json").exists()
    lines = [line.partition("error: ")[2] for line in capsys.readouterr().err.splitlines() if "error: " in line]
    expected = [("norms", "freeze_layer_norm"), ("causal", "routed_features"), ("high", "layers_to_transform"),
                ("none", "set prefix, or routed_positions=all")]  # fmt: skip
    for line, (experiment, key) in zip([*lines, str(last.value)], expected, strict=True):
        assert line.startswith(f"experiment '{experiment}': ") and key in line
    with pytest.raises(RoutevlError, match="experiment 'split'.*r is 2, and bottleneck=split needs a multiple of 4"):
        run_check(tmp_path, folders, row("split", "vqa", "routing=mul bottleneck=split"))


def test_a_model_that_looks_at_its_numbers_is_run_on_random_ones(
    tmp_path: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class PickyNorm(torch.nn.LayerNorm):
        """A norm of a model that does not take equal numbers."""

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            if hidden_states.std() == 0:
                raise RuntimeError("all are equal")
            return super().forward(hidden_states)

    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.nn.LayerNorm", PickyNorm)
    picky = row("a", "caption", "routing=mul", prefix="no")
    assert [entry["experiment"] for entry in run_check(tmp_path, folders, picky)] == ["a"]
    monkeypatch.setattr("routevl.backbones.skeleton.LARGEST", 1)
    with pytest.raises(RoutevlError, match=r"cannot be run \(all are equal\)"):
        run_check(tmp_path, folders, picky)


def test_tables_that_a_model_shares_are_counted_once(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=40)
    config.save_pretrained(tmp_path)
    tokenizer_of_letters().save_pretrained(tmp_path)
    skeleton, _ = text_skeleton(tmp_path, TASKS["caption"].text_model)
    assert sum(p.numel() for p in skeleton.parameters()) == sum(p.numel() for p in GPT2LMHeadModel(config).parameters())


def test_models_of_several_tasks_are_built_with_and_without_tensors_of_each(tmp_path: Path) -> None:
    """And what gives a vocabulary more rows leaves the table that embeds and predicts tokens one."""
    row_of = {"text_backbone": "bart", "vision_backbone": "vit", "prefix": "yes", "visual_tokens": "grid"}
    rows = [
        row("shared", "multitask", **row_of),
        row("each", "multitask", "tasks=4 task_prompts=no", **row_of),
        row("full", "multitask", method="full", **row_of),
    ]
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text("\n".join(["\t".join(COLUMNS), *rows]) + "\n")
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text()) | {"experiments": str(sheet)}
    entries = {entry["experiment"]: entry["trainable_params_by_part"] for entry in checked(config, tmp_path)}
    options = config["backbones"]["text"]["bart"]["pretrain"]
    write_untrained(tmp_path / "bart", options)
    model = BartForConditionalGeneration(BartConfig.from_pretrained(tmp_path / "bart"))
    assert entries["each"]["method"] == 4 * entries["shared"]["method"] > 0
    of_the_text_model = entries["full"]["method"] + entries["full"]["layer_norm"]
    assert of_the_text_model == sum(p.numel() for p in model.parameters()) + EXTRA_TOKENS * options["hidden_size"]


@pytest.mark.slow
def test_the_papers_models_are_checked_without_weights(tmp_path: Path) -> None:
    large = {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024}
    configs = {
        "roberta-base": RobertaConfig(max_position_embeddings=514),
        "roberta-large": RobertaConfig(max_position_embeddings=514, intermediate_size=4096, **large),
        "gpt2": GPT2Config(),
        "gpt2-medium": GPT2Config(**large),
        "vit-base": ViTConfig(),
        "vit-large": ViTConfig(intermediate_size=4096, **large),
    }
    for name, config in configs.items():
        config.save_pretrained(tmp_path / name)
        (ViTImageProcessor() if name.startswith("vit") else tokenizer_of_letters()).save_pretrained(tmp_path / name)
    config = yaml.safe_load((PROJECT / "config/paper.yaml").read_text())
    config["experiments"] = str(PROJECT / config["experiments"])
    for kind in config["backbones"].values():
        kind.update({name: {"path": str(tmp_path / name)} for name in kind})
    entries = checked(config, tmp_path)
    expected = {(e.text_backbone, e.vision_backbone, e.method) for e in read_sheet(config["experiments"])}
    assert {(entry["text_backbone"], entry["vision_backbone"], entry["method"]) for entry in entries} == expected
    counts = {entry["experiment"]: entry["trainable_params_by_part"] for entry in entries}
    assert counts["vqa_roberta-large_vit-large_lora_none"]["method"] == 24 * 2 * 128 * 2 * 1024


def test_the_demos_models_are_checked_before_they_are_made(tmp_path: Path) -> None:
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    config["experiments"] = str(PROJECT / "config/experiments/full.tsv")
    entries = checked(config, tmp_path)
    assert {entry["method"] for entry in entries} == {e.method for e in read_sheet(config["experiments"])}


def test_of_a_hub_model_the_small_files_suffice(tmp_path: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(hub_id: str, revision: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append((hub_id, revision, "*.safetensors" in allow_patterns))
        return folders["roberta"]

    monkeypatch.setattr("routevl.backbones.fetch.snapshot_download", snapshot_download)
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text("\n".join(["\t".join(COLUMNS), row("a", "vqa")]) + "\n")
    config["experiments"] = str(sheet)
    config["backbones"]["text"]["roberta"] = {"path": "owner/name", "revision": "abc"}
    assert [entry["experiment"] for entry in checked(config, tmp_path)] == ["a"]
    assert asked == [("owner/name", "abc", False)]
