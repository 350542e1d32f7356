"""Real photographs, captions and questions through preparation, extraction, training and prediction."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import SmallWorld, command_line, run_options, run_stage
from tiny_project import PROJECT

REFERENCE = Path(os.environ.get("ROUTEVL_REFERENCE", "."))
pytestmark = pytest.mark.skipif(
    "ROUTEVL_REFERENCE" not in os.environ, reason="ROUTEVL_REFERENCE names no folder of reference data"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference data, prepared as config/sample.yaml says."""
    folder = tmp_path_factory.mktemp("photographs") / "data"
    sources = yaml.safe_load((PROJECT / "config/sample.yaml").read_text())["data"]["sources"]
    for source in sources:
        source |= {
            key: str(REFERENCE / source[key]) for key in ("images", "captions", "questions", "annotations") if key in source
        }
    vocabulary = REFERENCE / "vqav2/trainval_ans2label.json"
    run_stage("prepare", "--sources", json.dumps(sources), "--vocabulary", vocabulary, "--output", folder)
    return folder


@pytest.fixture(scope="module")
def features(data: Path, small_world: SmallWorld) -> Path:
    folder = data.parent / "features"
    images = [data / split / "images.json" for split in ("train", "val", "test")]
    shard = folder / "shard-00000-of-00001.safetensors"
    run_stage("extract", "--images", *images, "--backbone", small_world.vision[24], "--output", shard)
    run_stage("index-features", "--shards", shard, "--output", folder / "index.json")
    return folder


def test_every_photograph_has_features_of_its_own(data: Path, features: Path) -> None:
    from routevl.features.store import Features

    ids = [entry["id"] for split in ("train", "val", "test") for entry in json.loads((data / split / "images.json").read_text())]
    photographs = [*REFERENCE.glob("coco/val2017/*.jpg"), *REFERENCE.glob("vqav2/images/*.jpg")]
    assert len(ids) == len({int(photograph.stem) for photograph in photographs}) > 100
    values = Features(features, "pooled").features(ids)
    assert values.isfinite().all() and len(values.flatten(1).unique(dim=0)) == len(ids)


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_a_run_learns_from_them_and_predicts(
    task: str, data: Path, features: Path, small_world: SmallWorld, tmp_path: Path
) -> None:
    options = run_options(small_world, task, width=24, data=data, features=features, epochs=1, max_text_tokens=40, batch_size=8)
    folders = {name: tmp_path / name for name in ("model", "predictions", "checkpoint")}
    run_stage("train", *command_line(options | folders))
    lines = [json.loads(line) for line in (tmp_path / "model/training.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] > 0 and lines[-1]["epoch"] == 1
    results = json.loads((tmp_path / "predictions/results.json").read_text())
    if task == "vqa":
        questions = json.loads((data / "test/questions.json").read_text())["questions"]
        answers = json.loads((REFERENCE / "vqav2/trainval_ans2label.json").read_text())
        assert [result["question_id"] for result in results] == [question["question_id"] for question in questions]
        assert all(result["answer"] in answers for result in results)
    else:
        captioned = {caption["image_id"] for caption in json.loads((data / "test/captions.json").read_text())["annotations"]}
        assert {result["image_id"] for result in results} == captioned
