"""What tasks share: the adapted text model with its visual inputs, and how it is built, saved and loaded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from routevl.backbones.co_attention import has_image_stream
from routevl.errors import RoutevlError
from routevl.files import write_json
from routevl.methods.base import Method, layer_norms, load_tensors, save_tensors
from routevl.settings import RunSettings
from routevl.visual import Control, VisualSource

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH = "length"  # column of a training example: its tokens
TASK_WEIGHTS = "task.safetensors"  # beside the method's: the head, the visual projection, a vision model's trained tensors


class VisionLanguageModel(nn.Module):
    """A text model fine-tuned by a method, which sees the image by the method, by a visual prefix, by both or not at all.

    A model that has a stream of its own for an image's tokens (`routevl.backbones.co_attention`) reads them there, as the vision
    model gives them, in the prefix's place.

    Attributes:
        routed_tokens: which of an image's tokens a method reads that does not say so itself, "all" or their "mean".

    Args:
        text_model: an unmodified Hugging Face model of width d.
        method: what makes the model to train of it.
        prepared: what the method's phase before training found.
        train_also: names of modules that are trained beside the method.
        visual: where the image comes from; where its width is not d, one trainable linear layer brings it to d, for the prefix
            and for the method alike: the method's own where it has one, so that its adapter can be used without this class. Where
            the text model's embeddings have another width d_e than its hidden states, the prefix has a layer of its own.
        prefix: put the visual tokens before the text's embeddings, or into the image's stream.

    Raises:
        RoutevlError: `prepared` is of another text model; the visual tokens have not the width of the image's stream.
    """

    routed_tokens = "all"

    def __init__(
        self,
        text_model: PreTrainedModel,
        method: Method,
        prepared: Mapping[str, Tensor],
        train_also: list[str],
        visual: VisualSource,
        prefix: bool,
    ) -> None:
        super().__init__()
        self.method = method
        self.two_streams = has_image_stream(text_model)
        self.image_stream, self.prefix = prefix and self.two_streams, prefix and not self.two_streams
        if self.image_stream and text_model.config.image_width != visual.width:
            raise RoutevlError(
                f"the text backbone's image stream reads tokens of width {text_model.config.image_width}, and the vision "
                f"backbone gives {visual.width}: derive it with this vision backbone (backbones.text.<name>.derive.with)"
            )
        self.read_beside = self.prefix or method.uses_image  # not, or not only, in a stream of its own
        self.sees_image = self.read_beside or self.image_stream
        self.width = text_model.config.hidden_size
        self.vision = visual.encoder
        try:
            self.text_model = method.build(text_model, prepared, train_also)
        except KeyError as error:
            if not prepared:
                raise
            raise RoutevlError(f"--prepared was found for another text model: it has no {error}") from error
        self.add_projections(visual.width)  # drawn after the method, so that baselines and routed twins start alike

    def add_projections(self, visual_width: int) -> None:
        """Make the layers that bring visual tokens (B, L_v, visual_width) to the widths of the method and of the prefix."""
        own = self.method.visual_projection(self.text_model, visual_width) if self.method.uses_image else None
        embedding_width = self.text_model.get_input_embeddings().weight.shape[1]
        width = self.width if self.method.uses_image else embedding_width
        self.method_projects = own is not None
        self.visual_projection = own or _linear(visual_width, width if self.read_beside else visual_width)
        shared = (own.out_features if own else width) == embedding_width
        self.prefix_projection = None if shared or not self.prefix else _linear(visual_width, embedding_width)

    def read_by_method(self, visual: Tensor, visual_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the method reads of the image's tokens (B, L_v, d): all of them, with the mask of `text_inputs`, or their mean
        (B, 1, d)."""
        if not self.method.uses_image or (self.method.routed_tokens or self.routed_tokens) == "all":
            return visual, visual_mask
        if visual_mask is None:
            return visual.mean(dim=1, keepdim=True), None
        weights = visual_mask / visual_mask.sum(dim=1, keepdim=True)  # (B, L_v)
        return weights[:, None].to(visual.dtype) @ visual, None

    def text_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor,
        routed_image: Tensor | None = None,
        task_id: Tensor | None = None,
        visual_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The text model's arguments: embeddings behind the visual prefix, their mask, and what travels beside the call.

        Shapes: input_ids and attention_mask (B, L_t) int64; image as the visual source gives it, features (B, L_v, d_v) or pixels
        (B, 3, H, W), float32; routed_image as image, where the method has a `stand_in`, which it reads instead; inputs_embeds
        (B, P + L_t, d_e) with P = L_v with the prefix, else 0; task_id (B,) int64, for methods that have tensors of each task;
        visual_mask (B, L_v) int64, 0 where a batch that mixes one image and two has none, left out where all have as many. With
        an image stream image_embeds (B, L_v, d_v) are among them, and there is no prefix.
        """
        embeddings = self.text_model.get_input_embeddings()(input_ids)
        visual = self.vision(image) if self.sees_image else None  # (B, L_v, d_v)
        stream = {"image_embeds": visual} if self.image_stream else {}
        if not self.read_beside:
            visual = None
        if visual is not None:
            tokens = None if self.prefix_projection is None else self.prefix_projection(visual)  # (B, L_v, d_e)
            if not self.method_projects or (self.prefix and tokens is None):
                projected = self.visual_projection(visual)  # (B, L_v, d)
                tokens = projected if tokens is None else tokens
                visual = visual if self.method_projects else projected
            if self.prefix:
                embeddings = torch.cat([tokens.to(embeddings.dtype), embeddings], dim=1)
                there = attention_mask.new_ones(tokens.shape[:2]) if visual_mask is None else visual_mask
                attention_mask = torch.cat([there, attention_mask], dim=1)
            if self.method.stand_in is not None:
                routed = self.vision(routed_image)  # (B, L_v, d_v)
                visual = routed if self.method_projects else self.visual_projection(routed)
        inputs = {"inputs_embeds": embeddings, "attention_mask": attention_mask, **stream}
        known = inputs if task_id is None else inputs | {"task_id": task_id}
        if self.prefix or self.two_streams:
            text = torch.zeros_like(input_ids, dtype=torch.bool)
            known = known | {"image_positions": nn.functional.pad(text, (embeddings.shape[1] - text.shape[1], 0), value=True)}
        if visual is not None:
            visual, mask = self.read_by_method(visual, visual_mask)
            known = known if mask is None else known | {"visual_mask": mask.bool()}
        return inputs | self.method.beside(known, visual)

    def tensors(self) -> dict[str, Tensor]:
        """The state of the model: the method's tensors and the task's, detached, by their names in the model."""
        of_method = {f"text_model.{name}": tensor for name, tensor in self.method.tensors(self.text_model).items()}
        return of_method | self.task_weights()

    def task_weights(self) -> dict[str, Tensor]:
        """The trained tensors that are not the method's in the text model: head, visual projection, vision model."""
        named = self.named_parameters()
        return {n: p.detach() for n, p in named if p.requires_grad and not n.startswith("text_model.")}

    def save(self, folder: Path) -> None:
        """Write the method's tensors, of a peft tuner as an ordinary adapter folder, with the task's weights beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.method.save(self.text_model, folder)
        save_tensors(self.task_weights(), folder / TASK_WEIGHTS)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises RoutevlError when it was made for another model or is damaged."""
        try:
            self.method.load(self.text_model, folder)
            load_tensors(self.task_weights(), folder / TASK_WEIGHTS)
        except FileNotFoundError as error:
            raise RoutevlError(f"{folder}: not a trained run ({error})") from error
        except Exception as error:  # safetensors', torch's and peft's own kinds, all meaning the same here
            reason = str(error).strip("'\"").splitlines()[0]
            raise RoutevlError(f"{folder}: an adapter of another model, or damaged ({reason})") from error

    def trainable_params_by_part(self) -> dict[str, int]:
        """How many trainable parameters each part has: method, layer_norm, head, visual_projection, vision, or another name
        that the method gives."""
        counts = {"method": 0, "layer_norm": 0, "head": 0, "visual_projection": 0}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part, _, rest = name.partition(".")
                if part == "text_model":
                    part = self.method.part_of(rest)
                elif part == "prefix_projection":
                    part = "visual_projection"
                counts[part] = counts.get(part, 0) + parameter.numel()
        return counts


def _linear(width: int, width_out: int) -> nn.Module:
    """A linear layer where the widths differ."""
    return nn.Identity() if width == width_out else nn.Linear(width, width_out)


class Task(ABC):
    """A task on prepared data: its examples, batches, model, validation and predictions.

    Attributes:
        files: what it reads of each prepared split, beside the list of images.
        selection: the validation metric that chooses the best epoch, and whether more of it is better.
        image_takes_positions: whether the tokens of a prefix are counted among the text model's positions.
        vocabulary: other files that training depends on, beside those of the splits and `inputs`.
        text_model_params: how many parameters the text backbone has.
    """

    files: tuple[str, ...]
    selection: tuple[str, bool]
    image_takes_positions = True
    vocabulary: tuple[Path, ...] = ()

    def __init__(
        self,
        settings: RunSettings,
        method: Method,
        prepared: Mapping[str, Tensor],
        text_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        visual: VisualSource,
        data: Path,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.visual = visual
        self.routed = Control(visual, method.stand_in, settings.seed) if method.stand_in else None
        self.data = data
        self._check_lengths(text_model)
        self.extend(text_model)
        if settings.gradient_checkpointing:
            text_model.gradient_checkpointing_enable()  # its name in every release; 5.23 has a newer one too
        self.text_model_params = sum(parameter.numel() for parameter in text_model.parameters())
        train_also = [] if settings.freeze_layer_norm else layer_norms(text_model)
        self.model = self.build(text_model, method, prepared, train_also, visual, settings.prefix)

    @staticmethod  # noqa: B027 (most tasks need nothing)
    def extend(text_model: PreTrainedModel) -> None:
        """Give the text model what the task needs beside its own tensors, frozen and the same in every run."""

    def longest_text(self) -> tuple[str, int]:
        """The setting that bounds the text's length, and this bound in tokens."""
        return "max_text_tokens", self.settings.max_text_tokens

    def _check_lengths(self, text_model: PreTrainedModel) -> None:
        """Raise RoutevlError where the longest text, behind its visual prefix, has more tokens than the model has positions."""
        own = getattr(text_model.config, "max_position_embeddings", None) or math.inf
        positions = min(self.tokenizer.model_max_length, own if own > 0 else math.inf)  # XLNet's is -1
        name, length = self.longest_text()
        before = self.settings.prefix and self.image_takes_positions and not has_image_stream(text_model)
        visual = self.visual.length if before else 0
        if length + visual > positions:
            raise RoutevlError(
                f"{name} {getattr(self.settings, name)} is too large: {length} text tokens after {visual} visual tokens, but the "
                f"text backbone has {positions} positions"
            )

    @abstractmethod
    def build(self, text_model: PreTrainedModel, *arguments: Any) -> VisionLanguageModel:
        """The model to train, of the text model and the other arguments of VisionLanguageModel; its forward pass takes a batch of
        `collate` and returns {"loss": scalar, "count": scalar, over how many terms the loss is a mean, ...}."""

    def inputs(self) -> dict[str, str]:
        """Name -> sha256 (hexadecimal) of what else the model's weights belong to, beside the backbones."""
        return {}

    @abstractmethod
    def examples(self, split: str) -> Dataset:
        """The examples of a split in a fixed order, with their "image_id" and LENGTH. Raises RoutevlError when there are none."""

    def training_examples(self) -> Dataset:
        """The examples of the training split, of which `max_train_examples` keeps the first."""
        examples = self.examples("train")
        most = self.settings.max_train_examples
        return examples if most is None or most >= len(examples) else examples.select(range(most))

    def parts(self, examples: Dataset) -> list[tuple[numpy.ndarray, int]]:
        """The parts of n training examples that have batches of their own: which examples, int64 (m,), and the batch size."""
        return [(numpy.arange(len(examples)), self.settings.batch_size)]

    def of_epoch(self, examples: Dataset, epoch: int) -> Dataset:
        """The training examples as an epoch learns them."""
        return examples

    def image_ids(self, items: Dataset) -> Sequence[int]:
        """The images of examples, or of items to predict."""
        return items.unique("image_id")

    @abstractmethod
    def constant(self, examples: Dataset) -> float:
        """The value of `selection` that the best answer, or distribution of tokens, that knows neither text nor image has."""

    @abstractmethod
    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Examples -> a batch of tensors, padded on the right; items to predict have their "ids" (B,) in it."""

    @abstractmethod
    def validate(self, outputs: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """The validation metrics from the model's outputs on all batches, each {name: (B, ...)}."""

    @abstractmethod
    def to_predict(self, split: str) -> Dataset:
        """The items of a split that want a prediction."""

    @abstractmethod
    def predict(self, model: VisionLanguageModel, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Predictions for one batch of `to_predict`'s items, as entries of the official results file."""

    def write_predictions(self, predictions: list[dict[str, Any]], folder: Path) -> None:
        """Write what `predict` gave for all items: results.json."""
        write_json(folder / "results.json", predictions)

    def images(self, image_ids: Sequence[int]) -> dict[str, Tensor]:
        """What a batch carries of its n images: "image", and "routed_image" where the method reads something in its place."""
        image = {"image": self.visual.of(image_ids)}
        return image if self.routed is None else image | {"routed_image": self.routed.of(image_ids)}

    def text_batch(self, token_ids: list[list[int]]) -> dict[str, Tensor]:
        """Token ids of B texts -> input_ids and attention_mask (B, L), int64, padded on the right."""
        padding = self.tokenizer.pad_token_id
        if padding is None:  # GPT-2 has no padding token; the mask hides whatever stands there
            padding = self.tokenizer.eos_token_id
        longest = max(map(len, token_ids))
        return {
            "input_ids": torch.tensor([ids + [padding] * (longest - len(ids)) for ids in token_ids]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in token_ids]),
        }
