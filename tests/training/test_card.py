"""Model cards: what they say is known, what they tell to do works, and a release has the test scores on them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SmallWorld, run_stage
from huggingface_hub import ModelCard
from runs import Run, contents, new_run
from safetensors.torch import save_file
from synthetic_manifests import make_job
from test_every_method import method_run
from test_training import first_batch

from routevl.backbones.folder import origin_of
from routevl.errors import RoutevlError
from routevl.files import read_json, write_json
from routevl.provenance.manifest import describe, read_manifest, write_manifest
from routevl.reporting.statistics import mean_interval
from routevl.tasks.table import TASKS

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
METHODS = [("vqa", "lora"), ("caption", "adapter"), ("vqa", "ia3"), ("caption", "bitfit"), ("vqa", "full")]
METHODS += [pytest.param("multitask", method, marks=pytest.mark.slow) for method in ("lora", "full")]
TASKS_OF_RUNS = ["vqa", pytest.param("multitask", marks=pytest.mark.slow)]
CALL_IT = """
import torch
from safetensors.torch import load_file

with torch.no_grad():
    assert torch.equal(model(**load_file("inputs"))[0], load_file("expected")["output"])
"""
HUB_ID, COMMIT = "somebody/some-roberta", "0123456789abcdef0123456789abcdef01234567"


def as_named(run: Run, folder: Path) -> None:
    """Put everything that a run was made from into a folder under the names that its card has."""
    folder.mkdir()
    for name in ("data", "features", "text_backbone", "vision_backbone"):
        (folder / Path(run.options[name]).name).symlink_to(run.options[name])
    (folder / run.model.name).symlink_to(run.model)


@pytest.mark.parametrize(("task", "method"), METHODS)
def test_what_a_card_tells_to_do_gives_the_trained_model(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, method: str
) -> None:
    run = method_run(small_world, tmp_path / "run", task, method).train()
    as_named(run, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    trained = run.trainer().task
    batch = first_batch(trained)
    for weights in ("", "last"):
        code = dict(BLOCK.findall(Path("model", weights, "README.md").read_text(encoding="utf-8")))["python"]
        trained.model.load(run.model / weights)
        inputs = trained.model.eval().text_inputs(batch["input_ids"], batch["attention_mask"], batch["image"])
        if task == "multitask":
            inputs["decoder_input_ids"] = batch["input_ids"]
        with torch.no_grad():
            output = trained.model.text_model(**inputs)[0]
        if task == "multitask" and method == "lora":  # the rows that number the grid are no part of the base of peft's adapter
            output = output[..., : len(trained.tokenizer)]
        save_file({"output": output.contiguous()}, "expected")
        save_file({name: tensor.detach().contiguous() for name, tensor in inputs.items()}, "inputs")
        # in a process where nothing has been imported yet
        ended = subprocess.run([sys.executable, "-c", code + CALL_IT], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    command = dict(BLOCK.findall(Path("model/README.md").read_text(encoding="utf-8")))["bash"].split()
    assert command[:2] == ["routevl", "predict"]
    run_stage(*command[1:])
    assert contents(Path("predictions")) == contents(run.predictions)


def test_load_run_refuses_another_text_model(small_world: SmallWorld, tmp_path: Path) -> None:
    from routevl.backbones.text import load_text_backbone
    from routevl.training.load import load_run

    run = method_run(small_world, tmp_path, "vqa", "bitfit").train()
    other, _ = load_text_backbone(small_world.text["caption"], "decoder")
    with pytest.raises(RoutevlError, match="model: not a run of this text model, or damaged"):
        load_run(other, run.model)


@pytest.fixture(scope="module", params=TASKS_OF_RUNS)
def run(request: pytest.FixtureRequest, small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return new_run(small_world, tmp_path_factory.mktemp("card"), request.param).train()


def test_a_card_says_what_is_known_and_nothing_else(run: Run) -> None:
    task = TASKS[run.options["task"]]
    metric = f"val_{'accuracy' if task.metric == 'accuracy' else 'score'}"
    for folder in (run.model, run.model / "last"):
        text, config = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "adapter_config.json"))
        assert "More Information Needed" not in text and "Model ID" not in text
        for said in (text, config):
            assert str(run.root) not in said and str(Path(run.options["text_backbone"]).parent) not in said
        data = ModelCard.load(folder / "README.md").data
        assert data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
        assert (data.library_name, data.pipeline_tag) == ("peft", task.pipeline_tag)
        assert data.tags == ["routevl", "vision-language", "lora"]
    record, lines = read_json(run.model / "run.json"), run.lines()
    text = (run.model / "README.md").read_text(encoding="utf-8")
    assert "x_t ∘ x'_v" in text and "Qu et al., 2024" in text
    assert f"{record['trainable_params']:,} of {record['total_params']:,}" in text
    assert all(fingerprint in text for fingerprint in record["inputs"].values() if fingerprint != record["inputs"].get("answers"))
    assert f"epoch {record['best_epoch']['epoch']} of 2" in text and f"{metric} {record['best_epoch'][metric]:.4g}" in text
    assert f"{metric} {lines[-1][metric]:.4g}" in (run.model / "last/README.md").read_text(encoding="utf-8")
    assert "Licence of the text model:** not stated" in text and "pretrained by `routevl pretrain-text`" in text


# ------------------------------------------------------------------------------------------ backbones from the hub


@pytest.fixture
def from_the_hub(small_world: SmallWorld, tmp_path: Path) -> Path:
    """A folder as `routevl fetch-backbone` leaves it."""
    folder = shutil.copytree(small_world.text["vqa"], tmp_path / "fetched")
    (folder / "pretraining.json").unlink()
    write_json(folder / "source.json", {"hub_id": HUB_ID, "commit": COMMIT, "sha256": {}})
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\n# A model\n")
    return folder


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "bitfit"])
def test_a_run_on_a_hub_model_names_it_and_its_commit(
    small_world: SmallWorld, tmp_path: Path, from_the_hub: Path, method: str
) -> None:
    run = method_run(small_world, tmp_path, "vqa", method, text_backbone=from_the_hub).train()
    card = ModelCard.load(run.model / "README.md")
    relation = "finetune" if method == "bitfit" else "adapter"
    assert (card.data.base_model, card.data.license) == (HUB_ID, "mit")
    assert card.data.to_dict()["base_model_relation"] == relation and f"base_model:{relation}:{HUB_ID}" in card.data.tags
    assert f"`{HUB_ID}` of the Hugging Face hub, commit `{COMMIT}`" in card.text
    code = dict(BLOCK.findall(card.text))["python"]
    assert f'("{HUB_ID}", revision="{COMMIT}"' in code
    if method != "bitfit":
        config = read_json(run.model / "adapter_config.json")
        assert (config["base_model_name_or_path"], config["revision"]) == (HUB_ID, COMMIT)


def test_a_run_on_a_derived_hub_model_does_not_pass_for_one_on_the_hub_model(
    small_world: SmallWorld, tmp_path: Path, from_the_hub: Path
) -> None:
    for source, derived, sparsity in (("fetched", "pruned", 0.25), ("pruned", "pruned twice", 0.5)):
        folders = ("--source", tmp_path / source, "--output", tmp_path / derived)
        run_stage("derive-backbone", "--by", "magnitude", *folders, "--options", f"sparsity={sparsity}")
    origin = origin_of(tmp_path / "pruned twice")
    assert (origin.hub_id, origin.commit, origin.license, origin.is_on_the_hub) == (HUB_ID, COMMIT, {"license": "mit"}, False)
    assert [step["options"]["sparsity"] for step in origin.derivations] == [0.25, 0.5]
    run = method_run(small_world, tmp_path, "vqa", "ia3", text_backbone=tmp_path / "pruned twice").train()
    config, card = read_json(run.model / "adapter_config.json"), ModelCard.load(run.model / "README.md")
    assert (config["base_model_name_or_path"], config["revision"]) == ("./pruned twice", None)
    assert card.data.base_model is None and card.data.license == "mit"
    assert f"made of `{HUB_ID}`" in card.text and card.text.count("derived by `magnitude`") == 2
    assert '.from_pretrained("./pruned twice", ' in card.text


# ------------------------------------------------------------------------------------------ releases


@pytest.fixture
def release(run: Run, tmp_path: Path) -> dict[str, Path]:
    """The run, scored, with a manifest of its training, as options of `routevl release`."""
    model, scores = shutil.copytree(run.model, tmp_path / "models" / "model"), tmp_path / "scores" / "model"
    predictions = shutil.copytree(run.predictions, tmp_path / "predictions" / "model")
    split = Path(run.options["data"]) / "test"
    run_stage("score", "--task", run.options["task"], "--split-folder", split, "--predictions", predictions, "--output", scores)
    manifest = tmp_path / "manifests/train/model.json"
    make_job(manifest, [], [])
    record = {name: value for name, value in read_manifest(manifest).items() if name != "digest"}
    write_manifest(manifest, record | {"outputs": [describe(model)]})
    return {"model": model, "scores": scores, "manifest": manifest, "output": tmp_path / "release" / "model"}


def publish(release: dict[str, Path]) -> None:
    run_stage("release", *(word for name, path in release.items() for word in (f"--{name}", path)))


def test_a_release_has_the_files_and_the_test_scores(release: dict[str, Path]) -> None:
    publish(release)
    output, model = release["output"], release["model"]
    files = {path.name for path in model.iterdir() if path.is_file()}
    assert {path.name for path in output.iterdir()} == files
    assert [name for name in files if (output / name).read_bytes() != (model / name).read_bytes()] == ["README.md"]
    card, before = ModelCard.load(output / "README.md"), ModelCard.load(model / "README.md")
    scored, items = (read_json(release["scores"] / name) for name in ("metrics.json", "items.json"))
    task = TASKS[scored["task"]]
    score = next(result for result in card.data.eval_results if result.metric_name == task.shown[task.metric])
    assert score.metric_value == round(scored["metrics"][task.metric], 4) and score.dataset_split == "test"
    assert card.data.model_name == "model" and card.data.tags == before.data.tags
    interval = mean_interval(np.asarray([items[task.metric]]), np.asarray(items["images"]))
    assert f"[{interval.low:.2f}, {interval.high:.2f}]" in card.text and f"{scored['n']} items" in card.text
    assert "bootstrap over images (" in card.text
    assert read_manifest(release["manifest"])["digest"] in card.text
    first = (output / "README.md").read_bytes()
    publish(release)
    assert (output / "README.md").read_bytes() == first


def test_a_release_of_what_does_not_belong_together_is_refused(release: dict[str, Path]) -> None:
    metrics = release["scores"] / "metrics.json"
    content = json.loads(metrics.read_text())
    write_json(metrics, content | {"run": "another"})
    with pytest.raises(RoutevlError, match="scores of the run another, not of model"):
        publish(release)
    write_json(metrics, content)
    (release["model"] / "training.jsonl").write_text("")
    with pytest.raises(RoutevlError, match="model.json: not of .*model as it is now"):
        publish(release)
    (release["model"] / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n")
    with pytest.raises(RoutevlError, match="README.md: not a card that `routevl train` wrote"):
        publish(release)
    assert not release["output"].exists()
