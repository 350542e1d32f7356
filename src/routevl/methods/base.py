"""What a method may say. Only its options and how it is built have no default; the trainer knows no method by name.

Free of torch, so that the run sheet can be checked without it: a method's folder imports its layers when it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from routevl.errors import RoutevlError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from routevl.tasks.base import Task, VisionLanguageModel
    from routevl.training.prepared import Batches
    from routevl.training.trainer import Trainer

WEIGHTS = "method.safetensors"  # where a method that is no peft tuner keeps its tensors


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


class Method:
    """A way of fine-tuning a frozen text model: options in, and a text model in and out.

    Attributes:
        Options: a frozen dataclass of `routevl.options.option` fields.
        refuses: what it cannot work with, a task, a model type of transformers, "gradient_checkpointing", "freeze_layer_norm=no"
            or "prefix=no" -> the reason.
        needs: what batches must have beside text and stored features: "pixels", the images themselves, so that the vision model
            runs (and can be trained) in the training process.
    """

    Options: ClassVar[type] = NoOptions
    refuses: ClassVar[Mapping[str, str]] = {}
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def uses_image(self) -> bool:
        """Whether the method itself reads the image; with neither this nor the visual prefix a run is blind."""
        return False

    @property
    def stand_in(self) -> str | None:
        """The kind of `routevl.visual.Control` that the method reads in the image's place, while the prefix keeps it; or None."""
        return None

    @property
    def routed_tokens(self) -> str | None:
        """Which of an image's tokens the method reads: "all", or their "mean"; None: as the task has it."""
        return None

    @classmethod
    def prepares(cls) -> bool:
        """Whether there is a phase before training: the rule `probe`, whose tensors `build` gets."""
        return cls.prepare is not Method.prepare

    def prepare(self, task: Task, batches: Batches) -> dict[str, Tensor]:
        """Look at the model and the data before training: a probe or a search, which may train what it likes.

        Args:
            task: its model is the bare text model with the task's head, all of it trainable.
            batches: of the first epoch, in the order of training, as an iterable; others by its methods.
        """
        raise NotImplementedError

    def budget(self, text_model: nn.Module) -> float | None:
        """About how many parameters are trained where `prepare` chooses them; None where they are as many whatever it finds."""
        return None

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        """Make the method's model of a frozen text model. The result keeps the text model's forward, generate and config.

        Args:
            prepared: what `prepare` returned; empty where the method has no such phase.
            train_also: names of modules that are trained whole beside the method: the layer norms, unless they stay frozen.
        """
        raise NotImplementedError

    def adapt_vision(self, vision_model: nn.Module) -> nn.Module:
        """As `build`, of a vision model that runs in the training process (needs "pixels")."""
        return vision_model

    def visual_projection(self, text_model: nn.Module, width: int) -> nn.Linear | None:
        """The built model's own trainable projection of the image's tokens, (B, L_v, width) -> (B, L_v, d), which the visual
        prefix reads too where its embeddings are as wide. None: it needs or has none, and the task makes one where d differs.
        """
        return None

    def beside(self, inputs: Mapping[str, Tensor], visual: Tensor | None) -> dict[str, Tensor]:
        """What travels beside a call of the text model, by the names of the streams that its layers declare.

        Args:
            inputs: the call's own arguments: inputs_embeds (B, P + L_t, d), P of them the prefix's, and attention_mask; beside
                them, with a prefix, image_positions (B, P + L_t) bool, true at these; task_id (B,) int64 where the run's task is
                of several; and visual_mask (B, L_v) bool where some of `visual` is not real.
            visual: the tokens of the image, or of its `stand_in`: (B, L_v, d), or as wide as the vision model gives them where
                the built model projects them itself; None where the run is blind, or the image is in a stream of the text model's
                alone.
        """
        return {}

    def losses(self, model: VisionLanguageModel, output: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses by name, each weighted already, that are added to the task's and logged."""
        return {}

    def groups(self, model: VisionLanguageModel, learning_rate: float) -> list[dict[str, Any]]:
        """The optimiser's parameter groups: every trainable parameter of the model once, head and all."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": learning_rate}]

    def after_step(self, trainer: Trainer) -> None:
        """What the method does after each optimiser step, such as moving gates that no gradient reaches."""

    def tensors(self, text_model: nn.Module) -> dict[str, Tensor]:
        """The tensors of the built model that are the method's state: checkpointed, kept of the best epoch, saved, compared."""
        return {name: p.detach() for name, p in text_model.named_parameters() if p.requires_grad}

    def part_of(self, name: str) -> str:
        """Which column of the cost table a trained parameter of the built model belongs to."""
        return "method"

    def save(self, text_model: nn.Module, folder: Path) -> None:
        """Write the method's tensors into a run's folder."""
        save_tensors(self.tensors(text_model), folder / WEIGHTS)

    def load(self, text_model: nn.Module, folder: Path) -> None:
        """Read what `save` wrote. Raises KeyError or a library's error where it is of another model."""
        load_tensors(self.tensors(text_model), folder / WEIGHTS)


def layer_norms(text_model: nn.Module) -> list[str]:
    """The full names of a model's layer norms.

    Raises:
        RoutevlError: there are none.
    """
    names = [name for name, module in text_model.named_modules() if is_layer_norm(module)]
    if not names:
        raise RoutevlError(
            f"{type(text_model).__name__} has no layer norm to train (a class named ...Norm): set freeze_layer_norm"
        )
    return names


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm, RMSNorm or the like: its class is named ...Norm, it has parameters and no parts."""
    return type(module).__name__.endswith("Norm") and not [*module.children()] and bool([*module.parameters()])


def is_causal(text_model: nn.Module) -> bool:
    """Whether a text model has no encoder and predicts each token from those before it."""
    return text_model.can_generate() and not text_model.config.is_encoder_decoder


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(own: Mapping[str, Tensor], path: Path) -> None:
    """Set tensors, in place, to what `save_tensors` wrote. Raises KeyError where the names are others."""
    from safetensors.torch import load_file

    saved = load_file(path)
    if different := sorted(own.keys() ^ saved.keys()):
        raise KeyError(f"{different[0]} is only in one of them")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
