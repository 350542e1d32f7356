"""`make plan`: speeds and memory of finished runs come first, those of a rehearsal next, estimates last; and which is which."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import PROJECT, row

from routevl.configuration import read_configuration
from routevl.sheet import COLUMNS, read_sheet

EXPERIMENTS = [
    row("none", "vqa", epochs="4", seeds="1,2"),
    row("mul", "vqa", "routing=mul", versus="none", epochs="4", seeds="1,2"),
    row("patches", "vqa", epochs="4", visual_tokens="patches"),
    row("caption", "caption", epochs="2"),
]
EXAMPLES = {"train_examples": 1000, "val_examples": 200, "test_items": 300}
PLAN = {
    **{key: dict.fromkeys(("vqa", "caption"), count) for key, count in EXAMPLES.items()},
    "images": 400,
    "text": {
        name: {"layers": 2, "width": 16, "samples_per_second": 50, "predictions_per_second": 10} for name in ("roberta", "gpt2")
    },
    "vision": {"vit": {"layers": 2, "width": 16, "patches": 9, "images_per_second": 20}},
}
STEP_MS, OF_VALIDATION, OF_PREDICTION = 128, 0.25, 0.5  # of a finished run; seconds of an example, and of a prediction


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(PROJECT / "workflow")
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text("\n".join(["\t".join(COLUMNS), *EXPERIMENTS]) + "\n")
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    config["tasks"]["vqa"] |= {"batch_size": 64, "max_text_tokens": 20}
    return config | {"results": str(tmp_path / "results"), "experiments": str(sheet), "plan": PLAN}


def finish(results: Path, run: str, speed: float = 1.0, **timing: Any) -> None:
    """What a finished run leaves of its times; `speed` times as fast."""
    model, predictions = results / "models" / run, results / "predictions" / run
    usage = {"peak_memory_mb": 700.0, "device": "cpu"}
    trained = {
        "step_ms_median": STEP_MS / speed, "validation_seconds": 100 * OF_VALIDATION / speed, "validated": 100, "processes": 1,
    }  # fmt: skip
    predicted = {"prediction_seconds": 50 * OF_PREDICTION / speed, "predicted": 50}
    for path, content in (
        (model / "run.json", {"settings": {"batch_size": 64}}),
        (model / "timing.json", usage | trained | timing),
        (predictions / "timing.json", usage | predicted | {"device": timing.get("device", "cpu")}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def hours(config: dict[str, Any], run: str) -> dict[str, tuple[float, str]]:
    """Hours of each part of a training job in seconds, and where they come from."""
    import plan

    cost = plan.Plan(config).cost("train", {"run": run})
    return {part.part: (part.hours * 3600, part.source) for part in cost.hours}


def seconds(source: str, speed: float = 1.0, epochs: int = 4) -> dict[str, tuple[Any, str]]:
    """What a finished run's speed comes to."""
    parts = {
        "steps": epochs * math.ceil(1000 / 64) * STEP_MS / 1000,
        "validation": epochs * 200 * OF_VALIDATION,
        "prediction": 300 * OF_PREDICTION,
    }
    return {part: (pytest.approx(value / speed), source) for part, value in parts.items()}


def test_finished_runs_come_before_the_rehearsal_and_both_before_estimates(config: dict[str, Any]) -> None:
    results = Path(config["results"])
    estimated = hours(config, "mul_seed1")
    assert estimated["steps"] == (pytest.approx(4 * 16 * 64 / 50), "estimated")
    assert estimated["validation"] == (pytest.approx(4 * 200 / 50 / 2), "estimated")
    assert estimated["prediction"] == (pytest.approx(300 / 10), "estimated")
    finish(results / "rehearsal", "mul_seed1", speed=4)
    assert hours(config, "mul_seed1") == hours(config, "mul_seed2") == seconds("rehearsed", 4)
    assert hours(config, "none_seed1") == seconds("rehearsed", 4)  # of the same task and text backbone
    finish(results, "none_seed2", speed=2)
    assert hours(config, "none_seed1") == seconds("measured", 2)
    assert hours(config, "mul_seed1") == seconds("rehearsed", 4)  # of the same method and options
    finish(results, "mul_seed2")
    assert hours(config, "mul_seed1") == seconds("measured")
    assert hours(config, "caption_seed1")["steps"][1] == "estimated"


def test_runs_without_times_of_validation_and_prediction_lend_those_of_their_steps(config: dict[str, Any]) -> None:
    """As they were written before these were taken."""
    finish(Path(config["results"]), "mul_seed1")
    for kind in ("models", "predictions"):
        path = Path(config["results"]) / kind / "mul_seed1/timing.json"
        times = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in times.items() if k.split("_")[0] not in ("validation", "validated")}))
    (Path(config["results"]) / "predictions/mul_seed1/timing.json").unlink()
    assert {part: source for part, (_, source) in hours(config, "mul_seed2").items()} == {
        "steps": "measured", "validation": "estimated", "prediction": "estimated",
    }  # fmt: skip


def test_hours_are_those_of_all_gpus_and_of_the_batch_that_is_configured(config: dict[str, Any]) -> None:
    finish(Path(config["results"]), "mul_seed1", processes=2)
    config["tasks"]["vqa"]["batch_size"] = 32
    assert hours(config, "mul_seed1")["steps"] == (pytest.approx(2 * 4 * 32 * STEP_MS / 1000 / 2), "measured")


def test_an_estimate_grows_with_the_patches_before_the_text(config: dict[str, Any]) -> None:
    for part, (value, _) in hours(config, "patches_seed1").items():
        assert value == pytest.approx(hours(config, "none_seed1")[part][0] * (20 + 9) / (20 + 1))


def test_the_table_says_where_speeds_and_memory_come_from(config: dict[str, Any]) -> None:
    import plan

    results = Path(config["results"])
    jobs = [("extract", {"vision": "vit", "shard": "00000"}), *(("train", {"run": f"{run}_seed1"}) for run in ("mul", "caption"))]
    lines = plan.report(config, jobs).splitlines()
    assert not any("memory" in line for line in lines)
    finish(results / "rehearsal", "mul_seed1", device="a GPU", padding=0.25)
    for rule, name, megabytes in (
        ("extract", "vit-00000", 5000.4),
        ("train", "mul_seed1", 900.0),
        ("train", "none_seed1", 800.0),
    ):
        manifest = results / "rehearsal/manifests" / rule / f"{name}.json"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"peak_memory_mb": megabytes}))
    log = results / "rehearsal/logs/extract/vit-00000.log"
    log.parent.mkdir(parents=True)
    log.write_text("extract: 10/20\nextract: 60 images in 4.000 s\nextract: 40 images in 1.000 s\n")
    lines = [" ".join(line.split()) for line in plan.report(config, jobs).splitlines()]
    assert [line for line in lines if line.startswith("extract 1 ")] == ["extract 1 0.0 0.0 0.0 rehearsed"]
    assert [line.split()[-1] for line in lines if line.startswith(("train 2", "steps"))] == ["rehearsed+estimated"] * 2
    at = lines.index("peak memory")
    assert lines[at + 1 : at + 5] == [
        "extract 5000 of 4000 MB, features.mem_mb rehearsed TOO LITTLE",
        "train 900 of 4000 MB, training.mem_mb rehearsed",
        "train, GPU 700 MB rehearsed",
        "Padding is 25% of the text positions in training (rehearsed).",
    ]
    cost = plan.Plan(config).cost("extract", {"vision": "vit"})
    assert cost.gpu_hours * 3600 == pytest.approx(400 / config["features"]["shards"] * 5 / 100)


def test_features_take_the_disk_of_their_tokens(config: dict[str, Any]) -> None:
    import plan

    for tokens, patches, count in (
        (["pooled"], 49, 1), (["grid"], 49, 36), (["grid"], 9, 9), (["pooled", "patches", "grid", "all"], 9, 29),
    ):  # fmt: skip
        features = config["features"] | {"tokens": tokens}
        sizes = PLAN | {"vision": {"vit": PLAN["vision"]["vit"] | {"patches": patches}}}
        disk = plan.Plan(config | {"features": features, "plan": sizes}).cost("extract", {"vision": "vit"}).disk
        assert disk == 4 * 16 * count * 400 / features["shards"]


def test_where_a_phase_before_training_chooses_its_budget_is_planned(config: dict[str, Any]) -> None:
    import plan

    methods = ("spt_lora", "spt_adapter", "adapeft")
    rows = [row(method, "vqa", "share=0.01 freeze_layer_norm=yes", method=method) for method in methods]
    Path(config["experiments"]).write_text("\n".join(["\t".join(COLUMNS), *rows]) + "\n")
    of_model = sum(parameter.numel() for parameter in plan._text_model("encoder", 2, 16).parameters())
    head = 2 * 16**2 + 2 * 16 * plan.ANSWERS
    for method in methods:
        disk = plan.Plan(config).cost("train", {"run": f"{method}_seed1"}).disk
        assert disk == 8 * (head + round(0.01 * of_model))  # float32, twice


def test_of_two_streams_all_is_counted_that_full_fine_tuning_trains(config: dict[str, Any]) -> None:
    """The text encoder of the source's shape, both streams of the derivation's, and a head that reads two vectors."""
    import plan

    full = row("full", "vqa", method="full", text_backbone="meter", visual_tokens="all")
    Path(config["experiments"]).write_text("\n".join(["\t".join(COLUMNS), full]) + "\n")
    d, layers = 16, config["backbones"]["text"]["meter"]["derive"]["options"]["layers"]
    encoder = sum(parameter.numel() for parameter in plan._text_model("encoder", 2, d).parameters())
    pooler = d * d + d  # RoBERTa's own, which there is none of here
    stream = d * d + d + layers * (8 * (d * d + d) + 8 * d * d + 5 * d + 6 * d) + d * d + d
    head = 2 * d * 2 * d + 2 * d * plan.ANSWERS
    disk = plan.Plan(config).cost("train", {"run": "full_seed1"}).disk
    assert disk == 8 * (encoder - pooler + 2 * stream + 2 * d + head)


def test_every_method_of_demo_full_can_be_planned(config: dict[str, Any]) -> None:
    import plan

    sheet = PROJECT / "config/experiments/full.tsv"
    text = {name: sizes | {"width": 96} for name, sizes in PLAN["text"].items()}
    costs = plan.Plan(config | {"experiments": str(sheet), "plan": PLAN | {"text": text}})
    for experiment in read_sheet(sheet):
        if "T7" in experiment.feeds and experiment.task == "vqa":
            assert costs.cost("train", {"run": f"{experiment.experiment}_seed1"}).disk > 0, experiment.method


# -------------------------------------------------------------------------------------- config/multitask.yaml

VISUAL, NORMS, BIASES = 1_582_848, 49_152, 125_952
TRAINED = {  # the parameters that CLIP-BART's published rows train, counted on the original code
    "full": 141_156_864,
    "bitfit": VISUAL + BIASES,
    "vl_prompt": VISUAL + 1_261_088,
    "vl_prompt_per_task": VISUAL + 4 * 1_261_088,
    "phm_adapter": VISUAL + 30 * 74_608 + NORMS,
    "phm_adapter_per_task": VISUAL + 4 * 2_238_240 + NORMS,
    "hyperformer": VISUAL + 6_947_088 + NORMS,
    "lora_none": VISUAL + 36 * 196_608 + BIASES,
    "lora_mul": VISUAL + 36 * 196_608 + BIASES,
    "lora_per_task": VISUAL + 4 * 7_077_888 + BIASES,
    "adapter_none": 6_081_600,
    "adapter_mul": 6_081_600,
    "vl_adapter": VISUAL + 30 * 148_320 + NORMS,
    "vl_adapter_half_shared": 12_786_240,
    "vl_adapter_half_shared_up": 12_725_760,
    "vl_adapter_per_task": VISUAL + 4 * 4_449_600 + NORMS,
    "vl_pet_small": 4_291_020,
    "vl_pet_middle_x": 4_281_804,
    "vl_pet_middle_y": 4_281_792,
    "vl_pet_large": 6_052_416,
    "blind": 36 * 196_608 + BIASES,
}


@pytest.fixture
def multitask(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(PROJECT / "workflow")
    monkeypatch.chdir(PROJECT)
    return read_configuration("config/multitask.yaml")


def test_the_weights_of_the_multitask_runs_are_those_of_the_published_rows(multitask: dict[str, Any]) -> None:
    import plan

    costs = plan.Plan(multitask)
    trained = {name: costs.cost("train", {"run": f"multitask_{name}_seed1"}).disk / 8 for name in TRAINED}  # float32, twice
    assert trained == TRAINED


def test_the_multitask_plan_lacks_nothing_but_the_sizes_of_some_archives(multitask: dict[str, Any]) -> None:
    import plan

    jobs = [
        ("download", {"file": "train2014.zip"}),
        ("download", {"file": "images.zip"}),
        ("fetch_backbone", {"name": "clip-rn101-cropped"}),
        ("derive_backbone", {"derived": "clip-rn101"}),
        *[("extract", {"vision": "clip-rn101"})] * multitask["features"]["shards"],
        ("train", {"run": "multitask_lora_mul_seed1"}),
    ]
    lines = plan.report(multitask, jobs).splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines}
    assert lines[1].endswith("(1 of them not in full)")
    not_counted = [line for line in lines if line.startswith("Not counted")]
    assert not_counted == ["Not counted are archives without `bytes` in config/datasets.tsv: images.zip."]
    assert 10 < float(table["train"][1]) < 24
    assert 0.1 <= float(table["derive_backbone"][3]) <= 0.3  # RN101's 56 million weights
    assert float(table["extract"][3]) == pytest.approx(325413 * 36 * 2048 * 4 / 1e9, abs=0.1)
