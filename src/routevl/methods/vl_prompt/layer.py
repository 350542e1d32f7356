"""The prompts, and how an encoder comes to read them and its decoder to attend to what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from routevl.conditioning import Conditioning
from routevl.methods.bottleneck.layer import STANDARD_DEVIATION, linear
from routevl.methods.per_task.layer import by_task


class Prompt(nn.Module):
    """W_2 tanh(W_1 e + b_1) + b_2, (P, d), of trained vectors e (P, d)."""

    def __init__(self, length: int, width: int, hidden: int, device: torch.device) -> None:
        super().__init__()
        self.vectors = nn.Parameter(STANDARD_DEVIATION * torch.randn(length, width, device=device))
        self.network = nn.Sequential(linear(width, hidden, device), nn.Tanh(), linear(hidden, width, device))

    def forward(self) -> Tensor:
        return self.network(self.vectors)


class Prompts(nn.Module):
    """Each example's are those of its task.

    Args:
        prompts: one for each task, all as long.
        conditioning: has the examples' tasks (`streams_of_tasks`); None where there is one task.
    """

    def __init__(self, prompts: Iterable[Prompt], conditioning: Conditioning | None) -> None:
        super().__init__()
        self.of_tasks = nn.ModuleList(prompts)
        self.length = len(self.of_tasks[0].vectors)
        self.conditioning = conditioning

    def forward(self, batch_size: int) -> Tensor:
        """(B, P, d)."""
        return by_task(self.conditioning, batch_size, lambda task: self.of_tasks[task]().expand(batch_size, -1, -1))


def prompt_encoder(text_model: nn.Module, prompts: Prompts) -> None:
    """Let the encoder of a BART or a T5 read prompts before all else. It has them as its part `prompts`.

    Nothing before the encoder knows of them: the text model is called, and generates, as without. A BART's prompts get no
    positions, and are normed as token embeddings whatever else may be left out of this norm; what a T5 adds is for any position.
    """
    encoder, length = text_model.get_encoder(), prompts.length
    encoder.prompts = prompts
    encoder.register_forward_pre_hook(_prepend, with_kwargs=True)
    text_model.get_decoder().register_forward_pre_hook(partial(_attend_to_prompts, length), with_kwargs=True)
    if text_model.config.model_type == "bart":  # these are outermost: hooks of others see the rows without prompts
        encoder.embed_positions.register_forward_pre_hook(partial(_without_prompts, length), prepend=True)
        encoder.embed_positions.register_forward_hook(partial(_no_positions, length))
        encoder.layernorm_embedding.register_forward_hook(partial(_norm_prompts, length))


# functions of this module, since hooks are copied and pickled with their model


def _prepend(encoder: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Input embeddings (B, L, d) and a mask (B, L), or token ids (B, L) and none -> (B, P + L, d) and (B, P + L)."""
    embeddings, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if embeddings is None:
        embeddings = encoder.embed_tokens(kwargs["input_ids"])
    prompts = encoder.prompts(len(embeddings)).to(embeddings.dtype)
    changed = {
        "input_ids": None,
        "inputs_embeds": torch.cat([prompts, embeddings], dim=1),
        "attention_mask": _widened(mask, prompts.shape[1]),
    }
    return args, kwargs | changed


def _attend_to_prompts(
    length: int, decoder: nn.Module, args: tuple[()], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """The mask of what the encoder has read, as the encoder had it."""
    return args, kwargs | {"encoder_attention_mask": _widened(kwargs.get("encoder_attention_mask"), length)}


def _widened(mask: Tensor | None, length: int) -> Tensor | None:
    """(B, L) -> (B, P + L), with ones for prompts."""
    return None if mask is None else nn.functional.pad(mask, (length, 0), value=1)


def _without_prompts(length: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """(B, P + L) -> (B, L), whose positions begin at 0."""
    return (args[0][:, length:],)


def _no_positions(length: int, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """(1 or B, L, d) -> (1 or B, P + L, d), 0 for prompts."""
    return nn.functional.pad(output, (0, 0, length, 0))


def _norm_prompts(length: int, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """(B, P + L, d) -> the same, the prompts' part as the norm itself gives it."""
    return torch.cat([module.forward(args[0][:, :length]), output[:, length:]], dim=1)
