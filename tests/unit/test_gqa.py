"""GQA: questions files and the official score of results."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from routevl.data.gqa import read_questions
from routevl.errors import RoutevlError
from routevl.metrics import gqa

QUESTION = {"imageId": "n161313", "question": "Is the sky dark?", "isBalanced": True}  # as the official files of test have it


def answered(answer: str, structural: str = "query", semantic: str = "attr", **changes: Any) -> dict[str, Any]:
    """A question as the official files of train, val and testdev have it, with fields that nothing here reads."""
    types = {"structural": structural, "semantic": semantic, "detailed": "directOf"}
    return QUESTION | {"answer": answer, "types": types, "groups": {"global": None, "local": "06-sky"}, "entailed": []} | changes


QUESTIONS = {
    "02930152": answered("yes", "verify"),
    "2930152": answered("blue"),  # another question: the zero counts
    "05": answered("left", "choose", "rel"),
    "00": answered("blue", isBalanced=False),
}


def save(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def results(**predictions: str) -> list[dict[str, str]]:
    return [{"questionId": name.removeprefix("q"), "prediction": text} for name, text in predictions.items()]


def report(folder: Path, capsys: pytest.CaptureFixture[str], questions: Any, predictions: Any) -> dict[str, Any]:
    """What `routevl gqa-score` prints."""
    parser = argparse.ArgumentParser()
    gqa.add_arguments(parser)
    paths = [str(save(folder / "q.json", questions)), str(save(folder / "r.json", predictions))]
    gqa.run(parser.parse_args(["--questions", paths[0], "--results", paths[1]]))
    return json.loads(capsys.readouterr().out)


def test_questions_keep_their_ids_and_order(tmp_path: Path) -> None:
    plain = save(tmp_path / "q.json", QUESTIONS)
    packed = tmp_path / "q.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_questions(plain) == read_questions(packed) == QUESTIONS
    assert list(read_questions(plain)) == ["02930152", "2930152", "05", "00"]


def test_questions_of_the_test_split_have_no_answers(tmp_path: Path) -> None:
    path = save(tmp_path / "q.json", {"201": QUESTION})
    assert read_questions(path) == {"201": QUESTION}
    with pytest.raises(RoutevlError, match=r"q\.json: the question 201 has no answer to score against"):
        gqa.score_files(path, save(tmp_path / "r.json", results(q201="yes")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([QUESTION], "not a GQA questions file: data must be object"),
        ({"07": "what is it?"}, r"data\.07 must be object"),
        ({"07": {"question": "what is it?", "isBalanced": True}}, r"data\.07 must contain .'imageId'. properties"),
        ({"07": QUESTION | {"imageId": 161313}}, r"data\.07\.imageId must be string"),
        ({"07": QUESTION | {"question": None}}, r"data\.07\.question must be string"),
        ({"07": QUESTION | {"isBalanced": "yes"}}, r"data\.07\.isBalanced must be boolean"),
        ({"07": answered("yes") | {"answer": 2}}, r"data\.07\.answer must be string"),
        ({"07": answered("yes") | {"types": "query"}}, r"data\.07\.types must be object"),
        ({"07": QUESTION | {"image_id": "161313"}}, r"data\.07\.image_id must be integer"),
    ],
)
def test_a_wrong_question_is_one_clear_error(tmp_path: Path, content: Any, message: str) -> None:
    path = save(tmp_path / "q.json", content)
    with pytest.raises(RoutevlError, match=message) as error:
        read_questions(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_gqa_score_counts_the_balanced_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: the first and the last of three are right; the unbalanced one may have a prediction, which does not count."""
    predictions = results(q02930152="yes", q2930152="red", q05="left", q00="red")
    expected = {
        "accuracy": 66.67,
        "binary": 100.0,
        "open": 0.0,
        "accuracyPerStructuralType": {"choose": 100.0, "query": 0.0, "verify": 100.0},
        "accuracyPerSemanticType": {"attr": 50.0, "rel": 100.0},
        "n": 3,
    }
    assert report(tmp_path, capsys, QUESTIONS, predictions) == expected
    assert report(tmp_path, capsys, QUESTIONS, predictions[:3]) == expected


@pytest.mark.parametrize("prediction", ["Yes", "yes ", " yes", "YES\n"])
def test_an_answer_in_another_case_is_wrong_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prediction: str
) -> None:
    predictions = results(q02930152=prediction, q2930152="green", q05="left")
    printed = report(tmp_path, capsys, QUESTIONS, predictions)
    assert printed["accuracy"] == 33.33 and printed["binary"] == 50.0
    assert printed["remarks"] == [
        "1 of 2 wrong predictions differ from the answer in case or white space alone: GQA compares texts as they are"
    ]


def test_an_answer_with_an_article_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no step of VQAv2's evaluator: neither articles nor number words."""
    printed = report(tmp_path, capsys, {"1": answered("dog"), "2": answered("2")}, results(q1="a dog", q2="two"))
    assert printed["accuracy"] == 0 and "remarks" not in printed


def test_questions_without_types_are_in_no_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = report(tmp_path, capsys, {"1": QUESTION | {"answer": "yes"}}, results(q1="yes"))
    assert printed == {"accuracy": 100.0, "accuracyPerStructuralType": {}, "accuracyPerSemanticType": {}, "n": 1}


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (results(q02930152="yes", q05="left"), "no result for 1 of 3 items, the first with the questionId 2930152"),
        (
            results(q02930152="yes", q2930152="red", q05="left", q5="left"),
            "have an unknown questionId, the first 5",
        ),
        (results(q05="left") * 2, "the questionId 05 is there twice"),
        ([{"questionId": 2930152, "prediction": "yes"}], r"data\[0\]\.questionId must be string"),
        ([{"questionId": "05", "prediction": True}], r"data\[0\]\.prediction must be string"),
        ([{"questionId": "05", "answer": "left"}], r"data\[0\] must contain .'prediction'. properties"),
    ],
)
def test_wrong_results_are_one_clear_error(tmp_path: Path, predictions: Any, message: str) -> None:
    questions, path = save(tmp_path / "q.json", QUESTIONS), save(tmp_path / "r.json", predictions)
    with pytest.raises(RoutevlError, match=message) as error:
        gqa.score_files(questions, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("questions", [{}, {"00": QUESTIONS["00"]}])
def test_a_file_without_balanced_questions_is_an_error(tmp_path: Path, questions: Any) -> None:
    with pytest.raises(RoutevlError, match=r"q\.json: holds no balanced questions"):
        gqa.score_files(save(tmp_path / "q.json", questions), save(tmp_path / "r.json", []))
