"""The list of derivations, free of torch: how a backbone is made of another one, before anything is trained on it.

A derived backbone is an ordinary model folder, which extraction and training read like any other. To add a derivation: a module
beside this one with a function of (source folder, options, output folder), and of prepared data where it calibrates, of an
`Execution` where it trains, and one row in DERIVATIONS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from routevl.errors import RoutevlError
from routevl.options import option, read


@dataclass(frozen=True)
class MagnitudeOptions:
    """Options of pruning by magnitude."""

    sparsity: float = option("share of the entries of all linear weights that become zero", above=0, below=1)


@dataclass(frozen=True)
class CropOptions:
    """Options of another crop, by timm's names."""

    crop_mode: str = option(
        "what becomes of an image that is not square: its middle is taken (`center`), it is squashed to a square (`squash`), or "
        "it gets margins (`border`)", choices=("center", "squash", "border"),
    )  # fmt: skip
    crop_pct: float = option("share of a side, of the image so far, that the model then sees", 1.0, above=0, most=1)


@dataclass(frozen=True)
class MultiflowOptions:
    """Options of pruning by MULTIFLOW."""

    sparsity: float = option(
        "share of the entries of each modality's linear weights that become zero; the paper's are 0.63, 0.75 and 0.9",
        above=0, below=1,
    )  # fmt: skip
    pairs: str = option("the texts of the pairs of image and text", "captions", choices=("captions", "questions"))
    examples: int = option("pairs of the training split to calibrate with, or all if it has fewer", 512, least=1)
    seed: int = option("seed that chooses them", 0, least=0)


@dataclass(frozen=True)
class SpvitOptions:
    """Options of SPViT."""

    flops: float = option("share of an image's multiply-adds that the search is to keep; DeiT-S's is 0.7", 0.7, above=0, below=1)
    penalty: float = option(
        "weight of the squared distance from that share; DeiT-S's is 3 for multiply-adds in 10^9, which is 60 for their share",
        60.0, above=0,
    )  # fmt: skip
    search_epochs: int = option("epochs of the search, which trains weights and gates", 10, least=1)
    tune_epochs: int = option("epochs of the fine-tuning after the cut, from the original weights", 130, least=1)
    batch_size: int = option("images per step", 64, least=1)
    learning_rate: float = option(
        "highest of the weights, in both phases; the source's is 5e-5 for batches of 512", 6.25e-6, above=0
    )
    gate_learning_rate: float = option("of the gates, which stays", 5e-4, above=0)
    seed: int = option("seed of the gates that are drawn, and of the order of images", 0, least=0)


@dataclass(frozen=True)
class CoAttentionOptions:
    """Options of a model of two streams that attend to each other."""

    layers: int = option("layers in which each stream attends to the other", 6, least=1)
    heads: int = option("attention heads of these layers", 12, least=1)
    hidden_size: int | None = option("their width, a multiple of the heads; `none`: the text model's", None, least=1)
    dropout: float = option("dropout in these layers", 0.1, least=0, below=1)
    epochs: int = option("passes over the pairs in pretraining; with 0 the layers stay as they are drawn", 10, least=0)
    examples: int = option("pairs of the training split's captions to learn from, or all if it has fewer", 20000, least=1)
    batch_size: int = option("pairs per optimiser step", 32, least=2)
    learning_rate: float = option("highest learning rate of the one-cycle schedule", 0.001, above=0)
    seed: int = option("seed of the first weights, and of the order and the masks of pretraining", 0, least=0, below=2**32)


@dataclass(frozen=True)
class Derivation:
    """One way of deriving a backbone.

    Attributes:
        label, source: its name for readers, and the paper that it is from.
        implementation: "<module>:<function>" under routevl.backbones.
        options: a frozen dataclass of `routevl.options.option` fields.
        prunes: whether weights become zero, which training then leaves at zero.
        calibrates: whether the function also gets prepared data, whose training split it runs the model on.
        trains: whether it trains, so that it also gets a `routevl.backbones.derive.Execution`, and resumes.
        joins: whether it also gets the folder of a vision model, whose tokens the new model reads; its module then has
            `write_untrained`, which writes all but the weights.
        model_type: transformers' type of the new model, where that is not its source's.
        differs: in what it is not its source's.
    """

    label: str
    source: str
    implementation: str
    options: type
    prunes: bool = False
    calibrates: bool = False
    trains: bool = False
    joins: bool = False
    model_type: str = ""
    differs: str = ""


DERIVATIONS = {
    "magnitude": Derivation(
        "Pruned by magnitude", "Han et al., 2015 (arXiv 1506.02626)", "magnitude:prune", MagnitudeOptions, prunes=True
    ),
    "multiflow": Derivation(
        "Pruned by MULTIFLOW", "Farina et al., 2024 (arXiv 2404.05621)", "multiflow:prune", MultiflowOptions,
        prunes=True, calibrates=True,
        differs="calibrated with a few pairs of the own training split, each model alone; the weights of an encoder-decoder's "
        "decoder are those of the fusion; of equal scores the first go, so that the sparsity is exact",
    ),
    "spvit": Derivation(
        "Compressed by SPViT", "He et al., 2021 (arXiv 2111.11802)", "spvit.compress:compress", SpvitOptions,
        calibrates=True, trains=True,
        differs="both phases learn the original model's tokens of the own training split's images, without labels or "
        "augmentation; the aim and the penalty are of the share of multiply-adds; a layer with nothing adds nothing, where the "
        "source's fine-tuning adds its normed input; the mixed and normed convolutions are stored as plain ones",
    ),
    "co_attention": Derivation(
        "METER: two streams that attend to each other", "Dou et al., 2022 (arXiv 2111.02387)", "pretrain_co_attention:derive",
        CoAttentionOptions, calibrates=True, trains=True, joins=True, model_type="co_attention",
        differs="pretrained on the captions of the own training split alone, in place of four million pairs; the vision model "
        "stays frozen; one learning rate for all that is trained",
    ),
    "crop": Derivation("A vision model of timm with another crop", "timm (create_transform)", "crop:crop", CropOptions),
}  # fmt: skip


def read_options(by: str, values: Mapping[str, Any], where: str) -> Any:
    """The options of a derivation. Raises RoutevlError where there is none of that name, or an option is wrong."""
    if by not in DERIVATIONS:
        raise RoutevlError(f"{where}: by {by!r} is not a derivation: choose one of {', '.join(DERIVATIONS)}")
    return read(DERIVATIONS[by].options, values, f"{where}: {by}")


def check_joined(by: str, joined: object, name: str) -> None:
    """Raise RoutevlError where a derivation joins a vision model and the key or option `name` gives none, or the reverse."""
    if DERIVATIONS[by].joins != (joined is not None):
        needs = "is missing: the vision backbone whose images it reads" if DERIVATIONS[by].joins else "is given: drop it"
        raise RoutevlError(f"{name} {needs} ({by})")


def check_backbones(backbones: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the configuration's derived backbones.

    Raises:
        RoutevlError: an unknown derivation or source, wrong options, or backbones that are derived from each other in a circle.
    """
    for modality, entries in backbones.items():
        for name, entry in entries.items():
            if "derive" not in entry:
                continue
            where = f"configuration: backbones.{modality}.{name}.derive"
            by, joined = entry["derive"]["by"], entry["derive"].get("with")
            read_options(by, entry["derive"].get("options", {}), where)
            check_joined(by, joined, f"{where}: with")
            if joined is not None and (modality != "text" or joined not in backbones["vision"]):
                of = "is none of backbones.vision" if modality == "text" else "is for a text backbone"
                raise RoutevlError(f"{where}: with {joined!r} {of}")
            seen, source = [name], entry["derive"]["from"]
            while source in entries and "derive" in entries[source] and source not in seen:
                seen.append(source)
                source = entries[source]["derive"]["from"]
            if source in seen or source not in entries:
                reason = "leads back to itself" if source in seen else f"is none of backbones.{modality}"
                raise RoutevlError(f"{where}: from {source!r} {reason}")
