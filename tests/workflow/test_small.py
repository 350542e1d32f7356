"""config/small.yaml: its plan at full size; its rehearsal, and then itself, at toy size on real photographs."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import PROJECT, copy_project, environment
from toy_sites import download_from, fill_hub, read_table, served, snakemake, write_table

from routevl.routing import without_ablations
from routevl.sheet import read_sheet

SMALL = yaml.safe_load((PROJECT / "config/small.yaml").read_text())
CONFIGURATION = "config/small.yaml"
REFERENCE = Path(os.environ.get("ROUTEVL_REFERENCE", "."))
MODELS = {
    "roberta-base": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "vit-base": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
}
ROWS = ["vqa_lora_none", "vqa_lora_attn", "vqa_lora_none_patches", "vqa_lora_attn_patches", "caption_blind", "caption_lora_mul"]
QUESTIONS = 5  # about each photograph


def plan(folder: Path) -> tuple[dict[str, list[str]], str]:
    """The table of `make plan` by its first column, and all of it."""
    command = [sys.executable, "workflow/plan.py", CONFIGURATION]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    table = done.stdout.partition("peak memory")[0]
    return {line.split()[0]: line.split()[1:] for line in table.splitlines()}, done.stdout


def test_it_takes_an_afternoon_and_compares_what_the_paper_does(tmp_path: Path) -> None:
    copy_project(tmp_path)
    table, output = plan(tmp_path)
    assert "Not counted" not in output
    assert 1 < float(table["total"][1]) <= 6 and float(table["download"][2]) < 1.5
    rows = read_sheet(PROJECT / "config/experiments/small.tsv")
    assert all(row.seeds == (1, 2, 3) for row in rows)
    for task in ("vqa", "caption"):
        for method in ("lora", "adapter"):
            of = {row.options.get("routing", "none"): row for row in rows if row.experiment.startswith(f"{task}_{method}_")
                  and row.visual_tokens == "pooled"}  # fmt: skip
            assert set(of) == set(without_ablations()) and all("T0" in row.feeds for row in of.values())
            assert {row.versus for routing, row in of.items() if routing != "none"} == {of["none"].experiment}
        [blind] = [row for row in rows if row.task == task and not row.prefix]
        assert "routing" not in blind.options
    assert sum(row.visual_tokens == "patches" for row in rows) >= 1


# -------------------------------------------------------------------------------------------- at toy size


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The archives by their official names: the reference's photographs, all captions, and questions, most about others."""
    root = tmp_path_factory.mktemp("sites")
    photographs = sorted(REFERENCE.glob("coco/val2017/*.jpg"))
    ids = [int(photograph.stem) for photograph in photographs]
    with zipfile.ZipFile(root / "val2017.zip", "w") as archive:
        for photograph in photographs:
            archive.write(photograph, f"val2017/{photograph.name}")
    with zipfile.ZipFile(root / "annotations_trainval2017.zip", "w") as archive:
        captions = gzip.decompress((REFERENCE / "coco/captions_val2017.json.gz").read_bytes())
        archive.writestr("annotations/captions_val2017.json", captions)
    members = {"questions": "v2_OpenEnded_mscoco_val2014_questions", "annotations": "v2_mscoco_val2014_annotations"}
    for kind, member in members.items():
        content = json.loads(gzip.decompress((REFERENCE / f"vqav2/{kind}_subset.json.gz").read_bytes()))
        records = sorted(content[kind], key=lambda record: record["question_id"])
        for number, record in enumerate(records[: QUESTIONS * len(ids)]):
            record["image_id"] = ids[number % len(ids)]
        with zipfile.ZipFile(root / f"v2_{kind.title()}_Val_mscoco.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{member}.json", json.dumps(content | {kind: records}))
    with served(root) as address:
        yield address


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, sites: str) -> Path:
    """The configuration with smaller numbers; nothing has been run."""
    folder = tmp_path_factory.mktemp("small")
    copy_project(folder)
    config = yaml.safe_load((folder / CONFIGURATION).read_text())
    config["data"]["minimum_answer_count"] = 2
    config["features"] |= {"batch_size": 16, "workers": 0}
    config["training"] |= {"threads": 1, "workers": 0}
    config["runs"] |= {"prediction_batch_size": 8, "beams": 2, "max_new_tokens": 6, "precision": "float32"}
    for task in config["tasks"].values():
        task["batch_size"] = 8
    (folder / CONFIGURATION).write_text(yaml.safe_dump(config))
    sheet = folder / "config/experiments/small.tsv"
    columns, rows = read_table(sheet)
    rows = [row | {"epochs": "1", "seeds": "1,2"} for row in rows if row["experiment"] in ROWS]
    for row in rows:
        row["options"] = re.sub(r"(r|lora_alpha)=\d+", r"\1=2", row["options"])
        row["versus"] *= row["versus"] in ROWS
    write_table(sheet, columns, rows)
    download_from(sites, folder)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_hub(tmp_path_factory.mktemp("hub"), SMALL, MODELS)


def images(results: Path) -> dict[str, int]:
    return {split: len(json.loads((results / f"data/{split}/images.json").read_text())) for split in ("train", "val", "test")}


@pytest.mark.slow
@pytest.mark.skipif("ROUTEVL_REFERENCE" not in os.environ, reason="ROUTEVL_REFERENCE names no folder of reference data")
def test_it_is_rehearsed_planned_and_run(toy: Path, hub: Path) -> None:
    results = toy / "results/small"
    snakemake(toy, hub, CONFIGURATION, "--config", "rehearsal=yes")
    assert sorted(path.name for path in results.iterdir()) == ["benchmarks", "downloads", "logs", "manifests", "rehearsal"]
    answers = json.loads((results / "rehearsal/data/answers.json").read_text())
    table, output = plan(toy)
    assert not {"download", "unpack"} & table.keys()
    assert table["train"][0] == str(2 * len(ROWS)) and table["train"][4] == table["extract"][4] == "rehearsed"
    assert re.search(r"^ +train +\d+ of 16000 MB, training.mem_mb  rehearsed$", output, re.MULTILINE)

    output = snakemake(toy, hub, CONFIGURATION)
    assert "rule download:" not in output and "rule unpack:" not in output
    there = images(results)
    few = images(results / "rehearsal")
    assert sum(there.values()) == len(list(REFERENCE.glob("coco/val2017/*.jpg")))
    assert few["train"] < there["train"] and all(0 < few[split] <= there[split] for split in there)
    assert json.loads((results / "data/answers.json").read_text()) == answers
    with open(results / "tables/T1_vqa.csv") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert [(row["routing"], row["n_seeds"]) for row in rows] == [("none", "2"), ("attn", "2")] * 2
    with open(results / "tables/T2_caption.csv") as file:
        assert {row["routing"] for row in csv.DictReader(file)} == {"none", "mul"}
