"""Pairs of image and text of prepared data, which derivations run a model on."""

from __future__ import annotations

from pathlib import Path

import numpy

from routevl.data.coco import read_captions
from routevl.data.vqav2 import read_questions
from routevl.errors import RoutevlError


def pairs_of(path: Path, examples: int, seed: int) -> list[tuple[int, str]]:
    """Image id and text of so many pairs of a split's captions.json or questions.json, or of all if it has fewer, in its order.

    Raises:
        RoutevlError: there are none.
    """
    if path.stem == "captions":
        pairs = [(caption["image_id"], caption["caption"]) for caption in read_captions(path)["annotations"]]
    else:
        pairs = [(question["image_id"], question["question"]) for question in read_questions(path)]
    if not pairs:
        raise RoutevlError(
            f"{path}: no {path.stem}, so nothing to run the model on; prepare data with some, or set the option pairs of a "
            "derivation that has it"
        )
    chosen = numpy.random.default_rng(seed).permutation(len(pairs))[:examples]
    return [pairs[place] for place in sorted(chosen)]
