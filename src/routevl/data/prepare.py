"""Stage `prepare`: merges sources in the official formats into checked train, val and test splits."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from routevl.data.coco import file_names, images_in_folder, read_captions, read_karpathy_splits
from routevl.data.records import INTEGER, SPLITS, STRING, Format, Record, check_unique, parse_number, write_records
from routevl.data.vqav2 import read_pair
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, sha256_of
from routevl.metrics.vqa import normalize_answer
from routevl.options import at_least
from routevl.progress import progress

SOURCE_FILES = ("images", "questions", "annotations", "captions")
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
                **dict.fromkeys(SOURCE_FILES, STRING), "split": SPLIT_OF_SOURCE, "missing_images": {"enum": ["error", "drop"]}
            },
        },
    },
)  # fmt: skip
QUESTION_FIELDS = ("image_id", "question", "question_id")
ANNOTATION_FIELDS = ("image_id", "question_id", "question_type", "answer_type", "multiple_choice_answer", "answers")
VOCABULARY = Format(
    "a list of different answers, or an object of answer to index",
    {
        "type": ["array", "object"],
        "minItems": 1, "uniqueItems": True, "items": STRING,
        "minProperties": 1, "additionalProperties": INTEGER,
    },
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `routevl prepare`."""
    parser.add_argument(
        "--sources",
        required=True,
        help='JSON list of {"images": folder, "split": "train" | "val" | "test" | {"train": fraction, ..., '
        '"seed": n} | {"karpathy": dataset_coco.json}, "questions" and "annotations": VQAv2 files, "captions": COCO file, '
        '"missing_images": "error" | "drop"}',
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the splits, replaced as a whole")
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument("--vocabulary", type=Path, help="answers: a JSON list, or an object of answer to index")
    answers.add_argument(
        "--minimum-answer-count",
        type=at_least(1),
        default=9,
        help="without --vocabulary: keep the answers that occur this often in --answer-splits (default: 9)",
    )
    parser.add_argument(
        "--answer-splits",
        nargs="+",
        choices=SPLITS,
        help="without --vocabulary: the splits whose answers are counted (default: train val). VQAv2's usual vocabulary of 3,129 "
        "counts all published answers; with Karpathy's splits, which take their test images from these, that is train val test",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write {train,val,test}/{images,questions,annotations,captions}.json and answers.json, or nothing.

    images.json holds [{"id": int, "file_name": str, "sha256": str, of the file's bytes}]: whatever reads an image later can tell
    that it is the one that was prepared.

    Raises:
        RoutevlError: a source, an official file or the vocabulary is wrong, images are missing, ids clash,
            an image is in two splits, or a split is empty.
    """
    if arguments.vocabulary is not None and arguments.answer_splits is not None:
        raise RoutevlError("--answer-splits: of no use with --vocabulary, which is taken as it is")
    splits = merge_sources(parse_sources(arguments.sources))
    if arguments.vocabulary is not None:
        answers = read_vocabulary(arguments.vocabulary)
    else:
        answers = build_vocabulary(splits, arguments.answer_splits or ("train", "val"), arguments.minimum_answer_count)
    hashes = _hash_images([path for split in splits.values() for path in split.images.values()])
    with atomic_folder(arguments.output, "answers.json") as folder:
        for name, split in splits.items():
            _write_split(folder / name, name, split, hashes)
        write_records(folder / "answers.json", answers)
    for name, split in splits.items():
        print(f"{name}: {len(split.images)} images, {len(split.questions)} questions, {len(split.captions)} captions")
    print(f"{len(answers)} answers")


# ------------------------------------------------------------------------------------------ sources


@dataclass(frozen=True)
class Source:
    """One entry of `--sources`, with its keys."""

    images: str
    split: str | dict[str, Any]
    questions: str | None = None
    annotations: str | None = None
    captions: str | None = None
    missing_images: str = "error"

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


def parse_sources(text: str) -> list[Source]:
    """Parse `--sources`, or raise RoutevlError."""
    try:
        return [Source(**entry) for entry in SOURCES.check("--sources", json.loads(text, parse_float=parse_number))]
    except RoutevlError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise RoutevlError(f"--sources: not {SOURCES.name} ({error})") from None


# ------------------------------------------------------------------------------ reading and merging


@dataclass
class Split:
    """The items of one split, or of one source: paths and COCO's entries of images by id."""

    images: dict[int, Path] = field(default_factory=dict)
    image_records: dict[int, Record] = field(default_factory=dict)
    questions: list[Record] = field(default_factory=list)
    annotations: list[Record] = field(default_factory=list)
    captions: list[Record] = field(default_factory=list)
    licenses: list[Any] = field(default_factory=list)


def merge_sources(sources: list[Source]) -> dict[str, Split]:
    """Read all sources and put their items into "train", "val" and "test"; errors as of `run`."""
    splits = {name: Split() for name in SPLITS}
    for source in sources:
        content = read_source(source)
        split_of = assign_splits(sorted(content.images), source)
        for name, split in splits.items():
            _add(split, content, {image_id for image_id, place in split_of.items() if place == name})
    _check_disjoint(splits)
    check_unique("--sources", "question_id", [question for split in splits.values() for question in split.questions])
    check_unique("--sources", "id", [caption for split in splits.values() for caption in split.captions])
    for kind in ("images", "questions", "captions"):
        empty = [name for name, split in splits.items() if not getattr(split, kind)]
        if empty and (kind == "images" or len(empty) < len(splits)):
            raise RoutevlError(f"--sources: the split {empty[0]!r} has no {kind}")
    return splits


def read_source(source: Source) -> Split:
    """Read a source's files and find its images.

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
    content.images = _find_images(source, content.image_records, referred)
    return content


def _find_images(source: Source, image_records: dict[int, Record], referred: dict[int, str]) -> dict[int, Path]:
    """The files of the images that are referred to, by their names in `image_records` or the numbers in these."""
    folder = Path(source.images)
    present = set(file_names(folder))
    numbered = images_in_folder(folder) if referred.keys() - image_records.keys() else {}
    found, missing = {}, {}
    for image_id in referred:
        name = image_records.get(image_id, {}).get("file_name") or numbered.get(image_id)
        if name is not None and (name in present or os.path.isfile(folder / name)):
            found[image_id] = _writable(folder / name)
        else:
            missing[image_id] = folder / (name or f"[..._]{image_id:012d}.[jpg|jpeg|png]")
    if missing and source.missing_images != "drop":
        image_id, path = next(iter(missing.items()))
        raise RoutevlError(
            f"{path}: no such image, but {referred[image_id]} refers to the image {image_id}; {len(missing)} of {len(referred)} "
            "images are missing (put them there, or set the source's missing_images to 'drop')"
        )
    if missing:
        print(f"{folder}: dropped what is about {len(missing)} of {len(referred)} images, which are missing")
    return found


def _writable(path: Path) -> Path:
    """The path, or a RoutevlError where its bytes are not UTF-8, so that no JSON file could hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RoutevlError(f"{ascii(str(path))}: a path that is not UTF-8; rename the file or folder") from None
    return path


def assign_splits(image_ids: list[int], source: Source) -> dict[int, str]:
    """The split of each image: all in the one named, as Karpathy's file says, or at random in the given fractions.

    Raises:
        RoutevlError: Karpathy's file is wrong, or does not name an image. Where the source drops missing images, such an image
            is left out.
    """
    split = source.split
    if isinstance(split, str):
        return dict.fromkeys(image_ids, split)
    if "karpathy" in split:
        return _karpathy_splits(image_ids, split["karpathy"], source)
    order = numpy.random.default_rng(split["seed"]).permutation(len(image_ids))
    edges = numpy.rint(numpy.cumsum([split.get(name, 0) for name in SPLITS]) * len(image_ids)).astype(int)
    places = numpy.split(order, edges[:2])
    return {image_ids[place]: name for name, chosen in zip(SPLITS, places, strict=True) for place in chosen}


def _karpathy_splits(image_ids: list[int], path: str, source: Source) -> dict[int, str]:
    split_of = read_karpathy_splits(path)
    unnamed = [image_id for image_id in image_ids if image_id not in split_of]
    if unnamed and source.missing_images != "drop":
        raise RoutevlError(
            f"{path}: does not name the image {unnamed[0]}, which is in {source.images} "
            "(set the source's missing_images to 'drop' to leave such images out)"
        )
    if unnamed:
        print(f"{source.images}: dropped what is about {len(unnamed)} of {len(image_ids)} images, which {path} does not name")
    return {image_id: split_of[image_id] for image_id in image_ids if image_id in split_of}


def _add(split: Split, content: Split, image_ids: set[int]) -> None:
    """Add what `content` says about `image_ids`; an id that is already there must be the same file."""
    for image_id in sorted(image_ids):
        path = content.images[image_id]
        first = split.images.setdefault(image_id, path)
        if first != path and first.resolve() != path.resolve():
            raise RoutevlError(f"the image id {image_id} is {first} in one source, but {path} in another")
        if image_id in content.image_records:
            split.image_records.setdefault(image_id, content.image_records[image_id])
    for kind in ("captions", "questions", "annotations"):
        getattr(split, kind).extend(record for record in getattr(content, kind) if record["image_id"] in image_ids)
    split.licenses += [entry for entry in content.licenses if entry not in split.licenses]


def _check_disjoint(splits: dict[str, Split]) -> None:
    """An image is in one split only, by its id and by its file."""
    split_of: dict[int | Path, str] = {}
    for name, split in splits.items():
        for image_id, path in split.images.items():
            for key in (image_id, path.resolve()):
                other = split_of.setdefault(key, name)
                if other != name:
                    raise RoutevlError(
                        f"{path} (image id {image_id}) is both in {other} and in {name}; give all files "
                        "about an image in one source, or sources with separate images"
                    )


# ------------------------------------------------------------------------------------------ answers


def read_vocabulary(path: Path) -> list[str]:
    """Read an answer vocabulary: a JSON list of answers, or an object of answer to index (0 to n - 1).

    Raises:
        RoutevlError: the file is missing or malformed.
    """
    content = VOCABULARY.read(path)
    if isinstance(content, dict):
        if sorted(content.values()) != list(range(len(content))):
            raise RoutevlError(f"{path}: expected each index from 0 to {len(content) - 1} once")
        content = sorted(content, key=content.__getitem__)
    return content


def build_vocabulary(splits: dict[str, Split], answer_splits: Collection[str], minimum_count: int) -> list[str]:
    """The normalised `multiple_choice_answer`s of the splits in `answer_splits` that occur at least `minimum_count` times.

    Returns:
        the most frequent first, ties in alphabetical order; empty where there are no questions.

    Raises:
        RoutevlError: no answer is that frequent.
    """
    counts: Counter[str] = Counter()
    annotations = (record for name in SPLITS if name in answer_splits for record in splits[name].annotations)
    for answer, count in Counter(record["multiple_choice_answer"] for record in annotations).items():
        counts[normalize_answer(answer)] += count
    frequent = [answer for answer, count in counts.items() if count >= minimum_count]
    if counts and not frequent:
        counted = ", ".join(name for name in SPLITS if name in answer_splits)
        raise RoutevlError(f"no answer occurs {minimum_count} times in {counted}; lower --minimum-answer-count")
    return sorted(frequent, key=lambda answer: (-counts[answer], answer))


# ------------------------------------------------------------------------------------------ writing


def _hash_images(paths: list[Path]) -> dict[Path, str]:
    """The sha256 of each file, in hexadecimal; each is read once, several at a time, since it is the disk that takes the time."""
    with ThreadPoolExecutor() as pool:
        hashes = progress(pool.map(sha256_of, paths), len(paths), "hashing images")
        return dict(zip(paths, hashes, strict=True))


def _write_split(folder: Path, name: str, split: Split, hashes: dict[Path, str]) -> None:
    folder.mkdir()
    info = {"description": f"the {name} split of routevl's sources"}
    header = {"info": info, "task_type": "Open-Ended", "data_type": "mixed", "data_subtype": name, "license": {}}
    questions = [{field: record[field] for field in QUESTION_FIELDS} for record in split.questions]
    annotations = [{field: record[field] for field in ANNOTATION_FIELDS} for record in split.annotations]
    images = {image_id: {"id": image_id, "file_name": str(split.images[image_id])} for image_id in sorted(split.images)}
    captioned = sorted({caption["image_id"] for caption in split.captions})
    captions = {
        "info": info,
        "licenses": split.licenses,
        "images": [split.image_records.get(image_id) or images[image_id] for image_id in captioned],
        "annotations": split.captions,
    }
    write_records(folder / "images.json", [image | {"sha256": hashes[split.images[n]]} for n, image in images.items()])
    write_records(folder / "questions.json", header | {"questions": questions})
    write_records(folder / "annotations.json", header | {"annotations": annotations})
    write_records(folder / "captions.json", captions)
