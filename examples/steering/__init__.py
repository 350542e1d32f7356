"""Steering vectors: a worked example of a method (docs/EXTENDING.md), with options, a stream of its own, a phase before training
and an extra loss.

After each layer of the text model a trained vector v_l (d) is added to the hidden states, more to the later tokens of a text:

    h_l <- h_l + depth · rms_l · v_l        depth (B, L): 0 for the first token of a text, 1 for its last

rms_l, a number per layer, is measured before training on the bare text model, so that one learning rate suits all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from routevl.methods.base import Method
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.tasks.base import Task, VisionLanguageModel


class Steering(Method):
    """One trained vector after each layer."""

    @dataclass(frozen=True)
    class Options:
        """Options of steering vectors."""

        penalty: float = option("weight of the vectors' mean square in the loss", 0.01, least=0)
        batches: int = option("batches that the phase before training looks at", 4, least=1)

    def prepare(self, task: Task, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """ "layer.<n>" -> the root mean square of the layer's output, a scalar."""
        from routevl.methods.steering.layer import root_mean_squares

        return root_mean_squares(task.model, islice(batches, self.options.batches))

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        from routevl.methods.steering.layer import steer

        for name in train_also:
            text_model.get_submodule(name).requires_grad_(True)
        return steer(text_model, prepared)

    def beside(self, inputs: Mapping[str, Tensor], visual: Tensor | None) -> dict[str, Tensor]:
        place = inputs["attention_mask"].cumsum(-1) - 1  # (B, L)
        return {"depth": (place / place[:, -1:].clamp_min(1)).clamp(0, 1)}

    def losses(self, model: VisionLanguageModel, output: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        vectors = [p for name, p in model.text_model.named_parameters() if name.endswith(".steering_vector")]
        return {"penalty": self.options.penalty * sum(vector.square().mean() for vector in vectors)}

    def part_of(self, name: str) -> str:
        return "method" if name.endswith(".steering_vector") else "layer_norm"
