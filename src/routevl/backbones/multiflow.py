"""MULTIFLOW (Farina et al., 2024): pruning of linear weights by what flows through them, as many in each layer as by magnitude.

The model is run on pairs of image and text, a vision model on the images, a text model on the texts. With n_j the root of the
mean, over examples, of the sum of squares of a layer's input j over an example's tokens, the score of a weight w_ij is

    s_ij = |w_ij| · mean_k(|w_ik| n_k) · mean_k(|w_kj| n_j)

How many a layer loses, magnitudes say: of the smallest |w| of all layers of its modality, those that are its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from routevl.backbones.derivations import MultiflowOptions
from routevl.backbones.from_transformers import of_the_folder
from routevl.backbones.matrices import turned
from routevl.backbones.pairs import pairs_of
from routevl.backbones.pruning import prunable, pruned_copy, smallest
from routevl.backbones.vision import vision_folder
from routevl.features.images import read_image_lists
from routevl.features.loading import pixels_of

BATCH_SIZE = 32  # which changes no result but in the last bits
LONGEST = 64  # tokens of a text that count


def prune(source: Path, options: MultiflowOptions, output: Path, data: Path) -> dict[str, Any]:
    """Copy a backbone's folder with, of each modality, the floor(sparsity × entries) entries of its linear weights set to zero
    through which the least flows.

    Biases, norms, embeddings, heads and modules that the model does not run are left alone.

    Args:
        data: prepared data, whose training split has the pairs.

    Returns:
        with how many pairs it was calibrated, and of each modality how many entries there were and how many are zero now.

    Raises:
        RoutevlError: the training split has no such pairs, or unreadable images; config.json does not say which class of
            transformers the weights are of.
    """
    pairs = pairs_of(data / "train" / f"{options.pairs}.json", options.examples, options.seed)
    found = pruned_copy(source, output, partial(_prune, source=source, data=data, pairs=pairs, sparsity=options.sparsity))
    return {"pairs": len(pairs), **found}


def _prune(model: nn.Module, source: Path, data: Path, pairs: list[tuple[int, str]], sparsity: float) -> dict[str, int]:
    twin = copy.deepcopy(model).float().eval()  # some models are stored in half precision
    forward, batches = _calibration(twin, source, data, pairs)
    norms = input_norms(prunable(twin), forward, batches)
    weights = {name: turned(module, module.weight.detach()) for name, module in prunable(model).items() if name in norms}
    modalities = modalities_of(model)
    found: dict[str, int] = {}
    for name, mask in pruned_entries(weights, norms, modalities, sparsity).items():
        weights[name][mask] = 0
        counts = {"entries": mask.numel(), "zero": int((weights[name] == 0).sum())}
        for what, count in counts.items():
            key = f"{modalities[name]}_{what}"
            found[key] = found.get(key, 0) + count
    return found


# ------------------------------------------------------------------------------------------- calibration


def _calibration(
    model: nn.Module, source: Path, data: Path, pairs: list[tuple[int, str]]
) -> tuple[Callable[..., Any], Iterator[dict[str, Tensor]]]:
    """What runs a model, and batches of its arguments."""
    parts = (pairs[start : start + BATCH_SIZE] for start in range(0, len(pairs), BATCH_SIZE))
    if _is_vision(model):
        files = {image.image_id: image for image in read_image_lists([data / "train" / "images.json"])}
        transform = vision_folder(source).transform(model)
        batches = (pixels_of((files[image_id] for image_id, _ in part), transform) for part in parts)
        if not hasattr(model, "config"):
            return model, ({"x": pixels} for pixels in batches)  # timm's
        return getattr(model, "vision_model", model.base_model), ({"pixel_values": pixels} for pixels in batches)
    tokenizer = of_the_folder(AutoTokenizer, source, "tokenizer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # the mask hides whatever stands there
    texts = ([text for _, text in part] for part in parts)
    longest = min(LONGEST, tokenizer.model_max_length)
    tokenise = partial(tokenizer, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    batches = (tokenise(of_part) for of_part in texts)
    inputs = ({name: tokens[name] for name in ("input_ids", "attention_mask")} for tokens in batches)
    if model.config.is_encoder_decoder:
        inputs = (of | {f"decoder_{name}": tensor for name, tensor in of.items()} for of in inputs)
    return model.base_model, inputs


def _is_vision(model: nn.Module) -> bool:
    """Whether a backbone is a vision model: timm's, or one of transformers that is or has one."""
    config = getattr(model, "config", None)
    return config is None or hasattr(config, "vision_config") or model.main_input_name == "pixel_values"


@torch.inference_mode()
def input_norms(
    modules: Mapping[str, nn.Module], forward: Callable[..., Any], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """n_j of each of the modules that `forward` calls, (inputs,) float64; it does not depend on how examples are batched.

    Args:
        batches: arguments of `forward`, each with a row for each of B examples. Positions that an attention_mask (B, T) among
            them hides do not count, where a module's input has B × T positions.
    """
    sums: dict[str, Tensor] = {}
    examples, kept = 0, None

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens = args[0].flatten(0, -2)  # (positions, inputs)
        if kept is not None and len(tokens) == len(kept):
            tokens = tokens[kept]
        sums[name] = sums.get(name, 0) + tokens.double().square().sum(0)

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    try:
        for batch in batches:
            kept = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else None
            examples += len(next(iter(batch.values())))
            forward(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / examples).sqrt() for name, total in sums.items()}


# ----------------------------------------------------------------------------------------------- pruning


def modalities_of(model: nn.Module) -> dict[str, str]:
    """Name of each module of `prunable` -> "vision", "text" or, in the decoder of an encoder-decoder, "fusion"."""
    if _is_vision(model):
        return dict.fromkeys(prunable(model), "vision")
    fused = {*model.get_decoder().modules()} if model.config.is_encoder_decoder else set()
    return {name: "fusion" if module in fused else "text" for name, module in prunable(model).items()}


def pruned_entries(
    weights: Mapping[str, Tensor], norms: Mapping[str, Tensor], modalities: Mapping[str, str], sparsity: float
) -> dict[str, Tensor]:
    """Which entries of each weight (outputs, inputs) are pruned, of the same shape, bool; by norms (inputs,) and modality."""
    counts: dict[str, int] = {}
    for modality in sorted({modalities[name] for name in weights}):
        own = {name: weight.abs().flatten().float() for name, weight in weights.items() if modalities[name] == modality}
        magnitudes = torch.cat([*own.values()])
        small = smallest(magnitudes, int(sparsity * len(magnitudes))).split([len(of_layer) for of_layer in own.values()])
        counts |= {name: int(of_layer.sum()) for name, of_layer in zip(own, small, strict=True)}
    scored = {name: scores(weight, norms[name]) for name, weight in weights.items()}
    return {name: smallest(of_layer.flatten(), counts[name]).view_as(of_layer) for name, of_layer in scored.items()}


def scores(weight: Tensor, norms: Tensor) -> Tensor:
    """s_ij of a weight (outputs, inputs) whose inputs have the norms (inputs,): (outputs, inputs) float64."""
    magnitudes = weight.abs().double()
    flow = magnitudes * norms
    return magnitudes * flow.mean(1, keepdim=True) * flow.mean(0, keepdim=True)
