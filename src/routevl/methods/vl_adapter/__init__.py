"""VL-Adapter: a bottleneck after every sub-layer of the text model, for one task or for several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routevl.methods.bottleneck import BottleneckMethod, BottleneckOptions
from routevl.options import option

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from routevl.backbones.structure import Structure


@dataclass(frozen=True)
class TaskOptions(BottleneckOptions):
    """Options of adapters that several tasks may have apart."""

    sharing: str = option(
        "what tasks share: `single`, all; `half_shared`, the down-projections; `multiple`, nothing", "single",
        choices=("single", "half_shared", "multiple"),
    )  # fmt: skip
    tasks: int = option("tasks with projections of their own; of more than one, `task_id` travels beside each call", 1, least=1)

    def conflicts(self) -> Iterator[str]:
        """What is wrong with options that are right each by itself."""
        if self.sharing == "single" and self.tasks > 1:
            yield f"tasks is {self.tasks}, but with sharing=single all have the same adapters: leave tasks out"


class VLAdapter(BottleneckMethod):
    """h + U gelu(D h) in place of the output h of every attention, cross-attention and feed-forward part."""

    Options = TaskOptions

    def projections(self, device: torch.device) -> Callable[[int, int], nn.Module]:
        """What makes the model's projections of their two widths."""
        from routevl.methods.bottleneck.layer import linear

        return lambda width, width_out: linear(width, width_out, device)

    def adapt(self, text_model: nn.Module, parts: Structure) -> None:
        from routevl.backbones.skeleton import widths_of
        from routevl.methods.bottleneck.layer import Bottleneck, change_output
        from routevl.methods.vl_adapter.layer import Adapter, streams_of_tasks

        shared, tasks = self.options.sharing == "half_shared", self.options.tasks
        conditioning = streams_of_tasks(text_model, tasks) if tasks > 1 else None
        new = self.projections(text_model.device)
        for name in (*parts.attention_outputs, *parts.cross_attention_outputs, *parts.feed_forward_outputs):
            module = text_model.get_submodule(name)
            width = widths_of(module)[1]
            rank = self.rank(width)
            downs = [new(width, rank)] * tasks if shared else [new(width, rank) for _ in range(tasks)]
            change_output(module, Adapter([Bottleneck(down, new(rank, width)) for down in downs], conditioning))

    def beside(self, inputs: Mapping[str, Tensor], visual: Tensor | None) -> dict[str, Tensor]:
        own = self.options.tasks > 1 and "task_id" in inputs  # a call without it is refused by the first layer that reads it
        return {"task_id": inputs["task_id"]} if own else {}
