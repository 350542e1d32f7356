"""Reading question files in GQA's form (https://cs.stanford.edu/people/dorarad/gqa/download.html), version 1.2.

The balanced files and the "all" files have one form; those of the splits test and challenge have no answers and no types.
"""

from __future__ import annotations

from pathlib import Path

from routevl.data.records import INTEGER, STRING, Format, Record, object_of

QUESTION = object_of(
    "answer", "types", "image_id",
    imageId=STRING,
    question=STRING,
    isBalanced={"type": "boolean"},
    answer=STRING,
    types=object_of("structural", "semantic", structural=STRING, semantic=STRING),
    image_id=INTEGER,  # of prepared questions
)  # fmt: skip
QUESTIONS = Format("a GQA questions file", {"type": "object", "additionalProperties": QUESTION})


def read_questions(path: str | Path) -> dict[str, Record]:
    """The questions of a file by their ids, which are texts with leading zeros, in the order of the file.

    Returns:
        question id to {"imageId": str, the name of the image's file without its ending, "question": str, "isBalanced": bool, ...}
        with, where the file has them, "answer", "types": {"structural": str, "semantic": str}, and, as `routevl prepare` writes
        it, "image_id": int, the image's id in images.json.

    Raises:
        RoutevlError: the file is missing or malformed.
    """
    return QUESTIONS.read(path)
