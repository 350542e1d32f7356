"""Accuracy on GQA as its evaluator computes it: the predicted text is the answer, character by character, or wrong.

The evaluator is `eval.py` of https://cs.stanford.edu/people/dorarad/gqa/evaluate.html. It counts the balanced questions alone.
Its validity, plausibility and consistency need further files, and are not computed.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from routevl.data.gqa import read_questions
from routevl.data.records import STRING, Record
from routevl.errors import RoutevlError
from routevl.metrics.results import GroupAccuracy, mean, mean_by_group, read_results, remarked, rounded

BY_WRITING_ALONE = (
    "{n} of {wrong} wrong predictions differ from the answer in case or white space alone: GQA compares texts as they are"
)


class Scores(NamedTuple):
    """Accuracy in percent and not rounded: of all balanced questions, of the types that occur, and by question id.

    A question whose structural type is "query" is "open", one of another type "binary". `remarks` are sentences about what the
    scores cannot tell, and why.
    """

    overall: float
    by_answer_type: dict[str, GroupAccuracy]
    by_structural_type: dict[str, GroupAccuracy]
    by_semantic_type: dict[str, GroupAccuracy]
    by_question: dict[str, float]
    remarks: list[str]


def score(questions: Mapping[str, Record], predictions: Mapping[str, str]) -> Scores:
    """Score predicted answers by question id to one or more questions of a GQA file that have answers.

    What has no type is in none of the groups of that kind.
    """
    by_question = {name: 100.0 * (predictions[name] == question["answer"]) for name, question in questions.items()}
    wrong = [(predictions[name], questions[name]["answer"]) for name, accuracy in by_question.items() if not accuracy]
    by_writing = sum(_loosely(prediction) == _loosely(answer) for prediction, answer in wrong)
    typed = [(question.get("types", {}), by_question[name]) for name, question in questions.items()]
    structural, semantic = (
        [(types[kind], accuracy) for types, accuracy in typed if kind in types] for kind in ("structural", "semantic")
    )
    return Scores(
        overall=mean(by_question.values()).accuracy,
        by_answer_type=mean_by_group(("open" if kind == "query" else "binary", accuracy) for kind, accuracy in structural),
        by_structural_type=mean_by_group(structural),
        by_semantic_type=mean_by_group(semantic),
        by_question=by_question,
        remarks=[BY_WRITING_ALONE.format(n=by_writing, wrong=len(wrong))] if by_writing else [],
    )


def _loosely(text: str) -> str:
    return " ".join(text.lower().split())


def read_answered(questions: str | Path) -> dict[str, Record]:
    """The questions of an official file by their ids, the unbalanced ones too.

    Raises:
        RoutevlError: the file is missing or malformed, no question is balanced, or one that is has no answer.
    """
    known = read_questions(questions)
    if not any(question["isBalanced"] for question in known.values()):
        raise RoutevlError(f"{questions}: holds no balanced questions, so none to score")
    for name, question in known.items():
        if question["isBalanced"] and "answer" not in question:
            raise RoutevlError(f"{questions}: the question {name} has no answer to score against")
    return known


def score_results(questions: Mapping[str, Record], results: str | Path) -> Scores:
    """Score a results file, which must answer the balanced questions of `read_answered`, and may answer the others.

    Raises RoutevlError as `read_results`.
    """
    balanced = {name: question for name, question in questions.items() if question["isBalanced"]}
    return score(balanced, read_results(results, "questionId", "prediction", balanced, questions, STRING))


def score_files(questions: str | Path, results: str | Path) -> Scores:
    """Score a results file against an official file; errors as of `read_answered` and `score_results`."""
    return score_results(read_answered(questions), results)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the stage `gqa-score`."""
    parser.add_argument("--questions", required=True, help="questions file in GQA's form (json or json.gz)")
    parser.add_argument("--results", required=True, help='results file: [{"questionId": "...", "prediction": ...}]')


def run(arguments: Namespace) -> None:
    """Print what the official evaluator reports, in percent with two decimals, and what that cannot tell, as JSON."""
    scores = score_files(arguments.questions, arguments.results)
    report = {
        "accuracy": round(scores.overall, 2),
        **rounded(scores.by_answer_type),
        "accuracyPerStructuralType": rounded(scores.by_structural_type),
        "accuracyPerSemanticType": rounded(scores.by_semantic_type),
        "n": len(scores.by_question),
    }
    print(json.dumps(report | remarked(scores.remarks), indent=1, ensure_ascii=False))
