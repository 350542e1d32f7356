"""What the rules ask a cluster for, refuse, and put into one job."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dry_runs import change_configuration, dry_run, expect_message

JOB = re.compile(r"^(?:local)?rule (\S+):\n((?:    .*\n)*)", re.MULTILINE)
SHEET = "config/experiments/demo.tsv"


def planned(workflow: Path, *options: str) -> list[tuple[str, dict[str, str]]]:
    """The rule of each job, and what Snakemake says of it by the names that it uses."""
    status, output = dry_run(workflow, *options)
    assert status == 0, output
    return [(rule, dict(re.findall(r"^    (\w+): (.*)$", details, re.MULTILINE))) for rule, details in JOB.findall(output)]


def asked_for(workflow: Path, attempt: int) -> dict[str, tuple[int, int]]:
    """Memory and minutes of a job of each rule, at an attempt."""
    found = {}
    for rule, job in planned(workflow, "--attempt", str(attempt)):
        resources = dict(re.findall(r"(\w+)=(\d+)", job["resources"]))
        if "runtime" in resources:
            found[rule.partition("_seed")[0]] = int(resources["mem_mb"]), int(resources["runtime"])
    return found


def test_b08_retries_that_resume_ask_for_the_same_time_and_none_for_more_than_the_limits(workflow: Path) -> None:
    change_configuration(workflow, "data.runtime", 25)
    change_configuration(workflow, "training.runtime", 90)
    change_configuration(workflow, "training.mem_mb", 5000)
    first, third = asked_for(workflow, 1), asked_for(workflow, 3)
    assert first["train"] == (5000, 90) and third["train"] == (15000, 90)
    assert first["extract"] == (4000, 60) and third["extract"] == (12000, 60)
    assert first["prepare"] == (2000, 25) and third["prepare"] == (6000, 75)
    assert first["world"] == (2000, 30) and third["world"] == (6000, 90)
    assert first["pretrain_text"] == (4000, 60) and third["pretrain_text"] == (12000, 90)
    assert {time for _, time in third.values()} <= {60, 75, 90}  # 90 is the longest that the configuration asks for
    change_configuration(workflow, "max_runtime", 100)
    change_configuration(workflow, "max_mem_mb", 9000)
    third = asked_for(workflow, 3)
    assert third["train"] == (9000, 90) and third["prepare"] == (6000, 75) and third["score_vqa_blind_r8_e8"] == (9000, 100)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("results", value, f"configuration: results: the path {value!r} is empty, begins with - or ~, ")
          for value in ("", "-x", "~/x", " x", "{x}", "x\ny", "x\x85y")),
        ("experiments", "-x", "configuration: experiments: the path '-x' is"),
        ("data.root", "{x}", "configuration: data.root: the path '{x}' is"),
        ("backbones.text.other", {"path": "~/x"}, "configuration: backbones.text.other.path: the path '~/x' is"),
        *(("results", value, f"configuration: results: {value!r} is no folder of its own") for value in (".", "/", "a/../b")),
        *(("backbones.text", {name: {"path": "x"}}, f"backbones.text: {name!r} does not match")
          for name in ("..", "-x", "a b", "{x}", "x" * 101)),
        ("max_runtime", 59, "configuration: features.runtime: 60 is more than max_runtime, 59"),
        ("max_mem_mb", 3000, "configuration: features.mem_mb: 4000 is more than max_mem_mb, 3000"),
    ],
    ids=str,
)  # fmt: skip
def test_b08_b20_what_no_command_or_cluster_can_carry_is_refused(workflow: Path, key: str, value: Any, message: str) -> None:
    change_configuration(workflow, key, value)
    expect_message(workflow, message)


def test_b20_names_in_the_sheet_are_no_patterns(workflow: Path) -> None:
    """`.` in a run's name is a dot, and no target is taken for a run that it is like."""
    sheet = workflow / SHEET
    sheet.write_text(sheet.read_text().replace("vqa_blind_r8_e8", "vqa.blind"))
    assert any(rule.startswith("train") for rule, _ in planned(workflow, "results/models/vqa.blind_seed1"))
    status, output = dry_run(workflow, "results/models/vqaXblind_seed1")
    assert status != 0 and "MissingRuleException" in output


def test_b20_sources_may_lie_anywhere(workflow: Path) -> None:
    """In the data's root itself, beside it, or under an absolute path."""
    change_configuration(workflow, "world", None)
    sources = [
        {"split": split, "images": images, "captions": f"{images}/captions.json"}
        for split, images in (("train", "."), ("val", "../beside"), ("test", str(workflow / "else where")))
    ]
    change_configuration(workflow, "data.sources", sources)
    change_configuration(workflow, "data.root", "my data")
    folders = [workflow / "my data", workflow / "beside", workflow / "else where"]
    for folder in folders:
        folder.mkdir()
        (folder / "captions.json").touch()
    [(_, job)] = [job for job in planned(workflow, "results/data") if job[0] == "prepare"]
    assert {(workflow / path).resolve() for path in job["input"].split(", ")} == {
        *folders, *(folder / "captions.json" for folder in folders),
    }  # fmt: skip


def scoring(workflow: Path) -> dict[str, list[str]]:
    """The predictions of each scoring job, by the job's rule."""
    jobs = planned(workflow)
    return {rule: [w for w in job["input"].split(", ") if "predictions" in w] for rule, job in jobs if rule.startswith("score_")}


def test_b12_a_new_row_changes_the_scoring_of_its_own_baseline_alone(workflow: Path) -> None:
    before = scoring(workflow)
    for rule, predictions in before.items():
        assert rule == "score_" + predictions[0].removeprefix("results/predictions/") and len(predictions) <= 16
    sheet = workflow / SHEET
    lines = sheet.read_text().splitlines()
    [place] = [n for n, line in enumerate(lines) if line.startswith("vqa_lora_none_r2_e3\t")]
    new = lines[place].replace("vqa_lora_none_r2_e3\t", "vqa_new\t")
    sheet.write_text("\n".join([*lines[: place + 1], new, *lines[place + 1 :]]) + "\n")
    after = scoring(workflow)
    assert after == before | {"score_vqa_new_seed1": ["results/predictions/vqa_new_seed1"]}
    cells = lines[place].split("\t")
    column = lines[0].split("\t").index("versus")
    cells[0], cells[column] = "vqa_newer", "vqa_lora_none_r2_e3"
    sheet.write_text("\n".join([*lines[: place + 1], "\t".join(cells), *lines[place + 1 :]]) + "\n")
    changed = {rule for rule, predictions in scoring(workflow).items() if before.get(rule) != predictions}
    assert changed == {"score_vqa_lora_none_r2_e3_seed1"}


# ------------------------------------------------------------------------------- from the files to the command lines


def commands(workflow: Path, stage: str, *targets: str) -> list[str]:
    """The command lines of a stage that Snakemake would run."""
    status, output = dry_run(workflow, "--printshellcmds", *targets)
    assert status == 0, output
    return re.findall(rf"^Shell command: .* -- routevl ({stage} .*) &> ", output, re.MULTILINE)


def test_each_experiment_has_its_own_learning_rate_batch_size_and_scale(workflow: Path) -> None:
    """The row's, else the method's, else the task's; a number however it is written."""
    own = {
        "vqa_lora_mul_r8_e8": "learning_rate=1e-4 batch_size=3.2e1 visual_scale=layer_norm max_train_examples=5E2",
        "vqa_lora_none_r8_e8": "batch_size=8.0",
    }
    sheet = workflow / SHEET
    header, *lines = [line.split("\t") for line in sheet.read_text().splitlines()]
    for line in lines:
        line[header.index("options")] += f" {own.get(line[0], '')}"
    sheet.write_text("\n".join("\t".join(line) for line in [header, *lines]) + "\n")
    change_configuration(workflow, "methods.lora.batch_size", 24)
    found = {}
    for command in commands(workflow, "train"):
        words = dict(re.findall(r"--(learning-rate|batch-size|max-train-examples) (\S+)", command))
        scale = re.search(r" visual_scale=(\S+)", command)
        found[re.search(r"--model results/models/(\S+)_seed\d+ ", command)[1]] = {**words, "scale": scale and scale[1]}
    of_method = {"learning-rate": "0.002", "batch-size": "24", "scale": "tanh"}
    changed = {"learning-rate": "0.0001", "batch-size": "32", "max-train-examples": "500", "scale": "layer_norm"}
    assert found.pop("vqa_lora_mul_r8_e8") == changed
    assert found.pop("vqa_lora_none_r8_e8") == of_method | {"batch-size": "8"}
    assert found.pop("vqa_lora_none_r2_e3") == of_method
    assert found.pop("vqa_adapter_none_r8_e3") == of_method | {"batch-size": "16"}
    assert len(found) > 20 and not any("max-train-examples" in words for words in found.values())


def test_numbers_of_the_configuration_are_read_as_people_write_them(workflow: Path) -> None:
    """YAML takes 1e-3 for a text; 2.0 is a whole number, as `--config` or a program may write it."""
    path = workflow / "config/config.yaml"
    text = path.read_text()
    for old, new in (
        ("train_images: 700", "train_images: 7e2"),
        ("seed: 3", "seed: 3.0"),
        ("epochs: 2, hidden", "epochs: 2, learning_rate: 1E-4, hidden"),
        ("checkpoint_every: 500", "checkpoint_every: 5e2"),
        ("learning_rate: 0.002", "learning_rate: 2e-3"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    stages = r"(?!provenance)\S+"  # which has the configuration as it is, for its readers
    before = set(commands(workflow, stages))
    path.write_text(text)
    after = set(commands(workflow, stages))
    [old], [new] = before - after, after - before
    assert new == old.replace(" --epochs 2 ", " --epochs 2 --learning-rate 0.0001 ") and len(before & after) > 40


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("world.train_images", "1.5e0", "configuration: world.train_images: '1.5e0' is not of type 'integer'"),
        ("world.train_images", 2.5, "configuration: world.train_images: 2.5 is not of type 'integer'"),
        ("world.train_images", "many", "configuration: world.train_images: 'many' is not of type 'integer'"),
        ("world.train_images", "0e1", "configuration: world.train_images: 0 is less than the minimum of 1"),
        ("features.shards", True, "configuration: features.shards: True is not of type 'integer'"),
        ("plan.text.roberta.samples_per_second", "inf", "samples_per_second: 'inf' is not of type 'number'"),
        ("runs.learning_rate", "0,001", "configuration: runs: learning_rate is '0,001', expected number"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_number_in_the_configuration_is_refused(workflow: Path, key: str, value: Any, message: str) -> None:
    change_configuration(workflow, key, value)
    expect_message(workflow, message)


def own_source(split: Any, **keys: Any) -> dict[str, Any]:
    return {"split": split, "images": "images", "questions": "q.json", "annotations": "a.json"} | keys


def test_the_keys_of_a_source_reach_the_command_line(workflow: Path) -> None:
    change_configuration(workflow, "world", None)
    change_configuration(workflow, "data.root", "mine")
    first = own_source({"train": 0.9, "val": "1e-1", "seed": 1}, image_list="list.json", max_images="1e2", id_offset=1000.0)
    change_configuration(workflow, "data.sources", [first, own_source("test")])
    for name in ("images", "list.json", "q.json", "a.json"):
        (workflow / "mine" / name).mkdir(parents=True)
    [(_, job)] = [job for job in planned(workflow, "results/data") if job[0] == "prepare"]
    assert "mine/list.json" in job["input"].split(", ")
    [command] = commands(workflow, "prepare", "results/data")
    passed = json.loads(re.search(r"--sources '(.*?)'", command)[1])
    paths = {"images": "mine/images", "questions": "mine/q.json", "annotations": "mine/a.json"}
    assert passed == [
        {"split": {"train": 0.9, "val": 0.1, "seed": 1}, **paths, "image_list": "mine/list.json", "max_images": 100,
         "id_offset": 1000},
        {"split": "test", **paths},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (own_source({"train": 0.9, "val": 0.2, "seed": 1}), "expected a split, fractions that sum to 1 and a seed"),
        (own_source({"train": 1.0}), "configuration: data.sources.0.split: {'train': 1.0} is not valid"),
        (own_source("train", annotations=None), "configuration: data.sources: not a list of sources as data.sources in the "),
        (own_source("train", max_images=0), "configuration: data.sources.0.max_images: 0 is less than the minimum of 1"),
        (own_source("train", image_list="~/list.json"), "configuration: data.sources.0.image_list: the path '~/list.json' is"),
    ],
)
def test_wrong_sources_are_refused_before_anything_runs(workflow: Path, source: dict[str, Any], message: str) -> None:
    change_configuration(workflow, "data.sources", [{key: value for key, value in source.items() if value is not None}])
    expect_message(workflow, message)


def derived(workflow: Path, by: str, kind: str = "text", source: str = "roberta", **options: float) -> tuple[str, set[str], str]:
    """How a backbone is derived, what is made before, and what the job asks for."""
    change_configuration(workflow, f"backbones.{kind}.derived", {"derive": {"by": by, "from": source, "options": options}})
    jobs = dict(planned(workflow, "--printshellcmds", "results/backbones/derived"))
    _, output = dry_run(workflow, "--printshellcmds", "results/backbones/derived")
    [command] = [line for line in output.splitlines() if "derive-backbone" in line]
    return command, jobs.keys() - {"derive_backbone", f"pretrain_{kind}"}, jobs["derive_backbone"]["resources"]


def test_a_derivation_that_calibrates_reads_the_prepared_data(workflow: Path) -> None:
    command, before, _ = derived(workflow, "magnitude", sparsity=0.5)
    assert "--source results/backbones/roberta --by magnitude --options sparsity=0.5" in command and not before
    command, before, _ = derived(workflow, "multiflow", sparsity=0.63)
    assert "--source results/backbones/roberta --data results/data --by multiflow --options sparsity=0.63" in command
    assert before == {"world", "prepare"}


@pytest.mark.parametrize("flag", ["gpus", "gres"])
def test_a_derivation_that_trains_asks_for_what_training_does_and_has_a_checkpoint(workflow: Path, flag: str) -> None:
    change_configuration(workflow, "gpu_flag", flag)
    change_configuration(workflow, "training.runtime", 90)
    change_configuration(workflow, "training.mem_mb", 5000)
    gpu = {"gpus": "gpu=1", "gres": "gres=gpu:1"}[flag]
    command, before, resources = derived(workflow, "spvit", "vision", "vit", flops=0.5)
    assert before == {"world", "prepare"} and all(words in resources for words in ("mem_mb=5000", "runtime=90", gpu))
    assert "--source results/backbones/vit --data results/data --by spvit --options flops=0.5 --checkpoint" in command
    assert "--checkpoint results/checkpoints/derived --checkpoint-every 500 --threads 1 --workers 0 --output" in command
    command, _, resources = derived(workflow, "magnitude", "vision", "vit", sparsity=0.5)
    assert "--checkpoint" not in command and gpu not in resources and "mem_mb=8000" in resources and "runtime=60" in resources
