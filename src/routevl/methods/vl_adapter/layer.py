"""The adapter of one task or several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from routevl.conditioning import PER_EXAMPLE, Conditioning
from routevl.errors import RoutevlError
from routevl.methods.bottleneck.layer import Bottleneck


class Adapter(nn.Module):
    """h + the bottleneck of h; each example's is that of its task.

    Args:
        bottlenecks: one for each task; they may have projections in common.
        conditioning: has the examples' tasks (`streams_of_tasks`); None where there is one task.
    """

    def __init__(self, bottlenecks: Iterable[Bottleneck], conditioning: Conditioning | None) -> None:
        super().__init__()
        self.bottlenecks = nn.ModuleList(bottlenecks)
        self.conditioning = conditioning

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, ..., d) -> the same."""
        if self.conditioning is None:
            return hidden_states + self.bottlenecks[0](hidden_states)
        texts = self.conditioning.by_text(hidden_states)
        task_id = self.conditioning.per_example("task_id", len(texts), "task_id").to(texts.device)
        task_id = task_id.view(-1, *[1] * (texts.dim() - 1))  # (B, 1, ...)
        adapted = texts
        for task in self.conditioning.call().streams["tasks"]:
            adapted = torch.where(task_id == task, texts + self.bottlenecks[task](texts), adapted)
        return adapted.view_as(hidden_states)


def streams_of_tasks(text_model: nn.Module, tasks: int) -> Conditioning:
    """Let calls of a model have `task_id`, (B,) int64: the task of each example, 0 or more and less than `tasks`.

    Layers read beside it `tasks`, the numbers of those in the batch: what belongs to no other is used, or gets a gradient.
    """

    def prepare(given: dict[str, Tensor]) -> dict[str, Any]:
        task_id = given["task_id"]
        if task_id.dim() != 1 or task_id.dtype != torch.int64:
            raise RoutevlError(f"task_id must be (batch,) int64, not {tuple(task_id.shape)} {task_id.dtype}")
        present = task_id.unique().tolist()  # once a call, since a GPU has to be waited for
        if wrong := [task for task in present if not 0 <= task < tasks]:
            raise RoutevlError(f"task_id has a {wrong[0]}, but the model has adapters for the tasks 0 to {tasks - 1}")
        return {"task_id": task_id, "tasks": present}

    return Conditioning(text_model, {"task_id": PER_EXAMPLE}, prepare)
