"""What methods share that have tensors of each task: their option here; layer.py chooses them for each example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from routevl.methods.base import Method
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor


def tasks_option(what: str) -> Any:
    """The option `tasks`, of methods that give each task something of its own."""
    return option(f"tasks with {what} of their own; of more than one, `task_id` travels beside each call", 1, least=1)


class PerTask(Method):
    """A method with the option `tasks`, whose tensors are chosen by each example's task where there are several."""

    def beside(self, inputs: Mapping[str, Tensor], visual: Tensor | None) -> dict[str, Tensor]:
        own = self.options.tasks > 1 and "task_id" in inputs  # a call without it is refused by the first layer that reads it
        return super().beside(inputs, visual) | ({"task_id": inputs["task_id"]} if own else {})
