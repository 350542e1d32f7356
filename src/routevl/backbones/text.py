"""Loading frozen text models from transformers folders."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from routevl.backbones.co_attention import CoAttentionConfig
from routevl.backbones.folder import check_folder, origin_of, public_name
from routevl.backbones.from_transformers import check_complete, load_transformers, of_the_folder, transformers_config
from routevl.backbones.skeleton import no_weights
from routevl.errors import RoutevlError

# kind of text backbone -> its classes by configuration, and what to say where a folder is none
TEXT_MODELS = {
    "encoder": (MODEL_MAPPING, "a bidirectional text encoder such as roberta"),
    "decoder": (MODEL_FOR_CAUSAL_LM_MAPPING, "a causal language model such as gpt2"),
    "encoder-decoder": (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, "an encoder-decoder such as bart"),
}


def load_text_backbone(path: str | Path, kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text model in float32, in evaluation mode and frozen, with its tokenizer.

    Its `name_or_path`, which libraries write into what they save, is its hub id where the folder is a copy of a hub model, and
    its config has that model's commit; else it is the folder's `public_name`. Its `is_pruned` is the folder's (`Origin`).

    Args:
        path: its folder.
        kind: "encoder" loads a bidirectional encoder without pooling layer (RoBERTa ships no weights for it), or a model of two
            streams (`routevl.backbones.co_attention`); "decoder" loads a causal language model; "encoder-decoder" one with an
            encoder before it.

    Raises:
        RoutevlError: as `check_folder`; the folder cannot be read, lacks weights, or is the wrong kind of model.
    """
    folder = check_folder(path)
    model_class, _, options = _class_of(folder, kind)
    model, missing = load_transformers(model_class, folder, **options)
    check_complete(folder, model_class, missing)
    origin = origin_of(folder)
    on_the_hub = origin.is_on_the_hub
    model.name_or_path = model.config.name_or_path = origin.hub_id if on_the_hub else public_name(path)
    model.is_pruned = origin.is_pruned
    model.config._commit_hash = origin.commit if on_the_hub else None  # where transformers has it of a model from the hub
    return model, of_the_folder(AutoTokenizer, folder, "tokenizer")


def text_skeleton(path: str | Path, kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_text_backbone`, by config.json and the tokenizer alone: its parameters are on the meta device."""
    folder = Path(path)
    model_class, config, options = _class_of(folder, kind)
    with no_weights():
        model = model_class(config, **options)
    model.name_or_path = public_name(path)
    return model.eval().requires_grad_(False), of_the_folder(AutoTokenizer, folder, "tokenizer")


def _class_of(folder: Path, kind: str) -> tuple[type[PreTrainedModel], PretrainedConfig, dict[str, Any]]:
    """The class of a folder's model, its configuration, and what the class is made with beside it."""
    config = transformers_config(folder)
    classes, needed = TEXT_MODELS[kind]
    if _kind_of(config) != kind:
        raise RoutevlError(f"backbone {folder}: a {config.model_type} model; needs {needed}")
    model_class = classes[type(config)]
    has_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return model_class, config, {"add_pooling_layer": False} if has_pooler else {}


def _kind_of(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "encoder-decoder" if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING else None
    # RoBERTa also has a causal class: what counts is whether its configuration makes it a decoder.
    bidirectional = type(config) in MODEL_FOR_MASKED_LM_MAPPING or isinstance(config, CoAttentionConfig)
    if bidirectional and not getattr(config, "is_decoder", False):
        return "encoder"
    return "decoder" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
