"""What phases before training share that look at gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from routevl.tasks.base import VisionLanguageModel


def squared_gradients(model: VisionLanguageModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name of each parameter of the text model -> the squares of its gradients of a batch's loss, summed over batches: float32,
    its shape. The model stays in its mode."""
    parameters = dict(model.text_model.named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for batch in batches:
        model.zero_grad()
        model(**batch)["loss"].backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares[name] += parameter.grad.square()
    return squares
