"""Reading VQAv2 question and annotation files (https://visualqa.org/download.html)."""

from __future__ import annotations

from pathlib import Path

from routevl.data.records import INTEGER, STRING, Format, Record, check_unique, list_of, object_of
from routevl.errors import RoutevlError

QUESTIONS = Format("a VQAv2 questions file", object_of(questions=list_of(image_id=INTEGER, question_id=INTEGER, question=STRING)))
ANNOTATIONS = Format(
    "a VQAv2 annotations file",
    object_of(
        annotations=list_of(
            image_id=INTEGER,
            question_id=INTEGER,
            question_type=STRING,
            answer_type={"enum": ["yes/no", "number", "other"]},
            multiple_choice_answer=STRING,
            answers=list_of(answer=STRING) | {"minItems": 1},
        )
    ),
)


def read_pair(questions_path: str | Path, annotations_path: str | Path) -> tuple[list[Record], list[Record]]:
    """Read a questions file and its annotations file; check that they are about the same questions.

    Returns:
        the questions in the order of their file, and the annotations in the SAME order.

    Raises:
        RoutevlError: a file is missing or malformed, a question_id is there twice, a question has no annotation, an
            annotation no question, or the two name different images.
    """
    questions = QUESTIONS.read(questions_path)["questions"]
    records = ANNOTATIONS.read(annotations_path)["annotations"]
    check_unique(questions_path, "question_id", questions)
    check_unique(annotations_path, "question_id", records)
    annotations = {annotation["question_id"]: annotation for annotation in records}
    matched = []
    for question in questions:
        question_id = question["question_id"]
        annotation = annotations.pop(question_id, None)
        if annotation is None:
            raise RoutevlError(f"{annotations_path}: no annotation for the question_id {question_id} of {questions_path}")
        if annotation["image_id"] != question["image_id"]:
            raise RoutevlError(
                f"{annotations_path}: question_id {question_id} is about the image {annotation['image_id']}, "
                f"but about {question['image_id']} in {questions_path}"
            )
        matched.append(annotation)
    if annotations:
        raise RoutevlError(f"{annotations_path}: the question_id {next(iter(annotations))} is not in {questions_path}")
    return questions, matched
