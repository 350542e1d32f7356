"""Stage `world`: the demo world of `routevl.data.scenes`, in the official formats of COCO captions, VQAv2, GQA and NLVR2."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy

from routevl.data.records import SPLITS, Record, write_lines, write_records
from routevl.data.scenes import COLORS, SHAPES, SIZES, Scene, pick, render, sample_scene, toss
from routevl.data.shapes_gqa import gqa_questions
from routevl.data.shapes_language import MOST_QUESTIONS, Question, captions, questions
from routevl.data.shapes_nlvr2 import statements
from routevl.files import atomic_folder
from routevl.options import at_least

ANNOTATORS = 10
CAPTIONS = 5
MOST_DEVIATIONS = 4  # of a question's annotators, so that the true answer stays the most frequent
DEVIATION = 0.08  # chance of each annotator to deviate
GQA_QUESTIONS = 3  # about each image
NLVR2_PAIRS, NLVR2_SENTENCES = 4, 2  # of a set: each sentence is about all of its pairs of images
IMAGES_PER_SET = 2 * NLVR2_PAIRS  # so that there are as many pairs as half of the images

# What an annotator may say instead and mean the same. The official evaluator maps number words back.
SYNONYMS = {
    "0": "none", "1": "one", "2": "two", "3": "three", "small": "little", "big": "large", "purple": "violet",
    "cross": "plus", "circle": "dot", "square": "box", "yes": "yes it is", "no": "not really",
}  # fmt: skip
MISTAKES = (("yes", "no"), ("0", "1", "2", "3"), COLORS, SHAPES, SIZES)

GQA, NLVR2 = 1, 2  # kinds of text with generators of their own, so that the others do not depend on them

INFO = {"description": "routevl demo world of coloured shapes", "version": "1.0", "year": 2024}
LICENSE = {"id": 1, "name": "Generated data, no rights reserved", "url": ""}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `routevl world`."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the world, replaced as a whole")
    parser.add_argument("--seed", type=at_least(0), required=True, help="seed of everything")
    for split in SPLITS:
        parser.add_argument(f"--{split}-images", type=at_least(1), required=True, help=f"number of {split} images")
    parser.add_argument("--image-size", type=at_least(24), required=True, help="side of the square images, in pixels")
    numbers = range(1, MOST_QUESTIONS + 1)
    parser.add_argument("--questions-per-image", type=at_least(1), choices=numbers, required=True, metavar="N", help="1 to 20")


def run(arguments: argparse.Namespace) -> None:
    """Write the world, or nothing.

    It is {train,val,test}/{images/,captions.json,questions.json,annotations.json,gqa_questions.json,nlvr2.jsonl}.
    """
    counts = {split: getattr(arguments, f"{split}_images") for split in SPLITS}
    with atomic_folder(arguments.output, "train") as folder:
        for split, count in counts.items():
            write_split(folder / split, split, count, arguments.seed, arguments.image_size, arguments.questions_per_image)
    print(f"world of {sum(counts.values())} images written to {arguments.output}")


def write_split(folder: Path, split: str, count: int, seed: int, image_size: int, questions_per_image: int) -> None:
    """Write one split into `folder`.

    An image and what is said of it alone depend on seed, split and its index only, a set of NLVR2's on the number of images too.
    """
    (folder / "images").mkdir(parents=True)
    images: list[Record] = []
    caption_records: list[Record] = []
    question_records: list[Record] = []
    annotation_records: list[Record] = []
    scenes: list[Scene] = []
    for index in range(count):
        generator = _generator(seed, split, index)
        scene = sample_scene(generator)
        scenes.append(scene)
        image_id = (SPLITS.index(split) + 1) * 1_000_000 + index
        file_name = f"shapes_{split}_{image_id:012d}.png"
        render(scene, image_size, generator).save(folder / "images" / file_name, compress_level=1)
        images.append({"id": image_id, "file_name": file_name, "width": image_size, "height": image_size, "license": 1})
        for place, caption in enumerate(captions(scene, generator, CAPTIONS)):
            caption_records.append({"id": image_id * CAPTIONS + place, "image_id": image_id, "caption": caption})
        for place, question in enumerate(questions(scene, generator, questions_per_image)):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + place}  # as in VQAv2
            question_records.append({"image_id": image_id, "question": question.text, "question_id": ids["question_id"]})
            annotation_records.append(ids | _annotation(question, generator))
    header = {"info": INFO, "task_type": "Open-Ended", "data_type": "shapes", "data_subtype": split, "license": LICENSE}
    write_records(folder / "questions.json", header | {"questions": question_records})
    write_records(folder / "annotations.json", header | {"annotations": annotation_records})
    captions_file = {"info": INFO, "licenses": [LICENSE], "images": images, "annotations": caption_records}
    write_records(folder / "captions.json", captions_file)
    write_records(folder / "gqa_questions.json", _gqa_questions(split, seed, scenes, images))
    write_lines(folder / "nlvr2.jsonl", _nlvr2_examples(split, seed, scenes, images))


def _generator(seed: int, split: str, *place: int) -> numpy.random.Generator:
    """A generator that depends on these alone; `place` is an image's index, or a number and a kind of text."""
    return numpy.random.default_rng(numpy.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), *place)))


def _annotation(question: Question, generator: numpy.random.Generator) -> Record:
    answers = annotators_answers(question.answer, generator)
    return {
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        "multiple_choice_answer": Counter(record["answer"] for record in answers).most_common(1)[0][0],
        "answers": answers,
    }


def annotators_answers(answer: str, generator: numpy.random.Generator) -> list[Record]:
    """Ten annotators' answers in VQAv2's form: mostly `answer`, at most MOST_DEVIATIONS synonyms or mistakes."""
    order = generator.permutation(ANNOTATORS)
    deviating = set(order[: min(MOST_DEVIATIONS, int(generator.binomial(ANNOTATORS, DEVIATION)))].tolist())
    return [
        {
            "answer": _deviation(answer, generator) if place in deviating else answer,
            "answer_confidence": _confidence(0.5 if place in deviating else 0.93, generator),
            "answer_id": place + 1,
        }
        for place in range(ANNOTATORS)
    ]


def _deviation(answer: str, generator: numpy.random.Generator) -> str:
    if answer in SYNONYMS and toss(generator):
        return SYNONYMS[answer]
    alternatives = next(kind for kind in MISTAKES if answer in kind)
    return pick(generator, [other for other in alternatives if other != answer])


def _confidence(sure: float, generator: numpy.random.Generator) -> str:
    if toss(generator, sure):
        return "yes"
    return "maybe" if toss(generator, 0.8) else "no"


def _gqa_questions(split: str, seed: int, scenes: Sequence[Scene], images: Sequence[Record]) -> dict[str, Record]:
    """A file of GQA's balanced questions, without its programs, entailed questions and pointers to objects."""
    return {
        f"{image['id'] * 10 + place:09d}": {
            "question": question.text,
            "imageId": Path(image["file_name"]).stem,
            "answer": question.answer,
            "fullAnswer": question.full_answer,
            "isBalanced": True,
            "types": {"structural": question.structural, "semantic": question.semantic, "detailed": question.detailed},
        }
        for index, (scene, image) in enumerate(zip(scenes, images, strict=True))
        for place, question in enumerate(gqa_questions(scene, _generator(seed, split, index, GQA), GQA_QUESTIONS))
    }


def _nlvr2_examples(split: str, seed: int, scenes: Sequence[Scene], images: Sequence[Record]) -> Iterator[Record]:
    """The lines of an NLVR2 file, whose addresses are the images' file names; none where there is no pair of images."""
    for number in range(max(1, len(scenes) // IMAGES_PER_SET) if len(scenes) > 1 else 0):
        generator = _generator(seed, split, number, NLVR2)
        pairs = [generator.choice(len(scenes), 2, replace=False).tolist() for _ in range(NLVR2_PAIRS)]
        scene_pairs = [(scenes[left], scenes[right]) for left, right in pairs]
        for sentence, statement in enumerate(statements(scene_pairs, generator, NLVR2_SENTENCES)):
            for pair, (left, right) in enumerate(pairs):
                yield {
                    "identifier": f"{split}-{number}-{pair}-{sentence}",
                    "sentence": statement.text,
                    "label": str(statement.holds(scenes[left], scenes[right])),
                    "left_url": images[left]["file_name"],
                    "right_url": images[right]["file_name"],
                }
