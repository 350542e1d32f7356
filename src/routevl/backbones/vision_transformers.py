"""Vision models in transformers' folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.layers import Format
from timm.layers.format import get_channel_dim, get_spatial_dim
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoImageProcessor, PretrainedConfig, PreTrainedModel, ViTMAEConfig, ViTModel

from routevl.backbones.from_transformers import (
    check_complete,
    load_transformers,
    of_the_folder,
    transformers_config,
)
from routevl.backbones.vision_folder import Layout, Unreadable, VisionFolder, shape_text
from routevl.errors import RoutevlError, first_line

# Parameters of a model's `embeddings`, each of one or more tokens that stand in front of the patches; the first two make
# class tokens.
CLASS_TOKENS = ("cls_token", "class_embedding")
TOKENS_BEFORE_PATCHES = (*CLASS_TOKENS, "distillation_token", "register_tokens")


class TransformersFolder(VisionFolder):
    """As `save_pretrained` makes it; of CLIP and its like, which have a text model beside it, the vision model is taken."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model_class = _vision_model_class(transformers_config(folder), folder)
        self.options: dict[str, Any] = {}

    def load(self) -> nn.Module:
        model, missing = load_transformers(self.model_class, self.folder)
        if missing and all(name.startswith("pooler.") for name in missing):
            self.options = {"add_pooling_layer": False}
            model, missing = load_transformers(self.model_class, self.folder, **self.options)
        check_complete(self.folder, self.model_class, missing)
        return model

    def build(self) -> nn.Module:
        try:
            return self.model_class(self.model_class.config_class.from_pretrained(self.folder), **self.options)
        except Exception as error:  # a model's code may do anything with its configuration
            raise RoutevlError(f"backbone {self.folder}: cannot be built ({first_line(error)})") from None

    def transform(self, model: nn.Module) -> Callable[[Image.Image], Tensor]:
        processor = of_the_folder(AutoImageProcessor, self.folder, "preprocessor_config.json")

        def transform(image: Image.Image) -> Tensor:
            return processor(images=image, return_tensors="pt")["pixel_values"][0]

        return transform

    def output(self, model: nn.Module, pixels: Tensor) -> Any:
        return model(pixel_values=pixels)

    def hidden_states(self, output: Any) -> Tensor:
        if not isinstance(found := getattr(output, "last_hidden_state", None), Tensor):
            raise Unreadable("its output has no last_hidden_state")
        return found

    def pooled(self, model: nn.Module, output: Any) -> Tensor:
        """`pooler_output` (ViT: dense + tanh on [CLS], the paper's choice), else the normalised [CLS]."""
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled[..., 0, 0] if pooled.shape[2:] == (1, 1) else pooled  # convolutional models keep the map's two axes
        if not _tokens_before_patches(model, CLASS_TOKENS):
            raise Unreadable("it has no pooler_output, and its embeddings no class token")
        return self.hidden_states(output)[:, 0]

    def layout(self, model: nn.Module, output: Any, pixels: Tensor) -> Layout:
        """Of a map by the axis that has the model's width; of a sequence by the number of patches that the model says it has."""
        hidden_states = self.hidden_states(output)
        widths = _widths(model.config, output)
        if hidden_states.dim() == 4:
            return Layout(_format_of_map(hidden_states, widths))
        before = _tokens_before_patches(model, TOKENS_BEFORE_PATCHES)
        patches = [rows * columns for rows, columns in self._grids(model, pixels, widths)]
        if hidden_states.dim() != 3 or hidden_states.shape[2] not in widths or hidden_states.shape[1] - before not in patches:
            stated = f"{before} + {_alternatives(patches)} tokens of width {_alternatives(widths)}"
            raise Unreadable(f"its last_hidden_state is {shape_text(hidden_states)}, not {stated}")
        return Layout(Format.NLC, before)

    def _grids(self, model: nn.Module, pixels: Tensor, widths: set[int]) -> Iterator[tuple[int, int]]:
        """The rows and columns of patches: as a plain vision transformer cuts the image, and as a hierarchical one ends."""
        if size := getattr(model.config, "patch_size", None):
            sides = (size, size) if isinstance(size, int) else size
            yield tuple(pixel // side for pixel, side in zip(pixels.shape[-2:], sides, strict=True))
        # Hiera's tokens stand row by row only where each stage but the last has pooled.
        unordered = getattr(model.config, "num_query_pool", None) not in (None, len(getattr(model.config, "depths", ())) - 1)
        if not unordered and not _tokens_before_patches(model, TOKENS_BEFORE_PATCHES):
            maps = getattr(model(pixel_values=pixels, output_hidden_states=True), "reshaped_hidden_states", None)
            if maps is not None:
                yield tuple(maps[-1].shape[axis] for axis in get_spatial_dim(_format_of_map(maps[-1], widths)))


def _vision_model_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """Raises RoutevlError where it is no image encoder, or one whose library is missing."""
    if isinstance(config, ViTMAEConfig):
        return ViTModel  # the same weights; ViTMAEModel drops three quarters of the patches and shuffles the others
    model_class = MODEL_MAPPING.get(type(getattr(config, "vision_config", config)), None)
    try:
        takes = getattr(model_class, "main_input_name", None)
    except ImportError as error:
        raise RoutevlError(f"backbone {folder}: {first_line(error)}") from None
    if takes != "pixel_values":
        raise RoutevlError(f"backbone {folder}: a {config.model_type} model, not an image encoder")
    return model_class


def _tokens_before_patches(model: nn.Module, names: Sequence[str]) -> int:
    """How many tokens these parameters of a model's `embeddings` make."""
    ends = tuple(f".embeddings.{name}" for name in names)
    found = [parameter for name, parameter in model.named_parameters() if f".{name}".endswith(ends)]
    return sum(parameter.numel() // parameter.shape[-1] for parameter in found)


def _widths(config: PretrainedConfig, output: Any) -> set[int]:
    """The widths that a model says its last hidden states have: its configuration's, and that of what it pools them to."""
    stated = [getattr(config, name, None) for name in ("hidden_size", "hidden_sizes", "embed_dims", "embed_dim")]
    widths = {stated[0], *(sizes[-1] for sizes in stated[1:] if isinstance(sizes, Sequence))}
    if isinstance(pooled := getattr(output, "pooler_output", None), Tensor):
        widths.add(pooled.shape[1])
    return widths - {None}


def _format_of_map(tensor: Tensor, widths: set[int]) -> Format:
    found = [of for of in (Format.NCHW, Format.NHWC) if tensor.shape[get_channel_dim(of)] in widths]
    if len(found) != 1:
        raise Unreadable(
            f"its hidden states are {shape_text(tensor)}, where one axis should have the width {_alternatives(widths)}"
        )
    return found[0]


def _alternatives(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers))) or "?"
