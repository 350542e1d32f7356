"""How each example of a batch gets what belongs to its task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from routevl.conditioning import PER_EXAMPLE, Conditioning
from routevl.errors import RoutevlError


def streams_of_tasks(text_model: nn.Module, tasks: int) -> Conditioning | None:
    """Let calls of a model have `task_id`, (B,) int64: the task of each example, 0 or more and less than `tasks`.

    None where there is one task.
    """
    return None if tasks == 1 else Conditioning(text_model, {"task_id": PER_EXAMPLE}, partial(tasks_of, tasks=tasks))


def tasks_of(given: dict[str, Tensor], tasks: int) -> dict[str, Any]:
    """What layers read of `task_id`, and beside it `tasks`, the numbers of those in the batch: what belongs to no other is used,
    or gets a gradient. Raises RoutevlError where it is not as `streams_of_tasks` says."""
    task_id = given["task_id"]
    if task_id.dim() != 1 or task_id.dtype != torch.int64:
        raise RoutevlError(f"task_id must be (batch,) int64, not {tuple(task_id.shape)} {task_id.dtype}")
    present = task_id.unique().tolist()  # once a call, since a GPU has to be waited for
    if wrong := [task for task in present if not 0 <= task < tasks]:
        raise RoutevlError(f"task_id has a {wrong[0]}, but the model knows the tasks 0 to {tasks - 1}")
    return {"task_id": task_id, "tasks": present}


def by_task(conditioning: Conditioning | None, batch_size: int, of_task: Callable[[int], Tensor]) -> Tensor:
    """Each example's part of what its own task gives.

    Args:
        conditioning: has the examples' tasks (`streams_of_tasks`); None: all are of task 0.
        of_task: number of a task -> (B, ...) for all examples of the batch, as if they were of this task.

    Raises:
        RoutevlError: the call has no `task_id`, or one of another batch size.
    """
    if conditioning is None:
        return of_task(0)
    task_id = conditioning.per_example("task_id", batch_size, "task_id")
    first, *others = conditioning.call().streams["tasks"]
    chosen = of_task(first)
    task_id = task_id.to(chosen.device).view(-1, *[1] * (chosen.dim() - 1))  # (B, 1, ...)
    for task in others:
        chosen = torch.where(task_id == task, of_task(task), chosen)
    return chosen


class OfTasks(nn.Module):
    """Modules, (B, ..., d) -> (B, ..., d_out), one for each task: each example goes through that of its own."""

    def __init__(self, modules: Iterable[nn.Module], conditioning: Conditioning) -> None:
        super().__init__()
        self.of_tasks = nn.ModuleList(modules)
        self.conditioning = conditioning

    @property
    def weight(self) -> Tensor:
        """The first task's; all are of its dtype and on its device."""
        return self.of_tasks[0].weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        texts = self.conditioning.by_text(hidden_states)
        chosen = by_task(self.conditioning, len(texts), lambda task: self.of_tasks[task](texts))
        return chosen.view(*hidden_states.shape[:-1], -1)
