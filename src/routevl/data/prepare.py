"""Stage `prepare`: merges sources in the official formats into checked train, val and test splits."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from heapq import nlargest
from pathlib import Path

import numpy

from routevl.data.coco import read_karpathy_splits
from routevl.data.nlvr2 import Example
from routevl.data.records import INTEGER, SPLITS, STRING, Format, Record, write_lines, write_records
from routevl.data.sources import Source, Split, identify, parse_sources, read_source
from routevl.data.vqav2 import usual_answer
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, sha256_of
from routevl.metrics.vqa import normalize_answer
from routevl.options import at_least
from routevl.progress import progress

QUESTION_FIELDS = ("image_id", "question", "question_id")
ANNOTATION_FIELDS = ("image_id", "question_id", "question_type", "answer_type", "multiple_choice_answer", "answers")
KINDS = {  # what a split may hold, and what it is in messages
    "images": "images", "questions": "questions", "captions": "captions", "gqa": "GQA questions", "nlvr2": "NLVR2 examples"
}  # fmt: skip
MEND_IDS = "give one of the two sources an id_offset, or leave out what is there twice"
MEND_NAMES = "leave out what is there twice"  # of GQA and NLVR2, which go by names
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
        '"gqa": GQA questions file, "nlvr2": NLVR2 file, '
        '"image_list": file of {"id", "file_name"}, "missing_images": "error" | "drop", "max_images": n, "id_offset": n}',
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
    parser.add_argument(
        "--few",
        type=at_least(1),
        metavar="N",
        help="for a rehearsal: when the answers are counted, keep of each split only what is about the images of its first N and "
        "its N longest questions, and of as many captions, GQA questions and NLVR2 examples",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write {train,val,test}/{images,questions,annotations,captions,gqa}.json and nlvr2.jsonl, and answers.json, or nothing.

    images.json holds [{"id": int, "file_name": str, "sha256": str, of the file's bytes}]: whatever reads an image later can tell
    that it is the one that was prepared. gqa.json and nlvr2.jsonl are in the official forms, of the fields that are read, with
    the ids of their images: "image_id": int of a question, "image_ids": [left, right] of an example.

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
    if arguments.few is not None:
        splits = {name: _few_of(split, arguments.few) for name, split in splits.items()}
    hashes = _hash_images([path for split in splits.values() for path in split.images.values()])
    with atomic_folder(arguments.output, "answers.json") as folder:
        for name, split in splits.items():
            _write_split(folder / name, name, split, hashes)
        write_records(folder / "answers.json", answers)
    for name, split in splits.items():
        print(f"{name}: {', '.join(f'{len(getattr(split, kind))} {word}' for kind, word in KINDS.items())}")
    print(f"{len(answers)} answers")


# ------------------------------------------------------------------------------------------ merging


def merge_sources(sources: list[Source]) -> dict[str, Split]:
    """Read all sources and put their items into "train", "val" and "test"; errors as of `run`."""
    splits = {name: Split() for name in SPLITS}
    parts: list[tuple[Source, Split]] = []
    contents = [(source, *read_source(source)) for source in sources]
    known: dict[Path, int] = {}
    for source, content, _ in contents:
        for image_id, path in content.images.items():
            known.setdefault(path.resolve(), image_id + source.id_offset)
    for source, content, named in contents:
        identify(source, content, named, known)
        split_of = {n + source.id_offset: name for n, name in assign_splits(content, source).items()}
        content = content.shifted(source.id_offset)
        for name, split in splits.items():
            part = Split()
            part.add(content, {image_id for image_id, place in split_of.items() if place == name})
            split.add(part, part.images.keys())
            parts.append((source, part))
    _check_image_ids(parts)
    _check_disjoint(splits)
    _check_text_ids(parts)
    for kind, word in KINDS.items():
        empty = [name for name, split in splits.items() if not getattr(split, kind)]
        if empty and (kind == "images" or len(empty) < len(splits)):
            raise RoutevlError(f"--sources: the split {empty[0]!r} has no {word}")
    return splits


def _check_image_ids(parts: list[tuple[Source, Split]]) -> None:
    """Two sources may be about one image, by its id, where it is the same file."""
    paths: dict[int, Path] = {}
    for source, part in parts:
        mend = MEND_NAMES if source.gqa or source.nlvr2 else MEND_IDS
        for image_id, path in part.images.items():
            first = paths.setdefault(image_id, path)
            if first != path and first.resolve() != path.resolve():
                raise RoutevlError(f"the image id {image_id} is {first} in one source, but {path} in another; {mend}")


def _check_text_ids(parts: list[tuple[Source, Split]]) -> None:
    """Ids of questions, and of captions, are different in all sources, as are those of GQA and NLVR2."""
    files: dict[tuple[str, int | str], str] = {}
    for source, part in parts:
        for kind, field, ids, mend in (
            ("questions", "question_id", (record["question_id"] for record in part.questions), MEND_IDS),
            ("captions", "id", (record["id"] for record in part.captions), MEND_IDS),
            ("gqa", "question", part.gqa, MEND_NAMES),
            ("nlvr2", "identifier", (example.identifier for example in part.nlvr2), MEND_NAMES),
        ):
            file = getattr(source, kind)
            for text_id in ids:
                if (kind, text_id) in files:
                    raise RoutevlError(
                        f"--sources: the {field} {text_id} is there twice, in {files[kind, text_id]} and in {file}; {mend}"
                    )
                files[kind, text_id] = file


def assign_splits(content: Split, source: Source) -> dict[int, str]:
    """The split of each image: all in the one named, as Karpathy's file says, or at random in the given fractions.

    The images of a set of NLVR2's, which its sentences are about, are drawn together.

    Raises:
        RoutevlError: Karpathy's file is wrong, or does not name an image, or an image is in two sets of NLVR2's. Where the source
            drops missing images, one that Karpathy's file does not name is left out.
    """
    split = source.split
    image_ids = sorted(content.images)
    if isinstance(split, str):
        return dict.fromkeys(image_ids, split)
    if "karpathy" in split:
        return _karpathy_splits(image_ids, split["karpathy"], source)
    set_of = _nlvr2_sets(content, source)
    together: dict[int | tuple[str, str], list[int]] = defaultdict(list)
    for image_id in image_ids:
        together[set_of.get(image_id, image_id)].append(image_id)
    groups = list(together.values())
    order = numpy.random.default_rng(split["seed"]).permutation(len(groups))
    edges = numpy.rint(numpy.cumsum([split.get(name, 0) for name in SPLITS]) * len(groups)).astype(int)
    places = numpy.split(order, edges[:2])
    return {n: name for name, chosen in zip(SPLITS, places, strict=True) for place in chosen for n in groups[place]}


def _nlvr2_sets(content: Split, source: Source) -> dict[int, tuple[str, str]]:
    """The set of each image that an example of NLVR2 is about: split and number of the set, as in the identifier."""
    set_of: dict[int, tuple[str, str]] = {}
    for example in content.nlvr2:
        for image_id in example.image_ids:
            first = set_of.setdefault(image_id, example.statement[:2])
            if first != example.statement[:2]:
                raise RoutevlError(
                    f"{source.nlvr2}: {content.images[image_id]} is in the sets {'-'.join(first)} and "
                    f"{'-'.join(example.statement[:2])}, which fractions could take apart; give the source one split"
                )
    return set_of


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
    """The normalised usual answers of the splits in `answer_splits` that occur at least `minimum_count` times.

    Returns:
        the most frequent first, ties in alphabetical order; empty where there are no questions.

    Raises:
        RoutevlError: no answer is that frequent.
    """
    counts: Counter[str] = Counter()
    annotations = (record for name in SPLITS if name in answer_splits for record in splits[name].annotations)
    for answer, count in Counter(map(usual_answer, annotations)).items():
        counts[normalize_answer(answer)] += count
    frequent = [answer for answer, count in counts.items() if count >= minimum_count]
    if counts and not frequent:
        counted = ", ".join(name for name in SPLITS if name in answer_splits)
        raise RoutevlError(f"no answer occurs {minimum_count} times in {counted}; lower --minimum-answer-count")
    return sorted(frequent, key=lambda answer: (-counts[answer], answer))


# ------------------------------------------------------------------------------------------ writing


def _few_of(split: Split, few: int) -> Split:
    """What is about the images of the split's first texts of each kind, and of its longest ones in characters."""
    kept: set[int] = set()
    for texts in (
        [(record["question"], (record["image_id"],)) for record in split.questions],
        [(record["caption"], (record["image_id"],)) for record in split.captions],
        [(record["question"], (record["image_id"],)) for record in split.gqa.values()],
        [(example.sentence, example.image_ids) for example in split.nlvr2],
    ):
        longest = nlargest(few, texts, key=lambda entry: len(entry[0]))
        kept.update(image_id for _, image_ids in [*texts[:few], *longest] for image_id in image_ids)
    part = Split()
    part.add(split, kept)
    return part


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
    annotations = [{field: record[field] for field in ANNOTATION_FIELDS if field in record} for record in split.annotations]
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
    write_records(folder / "gqa.json", split.gqa)
    write_lines(folder / "nlvr2.jsonl", map(_nlvr2_record, split.nlvr2))


def _nlvr2_record(example: Example) -> Record:
    """An example in the official form, with the ids of its images in place of their names."""
    return {
        "identifier": example.identifier,
        "sentence": example.sentence,
        "label": str(example.label),
        "image_ids": example.image_ids,
    }
