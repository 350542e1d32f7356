"""PHA: adapters beside the feed-forward parts, whose weights a small network makes of a prototype of the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from routevl.methods.bottleneck import BottleneckMethod
from routevl.methods.hyperformer import ONE_TASK
from routevl.methods.per_task import PerTask, tasks_option
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.backbones.structure import Structure
    from routevl.tasks.base import VisionLanguageModel


class Pha(PerTask, BottleneckMethod):
    """h + U relu(D x), x being what a feed-forward part reads and h its output, with D, U and their biases generated: linear
    functions of LN(W_2 relu(W_1 [k; l] + b_1) + b_2), k the prototype of the task, l a vector of the layer.

    The encoder of an encoder-decoder has ordinary adapters instead, which all tasks share. Of several tasks, two losses gather a
    vector of each example, which nothing else reads, around its task's prototype.
    """

    refuses: ClassVar[Mapping[str, str]] = {"vqa": ONE_TASK, "caption": ONE_TASK}

    @dataclass(frozen=True)
    class Options:
        """Options of PHA."""

        r: int = option("width of the bottlenecks", 64, least=1)
        tasks: int = tasks_option("a prototype")
        temperature: float = option("of the two losses; cosines are divided by it", 0.1, above=0)
        loss_weight: float = option("what each of the two losses is multiplied by", 0.1, least=0)

    def adapt(self, text_model: nn.Module, parts: Structure) -> None:
        from routevl.backbones.skeleton import widths_of
        from routevl.errors import RoutevlError
        from routevl.methods.bottleneck.layer import InParallel, change_sub_layer
        from routevl.methods.hyperformer.layer import Generated, task_vectors
        from routevl.methods.per_task.layer import OfTasks, streams_of_tasks
        from routevl.methods.pha import layer
        from routevl.methods.routed.tuner import layer_of
        from routevl.methods.vl_pet import encoder_of

        ends = parts.feed_forward_outputs
        if unknown := [name for name in ends if name not in parts.feed_forward_inputs]:
            raise RoutevlError(f"{unknown[0]}: what its feed-forward part reads, which PHA's adapters read, is not found")
        r, tasks, device = self.options.r, self.options.tasks, text_model.device
        conditioning, prototypes = streams_of_tasks(text_model, tasks), task_vectors(tasks, device, layer.WIDTH)
        ordinary = encoder_of(text_model) or None  # what the names of the encoder's modules begin with
        layers = list(dict.fromkeys(layer_of(name) for name in ends if not (ordinary and name.startswith(ordinary))))
        code, heads = layer.new_code(prototypes, len(layers), device), {}
        for name in ends:
            width = widths_of(text_model.get_submodule(name))[1]
            if ordinary and name.startswith(ordinary):
                bottleneck = layer.ordinary_bottleneck(width, r, device)
            else:
                if width not in heads:
                    heads[width] = [layer.new_head(*widths, device) for widths in ((width, r), (r, width))]
                number = layers.index(layer_of(name))
                generated = ([Generated(code, head, task, number) for head in heads[width]] for task in range(tasks))
                bottlenecks = [layer.ReluBottleneck(down, up) for down, up in generated]
                bottleneck = bottlenecks[0] if conditioning is None else OfTasks(bottlenecks, conditioning)
            change_sub_layer(text_model, parts.feed_forward_inputs[name][0], name, InParallel(bottleneck))
        if tasks > 1:
            layer.note_instances(text_model, layer.Instances(prototypes, text_model.config.hidden_size, device))

    def part_of(self, name: str) -> str:
        return "method" if "instances." in name else super().part_of(name)

    def losses(self, model: VisionLanguageModel, output: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from routevl.methods.pha import layer

        if self.options.tasks == 1:  # there is no other to be told from
            return {}
        vectors, prototypes = layer.noted_instances(model.text_model)
        weight, arguments = self.options.loss_weight, (batch["task_id"], self.options.temperature)
        return {
            "instance": weight * layer.instance_loss(vectors, *arguments),
            "prototype": weight * layer.prototype_loss(vectors, prototypes, *arguments),
        }
