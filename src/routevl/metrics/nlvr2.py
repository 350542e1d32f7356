"""Accuracy and consistency on NLVR2 as its evaluator computes them (https://github.com/lil-lab/nlvr, nlvr2/eval/metrics.py)."""

from __future__ import annotations

import csv
import json
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from routevl.data.nlvr2 import LABELS, Example, read_examples
from routevl.errors import RoutevlError
from routevl.files import read_text
from routevl.metrics.results import mean, results_by_id

WORDS = {word.lower(): label for word, label in LABELS.items()}


class Scores(NamedTuple):
    """Scores in percent and not rounded.

    Attributes:
        accuracy: of all examples.
        consistency: the share of sentences that are judged rightly about each of their pairs of images.
        by_example: accuracy by identifier.
        by_sentence: 100 or 0 by split, set and sentence of the identifier.
    """

    accuracy: float
    consistency: float
    by_example: dict[str, float]
    by_sentence: dict[tuple[str, str, str], float]


def score(examples: Sequence[Example], predictions: Mapping[str, bool]) -> Scores:
    """Score predicted labels by identifier against one or more examples."""
    by_example = {example.identifier: 100.0 * (predictions[example.identifier] == example.label) for example in examples}
    about: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for example in examples:
        about[example.statement].append(by_example[example.identifier])
    by_sentence = {sentence: min(accuracies) for sentence, accuracies in about.items()}
    return Scores(mean(by_example.values()).accuracy, mean(by_sentence.values()).accuracy, by_example, by_sentence)


def read_predictions(path: str | Path, expected: Collection[str]) -> dict[str, bool]:
    """Read a results file, lines `<identifier>,True` or `<identifier>,False` without a header, in any case; plain or gzip.

    Args:
        expected: identifiers of the examples, each of which must have one line.

    Raises:
        RoutevlError: the file is missing, a line is another one, or an identifier is there twice, unknown or missing.
    """
    reader = csv.reader(StringIO(read_text(path), newline=""), quoting=csv.QUOTE_NONE)
    entries = []
    try:
        for row in filter(None, reader):
            identifier, *words = row
            label = WORDS.get(",".join(words).lower())
            if label is None:
                raise RoutevlError(
                    f"{path}: line {reader.line_num}: {','.join(row)!r}, expected <identifier>,True or <identifier>,False"
                )
            entries.append({"identifier": identifier, "prediction": label})
    except csv.Error as error:
        raise RoutevlError(f"{path}: line {reader.line_num}: not readable as CSV ({error})") from error
    return results_by_id(path, "identifier", "prediction", entries, expected)


def read_labelled(annotations: str | Path) -> list[Example]:
    """The examples of an official file. Raises RoutevlError where it is missing or malformed, or has none."""
    examples = read_examples(annotations)
    if not examples:
        raise RoutevlError(f"{annotations}: holds no examples to score")
    return examples


def score_results(examples: Sequence[Example], results: str | Path) -> Scores:
    """Score a results file, which must have one line for each example. Raises RoutevlError as `read_predictions`."""
    return score(examples, read_predictions(results, [example.identifier for example in examples]))


def score_files(annotations: str | Path, results: str | Path) -> Scores:
    """Score a results file against an official file of examples; errors as of `read_labelled` and `score_results`."""
    return score_results(read_labelled(annotations), results)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the stage `nlvr2-score`."""
    parser.add_argument("--annotations", required=True, help="file in NLVR2's form, an example a line (json or json.gz)")
    parser.add_argument("--results", required=True, help="results file: a line <identifier>,True or <identifier>,False for each")


def run(arguments: Namespace) -> None:
    """Print what the official evaluator reports, but in percent with two decimals, and of how many, as JSON."""
    scores = score_files(arguments.annotations, arguments.results)
    report = {
        "accuracy": round(scores.accuracy, 2),
        "consistency": round(scores.consistency, 2),
        "n": len(scores.by_example),
        "sentences": len(scores.by_sentence),
    }
    print(json.dumps(report, indent=1))
