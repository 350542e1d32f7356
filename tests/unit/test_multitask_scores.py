"""The scores of multi-task runs: those of the four data sets, their average, and what each item has in it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routevl.errors import RoutevlError
from routevl.metrics import captions, gqa, nlvr2, score, vqa

ANSWERS = {
    5: ("red", 1, "other"),
    6: ("2", 1, "number"),
    7: ("yes", 2, "yes/no"),
    8: ("yes", 3, "yes/no"),
    9: ("no", 3, "yes/no"),
}
PREDICTED = {5: "red", 6: "two", 7: "no", 8: "yes", 9: "yes"}  # 3 of 5; the evaluator compares unanimous answers as they are
SENTENCES = {1: "a red circle above a square", 2: "two big green stars", 3: "there is a small triangle"}
FILES = {"vqa": "vqa.json", "gqa": "gqa.json", "nlvr2": "nlvr2.csv", "caption": "caption.json"}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Five VQA questions, three GQA questions, one of which is not balanced, three NLVR2 examples and six captions."""
    folder = tmp_path / "test"
    asked = [{"question_id": number, "image_id": image, "question": "?"} for number, (_, image, _) in ANSWERS.items()]
    annotations = [
        {"question_id": number, "image_id": image, "answer_type": kind, "question_type": "?", "multiple_choice_answer": answer,
         "answers": [{"answer": answer}] * 10}
        for number, (answer, image, kind) in ANSWERS.items()
    ]  # fmt: skip
    write(folder / "questions.json", {"questions": asked})
    write(folder / "annotations.json", {"annotations": annotations})
    write(
        folder / "captions.json",
        {"annotations": [
            {"id": 10 * image + place, "image_id": image, "caption": text}
            for image, text in SENTENCES.items() for place in range(2)
        ]},
    )  # fmt: skip
    known = {"imageId": "n11", "question": "Is it?", "isBalanced": True, "image_id": 11}
    questions = {"007": known | {"answer": "yes"}, "7": known | {"answer": "no"}}
    write(folder / "gqa.json", questions | {"8": known | {"answer": "no", "isBalanced": False}})
    examples = [
        {"identifier": f"test1-1-{pair}-{sentence}", "sentence": "Both.", "label": "True", "image_ids": [20 + pair, 30]}
        for pair, sentence in ((0, 0), (1, 0), (0, 1))
    ]
    (folder / "nlvr2.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return folder


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    folder = tmp_path / "predictions" / "lora_seed1"
    write(folder / "results.json", FILES)
    write(folder / "vqa.json", [{"question_id": number, "answer": answer} for number, answer in PREDICTED.items()])
    write(folder / "gqa.json", [{"questionId": name, "prediction": "no"} for name in ("7", "8", "007")])
    (folder / "nlvr2.csv").write_text("test1-1-0-0,True\ntest1-1-1-0,False\ntest1-1-0-1,True\n", encoding="utf-8")
    said = {3: "a small triangle", 1: "a red circle above a square", 2: "one star"}
    write(folder / "caption.json", [{"image_id": image, "caption": text} for image, text in said.items()])
    return folder


def run_score(split: Path, predictions: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """metrics.json and items.json of the stage `score`."""
    output = predictions.parents[1] / "scores" / predictions.name
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    options = {"--task": "multitask", "--split-folder": split, "--predictions": predictions, "--output": output}
    score.run(parser.parse_args([str(word) for pair in options.items() for word in pair]))
    return tuple(json.loads((output / name).read_text()) for name in ("metrics.json", "items.json"))


def test_the_scores_are_those_of_the_official_metrics(split: Path, predictions: Path) -> None:
    found, items = run_score(split, predictions)
    [cider] = captions.cider_of_files(split / "captions.json", [predictions / "caption.json"])
    of_vqa = vqa.score_files(split / "questions.json", split / "annotations.json", predictions / "vqa.json").overall
    of_gqa = gqa.score_files(split / "gqa.json", predictions / "gqa.json").overall
    of_nlvr2 = nlvr2.score_files(split / "nlvr2.jsonl", predictions / "nlvr2.csv")
    assert (of_vqa, of_gqa, of_nlvr2.consistency) == (40.0, 50.0, 50.0)
    metrics = found["metrics"]
    assert metrics == {
        "average": pytest.approx((40 + 50 + 200 / 3 + 100 * cider.metrics["CIDEr"]) / 4),
        "vqa": 40.0, "gqa": 50.0, "nlvr2": pytest.approx(200 / 3), "caption": 100 * cider.metrics["CIDEr"],
        "nlvr2_consistency": 50.0, "vqa_yes_no": pytest.approx(100 / 3), "vqa_number": 0.0, "vqa_other": 100.0,
    }  # fmt: skip
    assert (found["run"], found["task"], found["n"]) == ("lora_seed1", "multitask", 13)
    assert [remark.partition(" ")[0] for remark in found["remarks"]] == ["caption:"]
    assert items["ids"] == [
        *(f"vqa/{number}" for number in ANSWERS), "gqa/007", "gqa/7",
        "nlvr2/test1-1-0-0", "nlvr2/test1-1-1-0", "nlvr2/test1-1-0-1", "caption/1", "caption/2", "caption/3",
    ]  # fmt: skip
    assert items["images"] == [1, 1, 2, 3, 3, 11, 11, 20, 21, 20, 1, 2, 3]
    for name in FILES:
        own = [value for value in items[name] if value is not None]
        assert len(own) == sum(item.startswith(f"{name}/") for item in items["ids"])
        assert np.mean(own) == pytest.approx(metrics[name])


def test_items_resample_as_the_average_of_the_data_sets(split: Path, predictions: Path) -> None:
    """Drawn anew within each data set, their mean is the average of the data sets' new means."""
    found, items = run_score(split, predictions)
    average = np.array(items["average"])
    assert average.mean() == pytest.approx(found["metrics"]["average"])
    generator = np.random.default_rng(0)
    columns = [np.array(items[name], dtype=float) for name in FILES]
    drawn = [generator.choice(np.flatnonzero(~np.isnan(column)), (~np.isnan(column)).sum()) for column in columns]
    means = [column[those].mean() for column, those in zip(columns, drawn, strict=True)]
    assert average[np.concatenate(drawn)].mean() == pytest.approx(np.mean(means))
    assert np.mean(means) != pytest.approx(found["metrics"]["average"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("predictions/lora_seed1/results.json", "[]", r"results\.json: not the results of a multi-task run: data must be object"),
        ("predictions/lora_seed1/results.json", '{"vqa": "vqa.json"}', r"not the results of a multi-task run: .*gqa"),
        ("predictions/lora_seed1/results.json", json.dumps(FILES | {"okvqa": "okvqa.json"}), r"not the results of .*okvqa"),
        ("predictions/lora_seed1/gqa.json", "[]", r"gqa\.json: no result for 2 of 2 items, the first with the questionId 007"),
        ("predictions/lora_seed1/nlvr2.csv", "test1-1-0-0,Maybe", r"nlvr2\.csv: line 1: 'test1-1-0-0,Maybe', expected"),
        ("test/gqa.json", "{}", r"gqa\.json: holds no balanced questions, so none to score"),
        ("test/nlvr2.jsonl", "", r"nlvr2\.jsonl: holds no examples to score"),
        (
            "test/gqa.json",
            '{"7": {"imageId": "n1", "question": "?", "isBalanced": true, "answer": "no"}}',
            r"test: its gqa items do not name their images: it is not a split that `routevl prepare` wrote",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_clear_error(
    split: Path, predictions: Path, tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(RoutevlError, match=message):
        run_score(split, predictions)
    assert not (tmp_path / "scores" / "lora_seed1").exists()


def test_a_missing_file_of_a_data_set_is_named(split: Path, predictions: Path) -> None:
    (predictions / "vqa.json").unlink()
    with pytest.raises(RoutevlError, match=r"lora_seed1/vqa\.json: no such file"):
        run_score(split, predictions)


def test_cider_alone_is_that_of_all_metrics(split: Path, predictions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMeteor:
        def corpus_score(self, *_: Any) -> float:
            return 0.0

    @contextmanager
    def start() -> Iterator[NoMeteor]:
        yield NoMeteor()

    files = split / "captions.json", [predictions / "caption.json"]
    [alone] = captions.cider_of_files(*files)
    monkeypatch.setattr(captions, "start_meteor", start)
    [of_all] = captions.score_files(*files)
    assert alone.metrics["CIDEr"] == of_all.metrics["CIDEr"] > 0
    assert alone.cider_by_image == of_all.cider_by_image and alone.remarks == of_all.remarks
