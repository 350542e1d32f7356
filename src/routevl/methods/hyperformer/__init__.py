"""HyperFormer: VL-Adapter's bottlenecks, whose weights a small network makes of vectors of the task and the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from routevl.methods.bottleneck import BottleneckMethod, BottleneckOptions
from routevl.methods.per_task import PerTask, tasks_option

if TYPE_CHECKING:
    from torch import nn

    from routevl.backbones.structure import Structure

ONE_TASK = "its adapters are made of what several tasks have in common, and there is one"


class HyperFormer(PerTask, BottleneckMethod):
    """h + U gelu(D h) after every sub-layer, as VL-Adapter, with D, U and their biases generated: linear functions of
    z = LN(W_2 relu(W_1 [t; l] + b_1) + b_2), t a vector of the task, l one of the layer; a stack's layers have one such network.
    """

    refuses: ClassVar[Mapping[str, str]] = {"vqa": ONE_TASK, "caption": ONE_TASK}

    @dataclass(frozen=True)
    class Options(BottleneckOptions):
        """Options of HyperFormer."""

        tasks: int = tasks_option("a vector")

    def adapt(self, text_model: nn.Module, parts: Structure) -> None:
        from routevl.backbones.skeleton import widths_of
        from routevl.methods.bottleneck.layer import Bottleneck, change_output
        from routevl.methods.hyperformer.layer import Code, Generated, Head, task_vectors
        from routevl.methods.per_task.layer import streams_of_tasks
        from routevl.methods.routed.tuner import layer_of
        from routevl.methods.vl_adapter.layer import Adapter
        from routevl.methods.vl_pet import encoder_of

        tasks, device, encoder = self.options.tasks, text_model.device, encoder_of(text_model)
        conditioning, vectors = streams_of_tasks(text_model, tasks), task_vectors(tasks, device)
        kinds = (parts.attention_outputs, parts.cross_attention_outputs, parts.feed_forward_outputs)
        stacks = {name.startswith(encoder) for names in kinds for name in names}
        for stack in sorted(stacks, reverse=True):  # the encoder, or a model that has no decoder beside it; the decoder
            places = [[name for name in names if name.startswith(encoder) == stack] for names in kinds]
            layers = list(dict.fromkeys(layer_of(name) for names in places for name in names))
            code = Code(vectors, len(layers), device)
            for names in places:
                heads: dict[int, list[Head]] = {}  # width of the hidden states -> those of D and U
                for name in names:
                    module, layer = text_model.get_submodule(name), layers.index(layer_of(name))
                    width = widths_of(module)[1]
                    if width not in heads:
                        heads[width] = [Head(*ends, device) for ends in ((width, self.rank(width)), (self.rank(width), width))]
                    generated = ([Generated(code, head, task, layer) for head in heads[width]] for task in range(tasks))
                    change_output(module, Adapter([Bottleneck(down, up) for down, up in generated], conditioning))
