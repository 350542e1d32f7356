"""Families of vision models: the tokens of each are those of its own forward pass, in the order of the image, or refused.

The table of the families is workflow/vision_models.py's, which docs/COMPATIBILITY.md shows. Here they are small and random.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

from routevl.backbones.vision import load_vision_backbone, vision_tokens
from routevl.errors import RoutevlError
from routevl.features.index import TOKENS

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "workflow"))
from vision_models import FAMILIES, Timm, Transformers, rows  # noqa: E402

FAST = {  # one for each way of reading an output, and of refusing it
    "timm": ["ViT", "Swin", "MobileNetV3", "PiT", "CrossViT"],
    "transformers": ["DINOv2 with registers", "ViT-MAE", "SigLIP", "Swin", "ResNet", "I-JEPA", "YOLOS", "PVT"],
}
Reader = Callable[[Any], Tensor]


def last(before: int = 0) -> Reader:
    return lambda output: output.last_hidden_state[:, before:]


def of_map(output: Any) -> Tensor:
    return rows_of_map(output.last_hidden_state)


def first(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def pooler(output: Any) -> Tensor:
    return output.pooler_output.flatten(1)


def rows_of_map(tensor: Tensor) -> Tensor:
    """(B, d, H, W) -> (B, H * W, d), one position after the other."""
    _, _, height, width = tensor.shape
    return torch.stack([tensor[:, :, row, column] for row in range(height) for column in range(width)], dim=1)


# transformers' families: the model's class, and how its pooled token and patches are read from its output; None: refused.
READERS: dict[str, tuple[str, Reader | None, Reader | None]] = {
    "ViT": ("ViTModel", pooler, last(1)),
    "DeiT, distilled": ("DeiTModel", pooler, last(2)),
    "BEiT": ("BeitModel", pooler, last(1)),
    "Data2Vec": ("Data2VecVisionModel", first, last(1)),
    "DINOv2": ("Dinov2Model", pooler, last(1)),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", pooler, last(5)),
    "DINOv3": ("DINOv3ViTModel", pooler, last(5)),
    "DINOv3 ConvNeXt": ("DINOv3ConvNextModel", pooler, None),
    "ViT-MSN": ("ViTMSNModel", first, last(1)),
    "ViT-MAE": ("ViTMAEModel", first, last(1)),
    "I-JEPA": ("IJepaModel", None, last()),
    "YOLOS": ("YolosModel", pooler, None),
    "CLIP": ("CLIPModel", pooler, last(1)),
    "Chinese-CLIP": ("ChineseCLIPModel", pooler, last(1)),
    "SigLIP": ("SiglipModel", pooler, last()),
    "Swin": ("SwinModel", pooler, last()),
    "Swin V2": ("Swinv2Model", pooler, last()),
    "Donut's Swin": ("DonutSwinModel", pooler, last()),
    "Hiera": ("HieraModel", pooler, last()),
    "FocalNet": ("FocalNetModel", pooler, last()),
    "PVT": ("PvtModel", None, None),
    "PVTv2": ("PvtV2Model", None, of_map),
    "SegFormer": ("SegformerModel", None, of_map),
    "PoolFormer": ("PoolFormerModel", None, of_map),
    "CvT": ("CvtModel", None, of_map),
    "LeViT": ("LevitModel", pooler, None),
    "MobileViT": ("MobileViTModel", pooler, of_map),
    "MobileViTV2": ("MobileViTV2Model", pooler, of_map),
    "SwiftFormer": ("SwiftFormerModel", None, of_map),
    "ConvNeXt": ("ConvNextModel", pooler, of_map),
    "ConvNeXt V2": ("ConvNextV2Model", pooler, of_map),
    "ResNet": ("ResNetModel", pooler, of_map),
    "RegNet": ("RegNetModel", pooler, of_map),
    "BiT": ("BitModel", pooler, of_map),
    "EfficientNet": ("EfficientNetModel", pooler, of_map),
    "MobileNetV1": ("MobileNetV1Model", pooler, of_map),
    "MobileNetV2": ("MobileNetV2Model", pooler, of_map),
}

# timm's families without patches, those whose last map is not the last that `forward_intermediates` gives, how it is read then,
# those whose classifier reads more than the pooled token, and those whose patches, of random weights, see all of the image alike.
WITHOUT_PATCHES = ("VOLO", "PiT", "CrossViT")
READ_BY_HAND = {"XCiT": lambda output: output[:, 1:], **dict.fromkeys(("FastViT", "EfficientNet", "GhostNet"), rows_of_map)}
WITHOUT_LAST_NORM = ("Hiera", "SAM 2 (HieraDet)")
OTHER_CLASSIFIERS = (
    "DeiT, distilled",
    "LeViT",
    "VOLO",
    "CrossViT",
    "EfficientViT (MSRA)",
    "Sequencer2D",
    "EfficientFormer",
    "EfficientFormerV2",
)
WITHOUT_ORDER = ("LeViT",)


def is_fast(of: Timm | Transformers) -> bool:
    return of.family in FAST[of.library]


every_family = pytest.mark.parametrize(
    "of",
    [pytest.param(of, id=f"{of.library}-{of.family}", marks=[] if is_fast(of) else pytest.mark.slow) for of in FAMILIES],
)


@pytest.fixture
def folder(of: Timm | Transformers, tmp_path: Path) -> Path:
    """A family's folder with random weights."""
    torch.manual_seed(1)
    if isinstance(of, Timm):
        model = shaken(timm.create_model(of.model, num_classes=5, **of.small))
        save_for_hf(model, str(tmp_path), safe_serialization=True)
    else:
        config, size = of.write_config(tmp_path, **of.small)
        model = shaken(getattr(transformers, READERS[of.family][0])(config))
        keep_signals(getattr(model, "vision_model", model), (3, *size))
        model.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """No scale or shift is left zero, which would hide what stands behind it."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def keep_signals(model: nn.Module, size: tuple[int, ...]) -> None:
    """Batch norms of the right scale, without which transformers' initial weights let an image die away in deep convolutions."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()(pixels_of(size))
        model.eval()


# --------------------------------------------------------------------------------------------- each family


@every_family
def test_tokens_are_those_of_the_models_own_forward_pass(of: Timm | Transformers, folder: Path) -> None:
    backbone, given = load_vision_backbone(folder), vision_tokens(folder)
    expected = (of_timm if isinstance(of, Timm) else of_transformers)(of, folder, size_of(backbone))
    pixels = pixels_of(size_of(backbone))
    if "patches" in expected:
        expected["grid"] = pooled_by_torch(expected["patches"])
        with torch.inference_mode():
            before = backbone.encode(pixels, ["all"])["all"][:, : -expected["patches"].shape[1]]
        assert before.shape[1] >= 1  # which tokens these are, test_backbones.py asks
        expected["all"] = torch.cat([before, expected["patches"]], dim=1)
    assert (backbone.tokens.shapes, backbone.tokens.refused) == (given.shapes, given.refused)
    assert given.shapes.keys() == expected.keys() and given.refused.keys() == set(TOKENS) - expected.keys()
    with torch.inference_mode():
        encoded = backbone.encode(pixels, expected)
    for kind, tokens in encoded.items():
        torch.testing.assert_close(tokens, expected[kind], rtol=1e-4, atol=1e-4)
        length, width = given.shape(kind)
        assert tokens.shape == ((2, width) if kind == "pooled" else (2, length, width))
        assert tokens[0].std() > 0 and not torch.equal(tokens[0], tokens[1])
    if "patches" in expected and of.family not in WITHOUT_ORDER:
        check_order(lambda images: backbone.encode(images, ["patches"])["patches"], pixels[:1])
    for kind in given.refused:
        for refuse in (given.shape, backbone.tokens.shape, lambda kind: backbone.encode(pixels, [kind])):
            with pytest.raises(RoutevlError, match=f"^backbone {folder}: no {kind} tokens: [^\n]*; leave {kind} out of [^\n]*$"):
                refuse(kind)


def test_the_tokens_of_hiera_are_refused_where_they_do_not_stand_row_by_row(tmp_path: Path) -> None:
    [of] = [of for of in FAMILIES if of.model == "HieraConfig"]
    of.write_config(tmp_path, **{**of.small, "image_size": [128, 128], "num_query_pool": 2})
    assert vision_tokens(tmp_path).shapes.keys() == {"pooled"}


def test_the_table_of_the_documents_has_what_these_models_give() -> None:
    table = (PROJECT / "docs/COMPATIBILITY.md").read_text(encoding="utf-8")
    for row in rows(filter(is_fast, FAMILIES)):
        assert f"| {' | '.join(row)} |" in table


@pytest.mark.slow
def test_the_table_of_the_documents_is_up_to_date() -> None:
    command = [sys.executable, str(PROJECT / "workflow/docs.py"), "--models", "--check"]
    subprocess.run(command, check=True, timeout=600)


def size_of(backbone: Any) -> tuple[int, ...]:
    from PIL import Image

    return backbone.transform(Image.new("RGB", (50, 70))).shape


def pixels_of(size: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def of_timm(of: Timm, folder: Path, size: tuple[int, ...]) -> dict[str, Tensor]:
    pixels = pixels_of(size)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected = {"pooled": timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()(pixels)}
    if of.family not in OTHER_CLASSIFIERS:
        torch.testing.assert_close(model.get_classifier()(expected["pooled"]), model(pixels), rtol=1e-4, atol=1e-4)
    if of.family in READ_BY_HAND:
        expected["patches"] = READ_BY_HAND[of.family](model.forward_features(pixels))
    elif of.family not in WITHOUT_PATCHES:
        options = {"indices": 1, "norm": of.family not in WITHOUT_LAST_NORM, "output_fmt": "NCHW", "intermediates_only": True}
        expected["patches"] = rows_of_map(model.forward_intermediates(pixels, **options)[-1])
    return expected


@torch.inference_mode()
def of_transformers(of: Transformers, folder: Path, size: tuple[int, ...]) -> dict[str, Tensor]:
    pixels = pixels_of(size)
    name, *readers = READERS[of.family]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    options = {}
    if of.family == "ViT-MAE":  # every patch, in order
        model.config.mask_ratio, options = 0.0, {"noise": torch.arange(16.0).expand(2, -1)}
    output = getattr(model, "vision_model", model)(pixel_values=pixels, **options)
    return {kind: read(output) for kind, read in zip(("pooled", "patches"), readers, strict=True) if read is not None}


def pooled_by_torch(patches: Tensor) -> Tensor:
    """(B, n * n, d) -> (B, 36 at most, d)."""
    side = math.isqrt(patches.shape[1])
    return adaptive_max_pool2d(patches.transpose(1, 2).unflatten(2, (side, side)), min(side, 6)).flatten(2).transpose(1, 2)


@torch.inference_mode()
def check_order(patches_of: Callable[[Tensor], Tensor], image: Tensor) -> None:
    """Changing one part of the image changes the patches there most: their rows follow its row, and their columns its column."""
    patches = patches_of(image)
    side = math.isqrt(patches.shape[1])
    assert side**2 == patches.shape[1]
    cells = [(0, 0), (0, side - 1), (side - 1, 0), (side - 1, side - 1), (0, side // 2), (side // 2, side - 1)]
    changed = image.repeat(len(cells), 1, 1, 1)
    for pixels, cell in zip(changed, cells, strict=True):
        rows, columns = (
            slice(place * length // side, (place + 1) * length // side)
            for place, length in zip(cell, image.shape[2:], strict=True)
        )
        pixels[:, rows, columns] *= -3
    change = (patches_of(changed) - patches).norm(dim=-1).square()  # (cells, L)
    weights = (change / change.sum(1, keepdim=True)).unflatten(1, (side, side))
    places = torch.arange(float(side))
    found = torch.stack([weights.sum(2) @ places, weights.sum(1) @ places])
    correlations = torch.corrcoef(torch.cat([found, torch.tensor(cells).T.float()]))[:2, 2:]
    assert correlations.diagonal().min() > 0.7, correlations
