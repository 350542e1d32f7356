"""How BART's own encoder reads an image's tokens beside the text: they get no positions and no norm of token embeddings.

They stand before the text, as everywhere here, where the original has them behind it: without positions, attention does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from routevl.errors import RoutevlError

# positions of the text that an encoder of this thread reads; whatever comes before them is the image's
_TEXT: ContextVar[int | None] = ContextVar("routevl_clip_bart_text_positions", default=None)


def embed_text_alone(text_model: PreTrainedModel) -> None:
    """Let a BART's encoder add positions to the text alone, and normalise its embeddings alone, within `text_of`.

    Raises:
        RoutevlError: the model is no BART.
    """
    if text_model.config.model_type != "bart":
        raise RoutevlError(f"backbone {text_model.name_or_path}: a {text_model.config.model_type} model; CLIP-BART needs a bart")
    encoder = text_model.get_encoder()
    encoder.embed_positions.register_forward_pre_hook(_number_text, with_kwargs=True)
    encoder.embed_positions.register_forward_hook(_positions_of_text)
    encoder.layernorm_embedding.register_forward_hook(_norm_of_text)


@contextmanager
def text_of(length: int) -> Iterator[None]:
    """Say that of what encoders read the last `length` positions are text."""
    token = _TEXT.set(length)
    try:
        yield
    finally:
        _TEXT.reset(token)


# functions of this module, since hooks are copied and pickled with their model


def _number_text(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
    """Look positions up for the text from 0 on, so that the table need not be as long as text and image together."""
    [rows] = args  # (B, P + L_t)
    numbers = torch.arange(rows.shape[1], device=rows.device) - _image_positions(rows)
    return args, kwargs | {"position_ids": numbers.clamp(min=0)}


def _positions_of_text(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """(1, P + L_t, d) -> the same, 0 at the image's positions."""
    image = _image_positions(output)
    return nn.functional.pad(output[:, image:], (0, 0, image, 0))


def _norm_of_text(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """(B, P + L_t, d) -> the image's part as the norm was given it, the text's as it gives it."""
    image = _image_positions(output)
    return torch.cat([args[0][:, :image].to(output.dtype), output[:, image:]], dim=1)


def _image_positions(rows: Tensor) -> int:
    """P of (B, P + L_t, ...); it is 0 in a side network's frozen half, which reads the text alone."""
    text = _TEXT.get()
    return 0 if text is None else rows.shape[1] - text
