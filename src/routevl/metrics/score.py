"""The stage `score`: the official metrics of runs' test predictions, in all and per item."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from routevl.data.records import STRING, Format, Record, object_of
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, check_replaceable, write_json
from routevl.metrics.results import remarked

if TYPE_CHECKING:
    from routevl.metrics import vqa

ANSWER_TYPES = {"yes_no": "yes/no", "number": "number", "other": "other"}  # metric -> what annotations call the type
_DATA_SETS = ("vqa", "gqa", "nlvr2", "caption")  # of a multi-task run, whose results.json has the name of each one's file
_MULTITASK = Format(
    "the results of a multi-task run", object_of(**dict.fromkeys(_DATA_SETS, STRING)) | {"additionalProperties": False}
)

Scores = tuple[dict[str, Any], dict[str, Any]]  # what metrics.json and items.json hold


def score_vqa(split: Path, results: Sequence[Path]) -> Iterator[Scores]:
    """Score VQA results against a prepared split, in percent; None for an answer type without questions."""
    from routevl.metrics import vqa

    questions, annotations = vqa.read_answered(split / "questions.json", split / "annotations.json")
    pairs = zip(questions, annotations, strict=True)
    images = {question["question_id"]: _image_of(question, annotation) for question, annotation in pairs}
    for path in results:
        scores = vqa.score_results(annotations, path)
        metrics: dict[str, Any] = {"accuracy": scores.overall, **_by_answer_type(scores)}
        metrics["by_question_type"] = {name: group._asdict() for name, group in scores.by_question_type.items()}
        summary = {"n": len(scores.by_question), "metrics": metrics}
        ids = list(scores.by_question)
        items = {"ids": ids, "images": [images[item] for item in ids], "accuracy": list(scores.by_question.values())}
        yield summary | remarked(scores.remarks), items


def _by_answer_type(scores: vqa.Scores) -> dict[str, float | None]:
    groups = {name: scores.by_answer_type.get(kind) for name, kind in ANSWER_TYPES.items()}
    return {name: group.accuracy if group else None for name, group in groups.items()}


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


def score_multitask(split: Path, results: Sequence[Path]) -> Iterator[Scores]:
    """Score multi-task results, which name a file for each data set, against a prepared split, in percent (CIDEr times 100).

    An item's `average` is what it adds to the average of the data sets: the mean of these over all items is that average, and
    over the items of images that are drawn anew it moves as that average does. An NLVR2 example is drawn with its left image.
    """
    from routevl.metrics import captions, gqa, nlvr2, vqa

    questions, annotations = vqa.read_answered(split / "questions.json", split / "annotations.json")
    gqa_questions, examples = gqa.read_answered(split / "gqa.json"), nlvr2.read_labelled(split / "nlvr2.jsonl")
    images = {
        "vqa": {question["question_id"]: question.get("image_id") for question in questions},
        "gqa": {name: question.get("image_id") for name, question in gqa_questions.items()},
        "nlvr2": {example.identifier: example.image_ids and example.image_ids[0] for example in examples},
    }
    for name, of_items in images.items():
        if None in of_items.values():
            raise RoutevlError(
                f"{split}: its {name} items do not name their images: it is not a split that `routevl prepare` wrote"
            )
    of_runs = [{name: path.parent / file for name, file in _MULTITASK.read(path).items()} for path in results]
    all_captions = captions.cider_of_files(split / "captions.json", [paths["caption"] for paths in of_runs])
    for paths, of_captions in zip(of_runs, all_captions, strict=True):
        of_vqa = vqa.score_results(annotations, paths["vqa"])
        of_gqa = gqa.score_results(gqa_questions, paths["gqa"])
        of_nlvr2 = nlvr2.score_results(examples, paths["nlvr2"])
        means = {"vqa": of_vqa.overall, "gqa": of_gqa.overall, "nlvr2": of_nlvr2.accuracy}
        means["caption"] = 100 * of_captions.metrics["CIDEr"]
        by_item = {"vqa": of_vqa.by_question, "gqa": of_gqa.by_question, "nlvr2": of_nlvr2.by_example}
        by_item["caption"] = {image: 100 * cider for image, cider in sorted(of_captions.cider_by_image.items())}
        items = items_of_data_sets(means, by_item, images | {"caption": {image: image for image in by_item["caption"]}})
        metrics = {"average": fmean(means.values()), **means, "nlvr2_consistency": of_nlvr2.consistency}
        metrics |= {f"vqa_{name}": accuracy for name, accuracy in _by_answer_type(of_vqa).items()}
        remarks = {"vqa": of_vqa.remarks, "gqa": of_gqa.remarks, "caption": of_captions.remarks}
        summary = {"n": len(items["ids"]), "metrics": metrics}
        yield summary | remarked([f"{name}: {remark}" for name, those in remarks.items() for remark in those]), items


def items_of_data_sets(
    means: Mapping[str, float], by_item: Mapping[str, Mapping[Any, float]], images: Mapping[str, Mapping[Any, int]]
) -> dict[str, list[Any]]:
    """items.json of several data sets: from each one's mean score, and the scores and images of its items."""
    average, n_items = fmean(means.values()), sum(map(len, by_item.values()))
    items: dict[str, list[Any]] = {column: [] for column in ("ids", "images", "average", *by_item)}
    for name, scores in by_item.items():
        weight = n_items / (len(means) * len(scores))  # each data set has the same part in the average, however many its items
        for item, score in scores.items():
            items["ids"].append(f"{name}/{item}")
            items["images"].append(images[name][item])
            items["average"].append(average + weight * (score - means[name]))
            for column in by_item:
                items[column].append(score if column == name else None)
    return items


_SCORERS = {"vqa": score_vqa, "caption": score_captions, "multitask": score_multitask}


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
