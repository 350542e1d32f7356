"""The official scores: hand-made cases, a direct computation of the definitions, and the reference data."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from routevl.errors import RoutevlError
from routevl.metrics import captions, java, score, vqa
from routevl.metrics.results import read_results
from routevl.surroundings import JAVA_VARIABLES

REFERENCE = Path(os.environ.get("ROUTEVL_REFERENCE", ""))
needs_reference = pytest.mark.skipif(
    "ROUTEVL_REFERENCE" not in os.environ,
    reason="ROUTEVL_REFERENCE does not name the folder of reference data",
)


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def run_stage(module: Any, *options: object) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args([str(option) for option in options]))


# --- VQA ---


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Yes", "yes"),
        ("  a dog\n", "dog"),
        ("the\tRed  ball", "red ball"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("yalld've", "yalld've"),
        (
            "Im here",
            "im here",
        ),  # the official table has this key in upper case, which no lower-cased word meets
        ("weve", "we've"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("t-shirt -", "tshirt"),  # a mark that touches a space anywhere goes everywhere
        ("1,000", "1000"),
        ("1,000-2", "10002"),  # a comma in a number: every mark goes without a space
        ("3.50", "3.50"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("it's 5 o'clock.", "it's 5 o'clock"),
        ("a", ""),
        ("", ""),
        ("?!", ""),
        ("what?yes", "what yes"),
        ("." * 40, "." * 8),  # the official code removes 32 periods at the most
        ("CAFÉ", "café"),
    ],
)
def test_normalize_answer(answer: str, normalised: str) -> None:
    assert vqa.normalize_answer(answer) == normalised


def test_normalising_twice_changes_nothing_for_common_answers() -> None:
    for answer in ["don't know", "black and white", "3.5", "0", "o'clock"]:
        assert vqa.normalize_answer(answer) == answer


def leave_one_out(answers: list[str], prediction: str) -> float:
    """The definition: min(1, matches / 3) against each subset of all annotators but one."""
    subsets = [answers[:left_out] + answers[left_out + 1 :] for left_out in range(len(answers))]
    return sum(min(1, subset.count(prediction) / 3) for subset in subsets) / len(subsets)


def test_accuracy_against_the_definition() -> None:
    generator = random.Random(0)
    for _ in range(500):
        answers = [generator.choice(["red", "blue", "green", "dark red"]) for _ in range(10)]
        for prediction in ["red", "blue", "dark red", "pink"]:
            expected = leave_one_out(answers, prediction)
            assert vqa.question_accuracy(answers, prediction) == pytest.approx(expected, abs=1e-12)


def test_accuracy_by_hand() -> None:
    answers = ["two"] * 3 + ["2"] * 1 + ["3"] * 6
    assert vqa.question_accuracy(answers, "2") == pytest.approx(1.0)
    assert vqa.question_accuracy(["2"] * 3 + ["3"] * 7, " 2\n") == pytest.approx(0.9)
    assert vqa.question_accuracy(["2"] * 1 + ["3"] * 9, "Two.") == pytest.approx(0.3)


def test_unanimous_answers_are_compared_as_they_are() -> None:
    assert vqa.question_accuracy(["the cat"] * 10, "cat") == 0.0
    assert vqa.question_accuracy(["the cat"] * 10, " the cat\n") == 1.0
    assert vqa.question_accuracy(["the cat"] * 9 + ["cat"], "cat") == 1.0


def test_soft_scores() -> None:
    scores = vqa.soft_scores(["two"] * 2 + ["2"] + ["Three!"] * 6 + ["many"])
    assert scores == pytest.approx({"2": 0.9, "3": 1.0, "many": 0.3})
    assert vqa.soft_scores(["a cat"] * 10) == {"cat": 1.0}


def vqa_split(folder: Path, answers: dict[int, list[str]], answer_type: str = "other") -> Path:
    """A prepared split of the questions `answers`: question_id to its ten answers."""
    questions = [{"image_id": 1, "question_id": number, "question": "what is it?"} for number in answers]
    annotations = [
        {
            "image_id": 1,
            "question_id": number,
            "question_type": "what is" if number % 2 else "what",
            "answer_type": answer_type,
            "multiple_choice_answer": given[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": place} for place, answer in enumerate(given, start=1)
            ],
        }
        for number, given in answers.items()
    ]
    write(folder / "questions.json", {"questions": questions})
    write(folder / "annotations.json", {"annotations": annotations})
    return folder


def vqa_results(path: Path, answers: dict[int, str]) -> Path:
    return write(path, [{"question_id": number, "answer": answer} for number, answer in answers.items()])


ANSWERS = {5: ["red"] * 10, 3: ["red"] * 7 + ["blue"] * 3, 4: ["green"] * 10}


def test_score_stage_writes_vqa_scores(tmp_path: Path) -> None:
    split = vqa_split(tmp_path / "test", ANSWERS)
    vqa_results(tmp_path / "predictions/lora_seed1/results.json", {3: "blue", 4: "red", 5: "red"})
    output = tmp_path / "scores/lora_seed1"
    options = [
        "--split-folder",
        split,
        "--predictions",
        tmp_path / "predictions/lora_seed1",
        "--output",
        output,
    ]
    run_stage(score, "--task", "vqa", *options)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == {
        "run": "lora_seed1",
        "task": "vqa",
        "n": 3,
        "metrics": {
            "accuracy": pytest.approx(190 / 3),
            "yes_no": None,
            "number": None,
            "other": pytest.approx(190 / 3),
            "by_question_type": {
                "what": {"accuracy": 0.0, "n": 1},
                "what is": {"accuracy": pytest.approx(95.0), "n": 2},
            },
        },
    }
    items = json.loads((output / "items.json").read_text())
    assert items == {"ids": [5, 3, 4], "images": [1, 1, 1], "accuracy": pytest.approx([100.0, 90.0, 0.0])}
    assert sorted(path.name for path in output.parent.iterdir()) == ["lora_seed1"]


def test_vqa_score_stage_prints_the_official_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = vqa_split(tmp_path, ANSWERS)
    results = vqa_results(tmp_path / "results.json", {3: "blue", 4: "red", 5: "red"})
    files = ["--questions", split / "questions.json", "--annotations", split / "annotations.json"]
    run_stage(vqa, *files, "--results", results)
    assert json.loads(capsys.readouterr().out) == {
        "overall": 63.33,
        "perAnswerType": {"other": 63.33},
        "perQuestionType": {"what": 0.0, "what is": 95.0},
        "n": 3,
    }


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (
            [{"question_id": 3, "answer": "red"}],
            "no result for 2 of 3 items, the first with the question_id 5",
        ),
        (
            [{"question_id": number, "answer": "red"} for number in (3, 4, 5, 6)],
            "unknown question_id, the first 6",
        ),
        ([{"question_id": 3, "answer": "red"}] * 2, "the question_id 3 is there twice"),
        ([{"question_id": "3", "answer": "red"}], r"not a list of results: data\[0\]\.question_id must be integer"),
        ([{"question_id": 3, "answer": 2}], r"data\[0\]\.answer must be string"),
        ([{"question_id": 3}], r"data\[0\] must contain .'answer'. properties"),
        (["red"], r"data\[0\] must be object"),
        ({"results": []}, "not a list of results: data must be array"),
    ],
)
def test_bad_results_are_one_clear_error(tmp_path: Path, results: Any, message: str) -> None:
    split = vqa_split(tmp_path / "test", ANSWERS)
    path = write(tmp_path / "run/results.json", results)
    output = tmp_path / "scores"
    with pytest.raises(RoutevlError, match=message) as caught:
        run_stage(score, "--task", "vqa", "--split-folder", split, "--predictions", path.parent, "--output", output)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not output.exists()


@pytest.mark.parametrize("content", [b"", b'[{"question_id": 3,', b"\x1f\x8b broken", b"\xff\xfe"])
def test_unreadable_results_are_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(RoutevlError, match="not a readable JSON file"):
        read_results(path, "question_id", "answer", [3])


def test_a_split_without_questions_is_an_error(tmp_path: Path) -> None:
    split = vqa_split(tmp_path, {})
    results = vqa_results(tmp_path / "results.json", {})
    with pytest.raises(RoutevlError, match="no questions to score"):
        vqa.score_files(split / "questions.json", split / "annotations.json", results)


RELATIVES = {  # fields that OK-VQA, VizWiz or TextVQA have otherwise than VQAv2; None: not at all
    "no multiple_choice_answer": {"multiple_choice_answer": None},
    "another answer type": {"answer_type": "unanswerable"},
    "no types": {"answer_type": None, "question_type": None},
    "images named by texts": {"image_id": "003a8ae2ef43b901"},
    "no images": {"image_id": None},
}


@pytest.mark.parametrize("fields", RELATIVES.values(), ids=RELATIVES)
def test_h09_relatives_of_vqav2_get_the_official_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    """It needs the questions' ids and the annotators' answers; what has no type is in no group of that kind."""
    split = vqa_split(tmp_path / "test", ANSWERS)
    predictions = {3: "blue", 4: "red", 5: "red"}
    results = vqa_results(tmp_path / "run/results.json", predictions)
    for name in ("questions", "annotations"):
        content = json.loads((split / f"{name}.json").read_text())
        for record in content[name]:
            record |= {field: value for field, value in fields.items() if name == "annotations" or field == "image_id"}
            for field in [field for field, value in record.items() if value is None]:
                del record[field]
            record.pop("question", None)
        write(split / f"{name}.json", content)
    run_stage(vqa, "--questions", split / "questions.json", "--annotations", split / "annotations.json", "--results", results)
    report = json.loads(capsys.readouterr().out)
    assert report["overall"] == 63.33
    answer_type = fields.get("answer_type", "other")
    assert report["perAnswerType"] == ({answer_type: 63.33} if answer_type else {})
    assert bool(report["perQuestionType"]) == ("question_type" not in fields)
    run_stage(score, "--task", "vqa", "--split-folder", split, "--predictions", results.parent, "--output", tmp_path / "scores")
    metrics = json.loads((tmp_path / "scores/metrics.json").read_text())["metrics"]
    assert metrics["accuracy"] == pytest.approx(190 / 3)
    assert (metrics["other"] is None) == ("answer_type" in fields)


def test_the_score_stage_imports_little() -> None:
    program = (
        "import sys, routevl.metrics.score, routevl.metrics.vqa, routevl.metrics.captions\n"
        "print({'numpy', 'pandas', 'torch', 'transformers', 'pycocoevalcap'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


@needs_reference
@pytest.mark.parametrize("predictor", ["multiple_choice_answer", "always_yes", "first_annotator"])
def test_vqa_agrees_with_the_official_evaluator(tmp_path: Path, predictor: str) -> None:
    predict: dict[str, Callable[[dict[str, Any]], str]] = {
        "multiple_choice_answer": lambda annotation: annotation["multiple_choice_answer"],
        "always_yes": lambda annotation: "yes",
        "first_annotator": lambda annotation: annotation["answers"][0]["answer"],
    }
    folder = REFERENCE / "vqav2"
    path = folder / "annotations_subset.json.gz"
    annotations = json.loads(gzip.decompress(path.read_bytes()))["annotations"]
    predictions = {annotation["question_id"]: predict[predictor](annotation) for annotation in annotations}
    results = vqa_results(tmp_path / "results.json", predictions)
    scores = vqa.score_files(folder / "questions_subset.json.gz", path, results)
    expected = json.loads((folder / "expected_scores.json").read_text())[predictor]
    assert round(scores.overall, 2) == pytest.approx(expected["overall"], abs=0.0101)
    assert len(scores.by_question) == expected["n"]
    assert {name: group.accuracy for name, group in scores.by_answer_type.items()} == pytest.approx(
        expected["perAnswerType"], abs=0.01
    )


@pytest.mark.parametrize(("annotators", "best"), [(1, 0), (2, 100 / 3), (3, 200 / 3), (4, 100), (10, 100)])
def test_h18_few_annotators_have_a_remark(annotators: int, best: float) -> None:
    """With fewer than four nothing gets 100%, by the official rule."""

    def annotation(question_id: int, answers: int) -> dict[str, Any]:
        return {
            "question_id": question_id, "answer_type": "other", "question_type": "what", "answers": [{"answer": "red"}] * answers
        }  # fmt: skip

    scores = vqa.score([annotation(1, annotators), annotation(2, 10)], {1: "red", 2: "red"})
    assert scores.by_question == pytest.approx({1: best, 2: 100})
    remarks = ["1 of 2 questions have the answers of fewer than four annotators"] if best < 100 else []
    assert [remark.partition(":")[0] for remark in scores.remarks] == remarks


# --- Captions ---

ODD_CAPTIONS = [
    "a red circle\nand a blue square .",
    "a ||| b ||| c",
    "",
    "   ",
    "...",
    "un café à côté d'une forêt",
    "一只狗 😀 \ud83d",
    "line\u2028separator\u2029and\x85more\x0b\x0c\r\nend",
    "null \x00 bell \x07 escape \x1b[0m",
    "<b>bold</b> & <!-- open",
    "(555) 123-4567 costs 2 1/2 at http://a|||b",
    "can't won't 'ow's'at \"quoted\" ``x''",
    "|||",
    "etc.",
    "",
]


def test_odd_characters_keep_every_caption_on_its_line() -> None:
    tokens = java.tokenize([captions.one_line(caption) for caption in ODD_CAPTIONS])
    assert len(tokens) == len(ODD_CAPTIONS)
    assert tokens[0] == "a red circle and a blue square"
    assert [tokens[place] for place in (2, 3, 4, 14)] == [""] * 4
    assert tokens[5].startswith("un café à côté")
    assert not any("|||" in text or "\n" in text for text in tokens)
    assert java.tokenize(["", "", "a"]) == ["", "", "a"]
    assert java.tokenize(["a", "", ""]) == ["a", "", ""]
    assert java.tokenize([""]) == [""]


@pytest.fixture(scope="module")
def meteor() -> Iterator[java.Meteor]:
    """One METEOR for several tests: it takes ten seconds to load."""
    with java.start_meteor() as process:
        yield process


def test_odd_captions_do_not_shift_the_scores_of_others(meteor: java.Meteor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "start_meteor", lambda: nullcontext(meteor))
    good = {
        1: (["a red circle above a blue square"], "a red circle above a blue square"),
        2: (["there is one small green triangle", "a green triangle"], "one green triangle"),
    }
    odd = {100 + place: ([text, "a plain caption"], text) for place, text in enumerate(ODD_CAPTIONS)}
    mixed = odd | good
    (scores,) = captions.score(
        {image: texts for image, (texts, _) in mixed.items()},
        [{image: text for image, (_, text) in mixed.items()}],
    )
    assert list(scores.cider_by_image) == list(mixed)
    assert sum(scores.cider_by_image.values()) / len(mixed) == pytest.approx(scores.metrics["CIDEr"])
    assert scores.cider_by_image[1] == pytest.approx(10.0)
    assert scores.cider_by_image[102] == 0.0
    assert 0 < scores.metrics["METEOR"] <= 1
    assert scores.metrics["SPICE"] is None


def test_meteor_of_single_captions(meteor: java.Meteor) -> None:
    def of(reference: str, candidate: str) -> float:
        return meteor.corpus_score({1: [reference]}, {1: candidate})

    assert of("a red circle", "a red circle") == pytest.approx(1.0)
    assert of("a red circle", "") == 0.0
    assert of("un café", "un café") == pytest.approx(of("un cafe", "un cafe"))


def caption_split(folder: Path) -> Path:
    texts = {
        7: "a red circle above a blue square .",
        3: "there is a small green triangle .",
        9: "two big stars .",
    }
    images = [{"id": image, "file_name": f"{image}.png"} for image in texts]
    annotations = [
        {"id": 10 * image + place, "image_id": image, "caption": text} for image, text in texts.items() for place in range(2)
    ]
    write(folder / "captions.json", {"images": images, "annotations": annotations})
    return folder


def caption_results(path: Path, texts: dict[int, str]) -> Path:
    return write(path, [{"image_id": image, "caption": text} for image, text in texts.items()])


GOOD_CAPTIONS = {9: "two big stars", 7: "a red circle above a square", 3: "a triangle"}


def test_score_stage_writes_caption_scores_twice_at_once(tmp_path: Path) -> None:
    split = caption_split(tmp_path / "test")

    def score_run(name: str) -> tuple[bytes, bytes]:
        caption_results(tmp_path / "predictions" / name / "results.json", GOOD_CAPTIONS)
        output = tmp_path / "scores" / name
        run_stage(
            score, "--task", "caption", "--split-folder", split,
            "--predictions", tmp_path / "predictions" / name, "--output", output,
        )  # fmt: skip
        return (output / "metrics.json").read_bytes(), (output / "items.json").read_bytes()

    with ThreadPoolExecutor(2) as pool:
        (first, first_items), (second, second_items) = pool.map(score_run, ["a_seed1", "b_seed1"])
    assert first_items == second_items
    metrics = json.loads(first)
    assert json.loads(second) == metrics | {"run": "b_seed1"}
    assert list(metrics) == ["run", "task", "n", "metrics", "missing", "remarks"]
    assert [remark.partition(" says")[0] for remark in metrics["remarks"]] == ["CIDEr of 3 images"]
    assert (metrics["run"], metrics["task"], metrics["n"]) == ("a_seed1", "caption", 3)
    assert list(metrics["metrics"]) == [
        *(f"Bleu_{n}" for n in range(1, 5)),
        "METEOR",
        "ROUGE_L",
        "CIDEr",
        "SPICE",
    ]
    assert metrics["metrics"]["SPICE"] is None
    assert "SPICE" in metrics["missing"]
    items = json.loads(first_items)
    assert items["ids"] == items["images"] == [3, 7, 9]
    assert sum(items["CIDEr"]) / 3 == pytest.approx(metrics["metrics"]["CIDEr"])


@pytest.mark.parametrize(
    ("texts", "subset", "message"),
    [
        ({7: "a"}, False, "no result for 2 of 3 items, the first with the image_id 3"),
        ({8: "a"}, True, "1 of 1 results have an unknown image_id, the first 8"),
        ({}, True, "no captions to score"),
    ],
)
def test_results_of_other_images_are_an_error(tmp_path: Path, texts: dict[int, str], subset: bool, message: str) -> None:
    split = caption_split(tmp_path)
    results = caption_results(tmp_path / "results.json", texts)
    with pytest.raises(RoutevlError, match=message):
        captions.score_files(split / "captions.json", [results], subset=subset)


def test_references_without_words_are_an_error() -> None:
    with pytest.raises(RoutevlError, match="no reference caption of the 1 images to score holds a word"):
        captions.score({1: ["."]}, [{1: "a dog"}])


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "failed in Java: it ended without a message"),
        ("echo 'Error: Unable to access jarfile x' >&2; exit 1", "Unable to access jarfile"),
        ("echo 'Could not reserve enough space for object heap'; exit 1", "needs about 1 GB of free memory"),
        ("while read line; do echo nonsense; done", "METEOR failed in Java: nonsense"),
    ],
)
def test_a_failing_meteor_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str) -> None:
    fake = executable(tmp_path / "java", script)
    monkeypatch.setattr(java, "JAVA", fake)
    with pytest.raises(RoutevlError, match=message), java.start_meteor() as meteor:
        meteor.corpus_score({n: ["a dog"] for n in range(3)}, {n: "a dog" for n in range(3)})


def test_java_out_of_memory_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "METEOR_HEAP", "16m")
    with (
        pytest.raises(RoutevlError, match="OutOfMemoryError.*needs about 1 GB"),
        java.start_meteor() as meteor,
    ):
        meteor.corpus_score({1: ["a dog"]}, {1: "a dog"})
    monkeypatch.setattr(java, "TOKENIZER_HEAP", "1k")
    with pytest.raises(RoutevlError, match="the caption tokenizer failed in Java"):
        java.tokenize(["a dog"])


@pytest.mark.parametrize("name", JAVA_VARIABLES)
def test_h28_java_starts_without_inherited_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "-javaagent:/nowhere.jar")
    assert java.tokenize(["A dog."]) == ["a dog"]


TWO_ANSWERS = "read line; echo 1; read line; echo 1; read line"  # that all is loaded, and about the first image


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("echo 'java.lang.OutOfMemoryError: Java heap space' >&2", "failed in Java: java.lang.OutOfMemoryError"),
        ("echo nonsense", "failed in Java: nonsense"),
        ("exec sleep 60", "gave no answer within 1 s and was stopped"),
    ],
)
def test_h20_the_image_at_which_meteor_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, second: str, message: str
) -> None:
    monkeypatch.setattr(java, "METEOR_SECONDS", 1.0)
    monkeypatch.setattr(captions, "_tokens", list)
    monkeypatch.setattr(java, "JAVA", executable(tmp_path / "java", f"{TWO_ANSWERS}; {second}"))
    texts = {5: "a dog", 6: "a cat", 7: "a bird"}
    with pytest.raises(RoutevlError, match=rf"^b\.json: image 6: METEOR {message}"):
        captions.score({image: [text] for image, text in texts.items()}, [texts], ["b.json"])


RUNAWAYS = {3: "the " * 3000, 7: "a man riding a horse on a beach " * 700, 9: "a" * 100_000}


def test_h20_runaway_captions_leave_meteor_out_and_name_their_images(
    meteor: java.Meteor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other metrics are there, and METEOR goes on for the next system."""
    monkeypatch.setattr(captions, "start_meteor", lambda: nullcontext(meteor))
    split = caption_split(tmp_path)
    files = [
        caption_results(tmp_path / f"{number}.json", texts)
        for number, texts in enumerate(
            (RUNAWAYS, GOOD_CAPTIONS | {3: RUNAWAYS[3]}, GOOD_CAPTIONS | {9: RUNAWAYS[9]}, GOOD_CAPTIONS)
        )
    ]
    both, one, long_word, good = captions.score_files(split / "captions.json", files)
    assert both.missing["METEOR"] == "not computed: images 3, 7 have a caption of more than 1,000 words"
    assert one.missing["METEOR"] == "not computed: image 3 has a caption of more than 1,000 words"
    for scores in (both, one):
        assert [name for name, value in scores.metrics.items() if value is None] == ["METEOR", "SPICE"]
    for scores in (long_word, good):
        assert list(scores.missing) == ["SPICE"] and scores.metrics["METEOR"] > 0
    assert one.cider_by_image[7] == pytest.approx(good.cider_by_image[7])


def test_h20_references_may_run_away_too(meteor: java.Meteor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "start_meteor", lambda: nullcontext(meteor))
    (scores,) = captions.score({1: ["a dog", RUNAWAYS[7]]}, [{1: "a dog"}])
    assert scores.missing["METEOR"] == "not computed: image 1 has a caption of more than 1,000 words"


def test_h18_cider_of_few_images_has_a_remark(
    meteor: java.Meteor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(captions, "start_meteor", lambda: nullcontext(meteor))
    split = caption_split(tmp_path)
    results = caption_results(tmp_path / "results.json", {7: "a red circle above a blue square ."})
    run_stage(captions, "--annotations", split / "captions.json", "--results", results, "--subset")
    report = json.loads(capsys.readouterr().out)
    assert report["CIDEr"] == 0 and report["n"] == 1 and report["METEOR"] == pytest.approx(1)
    assert report["remarks"] == [
        "CIDEr of 1 image says little: it weighs words by how few of just these images' references have them, so that words "
        "which all have count nothing, and the CIDEr of one image is 0 whatever its caption"
    ]
    many = {number: f"a dog and {number} cats" for number in range(captions.FEW_IMAGES)}
    (scores,) = captions.score({image: [text] for image, text in many.items()}, [many])
    assert scores.remarks == [] and scores.metrics["CIDEr"] > 1


@needs_reference
def test_captions_agree_with_pycocoevalcap(capsys: pytest.CaptureFixture[str]) -> None:
    folder = REFERENCE / "coco"
    files = [
        "--annotations",
        folder / "captions_val2017.json.gz",
        "--results",
        folder / "fakecap_126_results.json",
    ]
    run_stage(captions, *files, "--subset")
    printed = json.loads(capsys.readouterr().out)
    expected = json.loads((folder / "expected_scores.json").read_text())["fakecap_126"]
    assert {name: printed[name] for name in expected} == pytest.approx(expected, abs=1e-6, rel=0)
    assert printed["SPICE"] is None
    assert "SPICE" in printed["missing"]
    assert printed["n"] == 126
