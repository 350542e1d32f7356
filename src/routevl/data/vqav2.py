"""Reading VQAv2 question and annotation files (https://visualqa.org/download.html)."""

from __future__ import annotations

from pathlib import Path

from routevl.data.records import Record, check_fields, check_unique, checked_records, read_object
from routevl.errors import RoutevlError

ANSWER_TYPES = ("yes/no", "number", "other")


def read_questions(path: str | Path) -> Record:
    """Read and check a VQAv2 questions file, plain or gzip-compressed.

    Returns:
        the file's object; "questions" is a list of {"image_id": int, "question_id": int, "question": str,
        ...}.

    Raises:
        RoutevlError: the file is missing or not JSON, an entry lacks a key or has it with another type, or a
            question_id is used twice.
    """
    content = read_object(path, "a VQAv2 questions file")
    fields = {"image_id": int, "question_id": int, "question": str}
    questions = checked_records(path, content, "questions", fields)
    check_unique(path, "questions", "question_id", questions)
    return content


def read_annotations(path: str | Path) -> Record:
    """Read and check a VQAv2 annotations file, plain or gzip-compressed.

    Returns:
        the file's object; "annotations" is a list of {"image_id": int, "question_id": int,
        "question_type": str, "answer_type": "yes/no" | "number" | "other", "multiple_choice_answer": str,
        "answers": [{"answer": str, ...}, ...], ...}.

    Raises:
        RoutevlError: the file is missing or not JSON, an entry lacks a key or has it with another type, a
            question_id is used twice, or a question has no answers or an unknown answer_type.
    """
    content = read_object(path, "a VQAv2 annotations file")
    fields = {
        "image_id": int,
        "question_id": int,
        "question_type": str,
        "answer_type": str,
        "multiple_choice_answer": str,
        "answers": list,
    }
    annotations = checked_records(path, content, "annotations", fields)
    check_unique(path, "annotations", "question_id", annotations)
    for index, annotation in enumerate(annotations):
        place = f"annotations[{index}]"
        if annotation["answer_type"] not in ANSWER_TYPES:
            found = f"must be one of {ANSWER_TYPES}, found {annotation['answer_type']!r}"
            raise RoutevlError(f"{path}: {place}['answer_type'] {found}")
        if not annotation["answers"]:
            raise RoutevlError(f"{path}: {place}['answers'] is empty, expected the annotators' answers")
        check_fields(path, f"{place}['answers']", annotation["answers"], {"answer": str})
    return content


def read_pair(questions_path: str | Path, annotations_path: str | Path) -> tuple[list[Record], list[Record]]:
    """Read a questions file and its annotations file; check that they are about the same questions.

    Returns:
        the questions in the order of their file, and the annotations in the SAME order.

    Raises:
        RoutevlError: as `read_questions` and `read_annotations`, or a question has no annotation, an
            annotation no question, or the two name different images; the message gives the question_id.
    """
    questions = read_questions(questions_path)["questions"]
    records = read_annotations(annotations_path)["annotations"]
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
