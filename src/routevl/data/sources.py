"""Sources of data, as `data.sources` of the configuration lists them: their keys, and the reading of their files."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routevl.data.coco import read_captions, read_image_list
from routevl.data.image_files import ImageFolder
from routevl.data.records import INTEGER, SPLITS, STRING, Format, Record
from routevl.data.vqav2 import read_pair
from routevl.errors import RoutevlError
from routevl.options import parse_number

SOURCE_FILES = ("images", "image_list", "questions", "annotations", "captions")
SHARE = {"type": "number", "minimum": 0}
SPLIT_OF_SOURCE = {
    "type": ["string", "object"],
    "properties": {
        "train": SHARE, "val": SHARE, "test": SHARE, "seed": {"type": "integer", "minimum": 0}, "karpathy": STRING
    },
}  # fmt: skip
SOURCES = Format(
    "a list of sources as data.sources in the configuration",
    {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                **dict.fromkeys(SOURCE_FILES, STRING),
                "split": SPLIT_OF_SOURCE,
                "missing_images": {"enum": ["error", "drop"]},
                "max_images": INTEGER | {"minimum": 1},
                "id_offset": INTEGER | {"minimum": 0},
            },
        },
    },
)


@dataclass(frozen=True)
class Source:
    """One entry of `--sources`, with its keys."""

    images: str
    split: str | dict[str, Any]
    image_list: str | None = None
    questions: str | None = None
    annotations: str | None = None
    captions: str | None = None
    missing_images: str = "error"
    max_images: int | None = None
    id_offset: int = 0

    def __post_init__(self) -> None:
        if (self.questions is None) != (self.annotations is None) or (self.questions is None and self.captions is None):
            raise ValueError("a source needs captions, or questions and annotations, or all three")
        if isinstance(self.split, str):
            known = self.split in SPLITS
        else:
            fractions = [self.split.get(name, 0) for name in SPLITS]
            known = "karpathy" in self.split or ("seed" in self.split and abs(sum(fractions) - 1) < 1e-6)
        if not known:
            raise ValueError(f"split {self.split}: expected a split, fractions that sum to 1 and a seed, or a karpathy file")


def parse_sources(text: str, where: str = "--sources") -> list[Source]:
    """Parse a JSON list of sources, or raise RoutevlError, whose message begins with `where`."""
    try:
        return [Source(**entry) for entry in SOURCES.check(where, json.loads(text, parse_float=parse_number))]
    except RoutevlError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise RoutevlError(f"{where}: not {SOURCES.name} ({error})") from None


@dataclass
class Split:
    """The items of one split, or of one source: paths and COCO's entries of images by id; annotations in the questions' order."""

    images: dict[int, Path] = field(default_factory=dict)
    image_records: dict[int, Record] = field(default_factory=dict)
    questions: list[Record] = field(default_factory=list)
    annotations: list[Record] = field(default_factory=list)
    captions: list[Record] = field(default_factory=list)
    licenses: list[Any] = field(default_factory=list)

    def add(self, other: Split, image_ids: Collection[int]) -> None:
        """Take over what `other` has about these images."""
        for image_id in sorted(image_ids):
            self.images.setdefault(image_id, other.images[image_id])
            if image_id in other.image_records:
                self.image_records.setdefault(image_id, other.image_records[image_id])
        for question, annotation in zip(other.questions, other.annotations, strict=True):
            if question["image_id"] in image_ids:
                self.questions.append(question)
                self.annotations.append(annotation)
        self.captions += [caption for caption in other.captions if caption["image_id"] in image_ids]
        self.licenses += [entry for entry in other.licenses if entry not in self.licenses]

    def shifted(self, offset: int) -> Split:
        """The same with `offset` added to all ids, of images, questions and captions. Raises RoutevlError above 64 bits."""
        if not offset:
            return self

        def moved(record: Record, *names: str) -> Record:
            ids = {name: record[name] + offset for name in names if name in record}
            if max(ids.values()) > INTEGER["maximum"]:
                raise RoutevlError(f"--sources: id_offset {offset} is too large: {max(ids.values())} is more than 64 bits hold")
            return record | ids

        return Split(
            images={image_id + offset: path for image_id, path in self.images.items()},
            image_records={image_id + offset: moved(record, "id") for image_id, record in self.image_records.items()},
            questions=[moved(record, "question_id", "image_id") for record in self.questions],
            annotations=[moved(record, "question_id", "image_id") for record in self.annotations],
            captions=[moved(record, "id", "image_id") for record in self.captions],
            licenses=self.licenses,
        )


def read_source(source: Source) -> Split:
    """Read a source's files and find its images. Its ids are still those of the files.

    Raises:
        RoutevlError: an official file is wrong, the folder of images is missing, or an image is.
    """
    content = Split()
    referred: dict[int, str] = {}  # image id to the file that refers to it
    if source.captions is not None:
        file = read_captions(source.captions)
        content.captions = file["annotations"]
        content.licenses = file.get("licenses", [])
        content.image_records = {image["id"]: image for image in file.get("images", [])}
        referred = {caption["image_id"]: source.captions for caption in content.captions}
    if source.questions is not None and source.annotations is not None:
        content.questions, content.annotations = read_pair(source.questions, source.annotations)
        referred = {question["image_id"]: source.questions for question in content.questions} | referred
    if source.image_list is not None:
        for image in read_image_list(source.image_list):
            content.image_records[image["id"]] = content.image_records.get(image["id"], {}) | image
    content.images = _find_images(source, content.image_records, referred)
    return content


def _find_images(source: Source, image_records: dict[int, Record], referred: dict[int, str]) -> dict[int, Path]:
    """The files of the images that are referred to, the first `max_images` of them by id."""
    folder = ImageFolder(source.images)
    found: dict[int, Path] = {}
    missing: list[int] = []
    for image_id in sorted(referred):
        if len(found) == source.max_images:
            break
        if path := folder.find(image_id, image_records.get(image_id, {}).get("file_name")):
            found[image_id] = _writable(path)
        else:
            missing.append(image_id)
    _refuse_one_file_for_two(folder, found, image_records)
    looked_at = len(found) + len(missing)
    if missing and source.missing_images != "drop":
        looked_for = folder.looked_for(missing[0], image_records.get(missing[0], {}).get("file_name"))
        raise RoutevlError(
            f"{looked_for}: no such image, but {referred[missing[0]]} refers to the image {missing[0]}; "
            f"{len(missing)} of {looked_at} images are missing (put them there, or set the source's missing_images to 'drop')"
        )
    if missing:
        print(f"{source.images}: dropped what is about {len(missing)} of {looked_at} images, which are missing")
    if len(found) < len(referred) - len(missing):
        print(f"{source.images}: kept what is about the first {len(found)} of {len(referred)} images")
    return found


def _refuse_one_file_for_two(folder: ImageFolder, found: dict[int, Path], image_records: dict[int, Record]) -> None:
    """Two images are one file only where both are given exactly its name: that of another folder may be another image's."""
    owners: dict[Path, int] = {}
    for image_id, path in found.items():
        first = owners.setdefault(path, image_id)
        names = [image_records.get(owner, {}).get("file_name") for owner in (first, image_id)]
        if first != image_id and not all(name is not None and folder.folder / name == path for name in names):
            raise RoutevlError(
                f"{path}: found for the image {first} ({names[0]}) and for the image {image_id} ({names[1]}); name their files, "
                "as they are below the folder, in the source's image_list"
            )


def _writable(path: Path) -> Path:
    """The path, or a RoutevlError where its bytes are not UTF-8, so that no JSON file could hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RoutevlError(f"{ascii(str(path))}: a path that is not UTF-8; rename the file or folder") from None
    return path
