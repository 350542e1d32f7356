"""Reading model folders of transformers; every failure is one line that names the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from routevl.errors import RoutevlError, first_line


def transformers_config(folder: Path) -> PretrainedConfig:
    """The configuration of a folder. Raises RoutevlError where it is not of a transformers model."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RoutevlError(f"backbone {folder}: config.json is not of a transformers model ({first_line(error)})") from None


def load_transformers(model_class: type[PreTrainedModel], folder: Path, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The frozen model, and the names of its parameters that the folder has no weights for."""
    try:
        model, loading = model_class.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise RoutevlError(f"backbone {folder}: cannot be loaded ({first_line(error)})") from None
    return model.eval().requires_grad_(False), sorted(loading["missing_keys"])


def check_complete(folder: Path, model_class: type[PreTrainedModel], missing: list[str]) -> None:
    """Raise RoutevlError where weights are missing."""
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise RoutevlError(f"backbone {folder}: its weights lack {listed} of {model_class.__name__}")


def of_the_folder(auto_class: type, folder: Path, what: str) -> Any:
    """The tokenizer or image processor of a folder."""
    try:
        return auto_class.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RoutevlError(f"backbone {folder}: no readable {what} ({first_line(error)})") from None
