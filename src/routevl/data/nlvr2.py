"""Reading example files in NLVR2's form (https://lil.nlp.cornell.edu/nlvr): one JSON object a line, about two images each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from routevl.data.records import INTEGER, STRING, Format, Record, check_unique, object_of

LABELS = {"True": True, "False": False}
EXAMPLE = Format(
    "an NLVR2 example",
    object_of(
        "directory", "left_url", "right_url", "image_ids",
        identifier={"type": "string", "pattern": r"^\w+-\d+-\d+-\d+$"},  # split-set-pair-sentence
        sentence=STRING,
        label={"type": ["string", "boolean"], "enum": [*LABELS, *LABELS.values()]},
        directory={"type": ["string", "integer"]},
        left_url=STRING,
        right_url=STRING,
        image_ids={"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 2},  # of prepared examples
    ),
)  # fmt: skip


class Example(NamedTuple):
    """A sentence about two images.

    Attributes:
        identifier: "<split>-<set>-<pair>-<sentence>", numbers but for the split.
        label: whether the sentence is true of the images.
        left, right: names that the image's file may have, the likeliest first: `<split>-<set>-<pair>-img0.png` (1 for the right
            one) below the example's directory, as the train images are kept, or without one; and the address that it is from.
        image_ids: ids in images.json of the left and the right image, where `routevl prepare` has written the example.
    """

    identifier: str
    sentence: str
    label: bool
    left: tuple[str, ...]
    right: tuple[str, ...]
    image_ids: tuple[int, int] | None = None

    @property
    def statement(self) -> tuple[str, str, str]:
        """Split, set and sentence of the identifier: what examples of one sentence about several pairs share."""
        split, of_set, _, sentence = self.identifier.split("-")
        return split, of_set, sentence


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a file, in its order.

    Raises:
        RoutevlError: the file is missing, a line is malformed, or an identifier is there twice.
    """
    records = EXAMPLE.read_lines(path)
    check_unique(path, "identifier", records)
    return [
        Example(
            identifier=record["identifier"],
            sentence=record["sentence"],
            label=LABELS.get(record["label"], record["label"]),
            left=_names(record, 0, "left_url"),
            right=_names(record, 1, "right_url"),
            image_ids=tuple(record["image_ids"]) if "image_ids" in record else None,
        )
        for record in records
    ]


def _names(record: Record, side: int, address: str) -> tuple[str, ...]:
    name = f"{record['identifier'].rpartition('-')[0]}-img{side}.png"
    folder = [f"{record['directory']}/{name}"] if "directory" in record else []
    return (*folder, name, *([record[address]] if address in record else []))
