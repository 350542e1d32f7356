"""Reading question and annotation files in VQAv2's form (https://visualqa.org/download.html).

OK-VQA, VizWiz and TextVQA come in it too, with other types or fewer fields: a file must have what is read of it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from routevl.data.records import INTEGER, STRING, Format, Record, check_unique, list_of, object_of
from routevl.errors import RoutevlError

ANY_ID = INTEGER | {"type": ["integer", "string"]}  # of an image that is not looked for: TextVQA's are texts
QUESTIONS = Format("a VQAv2 questions file", object_of(questions=list_of(image_id=INTEGER, question_id=INTEGER, question=STRING)))
# of questions that have been answered
ANSWERED = Format("a VQAv2 questions file", object_of(questions=list_of("image_id", image_id=ANY_ID, question_id=INTEGER)))
ANNOTATIONS = Format(
    "a VQAv2 annotations file",
    object_of(
        annotations=list_of(
            "image_id", "question_type", "answer_type", "multiple_choice_answer",
            image_id=ANY_ID,
            question_id=INTEGER,
            question_type=STRING,
            answer_type=STRING,
            multiple_choice_answer=STRING,
            answers=list_of(answer=STRING) | {"minItems": 1},
        )
    ),
)  # fmt: skip


def read_questions(path: str | Path, form: Format = QUESTIONS) -> list[Record]:
    """The questions of a file. Raises RoutevlError where it is missing or malformed, or a question_id is there twice."""
    questions = form.read(path)["questions"]
    check_unique(path, "question_id", questions)
    return questions


def read_pair(
    questions_path: str | Path, annotations_path: str | Path, form: Format = QUESTIONS
) -> tuple[list[Record], list[Record]]:
    """Read a questions file and its annotations file; check that they are about the same questions.

    Args:
        form: what the questions must have, QUESTIONS or ANSWERED.

    Returns:
        the questions in the order of their file, and the annotations in the SAME order.

    Raises:
        RoutevlError: a file is missing or malformed, a question_id is there twice, a question has no annotation, an
            annotation no question, or the two name different images.
    """
    questions = read_questions(questions_path, form)
    records = ANNOTATIONS.read(annotations_path)["annotations"]
    check_unique(annotations_path, "question_id", records)
    annotations = {annotation["question_id"]: annotation for annotation in records}
    matched = []
    for question in questions:
        question_id = question["question_id"]
        annotation = annotations.pop(question_id, None)
        if annotation is None:
            raise RoutevlError(f"{annotations_path}: no annotation for the question_id {question_id} of {questions_path}")
        images = [record["image_id"] for record in (annotation, question) if "image_id" in record]
        if len(set(images)) > 1:
            raise RoutevlError(
                f"{annotations_path}: question_id {question_id} is about the image {images[0]}, "
                f"but about {images[1]} in {questions_path}"
            )
        matched.append(annotation)
    if annotations:
        raise RoutevlError(f"{annotations_path}: the question_id {next(iter(annotations))} is not in {questions_path}")
    return questions, matched


def usual_answer(annotation: Record) -> str:
    """`multiple_choice_answer`, or what VQAv2 makes it of: the answer that most annotators gave, the first of several."""
    if "multiple_choice_answer" in annotation:
        return annotation["multiple_choice_answer"]
    return Counter(answer["answer"] for answer in annotation["answers"]).most_common(1)[0][0]
