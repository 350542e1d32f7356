"""Loading the frozen backbones: text models from transformers, vision models from timm or transformers.

A backbone is a folder in its library's own format. The stage `fetch-backbone` makes one of a model of the Hugging Face hub,
pinned by a revision. Only safetensors weights are read, never pickles.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.files import atomic_folder, read_json, sha256_of, write_json

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHA256 = re.compile(r"[0-9a-f]{64}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FILES_OF_A_BACKBONE = ["*.json", "*.txt", "*.safetensors"]
# Only what decides the features: a tokenizer or a model card beside the weights does not.
FILES_OF_A_FINGERPRINT = ["*.safetensors", "config.json", "preprocessor_config.json"]


def check_folder(path: str | Path) -> Path:
    """The folder of a backbone.

    Raises:
        RoutevlError: no such folder; no config.json or no safetensors weights in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RoutevlError(f"backbone {path}: no such folder (routevl fetch-backbone makes one of a Hugging Face hub model)")
    if not (folder / "config.json").is_file():
        raise RoutevlError(f"backbone {path}: no config.json, so it is not a model folder")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f" (found {', '.join(pickles)}; pickled weights are not loaded, convert them)" if pickles else ""
        raise RoutevlError(f"backbone {path}: no *.safetensors weights{found}")
    return folder


def fingerprint_of(folder: str | Path) -> str:
    """sha256 (hexadecimal) over the names and contents of a backbone's weights, config and preprocessing."""
    digest = hashlib.sha256()
    files = {file for pattern in FILES_OF_A_FINGERPRINT for file in Path(folder).glob(pattern)}
    for file in sorted(files):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


# ----------------------------------------------------------------------------- stage `fetch-backbone`


def add_arguments_fetch_backbone(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl fetch-backbone`."""
    parser.add_argument("--hub-id", required=True, metavar="OWNER/NAME", help="a model of the Hugging Face hub")
    parser.add_argument("--revision", required=True, help="commit, tag or branch")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where its files go")


def run_fetch_backbone(arguments: argparse.Namespace) -> None:
    """Put a hub model's files into a folder, from the local cache (HF_HOME) where it has them, else from the hub.

    The folder also gets source.json: the hub id, the commit that the revision stands for, and the sha256 of every file.

    Raises:
        RoutevlError: not a hub id; not on the hub; not in the local cache when offline; no config.json or no safetensors weights;
            or a file that is not what the hub published.
    """
    snapshot = check_folder(_hub_snapshot(arguments.hub_id, arguments.revision))
    with atomic_folder(arguments.output) as folder:
        hashes = {}
        for file in sorted(snapshot.iterdir()):
            hashes[file.name] = sha256_of(shutil.copyfile(file, folder / file.name))
            published = file.resolve().name  # the cache names large files by the sha256 that the hub gives
            if SHA256.fullmatch(published) and published != hashes[file.name]:
                raise RoutevlError(f"{file}: its sha256 is {hashes[file.name]}, not the published {published}; delete it")
        write_json(folder / "source.json", {"hub_id": arguments.hub_id, "commit": snapshot.name, "sha256": hashes})


def _hub_snapshot(hub_id: str, revision: str) -> Path:
    """The folder of a hub model's files in the local cache, downloaded where they are not there."""
    if not HUB_ID.fullmatch(hub_id):
        raise RoutevlError(f"backbone {hub_id}: no such folder, and not a Hugging Face hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=FILES_OF_A_BACKBONE, ignore_patterns=["*/*"]))
    except RevisionNotFoundError:
        raise RoutevlError(f"backbone {hub_id}: the Hugging Face hub has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise RoutevlError(f"backbone {hub_id}: no such folder, and not a (public) model on the Hugging Face hub") from None
    except LocalEntryNotFoundError:
        raise RoutevlError(
            f"backbone {hub_id} at revision {revision}: no such folder, and the Hugging Face hub cannot be reached and "
            "the local cache does not hold it; download it on a machine with internet and set the backbone's "
            "path to that folder, or HF_HOME to a cache that holds it"
        ) from None
    except OSError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise RoutevlError(f"backbone {hub_id} at revision {revision}: not downloaded ({first_line})") from None


# ---------------------------------------------------------------------------------------------- text


def load_text_backbone(path: str | Path, task: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text model in float32, in evaluation mode and frozen, with its tokenizer.

    Args:
        path: its folder.
        task: "vqa" loads a bidirectional encoder without pooling layer (RoBERTa ships no weights for it);
            "caption" loads a causal language model.
    Raises:
        RoutevlError: as `check_folder`; the folder cannot be read, lacks weights, or is the wrong kind of model.
    """
    from transformers import AutoTokenizer

    if task not in ("vqa", "caption"):
        raise RoutevlError(f"task {task!r}: expected vqa or caption")
    folder = check_folder(path)
    config = _transformers_config(folder, path)
    _check_kind(config, task, path)
    model_class = _text_model_class(config, task)
    options = {"add_pooling_layer": False} if _has_pooling_option(model_class) else {}
    model, missing = _load_transformers(model_class, folder, path, **options)
    if missing:
        raise RoutevlError(f"backbone {path}: its weights lack {_listed(missing)} of {model_class.__name__}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RoutevlError(f"backbone {path}: no readable tokenizer ({_first_line(error)})") from None
    return model, tokenizer


def _check_kind(config: PretrainedConfig, task: str, path: str | Path) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    single_stack = not config.is_encoder_decoder
    # RoBERTa also has a causal class: what counts is whether its configuration makes it a decoder.
    encoder = single_stack and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    decoder = single_stack and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder
    if task == "vqa" and not encoder:
        raise RoutevlError(
            f"backbone {path}: a {config.model_type} model; vqa needs a bidirectional text encoder such as roberta"
        )
    if task == "caption" and not decoder:
        raise RoutevlError(f"backbone {path}: a {config.model_type} model; caption needs a causal language model such as gpt2")


def _text_model_class(config: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    mapping = MODEL_MAPPING if task == "vqa" else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping[type(config)]


def _has_pooling_option(model_class: type[PreTrainedModel]) -> bool:
    import inspect

    return "add_pooling_layer" in inspect.signature(model_class.__init__).parameters


def _transformers_config(folder: Path, path: str | Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RoutevlError(f"backbone {path}: config.json is not of a transformers model ({_first_line(error)})") from None


def _load_transformers(
    model_class: type[PreTrainedModel], folder: Path, path: str | Path, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The frozen model, and the names of its parameters that the folder has no weights for."""
    import torch
    from safetensors import SafetensorError

    try:
        model, loading = model_class.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RoutevlError(f"backbone {path}: cannot be loaded ({_first_line(error)})") from None
    return model.eval().requires_grad_(False), sorted(loading["missing_keys"])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -------------------------------------------------------------------------------------------- vision


class VisionBackbone:
    """A frozen vision model with its own preprocessing, the same in training and inference.

    Attributes:
        model: the torch module, float32, in evaluation mode, without gradients.
        width: d, the width of both kinds of tokens.
        fingerprint: sha256 of the weights, config and preprocessing (`fingerprint_of`).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: Callable[[Image], torch.Tensor],
        encode: Callable[[torch.nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        width: int,
        fingerprint: str,
    ) -> None:
        self.model = model
        self.width = width
        self.fingerprint = fingerprint
        self._preprocess = preprocess
        self._encode = encode

    def transform(self, image: Image) -> torch.Tensor:
        """A PIL image of any size and mode -> float32 (3, H, W), resized, cropped and normalised."""
        return self._preprocess(to_rgb(image))

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, 3, H, W) -> pooled (B, d) and patches (B, L, d).

        The pooled token is the model's own: transformers' `pooler_output` (ViT: dense + tanh on [CLS], the
        paper's choice) where its weights are there, else the normalised [CLS]; for timm what its head reads.
        """
        return self._encode(self.model, pixels)


def load_vision_backbone(path: str | Path) -> VisionBackbone:
    """Load a vision model from a timm or transformers folder.

    Raises:
        RoutevlError: as `check_folder`; the folder cannot be read, lacks weights, or is not an image encoder.
    """
    folder = check_folder(path)
    load = _load_timm if "architecture" in _config_object(folder) else _load_transformers_vision
    model, preprocess, encode, width = load(folder, path)
    return VisionBackbone(model, preprocess, encode, width, fingerprint_of(folder))


def _config_object(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise RoutevlError(f"{folder / 'config.json'}: expected a JSON object")
    return config


def _load_timm(folder: Path, path: str | Path) -> tuple:
    import timm
    from safetensors import SafetensorError
    from timm.data import create_transform, resolve_model_data_config

    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise RoutevlError(f"backbone {path}: timm cannot load it ({_first_line(error)})") from None
    preprocess = create_transform(**resolve_model_data_config(model), is_training=False)
    return model.float().eval().requires_grad_(False), preprocess, _encode_timm, model.num_features


def _encode_timm(model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_states = model.forward_features(pixels)
    pooled = model.forward_head(hidden_states, pre_logits=True)
    if hidden_states.dim() == 4:  # a convolutional feature map (B, d, H, W)
        return pooled, hidden_states.flatten(2).transpose(1, 2)
    return pooled, hidden_states[:, model.num_prefix_tokens :]


def _load_transformers_vision(folder: Path, path: str | Path) -> tuple:
    from transformers import AutoImageProcessor

    config = _transformers_config(folder, path)
    model_class, config = _vision_model_class(config, path)
    model, missing = _load_transformers(model_class, folder, path)
    if missing and all(name.startswith("pooler.") for name in missing):
        model, missing = _load_transformers(model_class, folder, path, add_pooling_layer=False)
    if missing:
        raise RoutevlError(f"backbone {path}: its weights lack {_listed(missing)} of {model_class.__name__}")
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RoutevlError(f"backbone {path}: no readable preprocessor_config.json ({_first_line(error)})") from None

    def preprocess(image: Image) -> torch.Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    return model, preprocess, _encode_transformers, config.hidden_size


def _vision_model_class(config: PretrainedConfig, path: str | Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    from transformers import MODEL_MAPPING, CLIPConfig, CLIPVisionModel

    if isinstance(config, CLIPConfig):
        return CLIPVisionModel, config.vision_config
    model_class = MODEL_MAPPING.get(type(config), None)
    if getattr(model_class, "main_input_name", None) != "pixel_values" or not hasattr(config, "patch_size"):
        raise RoutevlError(f"backbone {path}: a {config.model_type} model, not a vision transformer")
    return model_class, config


def _encode_transformers(model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(pixel_values=pixels)
    hidden_states = output.last_hidden_state
    height, width = pixels.shape[-2:]
    patches = (height // model.config.patch_size) * (width // model.config.patch_size)
    pooled = output.pooler_output if output.pooler_output is not None else hidden_states[:, 0]
    return pooled, hidden_states[:, hidden_states.shape[1] - patches :]


# -------------------------------------------------------------------------------------------- images


def to_rgb(image: Image) -> Image:
    """An image of any mode as 8-bit RGB: upright by its EXIF orientation, transparency on white.

    Grey, palette, CMYK and 16-bit images are converted; the size stays as it is (up to the rotation).
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 or 32-bit grey: Pillow would clip it at 255 instead of scaling it
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
