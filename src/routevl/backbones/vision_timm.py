"""Vision models in timm's folders."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from timm.data import create_transform, resolve_model_data_config
from timm.layers import Format
from timm.layers.format import get_channel_dim
from torch import Tensor, nn

from routevl.backbones.spvit.form import load_timm
from routevl.backbones.vision_folder import Layout, Unreadable, VisionFolder, shape_text
from routevl.errors import RoutevlError, first_line


class TimmFolder(VisionFolder):
    """As `timm.models.save_for_hf` makes it, and as timm's models on the Hugging Face hub are; or compressed by SPViT."""

    def load(self) -> nn.Module:
        return self._create(pretrained=True)

    def build(self) -> nn.Module:
        return self._create(pretrained=False)

    def _create(self, pretrained: bool) -> nn.Module:
        try:
            return load_timm(self.folder, pretrained, num_classes=0)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise RoutevlError(f"backbone {self.folder}: timm cannot load it ({first_line(error)})") from None

    def transform(self, model: nn.Module) -> Callable[[Image.Image], Tensor]:
        return create_transform(**resolve_model_data_config(model), is_training=False)

    def output(self, model: nn.Module, pixels: Tensor) -> Any:
        return model.forward_features(pixels)

    def hidden_states(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise Unreadable(f"timm's forward_features gives a {type(output).__name__}, not one tensor")
        return output

    def pooled(self, model: nn.Module, output: Any) -> Tensor:
        """What the model's head reads."""
        return model.forward_head(output, pre_logits=True)

    def layout(self, model: nn.Module, output: Any, pixels: Tensor) -> Layout:
        """By the `output_fmt` of models that have one; the width must be timm's `num_features`, the length that of its stride."""
        hidden_states = self.hidden_states(output)
        usual = {3: Format.NLC, 4: Format.NCHW}.get(hidden_states.dim())
        found = Format(getattr(model, "output_fmt", None) or usual or "NLC")
        if hidden_states.dim() != len(found) or hidden_states.shape[get_channel_dim(found)] != model.num_features:
            stated = f"timm's {found.value} of width {model.num_features}"
            raise Unreadable(f"its features are {shape_text(hidden_states)}, not {stated}")
        if found is not Format.NLC:
            return Layout(found)
        before, stride = getattr(model, "num_prefix_tokens", 0), model.feature_info[-1]["reduction"]
        height, width = (ceil(side / stride) for side in pixels.shape[-2:])
        if hidden_states.shape[1] != before + height * width:
            stated = f"the {before} + {height} x {width} tokens of timm's stride {stride}"
            raise Unreadable(f"its features are {shape_text(hidden_states)}, not {stated}")
        return Layout(found, before)
