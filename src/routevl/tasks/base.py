"""What tasks share: the adapted text model with its visual inputs, and how it is built, saved and loaded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from routevl.errors import RoutevlError
from routevl.methods import METHODS
from routevl.methods.routed import RoutedConfig
from routevl.settings import RunSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from routevl.features import Features

TASK_WEIGHTS = "task.safetensors"  # beside the adapter: the head and the visual projection


class VisionLanguageModel(nn.Module):
    """A text model with an adapter, which sees the image by routing, by a visual prefix, by both or not at all.

    Args:
        text_model: an unmodified Hugging Face model of width d.
        adapter: config of the method.
        visual_width: width of the stored visual features; where it is not d, one trainable linear layer brings them to d,
            for the prefix and for routing alike.
        prefix: put the visual tokens before the text's embeddings.
    """

    def __init__(self, text_model: PreTrainedModel, adapter: RoutedConfig, visual_width: int, prefix: bool) -> None:
        super().__init__()
        self.prefix = prefix
        self.sees_image = prefix or adapter.routing != "none"
        self.width = text_model.config.hidden_size
        needs_projection = self.sees_image and visual_width != self.width
        self.visual_projection = nn.Linear(visual_width, self.width) if needs_projection else nn.Identity()
        self.text_model = get_peft_model(text_model, adapter)

    def text_inputs(self, input_ids: Tensor, attention_mask: Tensor, visual_features: Tensor) -> dict[str, Tensor]:
        """The text model's arguments: embeddings behind the visual prefix, their mask, and the features to route.

        Shapes: input_ids and attention_mask (B, L_t) int64, visual_features (B, L_v, d_v) float32;
        inputs_embeds (B, P + L_t, d) with P = L_v with the prefix, else 0.
        """
        embeddings = self.text_model.get_base_model().get_input_embeddings()(input_ids)
        if not self.sees_image:
            return {"inputs_embeds": embeddings, "attention_mask": attention_mask}
        visual = self.visual_projection(visual_features)  # (B, L_v, d)
        if self.prefix:
            embeddings = torch.cat([visual.to(embeddings.dtype), embeddings], dim=1)
            attention_mask = torch.cat([attention_mask.new_ones(visual.shape[:2]), attention_mask], dim=1)
        return {"inputs_embeds": embeddings, "attention_mask": attention_mask, "visual_features": visual}

    def task_weights(self) -> dict[str, Tensor]:
        """The trained tensors that are not the adapter's: head and visual projection."""
        return {k: v.detach().contiguous() for k, v in self.state_dict().items() if not k.startswith("text_model.")}

    def save(self, folder: Path) -> None:
        """Write a peft adapter folder, which loads on the unmodified text model too, with the task's weights beside it."""
        self.text_model.save_pretrained(folder)
        save_file(self.task_weights(), folder / TASK_WEIGHTS)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises RoutevlError when it was made for another model or is damaged."""
        try:
            result = set_peft_model_state_dict(self.text_model, load_file(folder / "adapter_model.safetensors"))
            self.load_state_dict({**self._without_task_weights(), **load_file(folder / TASK_WEIGHTS)})
        except FileNotFoundError as error:
            raise RoutevlError(f"{folder}: not a trained run ({error})") from error
        except Exception as error:  # safetensors' and torch's own kinds, all meaning the same here
            raise RoutevlError(f"{folder}: an adapter of another model, or damaged ({str(error).splitlines()[0]})") from error
        if result.unexpected_keys:
            raise RoutevlError(f"{folder}: an adapter of another model: it has {result.unexpected_keys[0]}, which this one lacks")

    def _without_task_weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if k.startswith("text_model.")}

    def trainable_params_by_part(self) -> dict[str, int]:
        """How many trainable parameters each part has: bottleneck, layer_norm, head, visual_projection."""
        counts = {"bottleneck": 0, "layer_norm": 0, "head": 0, "visual_projection": 0}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.split(".")[0]
                if part == "text_model":
                    part = "layer_norm" if ".modules_to_save." in name else "bottleneck"
                counts[part] += parameter.numel()
        return counts


def adapter_config(settings: RunSettings, text_model: nn.Module) -> RoutedConfig:
    """The peft config of a run: the method's default target modules, and the layer norms trained unless frozen."""
    if settings.method not in METHODS:
        raise RoutevlError(f"method {settings.method!r} is not a method: choose one of {', '.join(METHODS)}")
    layer_norms = {name.split(".")[-1] for name, module in text_model.named_modules() if isinstance(module, nn.LayerNorm)}
    options: dict[str, Any] = {"lora_alpha": settings.alpha} if settings.method == "lora" else {}
    return METHODS[settings.method](
        r=settings.rank,
        routing=settings.routing,
        visual_scale=settings.visual_scale,
        modules_to_save=None if settings.freeze_layer_norm else sorted(layer_norms),
        **options,
    )


class Task(ABC):
    """A task on prepared data: its examples, batches, model, validation and predictions.

    Attributes:
        text_task: which kind of text backbone it needs (see routevl.backbones.load_text_backbone).
        files: what it reads of each prepared split, beside the list of images.
        selection: the validation metric that chooses the best epoch, and whether more of it is better.
        text_model_params: how many parameters the text backbone has.
    """

    text_task: str
    files: tuple[str, ...]
    selection: tuple[str, bool]

    def __init__(
        self,
        settings: RunSettings,
        text_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        features: Features,
        data: Path,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.features = features
        self.data = data
        self._check_lengths(text_model)
        if settings.gradient_checkpointing:
            text_model.activation_checkpointing_enable()
        self.text_model_params = sum(parameter.numel() for parameter in text_model.parameters())
        self.model = self.build(text_model, adapter_config(settings, text_model))

    def longest_text(self) -> tuple[str, int]:
        """The setting that bounds the text's length, and this bound in tokens."""
        return "max_text_tokens", self.settings.max_text_tokens

    def _check_lengths(self, text_model: PreTrainedModel) -> None:
        """Raise RoutevlError where the longest text, behind its visual prefix, has more tokens than the model has positions."""
        positions = min(self.tokenizer.model_max_length, getattr(text_model.config, "max_position_embeddings", math.inf))
        name, length = self.longest_text()
        visual = self.features.length if self.settings.prefix else 0
        if length + visual > positions:
            raise RoutevlError(
                f"{name} {getattr(self.settings, name)} is too large: {length} text tokens after {visual} visual tokens, but the "
                f"text backbone has {positions} positions"
            )

    @abstractmethod
    def build(self, text_model: PreTrainedModel, adapter: RoutedConfig) -> VisionLanguageModel:
        """The model to train; its forward pass takes a batch of `collate` and returns {"loss": scalar,
        "count": scalar, over how many terms the loss is a mean, ...}."""

    def inputs(self) -> dict[str, str]:
        """Name -> sha256 (hexadecimal) of what else the model's weights belong to, beside the backbones."""
        return {}

    @abstractmethod
    def examples(self, split: str) -> Dataset:
        """The examples of a split, tokenised, in a fixed order. Raises RoutevlError when the split has none."""

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

    def text_batch(self, token_ids: list[list[int]]) -> dict[str, Tensor]:
        """Token ids of B texts -> input_ids and attention_mask (B, L), int64, padded on the right."""
        padding = self.tokenizer.pad_token_id
        if padding is None:  # GPT-2 has no padding token; the mask hides whatever stands there
            padding = self.tokenizer.eos_token_id
        rows = [torch.tensor(ids) for ids in token_ids]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {
            "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding),
            "attention_mask": mask,
        }
