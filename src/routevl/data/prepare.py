"""Stage `prepare`: merges sources in the official formats into checked train, val and test splits."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from routevl.data.coco import file_names, images_in_folder, read_captions, read_karpathy_splits
from routevl.data.records import SPLITS, Record, json_name, write_records
from routevl.data.vqav2 import read_pair
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, read_json

QUESTION_FIELDS = ("image_id", "question", "question_id")
ANNOTATION_FIELDS = (
    "image_id", "question_id", "question_type", "answer_type", "multiple_choice_answer", "answers"
)  # fmt: skip
SOURCE_KEYS = ("images", "split", "questions", "annotations", "captions", "missing_images")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `routevl prepare`."""
    parser.add_argument(
        "--sources",
        required=True,
        help='JSON list of {"images": folder, "split": "train" | "val" | "test" | {"train": fraction, ..., '
        '"seed": n} | {"karpathy": dataset_coco.json}, "questions" and "annotations": VQAv2 files, "captions": COCO file, '
        '"missing_images": "error" | "drop"}, or a file that holds it',
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the splits, replaced as a whole")
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument("--vocabulary", type=Path, help="answers: a JSON list, or an object of answer to index")
    answers.add_argument(
        "--minimum-answer-count",
        type=int,
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
    with atomic_folder(arguments.output) as folder:
        for name, split in splits.items():
            _write_split(folder / name, name, split)
        write_records(folder / "answers.json", answers)
    for name, split in splits.items():
        counts = f"{len(split.images)} images, {len(split.questions)} questions, {len(split.captions)} captions"
        print(f"{name}: {counts}")
    print(f"{len(answers)} answers")


# ----------------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class Source:
    """One entry of `--sources`; `split` is a split's name, fractions by name with a "seed", or the file of Karpathy's splits."""

    images: Path
    split: str | dict[str, Any] | Path
    questions: Path | None
    annotations: Path | None
    captions: Path | None
    drop_missing_images: bool


def parse_sources(text: str) -> list[Source]:
    """Parse and check `--sources`: a JSON list, or the path of a file that holds one.

    Raises:
        RoutevlError: names the source's index and key.
    """
    entries = _parse_json(text) if text.lstrip().startswith(("[", "{")) else read_json(text)
    if type(entries) is not list or not entries:
        raise RoutevlError(f"--sources: expected a list of at least one source, found {text[:80]}")
    return [_parse_source(f"--sources[{index}]", entry) for index, entry in enumerate(entries)]


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RoutevlError(f"--sources: not JSON ({error})") from None


def _parse_source(place: str, entry: Any) -> Source:
    if type(entry) is not dict:
        raise RoutevlError(f"{place}: expected an object, found {json_name(type(entry))}")
    unknown = sorted(set(entry) - set(SOURCE_KEYS))
    if unknown:
        raise RoutevlError(f"{place}: unknown key {unknown[0]!r}, expected one of {', '.join(SOURCE_KEYS)}")
    paths = {key: _parse_path(place, entry, key) for key in ("images", "questions", "annotations", "captions")}
    if paths["images"] is None:
        raise RoutevlError(f"{place}: lacks the key 'images', the folder of its images")
    if (paths["questions"] is None) != (paths["annotations"] is None):
        raise RoutevlError(f"{place}: 'questions' and 'annotations' go together, found only one of them")
    if paths["questions"] is None and paths["captions"] is None:
        raise RoutevlError(f"{place}: expected 'captions', or 'questions' and 'annotations', or all three")
    missing = entry.get("missing_images", "error")
    if missing not in ("error", "drop"):
        raise RoutevlError(f"{place}: 'missing_images' must be 'error' or 'drop', found {missing!r}")
    return Source(**paths, split=_parse_split(place, entry), drop_missing_images=missing == "drop")


def _parse_path(place: str, entry: Record, key: str) -> Path | None:
    value = entry.get(key)
    if value is None:
        return None
    if type(value) is not str or not value:
        raise RoutevlError(f"{place}: {key!r} must be a path, found {value!r}")
    return Path(value)


def _parse_split(place: str, entry: Record) -> str | dict[str, Any] | Path:
    split = entry.get("split")
    if type(split) is str and split in SPLITS:
        return split
    if type(split) is not dict:
        raise RoutevlError(f"{place}: 'split' must be one of {SPLITS}, fractions of them or a 'karpathy' file, found {split!r}")
    if "karpathy" in split:
        path = _parse_path(place, split, "karpathy")
        if path is None or len(split) > 1:
            raise RoutevlError(f"{place}: 'split' must be {{'karpathy': file}} alone where it names such a file, found {split}")
        return path
    unknown = sorted(set(split) - {*SPLITS, "seed"})
    if unknown:
        raise RoutevlError(f"{place}: unknown key {unknown[0]!r} in 'split', expected {SPLITS} and 'seed'")
    if type(split.get("seed")) is not int or split["seed"] < 0:
        raise RoutevlError(f"{place}: fractions in 'split' need a 'seed' of 0 or more, found {split}")
    fractions = [split.get(name, 0) for name in SPLITS]
    numbers = all(type(fraction) in (int, float) and fraction >= 0 for fraction in fractions)
    if not numbers or abs(sum(fractions) - 1) > 1e-6:
        raise RoutevlError(f"{place}: the fractions in 'split' must be 0 or more and sum to 1, found {split}")
    return split


# ----------------------------------------------------------------------------------------------------
# Reading and merging


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
    """Read all sources and put their items into "train", "val" and "test".

    Raises:
        RoutevlError: as `run`, but for the vocabulary.
    """
    splits = {name: Split() for name in SPLITS}
    for source in sources:
        content = read_source(source)
        place_of = assign_splits(sorted(content.images), source)
        for name, split in splits.items():
            _add(split, content, {image_id for image_id, place in place_of.items() if place == name})
    _check_disjoint(splits)
    _check_unique_ids(splits)
    _check_not_empty(splits)
    return splits


def read_source(source: Source) -> Split:
    """Read a source's files, find its images and drop what is about missing ones, where the source says so.

    Raises:
        RoutevlError: an official file is wrong, the folder of images is missing, or an image is.
    """
    content = Split()
    referred: dict[int, Path] = {}  # image id to the file that refers to it
    if source.captions is not None:
        file = read_captions(source.captions)
        content.captions = file["annotations"]
        content.licenses = file.get("licenses", [])
        content.image_records = {image["id"]: image for image in file.get("images", [])}
        referred.update((caption["image_id"], source.captions) for caption in content.captions)
    if source.questions is not None and source.annotations is not None:
        content.questions, content.annotations = read_pair(source.questions, source.annotations)
        for question in content.questions:
            referred.setdefault(question["image_id"], source.questions)
    _find_images(source, content, referred)
    return content


def _find_images(source: Source, content: Split, referred: dict[int, Path]) -> None:
    present = set(file_names(source.images))
    numbered: dict[int, str] = {}
    if any(image_id not in content.image_records for image_id in referred):
        numbered = images_in_folder(source.images)
    missing = 0
    for image_id, reference in referred.items():
        name = content.image_records.get(image_id, {}).get("file_name") or numbered.get(image_id)
        if name is not None and (name in present or (source.images / name).is_file()):
            content.images[image_id] = source.images / name
        elif source.drop_missing_images:
            missing += 1
        else:
            file = source.images / (name or f"[..._]{image_id:012d}.[jpg|jpeg|png]")
            raise RoutevlError(
                f"{file}: no such image, but {reference} refers to the image {image_id} "
                "(put it there, or set the source's missing_images to 'drop')"
            )
    if missing:
        print(f"{source.images}: dropped what is about {missing} of {len(referred)} images, which are missing")


def assign_splits(image_ids: list[int], source: Source) -> dict[int, str]:
    """The split of each image: all in the one named, as Karpathy's file says, or at random in the given fractions.

    Raises:
        RoutevlError: Karpathy's file is wrong, or does not name an image. Where the source drops missing images, such an image
            is left out.
    """
    split = source.split
    if isinstance(split, str):
        return dict.fromkeys(image_ids, split)
    if isinstance(split, Path):
        return _karpathy_splits(image_ids, split, source)
    order = numpy.random.default_rng(split["seed"]).permutation(len(image_ids))
    edges = numpy.cumsum([split.get(name, 0) for name in SPLITS]) * len(image_ids)
    first, second = (int(edge) for edge in numpy.rint(edges[:2]))
    names = ["train"] * first + ["val"] * (second - first) + ["test"] * (len(image_ids) - second)
    return {image_ids[place]: name for place, name in zip(order, names, strict=True)}


def _karpathy_splits(image_ids: list[int], path: Path, source: Source) -> dict[int, str]:
    split_of = read_karpathy_splits(path)
    unnamed = [image_id for image_id in image_ids if image_id not in split_of]
    if unnamed and not source.drop_missing_images:
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
        _check_same_file(image_id, split.images.setdefault(image_id, path), path)
    for image_id in image_ids & content.image_records.keys():
        split.image_records.setdefault(image_id, content.image_records[image_id])
    split.captions += _about(content.captions, image_ids)
    split.questions += _about(content.questions, image_ids)
    split.annotations += _about(content.annotations, image_ids)
    split.licenses += [entry for entry in content.licenses if entry not in split.licenses]


def _about(records: Iterable[Record], image_ids: set[int]) -> list[Record]:
    return [record for record in records if record["image_id"] in image_ids]


def _check_same_file(image_id: int, first: Path, second: Path) -> None:
    if first != second and first.resolve() != second.resolve():
        raise RoutevlError(f"the image id {image_id} is {first} in one source, but {second} in another")


def _check_disjoint(splits: dict[str, Split]) -> None:
    """An image is in one split only, by its id and by its file."""
    path_of: dict[int, Path] = {}
    split_of: dict[int | Path, str] = {}
    for name, split in splits.items():
        for image_id, path in split.images.items():
            _check_same_file(image_id, path_of.setdefault(image_id, path), path)
            for key in (image_id, path.resolve()):
                other = split_of.setdefault(key, name)
                if other != name:
                    raise RoutevlError(
                        f"{path} (image id {image_id}) is both in {other} and in {name}; give all files "
                        "about an image in one source, or sources with separate images"
                    )


def _check_unique_ids(splits: dict[str, Split]) -> None:
    questions = (question["question_id"] for split in splits.values() for question in split.questions)
    captions = (caption["id"] for split in splits.values() for caption in split.captions)
    for kind, ids in (("question_id", questions), ("caption id", captions)):
        seen: set[int] = set()
        for number in ids:
            if number in seen:
                raise RoutevlError(f"--sources: the {kind} {number} is in two of the sources")
            seen.add(number)


def _check_not_empty(splits: dict[str, Split]) -> None:
    kinds: tuple[tuple[str, Callable[[Split], Any]], ...] = (
        ("images", lambda split: split.images),
        ("questions", lambda split: split.questions),
        ("captions", lambda split: split.captions),
    )
    for kind, items in kinds:
        empty = [name for name, split in splits.items() if not items(split)]
        if empty and (kind == "images" or len(empty) < len(splits)):
            raise RoutevlError(f"--sources: the split {empty[0]!r} has no {kind}")


# ----------------------------------------------------------------------------------------------------
# Answers


def read_vocabulary(path: Path) -> list[str]:
    """Read an answer vocabulary: a JSON list of answers, or an object of answer to index (0 to n - 1).

    Raises:
        RoutevlError: the file is missing or anything else.
    """
    content = read_json(path)
    if type(content) is dict:
        if sorted(content.values(), key=repr) != sorted(range(len(content)), key=repr):
            raise RoutevlError(f"{path}: expected each index from 0 to {len(content) - 1} once")
        content = sorted(content, key=content.__getitem__)
    if type(content) is not list or not content or not all(type(answer) is str for answer in content):
        raise RoutevlError(f"{path}: expected a list of answers, or an object of answer to index")
    if len(set(content)) < len(content):
        raise RoutevlError(f"{path}: the answer {Counter(content).most_common(1)[0][0]!r} is there twice")
    return content


def build_vocabulary(splits: dict[str, Split], answer_splits: Collection[str], minimum_count: int) -> list[str]:
    """The normalised `multiple_choice_answer`s of the splits in `answer_splits` that occur at least `minimum_count` times.

    Returns:
        the most frequent first, ties in alphabetical order; empty where there are no questions.

    Raises:
        RoutevlError: no answer is that frequent.
    """
    from routevl.metrics.vqa import normalize_answer

    counts: Counter[str] = Counter()
    annotations = (record for name in SPLITS if name in answer_splits for record in splits[name].annotations)
    for answer, count in Counter(record["multiple_choice_answer"] for record in annotations).items():
        counts[normalize_answer(answer)] += count
    frequent = [answer for answer, count in counts.items() if count >= minimum_count]
    if counts and not frequent:
        counted = ", ".join(name for name in SPLITS if name in answer_splits)
        raise RoutevlError(f"no answer occurs {minimum_count} times in {counted}; lower --minimum-answer-count")
    return sorted(frequent, key=lambda answer: (-counts[answer], answer))


# ----------------------------------------------------------------------------------------------------
# Writing


def _write_split(folder: Path, name: str, split: Split) -> None:
    folder.mkdir()
    info = {"description": f"the {name} split of routevl's sources"}
    header = {
        "info": info,
        "task_type": "Open-Ended",
        "data_type": "mixed",
        "data_subtype": name,
        "license": {},
    }
    questions = [_select(question, QUESTION_FIELDS) for question in split.questions]
    annotations = [_select(annotation, ANNOTATION_FIELDS) for annotation in split.annotations]
    write_records(folder / "images.json", [_image(split, image_id) for image_id in sorted(split.images)])
    write_records(folder / "questions.json", header | {"questions": questions})
    write_records(folder / "annotations.json", header | {"annotations": annotations})
    write_records(folder / "captions.json", _captions_file(split, info))


def _image(split: Split, image_id: int) -> Record:
    return {"id": image_id, "file_name": str(split.images[image_id])}


def _captions_file(split: Split, info: Record) -> Record:
    captioned = sorted({caption["image_id"] for caption in split.captions})
    return {
        "info": info,
        "licenses": split.licenses,
        "images": [split.image_records.get(image_id) or _image(split, image_id) for image_id in captioned],
        "annotations": split.captions,
    }


def _select(record: Record, fields: tuple[str, ...]) -> Record:
    return {name: record[name] for name in fields}
