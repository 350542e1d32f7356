"""VQA accuracy as the official VQAv2 evaluator computes it (https://visualqa.org/evaluation.html).

The rules, odd ones included, are those of `vqaEval.py` of the official evaluation tools for v2.0.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from routevl.data.records import Record
from routevl.data.vqav2 import ANSWERED, read_pair
from routevl.errors import RoutevlError
from routevl.metrics.results import GroupAccuracy, mean, mean_by_group, read_results, remarked, rounded

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official code passes the flag re.UNICODE (32) to `sub` where the largest number of replacements belongs.
_MOST_PERIODS = 32

ENOUGH_ANSWERS = 4  # an answer is compared with those of the other annotators, and three of them make it right
FEW_ANSWERS = (
    "{few} of {n} questions have the answers of fewer than four annotators: no answer to them gets 100%, and none gets anything "
    "where there is one annotator"
)

# Every one of these is recognised when one of its apostrophes is left out.
_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
you'd've you'll you're you've
""".split()  # noqa: SIM905
_CONTRACTIONS = {
    contraction[:place] + contraction[place + 1 :]: contraction
    for contraction in _CONTRACTED
    for place, character in enumerate(contraction)
    if character == "'"
} | {"somebody'd": "somebodyd"}


class Scores(NamedTuple):
    """VQA accuracy, in percent and not rounded: of all questions, of the types that occur, and by question_id.

    `remarks` are sentences about what it cannot tell, and why.
    """

    overall: float
    by_answer_type: dict[str, GroupAccuracy]
    by_question_type: dict[str, GroupAccuracy]
    by_question: dict[int, float]
    remarks: list[str]


@lru_cache(maxsize=1 << 16)
def normalize_answer(answer: str) -> str:
    """An answer as the official evaluator compares it.

    Lower case; punctuation, articles and repeated spaces removed; the number words none, zero ... ten as
    digits; apostrophes put back into contractions.
    """
    words = [_NUMBER_WORDS.get(word, word) for word in _strip_punctuation(_tidy(answer)).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _tidy(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(answer: str) -> str:
    """Remove marks that touch a space (all, where a comma stands between digits); others become spaces."""
    comma_in_number = _COMMA_IN_NUMBER.search(answer)
    stripped = answer
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in answer or f" {mark}" in answer
        stripped = stripped.replace(mark, "" if touches_space or comma_in_number else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def _leave_one_out_accuracy(matches: int, annotators: int) -> float:
    """min(1, matches / 3) averaged over the subsets that leave out one annotator each, in [0, 1]."""
    without_a_match = min(1.0, (matches - 1) / 3)
    without_another = min(1.0, matches / 3)
    return (matches * without_a_match + (annotators - matches) * without_another) / annotators


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """The accuracy that each of the annotators' answers would get: the soft targets of training.

    Returns:
        normalised answer to accuracy in [0, 1], in the order of first occurrence. The evaluator leaves
        answers as they are where all annotators agree; here they are always normalised, as the vocabulary is.
    """
    counts = Counter(normalize_answer(answer) for answer in answers)
    return {answer: _leave_one_out_accuracy(matches, len(answers)) for answer, matches in counts.items()}


def question_accuracy(answers: Sequence[str], prediction: str) -> float:
    """Official accuracy of a prediction against the (ten) annotators' answers to one question, in [0, 1]."""
    answers = [_tidy(answer) for answer in answers]
    prediction = _tidy(prediction)
    if len(set(answers)) > 1:
        answers = [normalize_answer(answer) for answer in answers]
        prediction = normalize_answer(prediction)
    return _leave_one_out_accuracy(answers.count(prediction), len(answers))


def score(annotations: Sequence[dict[str, Any]], predictions: Mapping[int, str]) -> Scores:
    """Score predicted answers by question_id against one or more entries of a VQAv2 annotations file.

    What has no `answer_type` or `question_type` is in none of these groups.
    """
    few = sum(len(annotation["answers"]) < ENOUGH_ANSWERS for annotation in annotations)
    by_question: dict[int, float] = {}
    for annotation in annotations:
        answers = [answer["answer"] for answer in annotation["answers"]]
        question_id = annotation["question_id"]
        by_question[question_id] = 100 * question_accuracy(answers, predictions[question_id])

    def by_type(kind: str) -> dict[str, GroupAccuracy]:
        typed = [annotation for annotation in annotations if kind in annotation]
        return mean_by_group((annotation[kind], by_question[annotation["question_id"]]) for annotation in typed)

    return Scores(
        overall=mean(by_question.values()).accuracy,
        by_answer_type=by_type("answer_type"),
        by_question_type=by_type("question_type"),
        by_question=by_question,
        remarks=[FEW_ANSWERS.format(few=few, n=len(annotations))] if few else [],
    )


def read_answered(questions: str | Path, annotations: str | Path) -> tuple[list[Record], list[Record]]:
    """`read_pair` of what can be scored, for which the questions' text is not needed.

    Raises:
        RoutevlError: a file is missing or malformed, or the files are about different questions or none.
    """
    pair = read_pair(questions, annotations, ANSWERED)
    if not pair[1]:
        raise RoutevlError(f"{annotations}: holds no questions to score")
    return pair


def score_results(annotations: Sequence[Record], results: str | Path) -> Scores:
    """Score a results file, which must answer exactly the questions of the annotations. Raises RoutevlError as `read_results`."""
    question_ids = [entry["question_id"] for entry in annotations]
    return score(annotations, read_results(results, "question_id", "answer", question_ids))


def score_files(questions: str | Path, annotations: str | Path, results: str | Path) -> Scores:
    """Score a results file against the official files; errors as of `read_answered` and `score_results`."""
    return score_results(read_answered(questions, annotations)[1], results)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the stage `vqa-score`."""
    parser.add_argument("--questions", required=True, help="questions file in VQAv2's form (json or json.gz)")
    parser.add_argument("--annotations", required=True, help="annotations file in VQAv2's form (json or json.gz)")
    parser.add_argument("--results", required=True, help='results file: [{"question_id": ..., "answer": ...}]')


def run(arguments: Namespace) -> None:
    """Print what the official evaluator reports, in percent with two decimals, and what that cannot tell, as JSON."""
    scores = score_files(arguments.questions, arguments.annotations, arguments.results)
    report = {
        "overall": round(scores.overall, 2),
        "perAnswerType": rounded(scores.by_answer_type),
        "perQuestionType": rounded(scores.by_question_type),
        "n": len(scores.by_question),
    }
    print(json.dumps(report | remarked(scores.remarks), indent=1, ensure_ascii=False))
