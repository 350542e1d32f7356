"""The multi-task configuration at toy size, with data sites and a hub on this machine, from archives to tables."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_project import BIN, PROJECT, copy_project
from toy_sites import attempt, download_from, fill_hub, read_table, served, snakemake, write_coco, write_table

from routevl.configuration import read_configuration

pytestmark = pytest.mark.slow

CONFIG = "config/multitask.yaml"
SHEET = "config/experiments/multitask.tsv"
SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
MODELS = {  # of the real architectures, but narrow
    "bart-base": {"d_model": 32, **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIDES.items()}},
    "clip-rn101-cropped": {"width_factor": 0.0625},
}
RESULTS = Path("results/multitask")
EXPERIMENTS = [  # each method, but one VL-PET alone, and each way of having tensors of each task
    "multitask_blind", "multitask_lora_none", "multitask_lora_mul", "multitask_adapter_attn", "multitask_lora_mul_shuffled",
    "multitask_full", "multitask_bitfit", "multitask_vl_prompt_per_task", "multitask_phm_adapter_per_task",
    "multitask_hyperformer", "multitask_lora_per_task", "multitask_vl_adapter_per_task", "multitask_vl_adapter_half_shared",
    "multitask_vl_adapter_half_shared_up", "multitask_vl_pet_small",
]  # fmt: skip
OFFICIAL = {"train": "train", "val": "dev", "test": "test1"}  # the demo world's splits and NLVR2's
PHOTOGRAPHS = {"train": ("train_img.zip", "images/train"), "val": ("dev_img.zip", "dev"), "test": ("test1_img.zip", "test1")}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets in miniature, by their official names and formats; NLVR2's photographs in the folder `requested`."""
    root = tmp_path_factory.mktemp("sites")
    write_coco(root)
    write_gqa(root)
    write_nlvr2(root)
    return root


def write_gqa(root: Path) -> None:
    """The questions of the world that `write_coco` made, about images that are named as Visual Genome's and testdev's are."""
    with zipfile.ZipFile(root / "images.zip", "w") as images, zipfile.ZipFile(root / "questions1.2.zip", "w") as questions:
        for split, name in {"train": "train", "val": "val", "test": "testdev"}.items():
            content = json.loads((root / "world" / split / "gqa_questions.json").read_text())
            for question in content.values():
                file = f"{question['imageId']}.png"
                question["imageId"] = ("n" if split == "test" else "") + str(int(question["imageId"].rpartition("_")[2]))
                if (name_there := f"images/{question['imageId']}.jpg") not in images.namelist():
                    images.write(root / "world" / split / "images" / file, name_there)
            questions.writestr(f"{name}_balanced_questions.json", json.dumps(content))


def write_nlvr2(root: Path) -> None:
    """The world's examples, with images by the names of their pairs; the train images are in numbered folders."""
    (root / "requested").mkdir()
    for split, name in OFFICIAL.items():
        archive, below = PHOTOGRAPHS[split]
        lines = []
        with zipfile.ZipFile(root / "requested" / archive, "w") as images:
            for line in (root / "world" / split / "nlvr2.jsonl").read_text().splitlines():
                example = json.loads(line)
                example["identifier"] = example["identifier"].replace(split, name)
                folder = below
                if split == "train":
                    example["directory"] = int(example["identifier"].split("-")[1]) % 2
                    folder = f"{below}/{example['directory']}"
                for side, key in enumerate(("left_url", "right_url")):
                    pair = f"{folder}/{example['identifier'].rpartition('-')[0]}-img{side}.png"
                    if pair not in images.namelist():
                        images.write(root / "world" / split / "images" / example[key], pair)
                    example[key] = f"https://photographs.example/{example[key]}"
                lines.append(json.dumps(example))
        (root / f"{name}.json").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def sites(archives: Path) -> Iterator[str]:
    with served(archives) as address:
        yield address


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_hub(tmp_path_factory.mktemp("hub"), read_configuration(PROJECT / CONFIG), MODELS)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, archives: Path, sites: str, hub: Path) -> Path:
    """The configuration with other numbers, run from nothing."""
    folder = new_project(tmp_path_factory.mktemp("multitask"), sites)
    shutil.copytree(archives / "requested", folder / "data/downloads")
    snakemake(folder, hub, CONFIG)
    return folder


def new_project(folder: Path, sites: str) -> Path:
    copy_project(folder)
    config = yaml.safe_load((folder / CONFIG).read_text())
    config["data"]["minimum_answer_count"] = 1
    config["features"] |= {"shards": 1, "batch_size": 8, "workers": 0}
    config["training"] |= {"gpus": 0, "threads": 1, "workers": 0, "checkpoint_every": 20, "log_every": 1}
    config["runs"] |= {"prediction_batch_size": 64, "beams": 2, "max_new_tokens": 6}
    config["tasks"]["multitask"] |= {"batch_size": 60, "warmup": 2}
    (folder / CONFIG).write_text(yaml.safe_dump(config))
    columns, rows = read_table(folder / SHEET)
    rows = [row | {"epochs": "1", "seeds": "1"} for row in rows if row["experiment"] in EXPERIMENTS]
    for row in rows:
        row["options"] = re.sub(r"\br=\d+", "r=4", row["options"])
        row["versus"] *= row["versus"] in EXPERIMENTS
    write_table(folder / SHEET, columns, rows)
    download_from(sites, folder)
    return folder


def test_photographs_that_are_given_on_request_are_asked_for_in_one_line(tmp_path: Path, sites: str, hub: Path) -> None:
    status, output = attempt(new_project(tmp_path, sites), hub, CONFIG, "data/nlvr2_dev_img")
    assert status != 0
    [line] = [line for line in output.splitlines() if "error: " in line]
    assert "dev_img.zip is given on request alone (https://github.com/lil-lab/nlvr" in line
    assert "Put it at data/downloads/dev_img.zip by hand" in line


def test_the_multitask_setting_at_toy_size_runs_to_its_tables(toy: Path, hub: Path) -> None:
    results = toy / RESULTS
    _, rows = read_table(toy / SHEET)
    with open(results / "tables/T3_multitask.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == sum("T3" in row["feeds"] for row in rows) == len(EXPERIMENTS) - 1  # the control is T4's
    for row in table:
        scores = [float(row[f"{name}_mean"]) for name in ("vqa", "gqa", "nlvr2", "caption")]
        assert float(row["average_mean"]) == pytest.approx(sum(scores) / 4) and max(scores) > 0, row["experiment"]
    made = {path.stem for folder in ("tables", "figures") for path in (results / folder).glob("*.csv")}
    assert made >= {"T0_claims", "T3_multitask", "T4_ablations", "T6_cost", "F10_multitask"}
    assert (results / "figures/F10_multitask.png").stat().st_size > 10_000
    assert "Nothing to be done" in snakemake(toy, hub, CONFIG)


def test_everything_stands_by_its_manifests(toy: Path) -> None:
    audit = subprocess.run([str(BIN / "routevl"), "audit", str(RESULTS)], cwd=toy, capture_output=True, text=True)
    assert audit.returncode == 0 and "everything stands" in audit.stdout, audit.stdout + audit.stderr
    for name in ("download train_img.zip", "unpack gqa_images", "unpack nlvr2_dev", "derive_backbone clip-rn101"):
        assert f"{name}: stands" in audit.stdout, audit.stdout


def test_each_data_set_is_in_the_splits_that_the_configuration_says(toy: Path) -> None:
    data = toy / RESULTS / "data"
    images = {name: {entry["id"]: entry["file_name"] for entry in json.loads((data / name / "images.json").read_text())}
              for name in ("train", "val", "test")}  # fmt: skip
    of_gqa = {name: [q["imageId"] for q in json.loads((data / name / "gqa.json").read_text()).values()] for name in images}
    assert all(image.startswith("n") for image in of_gqa["test"])
    learned, chosen_by = set(of_gqa["train"]), set(of_gqa["val"])
    of_val = {image for image in learned | chosen_by if int(image) // 1_000_000 == 2}
    assert len(chosen_by) == 1 and chosen_by < of_val and len(learned - of_val) == 40  # a tenth of 8
    for name, split in OFFICIAL.items():
        examples = [json.loads(line) for line in (data / name / "nlvr2.jsonl").read_text().splitlines()]
        assert examples and all(example["identifier"].startswith(f"{split}-") for example in examples)
        for example in examples:
            pair = example["identifier"].rpartition("-")[0]
            assert [Path(images[name][n]).stem for n in example["image_ids"]] == [f"{pair}-img0", f"{pair}-img1"]
    captions = json.loads((data / "train/captions.json").read_text())["annotations"]
    assert Counter("val2014" in images["train"][caption["image_id"]] for caption in captions) == {False: 150, True: 50}  # restval


def test_photographs_are_squashed_for_clip(toy: Path) -> None:
    crops = []
    for name in ("clip-rn101-cropped", "clip-rn101"):
        preprocessing = json.loads((toy / RESULTS / "backbones" / name / "config.json").read_text())["pretrained_cfg"]
        crops.append((preprocessing["crop_mode"], preprocessing["crop_pct"], preprocessing["interpolation"]))
    assert crops == [("center", 0.9, "bicubic"), ("squash", 1, "bicubic")]


def test_the_early_check_has_built_what_the_runs_train(toy: Path) -> None:
    """Each row here is a case of its own, and has the counts that its run then has."""
    checked = json.loads((toy / RESULTS / "checked_models.json").read_text())["checked"]
    assert [entry["experiment"] for entry in checked] == EXPERIMENTS
    for entry in checked:
        run = json.loads((toy / RESULTS / "models" / f"{entry['experiment']}_seed1" / "run.json").read_text())
        assert run["trainable_params_by_part"] == entry["trainable_params_by_part"], entry["experiment"]
        assert run["settings"]["learning_rate"] == learning_rate(entry), entry["experiment"]


def learning_rate(entry: dict[str, str]) -> float:
    return 0.0001 if entry["method"] == "full" else 0.0003 if entry["experiment"] == "multitask_vl_adapter_per_task" else 0.001
