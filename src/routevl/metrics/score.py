"""The stage `score`: the official metrics of runs' test predictions, in all and per item."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from routevl.data.records import Record
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, check_replaceable, write_json
from routevl.metrics.results import remarked

Scores = tuple[dict[str, Any], dict[str, Any]]  # what metrics.json and items.json hold


def score_vqa(split: Path, results: Sequence[Path]) -> Iterator[Scores]:
    """Score VQA results against a prepared split, in percent; None for an answer type without questions."""
    from routevl.metrics import vqa

    questions, annotations = vqa.read_answered(split / "questions.json", split / "annotations.json")
    pairs = zip(questions, annotations, strict=True)
    images = {question["question_id"]: _image_of(question, annotation) for question, annotation in pairs}
    for path in results:
        scores = vqa.score_results(annotations, path)
        metrics: dict[str, Any] = {"accuracy": scores.overall}
        for metric, answer_type in (("yes_no", "yes/no"), ("number", "number"), ("other", "other")):
            group = scores.by_answer_type.get(answer_type)
            metrics[metric] = group.accuracy if group else None
        metrics["by_question_type"] = {name: group._asdict() for name, group in scores.by_question_type.items()}
        summary = {"n": len(scores.by_question), "metrics": metrics}
        ids = list(scores.by_question)
        items = {"ids": ids, "images": [images[item] for item in ids], "accuracy": list(scores.by_question.values())}
        yield summary | remarked(scores.remarks), items


def _image_of(question: Record, annotation: Record) -> int | str:
    """The image of a question; where neither file names one, the question stands for itself."""
    return question.get("image_id", annotation.get("image_id", question["question_id"]))


def score_captions(split: Path, results: Sequence[Path]) -> Iterator[Scores]:
    """Score captions against a prepared split, as fractions; METEOR is started once for all results."""
    from routevl.metrics import captions

    for scores in captions.score_files(split / "captions.json", results):
        by_image = dict(sorted(scores.cider_by_image.items()))
        summary = {"n": len(by_image), "metrics": scores.metrics, "missing": scores.missing}
        ids = list(by_image)
        yield summary | remarked(scores.remarks), {"ids": ids, "images": ids, "CIDEr": list(by_image.values())}


_SCORERS = {"vqa": score_vqa, "caption": score_captions}


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the stage `score`."""
    parser.add_argument("--task", required=True, choices=sorted(_SCORERS))
    parser.add_argument("--split-folder", required=True, type=Path, help="prepared split to score on")
    parser.add_argument("--predictions", required=True, type=Path, nargs="+", help="runs' folders of results.json")
    parser.add_argument("--output", required=True, type=Path, nargs="+", help="as many folders of metrics.json, items.json")


def run(arguments: Namespace) -> None:
    """Score runs' predictions, which must be there for every item of the split, and write their scores.

    Raises:
        RoutevlError: as the task's scorer; or not as many outputs as predictions.
    """
    if len(arguments.predictions) != len(arguments.output):
        raise RoutevlError(f"--output names {len(arguments.output)} folders for {len(arguments.predictions)} --predictions")
    for output in arguments.output:
        check_replaceable(output, "metrics.json")
    results = [folder / "results.json" for folder in arguments.predictions]
    scores = list(_SCORERS[arguments.task](arguments.split_folder, results))
    for predictions, output, (summary, items) in zip(arguments.predictions, arguments.output, scores, strict=True):
        with atomic_folder(output, "metrics.json") as folder:
            write_json(folder / "metrics.json", {"run": predictions.resolve().name, "task": arguments.task} | summary)
            write_json(folder / "items.json", items)
