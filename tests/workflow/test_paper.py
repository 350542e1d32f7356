"""The paper's configuration: its plan at full size, and a run of it at toy size, with data sites and a hub on this machine."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import BIN, PROJECT, copy_project, environment
from toy_sites import download_from, fill_hub, read_table, served, snakemake, write_coco, write_table

from routevl.routing import without_ablations
from routevl.sheet import Experiment, read_sheet

PAPER = yaml.safe_load((PROJECT / "config/paper.yaml").read_text())
MODELS = {  # what the toy run uses, as deep as in the paper but narrow, with a small vocabulary
    "roberta-large": {"hidden_size": 32, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 128},
    "gpt2-medium": {"n_embd": 32, "n_layer": 24, "n_head": 16},
    "vit-large": {"hidden_size": 32, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 128},
}
RUNS = [
    "vqa_roberta-large_vit-large_lora_mul",
    "vqa_roberta-large_vit-large_lora_none",
    "caption_gpt2-medium_vit-large_adapter_attn",
]
FEEDS = "T1,T2,T6,F2"


# ------------------------------------------------------------------------------------------- at full size


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `snakemake -n` prints of the paper's grid, where nothing has been done yet."""
    folder = tmp_path_factory.mktemp("grid")
    copy_project(folder)
    return dry_run(folder, "--printshellcmds", "--configfile", "config/paper.yaml")


def commands_in(dry_run: str) -> list[str]:
    return re.findall(r"^Shell command: routevl record .* -- (routevl .*)$", dry_run, re.MULTILINE)


def dry_run(folder: Path, *options: str) -> str:
    command = [str(BIN / "snakemake"), "--dry-run", "--cores", "2", *options]
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_command_of_the_grid_is_complete(commands: str) -> None:
    lines = commands_in(commands)
    stages = [line.split()[1] for line in lines]
    assert stages.count("train") >= 300
    assert set(stages) == set(
        "download unpack prepare fetch-backbone extract index-features train score table figure provenance".split()
    )
    for line in lines:
        assert not re.search(r"\{\w|None|<function|wildcards", line), line
        assert " &> " in line, line
    [train] = [line for line in lines if "--model results/paper/models/vqa_roberta-large_vit-large_lora_mul_seed2 " in line]
    for option in ("--method lora", "--options r=128 routing=mul visual_scale=none bottleneck=shared",
                   "lora_alpha=128 lora_dropout=0", "--epochs 20", "--batch-size 512", "--learning-rate 0.0003", "--warmup 0.05",
                   "--max-text-tokens 20", "--precision bfloat16", "--control none", "--seed 2",
                   "--text-backbone results/paper/backbones/roberta-large"):  # fmt: skip
        assert f"{option} " in f"{train} ", option


def test_the_grid_is_the_papers() -> None:
    """Every pair of backbones, method and routing function with three seeds, compared with no routing; every routing function at
    every rank."""
    rows = read_sheet(PROJECT / "config/experiments/paper.tsv")
    by_name = {row.experiment: row for row in rows}
    found = {}
    for row in rows:
        if row.prefix and row.epochs == 20 and row.seeds == (1, 2, 3):
            found[row.task, row.text_backbone, row.vision_backbone, row.method, routing_of(row), row.options["r"]] = row
    for task, texts in {"vqa": ("roberta-base", "roberta-large"), "caption": ("gpt2", "gpt2-medium")}.items():
        for text in texts:
            for vision in ("vit-base", "vit-large"):
                for method in ("lora", "adapter"):
                    rank = "64" if (task, method) == ("vqa", "adapter") else "128"
                    grid = {routing: found[task, text, vision, method, routing, rank] for routing in without_ablations()}
                    assert grid["none"].versus == ""
                    assert all(row.versus == grid["none"].experiment for name, row in grid.items() if name != "none")
        ranks = {(routing_of(row), row.options["r"]) for row in rows if row.task == task and "F3" in row.feeds}
        assert {(r, k) for r in without_ablations() for k in ("16", "32", "64", "128", "256")} <= ranks
    for row in rows:
        assert row.options.get("lora_alpha", row.options["r"]) == row.options["r"], row
        if row.versus and row.prefix:
            versus = by_name[row.versus]
            assert replace(row, experiment="", options={}, versus="", feeds=()) == replace(
                versus, experiment="", options={}, versus="", feeds=()
            )
            assert {**row.options, "routing": "none"} == {**versus.options, "routing": "none"}


def routing_of(row: Experiment) -> str:
    return row.options.get("routing", "none")


def test_the_plan_tells_what_the_grid_costs(commands: str) -> None:
    result = subprocess.run(
        [sys.executable, "workflow/plan.py", "config/paper.yaml"],
        cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    jobs = len(commands_in(commands))
    with open(PROJECT / "config/experiments/paper.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    hours = dict.fromkeys(("steps", "validation", "prediction"), 0.0)
    for row in rows:
        speeds, seeds = PAPER["plan"]["text"][row["text_backbone"]], len(row["seeds"].split(","))
        learned, validated, predicted = (
            PAPER["plan"][key][row["task"]] for key in ("train_examples", "val_examples", "test_items")
        )
        passes = int(row["epochs"]) * seeds / speeds["samples_per_second"] / 3600
        hours["steps"] += learned * passes
        hours["validation"] += validated * passes / 2  # it has no backward pass
        hours["prediction"] += predicted * seeds / speeds["predictions_per_second"] / 3600
    assert int(table["train"][0]) == sum(len(row["seeds"].split(",")) for row in rows)
    assert float(table["train"][1]) == pytest.approx(sum(hours.values()), rel=2e-3)  # the last batch counts as a whole one
    for part, of_part in hours.items():
        assert float(table[part][0]) == pytest.approx(of_part, abs=0.06, rel=2e-3) and table[part][1] == "estimated"
    assert float(table["download"][2]) > 20  # the photographs alone
    assert int(table["total"][0]) == jobs + 1  # rule all has no command


def test_the_plan_gives_a_derived_backbone_the_size_of_its_source(plan_module: Any) -> None:
    derived = {"derive": {"by": "magnitude", "from": "gpt2-medium", "options": {"sparsity": 0.5}}}
    texts = PAPER["backbones"]["text"] | {"pruned": derived, "pruned again": {"derive": {**derived["derive"], "from": "pruned"}}}
    costs = plan_module.Plan(PAPER | {"backbones": PAPER["backbones"] | {"text": texts}})
    disk = costs.cost("fetch_backbone", {"name": "gpt2-medium"}).disk / 2  # there it is twice
    for name in ("pruned", "pruned again"):
        assert costs.cost("derive_backbone", {"derived": name}).disk == disk > 1e9


@pytest.fixture
def plan_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(PROJECT / "workflow")
    import plan

    return plan


JOBS = [
    ("download", {"file": "train2014.zip"}),
    ("fetch_backbone", {"name": "roberta-base"}),
    ("extract", {"vision": "vit-base"}),
    *(("train", {"run": f"{run}_seed1"}) for run in RUNS),
]


def test_the_plan_counts_jobs_without_sizes_and_speeds(plan_module: Any) -> None:
    """And what needs none of these; it says what is missing."""
    lines = plan_module.report({key: value for key, value in PAPER.items() if key != "plan"}, JOBS).splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines[1:-3]}
    assert {name: cells[0] for name, cells in table.items()} == {
        "download": "1", "fetch_backbone": "1", "extract": "1", "train": "3", "total": "6",
    }  # fmt: skip
    assert float(table["download"][2]) > 10 and table["total"][2] == table["download"][2]
    assert " ".join(table["total"][5:]) == "(5 of them not in full)" and table["download"][4:] == ["-"]
    assert lines[-1].startswith("Not counted is what needs a key that the configuration lacks: plan.text.roberta-base.width, ")
    for key in (
        "plan.images",
        "plan.train_examples.vqa",
        "plan.vision.vit-base.images_per_second",
        "plan.text.gpt2-medium.layers",
    ):
        assert f" {key}," in lines[-1] + ",", key


def test_the_plan_lacks_one_speed_and_counts_the_rest(plan_module: Any) -> None:
    whole = plan_module.report(PAPER, JOBS).splitlines()
    large = {key: value for key, value in PAPER["plan"]["text"]["roberta-large"].items() if key != "samples_per_second"}
    some = PAPER | {"plan": PAPER["plan"] | {"text": PAPER["plan"]["text"] | {"roberta-large": large}}}
    lines = plan_module.report(some, JOBS).splitlines()
    assert (
        lines[-1] == "Not counted is what needs a key that the configuration lacks: plan.text.roberta-large.samples_per_second."
    )
    assert lines[1:4] == whole[1:4]
    before, now = (float(line.split()[2]) for line in (whole[4], lines[4]))
    assert 0 < now < before and lines[4].endswith("(2 of them not in full)")
    assert lines[4].split()[4] == whole[4].split()[4]  # the weights


def test_the_plan_counts_the_examples_that_a_row_learns_from(plan_module: Any) -> None:
    some = PAPER | {"runs": PAPER["runs"] | {"max_train_examples": 605102 // 2}}
    costs = [plan_module.Plan(config).cost("train", {"run": f"{RUNS[0]}_seed1"}) for config in (PAPER, some)]
    hours = [{part.part: part.hours for part in of.hours} for of in costs]
    assert hours[1]["steps"] == pytest.approx(hours[0]["steps"] / 2, rel=1e-3)
    assert hours[1]["validation"] == hours[0]["validation"] > 0


# -------------------------------------------------------------------------------------------- at toy size


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """COCO 2014, VQAv2 and the Karpathy splits in miniature, by their official names and formats, served over HTTP."""
    root = tmp_path_factory.mktemp("sites")
    write_coco(root)
    with served(root) as address:
        yield address


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the Hugging Face hub with the pinned revisions of MODELS, which have random weights."""
    return fill_hub(tmp_path_factory.mktemp("hub"), PAPER, MODELS)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, sites: str, hub: Path) -> Path:
    """The paper's configuration with other numbers, run from nothing."""
    folder = tmp_path_factory.mktemp("paper")
    copy_project(folder)
    write_toy_config(folder, sites)
    snakemake(folder, hub, "config/paper.yaml")
    return folder


def write_toy_config(folder: Path, sites: str) -> None:
    config = yaml.safe_load((folder / "config/paper.yaml").read_text())
    config["data"]["minimum_answer_count"] = 1
    config["features"] |= {"shards": 1, "batch_size": 8, "workers": 0}
    config["training"] |= {"threads": 1, "workers": 0, "checkpoint_every": 3, "log_every": 1}
    config["runs"] |= {"prediction_batch_size": 16, "beams": 2, "max_new_tokens": 6}
    for task in config["tasks"].values():
        task |= {"batch_size": 30, "warmup": 2}
    (folder / "config/paper.yaml").write_text(yaml.safe_dump(config))
    columns, rows = read_table(folder / "config/experiments/paper.tsv")
    rows = [row | {"epochs": "1", "seeds": "1", "feeds": FEEDS} for row in rows if row["experiment"] in RUNS]
    for row in rows:
        row["options"] = re.sub(r"(r|lora_alpha)=\d+", r"\1=4", row["options"])
        row["versus"] *= row["versus"] in RUNS
    write_table(folder / "config/experiments/paper.tsv", columns, rows)
    download_from(sites, folder)


@pytest.mark.slow
def test_the_paper_at_toy_size_runs_to_its_tables(toy: Path, hub: Path) -> None:
    results = toy / "results/paper"
    for table, routing in (("T1_vqa", {"none", "mul"}), ("T2_caption", {"attn"})):
        with open(results / f"tables/{table}.csv") as file:
            rows = list(csv.DictReader(file))
        assert {row["routing"] for row in rows} == routing and {row["vision_backbone"] for row in rows} == {"vit-large"}
    assert (results / "figures/F2_main.png").stat().st_size > 10_000
    images = {split: json.loads((results / f"data/{split}/images.json").read_text()) for split in ("train", "val", "test")}
    assert {split: len(entries) for split, entries in images.items()} == {"train": 40, "val": 8, "test": 12}
    assert sum("val2014" in entry["file_name"] for entry in images["train"]) == 10  # restval
    record = json.loads((results / "downloads/train2014.zip.json").read_text())
    assert record["checksum"] == "recorded"
    run = json.loads((results / "models" / f"{RUNS[0]}_seed1/run.json").read_text())
    assert run["text_model_params"] > 24 * 12 * 32**2  # RoBERTa-large's depth
    assert "Nothing to be done" in snakemake(toy, hub, "config/paper.yaml")


@pytest.mark.slow
def test_hub_models_are_copied_with_their_commit(toy: Path) -> None:
    for name in MODELS:
        entry = {**PAPER["backbones"]["text"], **PAPER["backbones"]["vision"]}[name]
        source = json.loads((toy / f"results/paper/backbones/{name}/source.json").read_text())
        assert (source["hub_id"], source["commit"]) == (entry["path"], entry["revision"])
        assert {"config.json", "model.safetensors"} < set(source["sha256"])


# ------------------------------------------------------------------------------------------- its rehearsal


@pytest.mark.slow
def test_the_rehearsal_of_the_paper_at_toy_size(toy: Path, hub: Path) -> None:
    """Every rule, at the shapes of the real results, which are left alone."""
    real, rehearsal = toy / "results/paper", toy / "results/paper/rehearsal"
    before = contents(real)
    output = snakemake(toy, hub, "config/paper.yaml", "--config", "rehearsal=yes")
    assert contents(real, but=rehearsal) == before
    rules = {
        "score" if rule.startswith("score_") else rule for rule in re.findall(r"^(?:local)?rule (\S+):", output, re.MULTILINE)
    }
    assert rules == {
        "rehearsal_sheet", "prepare", "fetch_backbone", "extract", "index_features", "train", "score", "table", "figure",
        "provenance", "all",
    }  # fmt: skip
    made = {path.relative_to(rehearsal).as_posix() for path in rehearsal.rglob("*") if path.is_file()}
    assert {f"{kind}/{run}_seed1/timing.json" for kind in ("models", "predictions") for run in RUNS} <= made
    assert {f"{folder}/{path.name}" for folder in ("tables", "figures") for path in (real / folder).iterdir()} <= made
    assert (rehearsal / "data/answers.json").read_bytes() == (real / "data/answers.json").read_bytes()
    for run in RUNS:
        ours, theirs = (json.loads((folder / f"models/{run}_seed1/run.json").read_text()) for folder in (rehearsal, real))
        assert (ours["total_params"], ours["settings"]) == (theirs["total_params"], theirs["settings"])
    for results in (rehearsal, real):
        audit = subprocess.run([str(BIN / "routevl"), "audit", str(results)], cwd=toy, capture_output=True, text=True)
        assert audit.returncode == 0 and "everything stands" in audit.stdout, audit.stdout + audit.stderr
        assert "download train2014" in audit.stdout and "unpack val2014: stands" in audit.stdout


@pytest.mark.slow
def test_the_rehearsal_of_the_comparison_at_toy_size(toy: Path, hub: Path) -> None:
    """A configuration that extends the paper's: trials of learning rates, an ablation, a control, a method with a probe."""
    names = ("lora_none", "lora_mul", "lora_mul_split", "lora_mul_shuffled", "lora_tuned", "vl_adapter", "gradient_norm")
    chosen = {f"vqa_{name}" for name in names}
    sheet = toy / "config/experiments/comparison.tsv"
    columns, rows = read_table(sheet)
    rows = [row for row in rows if row["experiment"] in chosen]
    for row in rows:
        row["options"] = re.sub(r"(r|lora_alpha)=\d+", r"\1=4", row["options"])
        row["versus"] *= row["versus"] in chosen
    write_table(sheet, columns, rows)
    output = snakemake(toy, hub, "config/comparison.yaml", "--config", "rehearsal=yes")
    rules = re.findall(r"^(?:local)?rule (\S+):", output, re.MULTILINE)
    assert (rules.count("tune"), rules.count("probe"), rules.count("inside")) == (3, 2, 1)
    results = toy / "results/comparison/rehearsal"
    made = {path.stem for path in (results / "tables").glob("*.csv")}
    assert made == {"T0_claims", "T4_ablations", "T6_cost", "T7_methods"}
    for name, base in (("lora_tuned", 0.0003), ("vl_adapter", 0.001)):
        record = json.loads((results / f"tuning/vqa_{name}_seed0.json").read_text())
        assert [trial["learning_rate"] for trial in record["trials"]] == pytest.approx([0.3 * base, base, 3 * base])
        run = json.loads((results / f"models/vqa_{name}_seed1/run.json").read_text())
        assert run["settings"]["learning_rate"] == record["learning_rate"]


def contents(folder: Path, but: Path | None = None) -> dict[Path, tuple[int, bytes]]:
    """Time of change and bytes of each file, but for those below another folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and (but is None or not path.is_relative_to(but))]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
