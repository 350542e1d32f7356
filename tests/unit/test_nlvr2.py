"""NLVR2: files of examples and the official scores of results."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from routevl.data.nlvr2 import Example, read_examples
from routevl.errors import RoutevlError
from routevl.metrics import nlvr2

REFERENCE = Path(os.environ.get("ROUTEVL_REFERENCE", ""))
needs_reference = pytest.mark.skipif(
    "ROUTEVL_REFERENCE" not in os.environ, reason="ROUTEVL_REFERENCE names no folder of reference data"
)


def record(identifier: str, label: Any = "True", **changes: Any) -> dict[str, Any]:
    return {"identifier": identifier, "sentence": "There are two dogs.", "label": label, "writer": "61"} | changes


def save(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    return path


def save_results(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Two sentences about the set 850, one about 851 and one of another split
LABELS = {"dev-850-0-0": "True", "dev-850-1-0": "False", "dev-850-0-1": "True", "dev-851-0-0": "False", "test1-850-0-0": "True"}
RECORDS = [record(identifier, label) for identifier, label in LABELS.items()]


def report(folder: Path, capsys: pytest.CaptureFixture[str], records: Iterable[Any], lines: str) -> dict[str, Any]:
    """What `routevl nlvr2-score` prints."""
    parser = argparse.ArgumentParser()
    nlvr2.add_arguments(parser)
    paths = [str(save(folder / "dev.json", records)), str(save_results(folder / "r.csv", lines))]
    nlvr2.run(parser.parse_args(["--annotations", paths[0], "--results", paths[1]]))
    return json.loads(capsys.readouterr().out)


def test_examples_with_labels_of_both_kinds_and_the_names_of_their_images(tmp_path: Path) -> None:
    records = [
        record("train-10171-0-1", "False", directory="57", left_url="https://example.org/left.jpg"),
        record("dev-850-2-0", True),
        record("dev-850-3-0", False, directory=57),
    ]
    left, right = "train-10171-0-img0.png", "train-10171-0-img1.png"
    first, second, third = read_examples(save(tmp_path / "train.json", records))
    names = ((f"57/{left}", left, "https://example.org/left.jpg"), (f"57/{right}", right))
    assert first == Example("train-10171-0-1", "There are two dogs.", False, *names)
    assert (second.label, second.left, second.right) == (True, ("dev-850-2-img0.png",), ("dev-850-2-img1.png",))
    assert third.label is False and third.left == ("57/dev-850-3-img0.png", "dev-850-3-img0.png")
    assert first.statement == ("train", "10171", "1")


def test_files_may_be_compressed_and_have_blank_lines(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(entry) for entry in RECORDS[:2]) + "\n\n"
    path = tmp_path / "dev.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert [example.identifier for example in read_examples(path)] == ["dev-850-0-0", "dev-850-1-0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 2: not an NLVR2 example: data must be object"),
        ('{"identifier": "dev-1-0-0"', r"line 2: not readable JSON \(Expecting ',' delimiter"),
        (json.dumps(record("dev-850-0")), r"line 2: not an NLVR2 example: data\.identifier must match pattern"),
        (json.dumps(record("dev-850-0-0.png")), r"line 2: .*data\.identifier must match pattern"),
        (json.dumps(record("dev-850-0-0", "true")), r"line 2: .*data\.label must be one of \['True', 'False', True, False\]"),
        (json.dumps(record("dev-850-0-0", 1)), r"line 2: .*data\.label must be string or boolean"),
        (json.dumps(record("dev-850-0-0", sentence=None)), r"line 2: .*data\.sentence must be string"),
        (json.dumps({"identifier": "dev-850-0-0", "label": "True"}), r"line 2: .*data must contain .'sentence'. properties"),
        (json.dumps(record("dev-850-0-0", left_url=3)), r"line 2: .*data\.left_url must be string"),
        (json.dumps(record("dev-850-0-0", image_ids=[1])), r"line 2: .*data\.image_ids must contain at least 2 items"),
        (json.dumps(record("dev-850-0-0", image_ids=["1", "2"])), r"line 2: .*data\.image_ids\[0\] must be integer"),
        (json.dumps(record("dev-850-1-0")), "the identifier dev-850-1-0 is there twice"),
    ],
)
def test_a_wrong_line_is_one_clear_error(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "dev.json"
    path.write_text(f"{json.dumps(record('dev-850-1-0'))}\n{line}\n{json.dumps(record('dev-850-2-0'))}\n")
    with pytest.raises(RoutevlError, match=message) as error:
        read_examples(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_consistency_is_of_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: four of five right. Of the four sentences one has two pairs, of which one is wrong: three of four."""
    lines = "dev-850-0-0,True\ndev-850-1-0,True\ndev-850-0-1,True\ndev-851-0-0,False\ntest1-850-0-0,True\n"
    assert report(tmp_path, capsys, RECORDS, lines) == {"accuracy": 80.0, "consistency": 75.0, "n": 5, "sentences": 4}
    all_right = lines.replace("1-0,True", "1-0,False")
    assert report(tmp_path, capsys, RECORDS, all_right) == {"accuracy": 100.0, "consistency": 100.0, "n": 5, "sentences": 4}
    only_one = "".join(f"{name},{'True' if name == 'dev-850-0-0' else label != 'True'}\n" for name, label in LABELS.items())
    assert report(tmp_path, capsys, RECORDS, only_one) == {"accuracy": 20.0, "consistency": 0.0, "n": 5, "sentences": 4}


GOOD = "".join(f"{name},{label}\n" for name, label in LABELS.items())


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("True", "true").replace("False", "FALSE"),
        GOOD.replace("\n", "\r\n"),
        f"\n{GOOD}\n\n",
    ],
)
def test_results_may_be_written_in_another_way(tmp_path: Path, text: str) -> None:
    """In any case, as Windows ends lines, with blank lines, and with the mark of a spreadsheet's UTF-8."""
    path = tmp_path / "r.csv"
    path.write_bytes(text.encode("utf-8-sig"))
    assert nlvr2.read_predictions(path, LABELS) == {name: label == "True" for name, label in LABELS.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"identifier,prediction\n{GOOD}", "line 1: 'identifier,prediction', expected <identifier>,True or <identifier>,False"),
        (GOOD.replace("0-1,True", "0-1,1"), "line 3: 'dev-850-0-1,1', expected"),
        (GOOD.replace("0-1,True", "0-1, True"), "line 3: 'dev-850-0-1, True', expected"),
        (GOOD.replace("0-1,True", "0-1"), "line 3: 'dev-850-0-1', expected"),
        (GOOD.replace("0-1,True", "0-1,True,0.9"), "line 3: 'dev-850-0-1,True,0.9', expected"),
        (f"\n{GOOD}dev-850-0-1,maybe", "line 7: 'dev-850-0-1,maybe', expected"),
        (GOOD + "dev-850-0-1,False\n", "the identifier dev-850-0-1 is there twice"),
        (GOOD + "dev-900-0-1,False\n", "1 of 6 results have an unknown identifier, the first dev-900-0-1"),
        (GOOD.replace("dev-850-0-1,True\n", ""), "no result for 1 of 5 items, the first with the identifier dev-850-0-1"),
        (GOOD.replace("0-1,True", '0-1,"True'), "line 3: 'dev-850-0-1,\"True', expected"),
        ("", "no result for 5 of 5 items"),
    ],
)
def test_wrong_results_are_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = save_results(tmp_path / "r.csv", text)
    with pytest.raises(RoutevlError, match=message) as error:
        nlvr2.score_files(save(tmp_path / "dev.json", RECORDS), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\x1f\x8b broken", b"dev-850-0-0,\xff\xfe"])
def test_unreadable_results_are_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(content)
    with pytest.raises(RoutevlError, match=r"r\.csv: not a readable text file"):
        nlvr2.read_predictions(path, LABELS)


def test_missing_files_and_files_without_examples(tmp_path: Path) -> None:
    with pytest.raises(RoutevlError, match=r"dev\.json: no such file"):
        read_examples(tmp_path / "dev.json")
    with pytest.raises(RoutevlError, match=r"r\.csv: no such file"):
        nlvr2.read_predictions(tmp_path / "r.csv", LABELS)
    with pytest.raises(RoutevlError, match=r"dev\.json: holds no examples to score"):
        nlvr2.score_files(save(tmp_path / "dev.json", []), save_results(tmp_path / "r.csv", ""))


@needs_reference
def test_the_official_dev_file(tmp_path: Path) -> None:
    """It has 6,982 examples, 2,018 sentences and 4,051 pairs; random predictions score as the official definitions have it."""
    path = REFERENCE / "nlvr2/dev.json.gz"
    examples = read_examples(path)
    assert len(examples) == 6982
    assert len({example.left[-2] for example in examples}) == 4051  # before the address stands the file's name
    generator = random.Random(0)
    right = {example.identifier: generator.random() < 0.8 for example in examples}
    lines = [f"{example.identifier},{example.label == right[example.identifier]}\n" for example in examples]
    scores = nlvr2.score_files(path, save_results(tmp_path / "r.csv", "".join(lines)))
    sentences: dict[str, bool] = {}
    for identifier, is_right in right.items():
        split, of_set, _, sentence = identifier.split("-")
        sentences[f"{split}-{of_set}--{sentence}"] = sentences.get(f"{split}-{of_set}--{sentence}", True) and is_right
    assert len(sentences) == 2018
    assert scores.accuracy == pytest.approx(100 * sum(right.values()) / 6982)
    assert scores.consistency == pytest.approx(100 * sum(sentences.values()) / 2018)
