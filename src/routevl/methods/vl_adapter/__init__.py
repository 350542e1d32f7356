"""VL-Adapter: a bottleneck after every sub-layer of the text model, for one task or for several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routevl.methods.bottleneck import BottleneckMethod, BottleneckOptions
from routevl.methods.per_task import PerTask, tasks_option
from routevl.options import option

if TYPE_CHECKING:
    import torch
    from torch import nn

    from routevl.backbones.structure import Structure


@dataclass(frozen=True)
class TaskOptions(BottleneckOptions):
    """Options of adapters that several tasks may have apart."""

    sharing: str = option(
        "what tasks share: `single`, all; `half_shared`, the down-projections; `half_shared_up`, the up-projections; `multiple`, "
        "nothing", "single", choices=("single", "half_shared", "half_shared_up", "multiple"),
    )  # fmt: skip
    tasks: int = tasks_option("projections")

    def conflicts(self) -> Iterator[str]:
        """What is wrong with options that are right each by itself."""
        if self.sharing == "single" and self.tasks > 1:
            yield f"tasks is {self.tasks}, but with sharing=single all have the same adapters: leave tasks out"


class VLAdapter(PerTask, BottleneckMethod):
    """h + U gelu(D h) in place of the output h of every attention, cross-attention and feed-forward part."""

    Options = TaskOptions

    def projections(self, device: torch.device) -> Callable[[int, int], nn.Module]:
        """What makes the model's projections of their two widths."""
        from routevl.methods.bottleneck.layer import linear

        return lambda width, width_out: linear(width, width_out, device)

    def adapt(self, text_model: nn.Module, parts: Structure) -> None:
        from routevl.backbones.skeleton import widths_of
        from routevl.methods.bottleneck.layer import Bottleneck, change_output
        from routevl.methods.per_task.layer import streams_of_tasks
        from routevl.methods.vl_adapter.layer import Adapter

        sharing, tasks = self.options.sharing, self.options.tasks
        conditioning, new = streams_of_tasks(text_model, tasks), self.projections(text_model.device)
        for name in (*parts.attention_outputs, *parts.cross_attention_outputs, *parts.feed_forward_outputs):
            module = text_model.get_submodule(name)
            width = widths_of(module)[1]
            rank = self.rank(width)
            downs = [new(width, rank)] * tasks if sharing == "half_shared" else [new(width, rank) for _ in range(tasks)]
            ups = [new(rank, width)] * tasks if sharing == "half_shared_up" else [new(rank, width) for _ in range(tasks)]
            change_output(module, Adapter(map(Bottleneck, downs, ups), conditioning))
