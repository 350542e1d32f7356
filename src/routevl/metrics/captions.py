"""COCO caption metrics: BLEU-1..4, METEOR, ROUGE-L and CIDEr-D, as in the official COCO evaluation.

The scorers are pycocoevalcap's (https://github.com/salaniz/pycocoevalcap), called one by one: its all-in-one
entry also runs SPICE, which downloads its models at the first call.
"""

from __future__ import annotations

import json
import unicodedata
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from routevl.data.coco import read_captions
from routevl.errors import RoutevlError
from routevl.metrics.java import Meteor, start_meteor, tokenize
from routevl.metrics.results import read_results

MISSING = {"SPICE": "not computed: its Stanford CoreNLP models are not part of the installed packages"}


class CaptionScores(NamedTuple):
    """Scores as fractions (CIDEr may exceed 1): of all captions, with None for what is `MISSING`, and CIDEr by image id."""

    metrics: dict[str, float | None]
    cider_by_image: dict[int, float]


def one_line(caption: str) -> str:
    """A caption that the line protocols of the Java scorers can carry without a change of its tokens.

    All white space, line breaks of every kind included, becomes single spaces; other control characters are
    removed; a bar, which separates METEOR's fields when tripled, stands alone, as the tokenizer would set it.
    """
    spaced = " ".join(caption.replace("|", " | ").split())
    return "".join(character for character in spaced if unicodedata.category(character) != "Cc")


def score(references: Mapping[int, Sequence[str]], candidates: Sequence[Mapping[int, str]]) -> list[CaptionScores]:
    """Score the captions of one or more systems, each one caption per image.

    METEOR loads its tables for about ten seconds, once for all systems.

    Args:
        references: image_id to one or more reference captions, for every image of the candidates; CIDEr's document
            frequencies come from the images that a system captions.
        candidates: of each system, image_id to the caption to score: any text, possibly empty; one or more images.

    Raises:
        RoutevlError: no reference holds a word, or a Java program failed.
    """
    with start_meteor() as meteor:
        captioned = {image: references[image] for system in candidates for image in system}
        tokenized = iter(_tokens([caption for captions in captioned.values() for caption in captions]))
        tokens = {image: [next(tokenized) for _ in captions] for image, captions in captioned.items()}
        if not any(map(any, tokens.values())):
            raise RoutevlError(f"no reference caption of the {len(tokens)} images to score holds a word")
        return [_score_one({image: tokens[image] for image in system}, system, meteor) for system in candidates]


def _tokens(captions: Iterable[str]) -> list[str]:
    return tokenize([one_line(caption) for caption in captions])


def _score_one(reference_tokens: Mapping[int, list[str]], candidates: Mapping[int, str], meteor: Meteor) -> CaptionScores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    texts = _tokens(candidates.values())
    candidate_tokens = {image: [text] for image, text in zip(candidates, texts, strict=True)}
    bleu, _ = Bleu(4).compute_score(reference_tokens, candidate_tokens, verbose=0)
    rouge, _ = Rouge().compute_score(reference_tokens, candidate_tokens)
    cider, cider_by_image = Cider().compute_score(reference_tokens, candidate_tokens)
    meteor_score = meteor.corpus_score(list(reference_tokens.values()), texts)
    metrics: dict[str, float | None] = {f"Bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    metrics |= {"METEOR": meteor_score, "ROUGE_L": float(rouge), "CIDEr": float(cider), "SPICE": None}
    return CaptionScores(metrics, dict(zip(candidates, cider_by_image.tolist(), strict=True)))


def score_files(annotations: str | Path, results: Sequence[str | Path], subset: bool = False) -> list[CaptionScores]:
    """Score results files, one per system, against an official COCO captions file.

    Args:
        subset: accept results for some of the images only, and score those alone.

    Raises:
        RoutevlError: a file is missing or malformed, or the results are not for the images with captions; or as `score`.
    """
    references: dict[int, list[str]] = defaultdict(list)
    for annotation in read_captions(annotations)["annotations"]:
        references[annotation["image_id"]].append(annotation["caption"])
    candidates = []
    for path in results:
        system = read_results(path, "image_id", "caption", references, subset)
        if not system:
            raise RoutevlError(f"{path}: holds no captions to score")
        candidates.append(system)
    return score(references, candidates)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the stage `caption-score`."""
    parser.add_argument("--annotations", required=True, help="COCO captions file (json or json.gz)")
    parser.add_argument("--results", required=True, help='results file: [{"image_id": ..., "caption": ...}]')
    parser.add_argument("--subset", action="store_true", help="the results are for some of the images: score those alone")


def run(arguments: Namespace) -> None:
    """Print the scores as fractions, and what is missing and why, as JSON."""
    (scores,) = score_files(arguments.annotations, [arguments.results], arguments.subset)
    print(json.dumps(scores.metrics | {"missing": MISSING, "n": len(scores.cider_by_image)}, indent=1))
