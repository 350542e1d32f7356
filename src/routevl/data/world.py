"""Stage `world`: the demo world of `routevl.data.shapes`, in the official COCO caption and VQAv2 formats."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy

from routevl.data.records import SPLITS, Record, write_records
from routevl.data.shapes import (
    COLORS,
    MOST_QUESTIONS,
    SHAPES,
    SIZES,
    Question,
    Scene,
    captions,
    pick,
    questions,
    render,
    sample_scene,
    toss,
)
from routevl.errors import RoutevlError
from routevl.files import atomic_folder

MOST_IMAGES = 1_000_000  # of a split, whose place among SPLITS gives the millions of its image ids
SMALLEST_IMAGE, LARGEST_IMAGE = 24, 1024  # pixels
ANNOTATORS = 10
CAPTIONS = 5
MOST_DEVIATIONS = 4  # of a question's annotators, so that the true answer stays the most frequent
DEVIATION = 0.08  # chance of each annotator to deviate

# What an annotator may say instead and mean the same. The official evaluator maps number words back.
SYNONYMS = {
    "0": "none", "1": "one", "2": "two", "3": "three", "small": "little", "big": "large", "purple": "violet",
    "cross": "plus", "circle": "dot", "square": "box", "yes": "yes it is", "no": "not really",
}  # fmt: skip
MISTAKES = (("yes", "no"), ("0", "1", "2", "3"), COLORS, SHAPES, SIZES)

INFO = {"description": "routevl demo world of coloured shapes", "version": "1.0", "year": 2024}
LICENSE = {"id": 1, "name": "Generated data, no rights reserved", "url": ""}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `routevl world`."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the world, replaced as a whole")
    parser.add_argument("--seed", type=int, required=True, help="seed of everything, zero or more")
    for split in SPLITS:
        parser.add_argument(f"--{split}-images", type=int, required=True, help=f"number of {split} images")
    parser.add_argument("--image-size", type=int, required=True, help="side of the square images, in pixels")
    parser.add_argument("--questions-per-image", type=int, required=True, help=f"1 to {MOST_QUESTIONS}")


def run(arguments: argparse.Namespace) -> None:
    """Write the world: {train,val,test}/{images/,questions.json,annotations.json,captions.json}, or nothing.

    Raises:
        RoutevlError: an option is out of range, or the folder cannot be written.
    """
    counts = {split: getattr(arguments, f"{split}_images") for split in SPLITS}
    for split, count in counts.items():
        _check_range(f"--{split}-images", count, 1, MOST_IMAGES - 1)
    _check_range("--image-size", arguments.image_size, SMALLEST_IMAGE, LARGEST_IMAGE)
    _check_range("--questions-per-image", arguments.questions_per_image, 1, MOST_QUESTIONS)
    _check_range("--seed", arguments.seed, 0, 2**63 - 1)
    with atomic_folder(arguments.output) as folder:
        for split, count in counts.items():
            write_split(folder, split, count, arguments.seed, arguments.image_size, arguments.questions_per_image)
    print(f"world of {sum(counts.values())} images written to {arguments.output}")


def _check_range(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RoutevlError(f"{option}: expected {low} to {high}, got {value}")


def write_split(folder: Path, split: str, count: int, seed: int, image_size: int, questions_per_image: int) -> None:
    """Write one split under `folder`; an image depends on seed, split and its index only."""
    (folder / split / "images").mkdir(parents=True)
    images: list[Record] = []
    caption_records: list[Record] = []
    question_records: list[Record] = []
    annotation_records: list[Record] = []
    for index in range(count):
        generator = generator_of(seed, split, index)
        scene = sample_scene(generator)
        image = _write_image(folder / split / "images", scene, split, index, image_size, generator)
        images.append(image)
        caption_records += _caption_records(scene, image["id"], generator)
        for place, question in enumerate(questions(scene, generator, questions_per_image)):
            question_id = image["id"] * 1000 + place  # as in VQAv2
            question_records.append(_question_record(question, image["id"], question_id))
            annotation_records.append(_annotation_record(question, image["id"], question_id, generator))
    _write_captions(folder / split / "captions.json", images, caption_records)
    _write_questions(folder / split, split, question_records, annotation_records)


def generator_of(seed: int, split: str, index: int) -> numpy.random.Generator:
    """The generator of everything about the image `index` of `split`."""
    sequence = numpy.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    return numpy.random.default_rng(sequence)


def _write_image(
    folder: Path, scene: Scene, split: str, index: int, image_size: int, generator: numpy.random.Generator
) -> Record:
    image_id = (SPLITS.index(split) + 1) * MOST_IMAGES + index
    file_name = f"shapes_{split}_{image_id:012d}.png"
    render(scene, image_size, generator).save(folder / file_name, compress_level=1)
    return {"id": image_id, "file_name": file_name, "width": image_size, "height": image_size, "license": 1}


def _caption_records(scene: Scene, image_id: int, generator: numpy.random.Generator) -> list[Record]:
    return [
        {"id": image_id * CAPTIONS + place, "image_id": image_id, "caption": caption}
        for place, caption in enumerate(captions(scene, generator, CAPTIONS))
    ]


def _question_record(question: Question, image_id: int, question_id: int) -> Record:
    return {"image_id": image_id, "question": question.text, "question_id": question_id}


def _annotation_record(question: Question, image_id: int, question_id: int, generator: numpy.random.Generator) -> Record:
    answers = annotators_answers(question.answer, generator)
    return {
        "image_id": image_id,
        "question_id": question_id,
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        "multiple_choice_answer": Counter(record["answer"] for record in answers).most_common(1)[0][0],
        "answers": answers,
    }


def annotators_answers(answer: str, generator: numpy.random.Generator) -> list[Record]:
    """Ten annotators' answers: mostly `answer`, at most MOST_DEVIATIONS synonyms or mistakes.

    Returns:
        VQAv2's [{"answer": str, "answer_confidence": "yes" | "maybe" | "no", "answer_id": 1 to 10}, ...].
    """
    order = generator.permutation(ANNOTATORS)
    deviating = set(order[: min(MOST_DEVIATIONS, int(generator.binomial(ANNOTATORS, DEVIATION)))].tolist())
    records = []
    for place in range(ANNOTATORS):
        deviates = place in deviating
        records.append(
            {
                "answer": _deviation(answer, generator) if deviates else answer,
                "answer_confidence": _confidence(0.5 if deviates else 0.93, generator),
                "answer_id": place + 1,
            }
        )
    return records


def _deviation(answer: str, generator: numpy.random.Generator) -> str:
    if answer in SYNONYMS and toss(generator):
        return SYNONYMS[answer]
    alternatives = next(kind for kind in MISTAKES if answer in kind)
    return pick(generator, [other for other in alternatives if other != answer])


def _confidence(sure: float, generator: numpy.random.Generator) -> str:
    if toss(generator, sure):
        return "yes"
    return "maybe" if toss(generator, 0.8) else "no"


def _write_captions(path: Path, images: list[Record], annotations: list[Record]) -> None:
    write_records(path, {"info": INFO, "licenses": [LICENSE], "images": images, "annotations": annotations})


def _write_questions(folder: Path, split: str, question_records: list[Record], annotation_records: list[Record]) -> None:
    shared = {
        "info": INFO,
        "task_type": "Open-Ended",
        "data_type": "shapes",
        "data_subtype": split,
        "license": LICENSE,
    }
    write_records(folder / "questions.json", shared | {"questions": question_records})
    write_records(folder / "annotations.json", shared | {"annotations": annotation_records})
