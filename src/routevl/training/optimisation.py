"""The optimiser step that training and pretraining share, and what makes both deterministic."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.other import is_repeated_blocks
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_linear_schedule_with_warmup

if TYPE_CHECKING:
    from routevl.settings import RunSettings


class Optimisation:
    """AdamW with a learning-rate schedule: the one optimiser step of training and pretraining.

    Args:
        groups: AdamW's parameter groups: `params`, and the group's peak learning rate `lr`.
        weight_decay: of the groups that set none of their own.
        schedule: makes the schedule of the optimiser; it goes on by one with each step.
        max_grad_norm: gradients are clipped to this norm, over all parameters together; None: they are not clipped.

    Attributes:
        optimiser: the AdamW.
        schedule: its learning-rate schedule.
        parameters: those of all groups.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        weight_decay: float,
        schedule: Callable[[Optimizer], LRScheduler],
        max_grad_norm: float | None,
    ) -> None:
        self.optimiser = AdamW(groups, weight_decay=weight_decay, fused=True)
        self.schedule = schedule(self.optimiser)
        self.parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        self.max_grad_norm = max_grad_norm

    def step(self) -> None:
        """Move the parameters along the gradients that `backward` left, and clear these."""
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad()


def optimisation_of(settings: RunSettings, groups: list[dict[str, Any]], steps: int) -> Optimisation:
    """That of a run, or of a search before it, of so many steps in all: a linear warm-up, then a linear decay to zero."""
    return Optimisation(
        groups,
        settings.weight_decay,
        lambda optimiser: get_linear_schedule_with_warmup(optimiser, settings.warmup_steps(steps), steps),
        settings.max_grad_norm,
    )


def prepare_torch(threads: int) -> None:
    """Use so many CPU threads, and deterministic kernels alone."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a tenth of the time


def compile_layers(model: nn.Module) -> None:
    """Compile each of a model's repeated layers in place, for texts of any length. What is around them stays as it is: hooks
    that take streams and choose positions."""
    if is_repeated_blocks(model):  # what is repeated within a layer is compiled with it
        for layer in model:
            layer.compile(dynamic=True)
        return
    for part in model.children():
        compile_layers(part)
