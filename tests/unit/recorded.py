"""Numbers that official code has computed, kept outside the project: `systems/<name>.npz` under ROUTEVL_REFERENCE."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

REFERENCE = Path(os.environ.get("ROUTEVL_REFERENCE", "."))
needs_reference = pytest.mark.skipif(
    "ROUTEVL_REFERENCE" not in os.environ, reason="ROUTEVL_REFERENCE names no folder of reference data"
)


def recorded(system: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The recorded tensors of a system, and their description."""
    arrays = dict(numpy.load(REFERENCE / f"systems/{system}.npz"))
    meta = json.loads(str(arrays.pop("meta")))
    return {name: torch.from_numpy(numpy.asarray(array)) for name, array in arrays.items()}, meta


def put(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter to a recorded value of its shape."""
    assert parameter.shape == value.shape
    parameter.data.copy_(value)


def assert_agrees(ours: Tensor, recorded: Tensor) -> None:
    """To 1e-5 of the largest value."""
    assert ours.shape == recorded.shape
    assert (ours - recorded).abs().max() <= 1e-5 * recorded.abs().max()
