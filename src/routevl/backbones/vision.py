"""Loading frozen vision models from timm or transformers folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
from PIL import Image
from safetensors import SafetensorError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoImageProcessor, CLIPConfig, CLIPVisionModel, PretrainedConfig, PreTrainedModel

from routevl.backbones.folder import check_folder, fingerprint_of
from routevl.backbones.from_transformers import (
    check_complete,
    first_line,
    load_transformers,
    of_the_folder,
    transformers_config,
)
from routevl.errors import RoutevlError
from routevl.files import read_json


@dataclass
class VisionBackbone:
    """A frozen vision model with its own preprocessing, the same in training and inference.

    Attributes:
        model: the torch module, float32, in evaluation mode, without gradients.
        width: d, the width of both kinds of tokens.
        fingerprint: sha256 of the weights, config and preprocessing (`fingerprint_of`).
        transform: an upright RGB image, as `routevl.features.images` reads it -> float32 (3, H, W), resized, cropped, normalised.
        tokens_of: the model and pixels -> what `encode` returns.
    """

    model: nn.Module
    width: int
    fingerprint: str
    transform: Callable[[Image.Image], Tensor]
    tokens_of: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) -> pooled (B, d) and patches (B, L, d).

        The pooled token is the model's own: transformers' `pooler_output` (ViT: dense + tanh on [CLS], the
        paper's choice) where its weights are there, else the normalised [CLS]; for timm what its head reads.
        """
        return self.tokens_of(self.model, pixels)


def load_vision_backbone(path: str | Path) -> VisionBackbone:
    """Load a vision model from a timm or transformers folder.

    Raises:
        RoutevlError: as `check_folder`; the folder cannot be read, lacks weights, or is not an image encoder.
    """
    folder = check_folder(path)
    load = _load_timm if "architecture" in read_json(folder / "config.json") else _load_transformers_vision
    return load(folder, fingerprint_of(folder))


def _load_timm(folder: Path, fingerprint: str) -> VisionBackbone:
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise RoutevlError(f"backbone {folder}: timm cannot load it ({first_line(error)})") from None
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    frozen = model.float().eval().requires_grad_(False)
    return VisionBackbone(frozen, model.num_features, fingerprint, transform, _timm_tokens)


def _timm_tokens(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    hidden_states = model.forward_features(pixels)
    pooled = model.forward_head(hidden_states, pre_logits=True)
    if hidden_states.dim() == 4:  # a convolutional feature map (B, d, H, W)
        return pooled, hidden_states.flatten(2).transpose(1, 2)
    return pooled, hidden_states[:, model.num_prefix_tokens :]


def _load_transformers_vision(folder: Path, fingerprint: str) -> VisionBackbone:
    model_class, config = _vision_model_class(transformers_config(folder), folder)
    model, missing = load_transformers(model_class, folder)
    if missing and all(name.startswith("pooler.") for name in missing):
        model, missing = load_transformers(model_class, folder, add_pooling_layer=False)
    check_complete(folder, model_class, missing)
    processor = of_the_folder(AutoImageProcessor, folder, "preprocessor_config.json")

    def transform(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    return VisionBackbone(model, config.hidden_size, fingerprint, transform, _transformers_tokens)


def _vision_model_class(config: PretrainedConfig, folder: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    if isinstance(config, CLIPConfig):
        return CLIPVisionModel, config.vision_config
    model_class = MODEL_MAPPING.get(type(config), None)
    if getattr(model_class, "main_input_name", None) != "pixel_values" or not hasattr(config, "patch_size"):
        raise RoutevlError(f"backbone {folder}: a {config.model_type} model, not a vision transformer")
    return model_class, config


def _transformers_tokens(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    output = model(pixel_values=pixels)
    hidden_states = output.last_hidden_state
    height, width = pixels.shape[-2:]
    patches = (height // model.config.patch_size) * (width // model.config.patch_size)
    pooled = output.pooler_output if output.pooler_output is not None else hidden_states[:, 0]
    return pooled, hidden_states[:, hidden_states.shape[1] - patches :]
