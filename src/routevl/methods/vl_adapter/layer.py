"""The adapter of one task or several."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from routevl.conditioning import Conditioning
from routevl.methods.bottleneck.layer import Bottleneck
from routevl.methods.per_task.layer import by_task


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
        texts = hidden_states if self.conditioning is None else self.conditioning.by_text(hidden_states)
        adapted = by_task(self.conditioning, len(texts), lambda task: texts + self.bottlenecks[task](texts))
        return adapted.view_as(hidden_states)
