"""Backbones as folders: whether a folder is one, and its fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path

from routevl.errors import RoutevlError
from routevl.files import sha256_of

# Only what decides the features: a tokenizer or a model card beside the weights does not.
FILES_OF_A_FINGERPRINT = ("*.safetensors", "config.json", "preprocessor_config.json")


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


def fingerprint_of(folder: str | Path) -> str:
    """sha256 (hexadecimal) over the names and contents of a backbone's weights, config and preprocessing."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in FILES_OF_A_FINGERPRINT for file in Path(folder).glob(pattern)):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
