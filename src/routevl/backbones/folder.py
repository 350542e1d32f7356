"""Backbones as folders: whether a folder is one, its fingerprint, its name for readers, and where it comes from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from routevl.backbones.derivations import DERIVATIONS
from routevl.errors import RoutevlError
from routevl.files import read_json, sha256_of

# Only what decides the features: a tokenizer or a model card beside the weights does not.
FILES_OF_A_FINGERPRINT = ("*.safetensors", "config.json", "preprocessor_config.json")
SOURCE, DERIVED, PRETRAINING = "source.json", "derived.json", "pretraining.json"  # what its folder says of where it comes from
LICENSE_KEYS = ("license", "license_name", "license_link")  # of a model card's metadata


@dataclass(frozen=True)
class Origin:
    """Where a backbone comes from, as far as its folder tells.

    Attributes:
        hub_id, commit, license: of the Hugging Face hub model that it is, or is derived from; `license` holds those of
            LICENSE_KEYS that the model's card has.
        pretraining: what pretraining.json says, of a backbone that this package made.
        derivations: how it was derived, each {"by": name, "options": {...}}, the first one first.
    """

    hub_id: str | None = None
    commit: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    pretraining: Mapping[str, Any] = field(default_factory=dict)
    derivations: tuple[Mapping[str, Any], ...] = ()

    @property
    def is_on_the_hub(self) -> bool:
        """Whether it is a model of the hub as it stands there."""
        return self.hub_id is not None and not self.derivations

    @property
    def is_pruned(self) -> bool:
        """Whether one of its derivations has pruned it, so that entries of its linear weights are zero."""
        return any(DERIVATIONS[step["by"]].prunes for step in self.derivations if step["by"] in DERIVATIONS)


def check_folder(path: str | Path) -> Path:
    """The folder of a backbone.

    Raises:
        RoutevlError: no such folder; no config.json or no safetensors weights in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RoutevlError(f"backbone {path}: no such folder (routevl fetch-backbone makes one of a Hugging Face hub model)")
    if not (folder / "config.json").is_file():
        raise RoutevlError(f"backbone {path}: no config.json, so it is not a model folder")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f" (found {', '.join(pickles)}; pickled weights are not loaded, convert them)" if pickles else ""
        raise RoutevlError(f"backbone {path}: no *.safetensors weights{found}")
    return folder


def copy_but_weights(source: Path, output: Path) -> None:
    """Copy what a backbone's folder holds beside its weights: config.json, tokenizer, preprocessing, where it comes from."""
    output.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".safetensors.index.json"):
            shutil.copy(path, output)


def fingerprint_of(folder: str | Path) -> str:
    """sha256 (hexadecimal) over the names and contents of a backbone's weights, config and preprocessing."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in FILES_OF_A_FINGERPRINT for file in Path(folder).glob(pattern)):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def public_name(path: str | Path) -> str:
    """A folder's path for readers, in a form that no hub id has; of one outside the working directory its last part alone."""
    inside = not Path(path).is_absolute() and ".." not in Path(path).parts
    return f"./{Path(path).as_posix() if inside else Path(path).resolve().name}"


def origin_of(folder: str | Path) -> Origin:
    """Where a backbone comes from. Raises RoutevlError where one of the records in its folder is no JSON file."""
    folder = Path(folder)
    source, derived, pretraining = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in (SOURCE, DERIVED, PRETRAINING)
    )
    if "source" in derived:
        of = derived["source"]
        origin = Origin(**{**of, "derivations": tuple(of["derivations"])})
    else:  # a derived backbone's folder may have its source's records too
        license = _license_of(folder) if source else {}
        origin = Origin(source.get("hub_id"), source.get("commit"), license, pretraining)
    step = ({"by": derived["by"], "options": derived["options"]},) if derived else ()
    return replace(origin, derivations=(*origin.derivations, *step))


def _license_of(folder: Path) -> dict[str, str]:
    """What the model card of a hub model says of its licence."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        metadata = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError):  # no such file, or no readable metadata
        return {}
    return {key: metadata[key] for key in LICENSE_KEYS if isinstance(metadata.get(key), str)}
