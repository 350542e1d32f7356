"""What comes before training and what a method may add: probes, derived backbones, other images, losses, groups, buffers."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SmallWorld, command_line, run_stage
from runs import (
    EPOCHS,
    STEPS,
    Run,
    assert_same_outcome,
    exit_status,
    new_run,
    outcome,
    probe,
    probe_words,
    signal_at_call,
    start,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from routevl.backbones.text import load_text_backbone
from routevl.backbones.vision import load_vision_backbone
from routevl.errors import RoutevlError
from routevl.features.store import Features
from routevl.methods.base import Method
from routevl.methods.table import METHODS, MethodRow
from routevl.options import option
from routevl.settings import CONTROLS, RunSettings
from routevl.tasks.base import VisionLanguageModel
from routevl.training.checkpoint import load_checkpoint, save_checkpoint
from routevl.training.trainer import Trainer
from routevl.visual import Control, StoredFeatures

KILL = signal_at_call(VisionLanguageModel, "text_inputs", 6, signal.SIGKILL)


def killed_and_finished(run: Run) -> Run:
    """Train, but for a kill in the middle, after which a new process resumes."""
    assert exit_status(start(run, KILL)) == -signal.SIGKILL
    assert run.checkpoint.exists()
    assert exit_status(start(run)) == 0
    assert "resuming from step" in (run.root / "log").read_text()
    return run


# ------------------------------------------------------------------------------------- a method that prepares

SHARE = 0.2  # of the text model's parameters


@pytest.fixture(scope="module")
def selective(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the method that trains what has the largest gradients."""
    root = tmp_path_factory.mktemp("selective")
    run = new_run(small_world, root, "vqa", method="gradient_norm", options={"share": SHARE, "batches": 2})
    return run.changed(prepared=probe(run, root / "prepared.safetensors")).train()


def test_adapeft_is_probed_in_float32(small_world: SmallWorld, tmp_path: Path) -> None:
    """In bfloat16 small changes of the loss are lost; training is in the precision that was asked for."""
    found = []
    for precision in ("float32", "bfloat16"):
        options = {"r": 2, "share": 0.2, "batches": 2, "every": 1}
        changes = {"options": options, "freeze_layer_norm": "yes", "precision": precision}
        run = new_run(small_world, tmp_path / precision, "vqa", method="adapeft", **changes)
        AcceleratorState._reset_state()  # a process has one precision
        found.append(probe(run, tmp_path / f"{precision}.safetensors").read_bytes())
    AcceleratorState._reset_state()
    assert found[0] == found[1]


def test_a_probe_gives_the_same_bytes_again(selective: Run, tmp_path: Path) -> None:
    again = probe(new_run_of(selective, tmp_path), tmp_path / "prepared.safetensors")
    assert again.read_bytes() == selective.options["prepared"].read_bytes()


def new_run_of(run: Run, root: Path) -> Run:
    """The same run without its preparation, in another folder."""
    return Run(root, {name: value for name, value in run.options.items() if name != "prepared"})


def test_only_what_the_probe_chose_is_trained_within_the_budget(small_world: SmallWorld, selective: Run) -> None:
    """Beside it the layer norms and the head, as with every method."""
    text_model, _ = load_text_backbone(small_world.text["vqa"], "encoder")
    scores = load_file(selective.options["prepared"])
    sizes = {name: parameter.numel() for name, parameter in text_model.named_parameters()}
    assert scores.keys() == sizes.keys()
    candidates = [name for name in sizes if "LayerNorm" not in name]
    budget = SHARE * sum(sizes[name] for name in candidates)
    saved = load_file(selective.model / "method.safetensors")
    chosen = [name for name in candidates if name in saved]
    assert chosen and set(saved) == {*chosen, *(name for name in sizes if "LayerNorm" in name)}
    spent = sum(sizes[name] for name in chosen)
    assert 0.5 * budget < spent <= budget
    lowest = min(scores[name] for name in chosen)
    assert all(scores[name] <= lowest or spent + sizes[name] > budget for name in candidates if name not in chosen)
    head = load_file(selective.model / "task.safetensors")
    state = json.loads((selective.model / "last" / "state.json").read_text())
    trained = {name.removeprefix("optimiser/exp_avg/") for name in state if name.startswith("optimiser/exp_avg/")}
    assert trained == {*(f"text_model.{name}" for name in saved), *head} and all(name.startswith("head.") for name in head)
    assert all(not torch.equal(saved[name], text_model.get_parameter(name)) for name in chosen)
    record = json.loads((selective.model / "run.json").read_text())
    assert record["trainable_params_by_part"]["method"] == spent


def test_a_prepared_run_that_was_killed_ends_in_the_same_bits(selective: Run, tmp_path: Path) -> None:
    assert_same_outcome(selective, killed_and_finished(Run(tmp_path, selective.options)))


def test_a_prepared_run_predicts_by_its_folder_alone(selective: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(selective.model, tmp_path / "model")
    names = ("data", "features", "text_backbone", "vision_backbone")
    options = {name: selective.options[name] for name in names} | {"model": folder, "predictions": tmp_path / "predictions"}
    run_stage("predict", *command_line(options))
    assert outcome(tmp_path / "predictions") == [Path("results.json")]
    assert json.loads((tmp_path / "predictions" / "results.json").read_text()) == selective.results()
    (folder / "prepared.safetensors").unlink()
    with pytest.raises(RoutevlError, match="prepared.safetensors: not what `routevl probe` writes"):
        run_stage("predict", *command_line(options))


def test_preparation_that_is_missing_or_too_much_is_named(small_world: SmallWorld, selective: Run, tmp_path: Path) -> None:
    unprepared, lora = new_run_of(selective, tmp_path / "unprepared"), new_run(small_world, tmp_path / "lora", "vqa")
    prepared = selective.options["prepared"]
    caption = new_run(small_world, tmp_path / "caption", "caption", method="gradient_norm", prepared=prepared)
    junk = tmp_path / "junk.safetensors"
    junk.write_text("no tensors")
    for run, message in (
        (unprepared, "the method prepares before training: give what `routevl probe` wrote as --prepared"),
        (lora.changed(prepared=prepared), f"--prepared {prepared}: the method has no phase before training"),
        (unprepared.changed(prepared=junk), f"{junk}: not what `routevl probe` writes"),
        (unprepared.changed(prepared=tmp_path / "none"), f"{tmp_path / 'none'}: not what `routevl probe` writes"),
        (caption, "--prepared was found for another text model"),
    ):
        with pytest.raises(RoutevlError, match=re.escape(message)):
            run.train()
        assert not run.model.exists()
    with pytest.raises(RoutevlError, match="the method lora has no phase before training"):
        probe(lora, tmp_path / "none")


def test_an_unfinished_run_refuses_another_preparation(selective: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, selective.options)
    assert exit_status(start(run, KILL)) == -signal.SIGKILL
    scores = load_file(selective.options["prepared"])
    name = min(scores, key=scores.get)
    save_file(scores | {name: scores[name] * 0}, tmp_path / "other.safetensors")
    with pytest.raises(RoutevlError, match="the unfinished run has prepared .* delete .* to start again"):
        run.changed(prepared=tmp_path / "other.safetensors").train()


# -------------------------------------------------------------------------- a phase before training that trains long


@pytest.fixture(scope="module")
def search(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run whose layers to skip are searched for in 24 steps, and what the search has found undisturbed."""
    options = {"skipped": 1, "r": 2, "subsets": 2, "every": 2}
    run = new_run(small_world, tmp_path_factory.mktemp("search"), "vqa", method="das", options=options)
    return run, probe(run, run.root / "prepared.safetensors")


def killed_search(search: tuple[Run, Path], root: Path, number: int = signal.SIGKILL) -> Run:
    """The same run in another folder, whose search got a signal in its second epoch, when the gates had moved already."""
    run = Run(root, search[0].options)
    sabotage = signal_at_call(VisionLanguageModel, "text_inputs", 22, number)
    process = start(run, sabotage, ["probe", *probe_words(run, root / "prepared.safetensors")])
    assert exit_status(process) == (-number if number == signal.SIGKILL else 143)
    assert not (root / "prepared.safetensors").exists()
    gates, record = load_checkpoint(run.checkpoint)
    assert gates["own/values"].any() and STEPS["vqa"] // EPOCHS < record["step"] < STEPS["vqa"]
    return run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_search_that_was_killed_finds_the_same_gates(search: tuple[Run, Path], tmp_path: Path, number: int) -> None:
    run = killed_search(search, tmp_path, number)
    reached = load_checkpoint(run.checkpoint)[1]["step"]
    assert exit_status(start(run, words=["probe", *probe_words(run, tmp_path / "prepared.safetensors")])) == 0
    log = (tmp_path / "log").read_text()
    assert (f"probe: told to stop, checkpoint at step {reached}\n" in log) == (number == signal.SIGTERM)
    assert f"probe: resuming from step {reached} of 24\n" in log and "Traceback" not in log
    assert (tmp_path / "prepared.safetensors").read_bytes() == search[1].read_bytes()
    assert any(gate != 0 for gate in load_file(search[1]).values())
    assert not run.checkpoint.parent.exists()


def test_a_search_refuses_a_checkpoint_that_is_damaged_or_of_another_one(search: tuple[Run, Path], tmp_path: Path) -> None:
    run, output = killed_search(search, tmp_path), tmp_path / "prepared.safetensors"
    content = run.checkpoint.read_bytes()
    tensors, record = load_checkpoint(run.checkpoint)
    for other, message in (
        (run.changed(options={"every": 3}), "the unfinished run has options .* delete .* to start again"),
        (run.changed(learning_rate=0.01), "the unfinished run has learning_rate 0.02, now it is 0.01: delete"),
        (run.changed(threads=2), "the unfinished run has threads 1, now it is 2: delete"),
    ):
        with pytest.raises(RoutevlError, match=message):
            probe(other, output)
    assert run.checkpoint.read_bytes() == content
    for path, message in (
        (content[:-1] + bytes([content[-1] ^ 1]), "a damaged checkpoint .*its checksum is another"),
        (content[: len(content) // 2], "a damaged checkpoint"),
    ):
        run.checkpoint.write_bytes(path)
        with pytest.raises(RoutevlError, match=message):
            probe(run, output)
    without = {name: tensor for name, tensor in tensors.items() if name != "own/since"}
    save_checkpoint(run.checkpoint, without, record)
    with pytest.raises(RoutevlError, match="a damaged checkpoint .it lacks since.; delete it to start again"):
        probe(run, output)
    training = run.changed(prepared=search[1])
    run.checkpoint.unlink()
    assert exit_status(start(training, KILL)) == -signal.SIGKILL
    with pytest.raises(RoutevlError, match="the unfinished run has .* now it is None: delete .* to start again"):
        probe(run, output)
    assert not output.exists()


# ------------------------------------------------------------------------------------------- derived backbones

LINEAR_WEIGHTS = {  # by their names in the files
    "roberta": r"roberta\.encoder\.layer\.\d\.(attention\.(self\.(query|key|value)|output\.dense)|(intermediate|output)\.dense)",
    "gpt2": r"transformer\.h\.\d\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)",
    "vit": r"blocks\.\d\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)",
}


def derive(source: Path, output: Path, *options: str, by: str = "magnitude") -> Path:
    run_stage("derive-backbone", "--by", by, "--source", source, "--options", *options, "--output", output)
    return output


@pytest.mark.parametrize("kind", LINEAR_WEIGHTS)
def test_the_smallest_half_of_all_linear_weights_is_pruned_and_nothing_else(
    small_world: SmallWorld, tmp_path: Path, kind: str
) -> None:
    source = {"roberta": small_world.text["vqa"], "gpt2": small_world.text["caption"], "vit": small_world.vision[16]}[kind]
    derived = derive(source, tmp_path / "derived", "sparsity=0.5")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, derived))
    assert before.keys() == after.keys()
    linear = [name for name in before if re.fullmatch(LINEAR_WEIGHTS[kind] + r"\.weight", name)]
    assert len(linear) == {"roberta": 12, "gpt2": 8, "vit": 4}[kind]
    assert all(torch.equal(before[name], after[name]) for name in before if name not in linear)
    old, new = (torch.cat([tensors[name].flatten() for name in linear]) for tensors in (before, after))
    zero = new == 0
    assert int(zero.sum()) == math.floor(0.5 * len(new))
    assert torch.equal(old[~zero], new[~zero])
    assert old[zero].abs().max() <= old[~zero].abs().min()
    record = json.loads((derived / "derived.json").read_text())
    assert (record["by"], record["options"], record["zero"]) == ("magnitude", {"sparsity": 0.5}, int(zero.sum()))
    assert outcome(derived) == sorted([*outcome(source), Path("derived.json")])
    if kind == "vit":
        model = load_vision_backbone(derived).model
    else:
        model, _ = load_text_backbone(derived, {"roberta": "encoder", "gpt2": "decoder"}[kind])
    zeros = sum(int((parameter == 0).sum()) for name, parameter in model.named_parameters() if parameter.dim() == 2)
    assert zeros >= int(zero.sum())
    again = derive(source, tmp_path / "again", "sparsity=0.5")
    assert [name for name in outcome(derived) if (derived / name).read_bytes() != (again / name).read_bytes()] == []


def test_files_as_on_the_hub_are_pruned_to_the_entry(small_world: SmallWorld, tmp_path: Path) -> None:
    """GPT-2's there lacks the prefix of the model with its head; in half precision many entries are equally small."""
    source = Path(shutil.copytree(small_world.text["caption"], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    hub = {name.removeprefix("transformer."): tensor.half() for name, tensor in tensors.items()}
    save_file(hub, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config))
    derived = derive(source, tmp_path / "derived", "sparsity=0.5")
    record = json.loads((derived / "derived.json").read_text())
    assert record["zero"] == math.floor(0.5 * record["entries"]) > 0
    model, _ = load_text_backbone(derived, "decoder")
    weight = model.transformer.h[0].mlp.c_fc.weight
    whole = hub["h.0.mlp.c_fc.weight"].float()
    assert torch.equal(weight[weight != 0], whole[weight != 0]) and 0.1 < (weight == 0).float().mean() < 0.9


@pytest.mark.parametrize(
    ("by", "options", "message"),
    [
        ("size", ["sparsity=0.5"], "by 'size' is not a derivation: choose one of magnitude"),
        ("magnitude", [], "--options: magnitude: the option sparsity is missing"),
        ("magnitude", ["sparsity=1"], "--options: magnitude: sparsity is 1.0, expected less than 1"),
        ("magnitude", ["sparsity=half"], "--options: magnitude: sparsity is 'half', expected number"),
        ("magnitude", ["sparsity=0.5", "seed=1"], "--options: magnitude: no option 'seed' (there are sparsity)"),
        ("magnitude", ["0.5"], "--options: '0.5' is not of the form key=value"),
    ],
)
def test_a_wrong_derivation_is_named(small_world: SmallWorld, tmp_path: Path, by: str, options: list[str], message: str) -> None:
    with pytest.raises(RoutevlError, match=re.escape(message)):
        derive(small_world.text["vqa"], tmp_path / "derived", *options, by=by)
    with pytest.raises(RoutevlError, match="no such folder"):
        derive(tmp_path / "none", tmp_path / "derived", "sparsity=0.5")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- what the image is


def control(world: SmallWorld, kind: str, seed: int = 5) -> Control:
    return Control(StoredFeatures(Features(world.features[16], "patches")), kind, seed)


@pytest.mark.parametrize("kind", [kind for kind in CONTROLS if kind != "none"])
def test_a_control_is_a_function_of_seed_and_image(small_world: SmallWorld, kind: str) -> None:
    source, first, other = control(small_world, kind).source, control(small_world, kind), control(small_world, kind, seed=6)
    ids = first.image_ids.tolist()
    real, shown = source.of(ids), first.of(ids)
    assert shown.shape == real.shape and shown.dtype == torch.float32
    assert torch.equal(control(small_world, kind).of(ids[::-1]), shown.flip(0))
    assert all(torch.equal(first.of([image_id])[0], row) for image_id, row in zip(ids, shown, strict=True))
    assert not any(torch.equal(*rows) for rows in zip(real, shown, strict=True))
    if kind == "ones":
        assert torch.equal(shown, torch.ones_like(real))
        return
    assert not torch.equal(other.of(ids), shown)
    assert len(shown.flatten(1).unique(dim=0)) == len(ids)
    if kind == "noise":
        assert abs(shown.mean()) < 0.1 and abs(shown.std() - 1) < 0.1
    else:
        assert torch.equal(shown.flatten(1).unique(dim=0), real.flatten(1).unique(dim=0))


@pytest.mark.parametrize("kind", [kind for kind in CONTROLS if kind != "none"])
def test_a_control_does_not_hide_that_an_image_is_missing(small_world: SmallWorld, kind: str) -> None:
    missing = control(small_world, kind).image_ids.max().item() + 1
    for ask in (control(small_world, kind).check, control(small_world, kind).of):
        with pytest.raises(RoutevlError, match=f"{missing}"):
            ask([missing])


@pytest.mark.parametrize("kind", ["noise", "shuffled"])
@pytest.mark.parametrize("task_name", ["vqa", "caption"])
def test_what_stands_in_for_the_image_in_the_bottleneck_is_its_own_everywhere(
    small_world: SmallWorld, tmp_path: Path, task_name: str, kind: str
) -> None:
    """In training and in prediction an image has one stand-in, and the prefix the image itself."""
    task = new_run(small_world, tmp_path, task_name, options={"routing": "mul", "routed_features": kind}).trainer().task
    of_image: dict[int, Tensor] = {}
    for examples in (list(task.training_examples())[:6], list(task.to_predict("train"))[:6]):
        batch = task.collate(examples)
        ids = [example["image_id"] for example in examples]
        assert torch.equal(batch["image"], task.visual.of(ids)) and not torch.equal(batch["routed_image"], batch["image"])
        for image_id, routed in zip(ids, batch["routed_image"], strict=True):
            assert torch.equal(of_image.setdefault(image_id, routed), routed)
    model, items = task.model.eval(), list(task.to_predict("train"))[:3]
    batch = task.collate(items)
    predicted = task.predict(model, dict(batch))
    assert [entry for item in items for entry in task.predict(model, task.collate([item]))] == predicted


@pytest.fixture(scope="module")
def baseline(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return new_run(small_world, tmp_path_factory.mktemp("baseline"), "vqa").train()


@pytest.mark.parametrize("kind", [kind for kind in CONTROLS if kind != "none"])
def test_a_run_on_a_control_ends_in_other_bits(small_world: SmallWorld, tmp_path: Path, baseline: Run, kind: str) -> None:
    run = new_run(small_world, tmp_path, "vqa", control=kind).train()
    with pytest.raises(RoutevlError, match="differ, first in"):
        run_stage("compare", baseline.model, run.model)
    assert json.loads((run.model / "run.json").read_text())["settings"]["control"] == kind


# ------------------------------------------------------------------------------------------- methods of these tests


class Beside(Method):
    """Adapts nothing: what every method trains beside itself is all."""

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        for name in train_also:
            text_model.get_submodule(name).requires_grad_(True)
        return text_model

    def part_of(self, name: str) -> str:
        return "layer_norm"


class FromPixels(Beside):
    """The vision model runs in the training process; its last norm is trained."""

    needs = frozenset({"pixels"})

    def adapt_vision(self, vision_model: nn.Module) -> nn.Module:
        vision_model.norm.requires_grad_(True)
        return vision_model


class Gated(Beside):
    """An extra loss, whose weight is a buffer that grows after each step, and slower layer norms."""

    @dataclass(frozen=True)
    class Options:
        extra: float = option("weight of the sum of all squares", 0.0, least=0)
        slow: float = option("the layer norms' learning rate, as a share of the others'", 1.0, least=0)

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        text_model.register_buffer("gate", torch.zeros(()))
        return super().build(text_model, prepared, train_also)

    def losses(self, model: VisionLanguageModel, output: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.options.extra:
            return {}
        squares = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        return {"extra": self.options.extra * model.text_model.gate * squares}

    def groups(self, model: VisionLanguageModel, learning_rate: float) -> list[dict[str, Any]]:
        trained = [(name.startswith("text_model."), p) for name, p in model.named_parameters() if p.requires_grad]
        rates = {False: learning_rate, True: learning_rate * self.options.slow}
        return [{"params": [p for of, p in trained if of == slow], "lr": lr} for slow, lr in rates.items()]

    def after_step(self, trainer: Trainer) -> None:
        trainer.task.model.text_model.gate += 1

    def tensors(self, text_model: nn.Module) -> dict[str, Tensor]:
        return {**super().tensors(text_model), "gate": text_model.gate}


@pytest.fixture(autouse=True)
def methods_of_these_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The classes above as rows of the list."""
    monkeypatch.setitem(sys.modules, "routevl.methods.of_tests", sys.modules[__name__])
    for method in (Beside, FromPixels, Gated):
        monkeypatch.setitem(METHODS, method.__name__, MethodRow("Test", "full", "", f"of_tests:{method.__name__}"))
    [field] = [field for field in fields(RunSettings) if field.name == "method"]
    monkeypatch.setattr(field, "metadata", {**field.metadata, "choices": tuple(METHODS)})
    yield


def without_features(run: Run) -> Run:
    return Run(run.root, {name: value for name, value in run.options.items() if name != "features"})


@pytest.mark.parametrize("tokens", ["pooled", "patches"])
def test_pixels_give_the_visual_tokens_that_are_stored(small_world: SmallWorld, tmp_path: Path, tokens: str) -> None:
    run = without_features(new_run(small_world, tmp_path, "vqa", method="FromPixels", visual_tokens=tokens, width=24))
    task = run.trainer().task
    stored = Features(small_world.features[24], tokens)
    ids = stored.image_ids.tolist()
    assert task.visual.image_ids.tolist() == ids and (task.visual.length, task.visual.width) == (stored.length, stored.width)
    task.model.train()
    with torch.no_grad():
        live = task.model.vision(task.visual.of(ids))
    torch.testing.assert_close(live, stored.features(ids), rtol=1e-5, atol=1e-5)


def test_a_run_from_pixels_trains_predicts_and_resumes(small_world: SmallWorld, tmp_path: Path) -> None:
    run = without_features(new_run(small_world, tmp_path / "pixels", "vqa", method="FromPixels")).train()
    assert_same_outcome(run, killed_and_finished(Run(tmp_path / "killed", run.options)))
    vision = {name: t for name, t in load_file(run.model / "task.safetensors").items() if not name.startswith("head.")}
    assert set(vision) == {"vision.model.norm.weight", "vision.model.norm.bias"}
    with safe_open(small_world.vision[16] / "model.safetensors", framework="pt") as file:
        assert not torch.equal(file.get_tensor("norm.weight"), vision["vision.model.norm.weight"])
    record = json.loads((run.model / "run.json").read_text())
    assert record["trainable_params_by_part"]["vision"] == 2 * 16
    names = ("data", "text_backbone", "vision_backbone")
    options = {name: run.options[name] for name in names} | {"model": run.model, "predictions": tmp_path / "predictions"}
    run_stage("predict", *command_line(options))
    assert (tmp_path / "predictions" / "results.json").read_bytes() == (run.predictions / "results.json").read_bytes()


@pytest.mark.parametrize("name", ["vqa", "multitask"])
def test_losses_from_pixels_are_those_from_stored_features(small_world: SmallWorld, tmp_path: Path, name: str) -> None:
    """Of items with one image, and (multitask) of those with two."""
    tasks = {
        "pixels": without_features(new_run(small_world, tmp_path, name, method="FromPixels")).trainer().task,
        "stored": new_run(small_world, tmp_path, name, method="Beside").trainer().task,
    }
    weights = tasks["stored"].model.tensors()
    losses = {}
    for name, task in tasks.items():
        for tensor, own in task.model.tensors().items():
            if tensor in weights:
                own.copy_(weights[tensor])
        with torch.no_grad():
            losses[name] = task.model.eval()(**task.collate(list(task.examples("val"))))["losses"]
    torch.testing.assert_close(losses["pixels"], losses["stored"], rtol=1e-5, atol=1e-5)


def test_missing_features_are_named_where_the_method_reads_them(small_world: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(RoutevlError, match="--features is missing: the method reads stored features"):
        without_features(new_run(small_world, tmp_path, "vqa", method="Beside")).train()


@pytest.fixture
def gated(small_world: SmallWorld, tmp_path: Path) -> Run:
    options = {"extra": 0.001, "slow": 0.1}
    return new_run(small_world, tmp_path / "gated", "vqa", method="Gated", options=options, log_every=1).train()


def test_a_further_loss_is_logged_by_its_name_and_learned(small_world: SmallWorld, tmp_path: Path, gated: Run) -> None:
    """It is zero in the first step, as the gate is."""
    lines = [line for line in gated.lines() if "loss" in line]
    assert [line["extra"] == 0 for line in lines] == [True] + [False] * (STEPS["vqa"] - 1)
    without = new_run(small_world, tmp_path / "without", "vqa", method="Gated", options={"slow": 0.1}, log_every=1).train()
    others = [line for line in without.lines() if "loss" in line]
    assert not any("extra" in line for line in others)
    assert [ours["loss"] == theirs["loss"] for ours, theirs in zip(lines[:3], others[:3], strict=True)] == [True, True, False]
    with pytest.raises(RoutevlError, match="differ, first in"):
        run_stage("compare", gated.model, without.model)


def test_a_run_with_groups_and_buffers_that_was_killed_ends_in_the_same_bits(tmp_path: Path, gated: Run) -> None:
    assert_same_outcome(gated, killed_and_finished(Run(tmp_path / "killed", gated.options)))


def test_each_group_has_its_own_learning_rate(small_world: SmallWorld, tmp_path: Path) -> None:
    """At none the layer norms stay where they were, before and after a kill."""
    run = new_run(small_world, tmp_path, "vqa", method="Gated", options={"slow": 0.0})
    first, second = run.trainer().optimisation.optimiser.param_groups
    assert (first["initial_lr"], second["initial_lr"]) == (run.options["learning_rate"], 0.0)
    killed_and_finished(run)
    text_model, _ = load_text_backbone(small_world.text["vqa"], "encoder")
    saved = load_file(run.model / "last" / "method.safetensors")
    assert all(torch.equal(tensor, text_model.get_parameter(name)) for name, tensor in saved.items() if name != "gate")
    state = json.loads((run.model / "last" / "state.json").read_text())
    start_of = run.trainer().task.model.tensors()
    head = load_file(run.model / "last" / "task.safetensors")
    assert all(not torch.equal(tensor, start_of[name]) for name, tensor in head.items())
    assert any(name.startswith("optimiser/exp_avg/text_model.") for name in state)


def test_buffers_are_those_of_the_best_epoch(small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qualities = iter([2.0, 1.0])
    monkeypatch.setattr(Trainer, "_validate", lambda trainer: {"val_loss": 1.0, "val_accuracy": next(qualities)})
    run = new_run(small_world, tmp_path, "vqa", method="Gated").train()
    gates = [load_file(folder / "method.safetensors")["gate"].item() for folder in (run.model, run.model / "last")]
    assert gates == [STEPS["vqa"] / EPOCHS, STEPS["vqa"]]
    trainer = run.trainer()
    trainer.task.model.load(run.model)
    assert trainer.task.model.text_model.gate == STEPS["vqa"] / EPOCHS
