"""Sources of data, as `data.sources` of the configuration lists them: their keys, and the reading of their files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from routevl.data.coco import read_captions, read_image_list
from routevl.data.gqa import read_questions
from routevl.data.image_files import ImageFolder
from routevl.data.nlvr2 import Example, read_examples
from routevl.data.records import INTEGER, SPLITS, STRING, Format, Record
from routevl.data.vqav2 import read_pair
from routevl.errors import RoutevlError
from routevl.options import parse_number

SOURCE_FILES = ("images", "image_list", "questions", "annotations", "captions", "gqa", "nlvr2")
GQA_FIELDS = ("question", "imageId", "answer", "isBalanced", "types")  # of a question, that are kept
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
    gqa: str | None = None
    nlvr2: str | None = None
    missing_images: str = "error"
    max_images: int | None = None
    id_offset: int = 0

    def __post_init__(self) -> None:
        texts = (self.questions, self.captions, self.gqa, self.nlvr2)
        if (self.questions is None) != (self.annotations is None) or all(file is None for file in texts):
            raise ValueError("a source needs captions, or questions and annotations, or gqa, or nlvr2, or several of these")
        if self.gqa is not None or self.nlvr2 is not None:
            if self.id_offset:
                raise ValueError("id_offset: of no use with gqa or nlvr2, whose images have names, which make their ids")
            if "karpathy" in self.split:
                raise ValueError("split karpathy: names no images of gqa or nlvr2; give these a source of their own")
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


class Named(NamedTuple):
    """An image that a data set knows by names, the likeliest first, that its file below the folder of images may have."""

    data_set: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return self.names[0]


@dataclass
class Split:
    """The items of one split, or of one source: paths and COCO's entries of images by id; annotations in the questions' order.

    GQA's questions, by their ids, have an "image_id" of `images`, as NLVR2's examples have two.
    """

    images: dict[int, Path] = field(default_factory=dict)
    image_records: dict[int, Record] = field(default_factory=dict)
    questions: list[Record] = field(default_factory=list)
    annotations: list[Record] = field(default_factory=list)
    captions: list[Record] = field(default_factory=list)
    gqa: dict[str, Record] = field(default_factory=dict)
    nlvr2: list[Example] = field(default_factory=list)
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
        self.gqa |= {name: question for name, question in other.gqa.items() if question["image_id"] in image_ids}
        self.nlvr2 += [example for example in other.nlvr2 if all(image_id in image_ids for image_id in example.image_ids)]
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

        return replace(
            self,
            images={image_id + offset: path for image_id, path in self.images.items()},
            image_records={image_id + offset: moved(record, "id") for image_id, record in self.image_records.items()},
            questions=[moved(record, "question_id", "image_id") for record in self.questions],
            annotations=[moved(record, "question_id", "image_id") for record in self.annotations],
            captions=[moved(record, "id", "image_id") for record in self.captions],
        )


def read_source(source: Source) -> tuple[Split, dict[Named, Path]]:
    """Read a source's files and find its images. Its ids are still those of the files.

    Returns:
        its content, and the files of the images of GQA and NLVR2, which have no ids yet: `identify` gives them.

    Raises:
        RoutevlError: an official file is wrong, the folder of images is missing, or an image is.
    """
    content = Split()
    numbered: dict[int, str] = {}  # image id to the file that refers to it
    named: dict[Named, str] = {}
    if source.captions is not None:
        file = read_captions(source.captions)
        content.captions = file["annotations"]
        content.licenses = file.get("licenses", [])
        content.image_records = {image["id"]: image for image in file.get("images", [])}
        numbered = {caption["image_id"]: source.captions for caption in content.captions}
    if source.questions is not None and source.annotations is not None:
        content.questions, content.annotations = read_pair(source.questions, source.annotations)
        numbered = {question["image_id"]: source.questions for question in content.questions} | numbered
    if source.gqa is not None:
        content.gqa = _read_answered(source.gqa)
        named |= {_gqa_image(question): source.gqa for question in content.gqa.values()}
    if source.nlvr2 is not None:
        content.nlvr2 = read_examples(source.nlvr2)
        named |= {image: source.nlvr2 for example in content.nlvr2 for image in _nlvr2_images(example)}
    if source.image_list is not None:
        for image in read_image_list(source.image_list):
            content.image_records[image["id"]] = content.image_records.get(image["id"], {}) | image
    found = _find_images(source, content.image_records, {image_id: numbered[image_id] for image_id in sorted(numbered)} | named)
    content.images = {image: path for image, path in found.items() if not isinstance(image, Named)}
    return content, {image: path for image, path in found.items() if isinstance(image, Named)}


def _read_answered(path: str) -> dict[str, Record]:
    questions = read_questions(path)
    unanswered = next((name for name, question in questions.items() if "answer" not in question), None)
    if unanswered is not None:
        raise RoutevlError(
            f"{path}: the question {unanswered} has no answer: GQA's files of test and challenge can be neither learned from nor "
            "scored; results are reported on testdev"
        )
    return {name: {field: q[field] for field in GQA_FIELDS if field in q} for name, q in questions.items()}


def _gqa_image(question: Record) -> Named:
    return Named("gqa", (f"{question['imageId']}.jpg",))


def _nlvr2_images(example: Example) -> tuple[Named, Named]:
    return Named("nlvr2", example.left), Named("nlvr2", example.right)


def identify(source: Source, content: Split, named: Mapping[Named, Path], known: Mapping[Path, int]) -> None:
    """Give the images of GQA and NLVR2, and what is about them, ids; leave out what is about images that are not in `named`.

    The id is the one that the file has in the source's image_list or captions, else in `known`, else a function of the image's
    name and its data set alone, so that no other source changes it.

    Args:
        named: the files, as `read_source` has found them.
        known: ids that images of all sources have by their captions or questions, by the files' resolved paths.

    Raises:
        RoutevlError: two files get one id.
    """
    content.gqa = {name: question for name, question in content.gqa.items() if _gqa_image(question) in named}
    content.nlvr2 = [example for example in content.nlvr2 if named.keys() >= set(_nlvr2_images(example))]
    if not named:
        return
    about = dict.fromkeys(_gqa_image(question) for question in content.gqa.values())
    about |= dict.fromkeys(image for example in content.nlvr2 for image in _nlvr2_images(example))
    folder = ImageFolder(source.images)
    listed = ((image_id, folder.find(image_id, record["file_name"])) for image_id, record in content.image_records.items())
    own = {path.resolve(): image_id for image_id, path in listed if path is not None}
    ids: dict[Named, int] = {}
    for image in about:
        path, file = named[image], named[image].resolve()
        ids[image] = own.get(file, known.get(file, stable_id(image.data_set, path.stem)))
        other = content.images.setdefault(ids[image], path)
        if other is not path and other.resolve() != file:
            raise RoutevlError(
                f"{path}: would get the id {ids[image]}, which {other} has; give the files different names, or ids in the "
                "source's image_list"
            )
    content.gqa = {name: question | {"image_id": ids[_gqa_image(question)]} for name, question in content.gqa.items()}
    content.nlvr2 = [
        example._replace(image_ids=tuple(ids[image] for image in _nlvr2_images(example))) for example in content.nlvr2
    ]


def stable_id(data_set: str, name: str) -> int:
    """An id for an image that has a name instead: 52 bits, which also programs hold that read all numbers as floats."""
    return int.from_bytes(sha256(f"{data_set}/{name}".encode()).digest()[:8], "big") >> 12


def _find_images(
    source: Source, image_records: Mapping[int, Record], referred: Mapping[int | Named, str]
) -> dict[int | Named, Path]:
    """The files of the images that are referred to, the first `max_images` of them in the order of `referred`."""
    folder = ImageFolder(source.images)
    found: dict[int | Named, Path] = {}
    files: set[Path] = set()
    missing: list[int | Named] = []
    for image in referred:
        if isinstance(image, Named):
            path = folder.find_named(image.names)
        else:
            path = folder.find(image, image_records.get(image, {}).get("file_name"))
        if len(files) == source.max_images and path not in files:
            continue
        if path is None:
            missing.append(image)
        else:
            found[image] = _writable(path)
            files.add(path)
    _refuse_one_file_for_two(folder, {n: path for n, path in found.items() if not isinstance(n, Named)}, image_records)
    looked_at = len(found) + len(missing)
    if missing and source.missing_images != "drop":
        raise RoutevlError(
            f"{_looked_for(folder, missing[0], image_records)}: no such image, but {referred[missing[0]]} refers to the image "
            f"{missing[0]}; {len(missing)} of {looked_at} images are missing (put them there, or set the source's missing_images "
            "to 'drop')"
        )
    if missing:
        print(f"{source.images}: dropped what is about {len(missing)} of {looked_at} images, which are missing")
    if looked_at < len(referred):
        print(f"{source.images}: kept what is about the first {len(files)} of {len(referred)} images")
    return found


def _looked_for(folder: ImageFolder, image: int | Named, image_records: Mapping[int, Record]) -> str:
    if isinstance(image, Named):
        return f"{folder.folder}: {' or '.join(image.names)} (or another ending of images)"
    return folder.looked_for(image, image_records.get(image, {}).get("file_name"))


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
