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
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from routevl.data.coco import read_captions
from routevl.errors import RoutevlError
from routevl.metrics.java import Meteor, start_meteor, tokenize
from routevl.metrics.results import read_results, remarked

SPICE_MISSING = "not computed: its Stanford CoreNLP models are not part of the installed packages"
# METEOR aligns 1,000 words within half a second. Its time and memory grow with the square of the words: 20,000 of them end it.
METEOR_WORDS = 1000
FEW_IMAGES = 100
MOST_NAMED = 10  # images in one message


class CaptionScores(NamedTuple):
    """The scores of one system.

    Attributes:
        metrics: of all captions, as fractions (CIDEr may exceed 1); None for what is missing.
        cider_by_image: CIDEr by image id.
        missing: metric that is None to the reason.
        remarks: sentences about metrics that say little, and why.
    """

    metrics: dict[str, float | None]
    cider_by_image: dict[int, float]
    missing: dict[str, str]
    remarks: list[str]


def one_line(caption: str) -> str:
    """A caption that the line protocols of the Java scorers can carry without a change of its tokens.

    All white space, line breaks of every kind included, becomes single spaces; other control characters are
    removed; a bar, which separates METEOR's fields when tripled, stands alone, as the tokenizer would set it.
    """
    spaced = " ".join(caption.replace("|", " | ").split())
    return "".join(character for character in spaced if unicodedata.category(character) != "Cc")


def score(
    references: Mapping[int, Sequence[str]], candidates: Sequence[Mapping[int, str]], names: Sequence[object] = ()
) -> list[CaptionScores]:
    """Score the captions of one or more systems, each one caption per image.

    METEOR loads its tables for about ten seconds, once for all systems.

    Args:
        references: image_id to one or more reference captions, for every image of the candidates; CIDEr's document
            frequencies come from the images that a system captions.
        candidates: of each system, image_id to the caption to score: any text, possibly empty; one or more images.
        names: what messages call each system, such as its file.

    Raises:
        RoutevlError: no reference holds a word, or a Java program failed; names the image, where METEOR failed at one.
    """
    with start_meteor() as meteor:
        tokens = _reference_tokens(references, candidates)
        scores = []
        for system, name in zip_longest(candidates, names):
            try:
                scores.append(_score_one({image: tokens[image] for image in system}, system, meteor))
            except RoutevlError as error:
                raise RoutevlError(f"{name}: {error}" if name else str(error)) from None
        return scores


def _reference_tokens(references: Mapping[int, Sequence[str]], candidates: Sequence[Mapping[int, str]]) -> dict[int, list[str]]:
    """The tokens of the references of all images that some system captions. Raises RoutevlError where none holds a word."""
    captioned = {image: references[image] for system in candidates for image in system}
    tokenized = iter(_tokens([caption for captions in captioned.values() for caption in captions]))
    tokens = {image: [next(tokenized) for _ in captions] for image, captions in captioned.items()}
    if not any(map(any, tokens.values())):
        raise RoutevlError(f"no reference caption of the {len(tokens)} images to score holds a word")
    return tokens


def _tokens(captions: Iterable[str]) -> list[str]:
    return tokenize([one_line(caption) for caption in captions])


def _score_one(reference_tokens: Mapping[int, list[str]], candidates: Mapping[int, str], meteor: Meteor) -> CaptionScores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    candidate_tokens = _candidate_tokens(candidates)
    bleu, _ = Bleu(4).compute_score(reference_tokens, candidate_tokens, verbose=0)
    rouge, _ = Rouge().compute_score(reference_tokens, candidate_tokens)
    cider, cider_by_image = _cider(reference_tokens, candidate_tokens)
    too_long = [image for image in candidates if _most_words(reference_tokens[image] + candidate_tokens[image]) > METEOR_WORDS]
    missing = {"SPICE": SPICE_MISSING}
    if too_long:
        missing["METEOR"] = f"not computed: {_named(too_long)} a caption of more than {METEOR_WORDS:,} words"
    texts = {image: text for image, [text] in candidate_tokens.items()}
    meteor_score = None if too_long else meteor.corpus_score(reference_tokens, texts)
    metrics: dict[str, float | None] = {f"Bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    metrics |= {"METEOR": meteor_score, "ROUGE_L": float(rouge), "CIDEr": cider, "SPICE": None}
    return CaptionScores(metrics, cider_by_image, missing, _remarks(len(cider_by_image)))


def _candidate_tokens(candidates: Mapping[int, str]) -> dict[int, list[str]]:
    return {image: [text] for image, text in zip(candidates, _tokens(candidates.values()), strict=True)}


def _cider(
    reference_tokens: Mapping[int, list[str]], candidate_tokens: Mapping[int, list[str]]
) -> tuple[float, dict[int, float]]:
    """CIDEr of all images of the candidates, and of each."""
    from pycocoevalcap.cider.cider import Cider

    cider, by_image = Cider().compute_score(reference_tokens, candidate_tokens)
    return float(cider), dict(zip(candidate_tokens, by_image.tolist(), strict=True))


def _most_words(texts: Iterable[str]) -> int:
    return max(len(text.split(" ")) for text in texts)


def _named(images: Sequence[int]) -> str:
    """For example "image 3 has", or "images 3, 5, 7 and 12 more have"."""
    if len(images) == 1:
        return f"image {images[0]} has"
    more = f" and {len(images) - MOST_NAMED} more" if len(images) > MOST_NAMED else ""
    return f"images {', '.join(map(str, images[:MOST_NAMED]))}{more} have"


def _remarks(n_images: int) -> list[str]:
    if n_images >= FEW_IMAGES:
        return []
    of_these = "1 image" if n_images == 1 else f"{n_images} images"
    return [
        f"CIDEr of {of_these} says little: it weighs words by how few of just these images' references have them, so that words "
        "which all have count nothing, and the CIDEr of one image is 0 whatever its caption"
    ]


def score_files(annotations: str | Path, results: Sequence[str | Path], subset: bool = False) -> list[CaptionScores]:
    """Score results files, one per system, against an official COCO captions file.

    Args:
        subset: accept results for some of the images only, and score those alone.

    Raises:
        RoutevlError: a file is missing or malformed, or the results are not for the images with captions; or as `score`.
    """
    return score(*_read(annotations, results, subset), results)


def cider_of_files(annotations: str | Path, results: Sequence[str | Path]) -> list[CaptionScores]:
    """`score_files` with CIDEr as the only metric, which needs no METEOR and a fraction of the time."""
    references, candidates = _read(annotations, results)
    tokens, scores = _reference_tokens(references, candidates), []
    for system in candidates:
        cider, by_image = _cider({image: tokens[image] for image in system}, _candidate_tokens(system))
        scores.append(CaptionScores({"CIDEr": cider}, by_image, {}, _remarks(len(by_image))))
    return scores


def _read(
    annotations: str | Path, results: Sequence[str | Path], subset: bool = False
) -> tuple[dict[int, list[str]], list[dict[int, str]]]:
    """The reference captions by image id, and the captions of each results file."""
    references: dict[int, list[str]] = defaultdict(list)
    for annotation in read_captions(annotations)["annotations"]:
        references[annotation["image_id"]].append(annotation["caption"])
    expected, optional = ((), references) if subset else (references, ())
    candidates = []
    for path in results:
        system = read_results(path, "image_id", "caption", expected, optional)
        if not system:
            raise RoutevlError(f"{path}: holds no captions to score")
        candidates.append(system)
    return references, candidates


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the stage `caption-score`."""
    parser.add_argument("--annotations", required=True, help="COCO captions file (json or json.gz)")
    parser.add_argument("--results", required=True, help='results file: [{"image_id": ..., "caption": ...}]')
    parser.add_argument("--subset", action="store_true", help="the results are for some of the images: score those alone")


def run(arguments: Namespace) -> None:
    """Print the scores as fractions, what is missing or says little, and why, as JSON."""
    (scores,) = score_files(arguments.annotations, [arguments.results], arguments.subset)
    report = scores.metrics | {"missing": scores.missing} | remarked(scores.remarks) | {"n": len(scores.cider_by_image)}
    print(json.dumps(report, indent=1))
