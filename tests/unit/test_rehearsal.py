"""A rehearsal: a configuration and a run sheet of their own, made from the real ones; and the few data that it keeps."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SmallWorld, run_stage
from dry_runs import change_configuration, dry_run, expect_message
from tiny_project import PROJECT

from routevl.rehearsal import rehearsed, rehearsed_sheet
from routevl.sheet import read_sheet, write_sheet
from routevl.slurm import kind_of

CONFIGURATIONS = ["config", "paper", "sample"]


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((PROJECT / f"config/{name}.yaml").read_text())


def words(value: Any, place: str = "") -> dict[str, Any]:
    """The values of a configuration by their places."""
    if not isinstance(value, dict):
        return {place.removeprefix("."): value}
    return {at: leaf for key, child in value.items() for at, leaf in words(child, f"{place}.{key}").items()}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_only_what_takes_long_is_less_and_nothing_that_decides_shapes_or_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    config = read(name)
    before = copy.deepcopy(config)
    again = rehearsed(config, read_sheet(config["experiments"]))
    assert config == before
    real, rehearsal = words(config), words(again)
    changed = {key for key in real.keys() | rehearsal.keys() if real.get(key) != rehearsal.get(key)}
    pretraining = {key for key in changed if re.search(r"\.pretrain\.(sentences|images|epochs)$", key)}
    own = {"results", "experiments", "data.few", "features.shards", *(["data.root"] if name == "config" else [])}
    training = {key for key in changed if re.search(r"\.derive\.options\.((search_|tune_|)epochs|examples)$", key)}
    assert changed - pretraining - training - {"features.shards"} == own - {"features.shards"}
    assert {rehearsal[key] for key in training} == ({1, 500} if name == "config" else set())
    assert again["results"] == f"{config['results']}/rehearsal" and again["features"]["shards"] == 1
    assert all(rehearsal[key] < real[key] for key in pretraining)
    assert again["data"]["few"] == {"config": 256, "paper": 512, "sample": 32}[name]  # the largest batch


@pytest.mark.parametrize("sheet", ["demo", "full", "paper", "sample"])
def test_every_experiment_is_rehearsed_once(sheet: str, tmp_path: Path) -> None:
    """And a sheet that was written is read as the same; budgets are told apart."""
    real = read_sheet(PROJECT / f"config/experiments/{sheet}.tsv")
    few = rehearsed_sheet(real)
    run_stage("rehearsal-sheet", "--experiments", PROJECT / f"config/experiments/{sheet}.tsv", "--output", tmp_path / "few.tsv")
    assert read_sheet(tmp_path / "few.tsv") == few
    write_sheet(tmp_path / "real.tsv", real)
    assert read_sheet(tmp_path / "real.tsv") == real
    assert [(e.experiment, e.method, e.options, e.feeds) for e in few] == [
        (e.experiment, e.method, e.options, e.feeds) for e in real
    ]
    assert all(len(e.seeds) == 1 for e in few)
    budgets = sorted({e.epochs for e in real})
    assert [budgets[e.epochs - 1] for e in few] == [e.epochs for e in real]


def test_preparation_keeps_few_images_with_the_longest_texts_and_counts_all_answers(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    names = ("questions", "annotations", "captions")
    sources = [
        {"split": split, "images": str(small_world.root / "world" / split / "images")}
        | {name: str(small_world.root / "world" / split / f"{name}.json") for name in names}
        for split in ("train", "val", "test")
    ]
    run_stage("prepare", "--sources", json.dumps(sources), "--minimum-answer-count", 1, "--few", 2, "--output", tmp_path / "few")
    assert (tmp_path / "few/answers.json").read_bytes() == (small_world.data / "answers.json").read_bytes()
    for split in ("train", "val", "test"):
        kept = {image["id"] for image in json.loads((tmp_path / "few" / split / "images.json").read_text())}
        wanted: set[int] = set()
        for name, key, text in (("questions", "questions", "question"), ("captions", "annotations", "caption")):
            every = json.loads((small_world.data / split / f"{name}.json").read_text())[key]
            longest = sorted(every, key=lambda record: -len(record[text]))[:2]
            wanted |= {record["image_id"] for record in [*every[:2], *longest]}
            few = json.loads((tmp_path / "few" / split / f"{name}.json").read_text())[key]
            assert few == [record for record in every if record["image_id"] in kept]
        assert kept == wanted
        annotations = json.loads((tmp_path / "few" / split / "annotations.json").read_text())["annotations"]
        assert {record["image_id"] for record in annotations} <= kept and annotations
    assert len(json.loads((tmp_path / "few/train/images.json").read_text())) < 12


# ----------------------------------------------------------------------------------------------- in the workflow


REHEARSAL = ("--config", "rehearsal=yes")


def jobs_of(workflow: Path, *options: str) -> str:
    status, output = dry_run(workflow, "--printshellcmds", *options)
    assert status == 0, output
    return output


def test_a_rehearsal_writes_nothing_beside_its_folder_and_reads_none_of_the_real_results(workflow: Path) -> None:
    output = jobs_of(workflow, *REHEARSAL)
    paths = re.findall(r"(?<![\w/.])results/[\w./-]+", output)
    assert paths and {path for path in paths if not path.startswith("results/rehearsal")} == set()
    assert resources_of(output).keys() == resources_of(jobs_of(workflow)).keys() | {"rehearsal_sheet"}


def resources_of(output: str) -> dict[str, set[str]]:
    """What the jobs of each kind of rule ask for."""
    found: dict[str, set[str]] = {}
    for rule, details in re.findall(r"^(?:local)?rule (\S+):\n((?:    .*\n)*)", output, re.MULTILINE):
        asked = re.search(r"^    resources: (.*)$", details, re.MULTILINE)
        found.setdefault(kind_of(rule), set()).add(asked[1] if asked else "")
    return found


def test_its_jobs_ask_for_what_the_real_ones_ask_for_and_for_no_more_when_tried_again(workflow: Path) -> None:
    real, first, third, real_third = (
        resources_of(jobs_of(workflow, *options))
        for options in ((), REHEARSAL, ("--attempt", "3", *REHEARSAL), ("--attempt", "3"))
    )
    assert first == third == real | {"rehearsal_sheet": first["rehearsal_sheet"]}
    assert real_third["train"] != real["train"]


def test_the_downloads_of_a_rehearsal_are_the_real_ones(workflow: Path) -> None:
    """Archives and what is unpacked are the inputs of both."""

    def downloads(*options: str) -> set[str]:
        output = jobs_of(workflow, "--configfile", "config/paper.yaml", *options)
        return {line for line in output.splitlines() if re.search(r"-- routevl (download|unpack) ", line)}

    assert downloads(*REHEARSAL) == downloads() and len(downloads()) == 2 * 8


@pytest.mark.parametrize("value", ["no", "maybe", "1", "True"])
def test_other_values_are_refused(workflow: Path, value: str) -> None:
    status, output = dry_run(workflow, "--config", f"rehearsal={value}")
    assert (
        status != 0 and f"configuration: rehearsal: {value if value in '1True' else repr(value)} is not one of ['yes']" in output
    )
    change_configuration(workflow, "rehearsal", value)
    expect_message(workflow, "configuration: rehearsal: ")
