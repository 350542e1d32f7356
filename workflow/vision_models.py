"""Families of vision models, and what tokens the package reads of each: the table of docs/COMPATIBILITY.md.

tests/unit/test_vision_families.py compares the features of every one, small and with random weights, with the model's own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import transformers

from routevl.backbones.vision import Tokens, vision_tokens

KINDS = ("pooled", "patches", "grid")  # of tokens that the table has; there are all tokens where there are patches
FLAT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64,
        "patch_size": 16}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 32,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 16, 32]}
HEADS = {"num_heads": [1, 2, 4, 8], "embed_dim": 16, "depths": [1, 1, 1, 1]}


@dataclass(frozen=True)
class Timm:
    """A family of timm's.

    Attributes:
        model: its architecture.
        small: arguments of `timm.create_model` that make it small enough for a test.
    """

    family: str
    model: str
    small: Mapping[str, Any] = field(default_factory=dict)
    library = "timm"

    def write_config(self, folder: Path) -> None:
        """What a folder has beside the weights."""
        config = {"architecture": self.model, "pretrained_cfg": timm.get_pretrained_cfg(self.model).to_dict()}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@dataclass(frozen=True)
class Transformers:
    """A family of transformers'.

    Attributes:
        model: the class of its configurations.
        small: arguments of that class that make it fit for a test, small above all.
    """

    family: str
    model: str
    small: Mapping[str, Any] = field(default_factory=dict)
    library = "transformers"

    def write_config(self, folder: Path, **arguments: Any) -> tuple[transformers.PretrainedConfig, tuple[int, int]]:
        """What a folder has beside the weights. Images are of the size that the configuration names, or 224 pixels a side.

        Returns the configuration, and the height and width of the images.
        """
        config = getattr(transformers, self.model)(**arguments)
        size = getattr(getattr(config, "vision_config", config), "image_size", None) or arguments.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        config.save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
        return config, (height, width)


FAMILIES = (
    Timm("ViT", "vit_tiny_patch16_224", {"depth": 2}),
    Timm("DeiT, distilled", "deit_tiny_distilled_patch16_224", {"depth": 2}),
    Timm("SigLIP", "vit_base_patch16_siglip_224", {"depth": 2, "embed_dim": 192, "num_heads": 3}),
    Timm("DINOv2 with registers", "vit_small_patch14_reg4_dinov2", {"depth": 1}),
    Timm("DINOv3", "vit_small_patch16_dinov3", {"depth": 2}),
    Timm("ViT, relative positions", "vit_relpos_small_patch16_224", {"depth": 2}),
    Timm("BEiT", "beit_base_patch16_224", {"depth": 2, "embed_dim": 192, "num_heads": 3}),
    Timm("EVA-02", "eva02_tiny_patch14_224", {"depth": 2}),
    Timm("Swin", "swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 48, "num_heads": (1, 2, 4, 8)}),
    Timm("Swin V2", "swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1), "embed_dim": 48, "num_heads": (1, 2, 4, 8)}),
    Timm("Hiera", "hiera_tiny_224"),
    Timm("SAM 2 (HieraDet)", "hieradet_small"),
    Timm("MViTv2", "mvitv2_tiny"),
    Timm("PVTv2", "pvt_v2_b0"),
    Timm("Twins-PCPVT", "twins_pcpvt_small"),
    Timm("Twins-SVT", "twins_svt_small"),
    Timm("XCiT", "xcit_nano_12_p16_224"),
    Timm("CaiT", "cait_xxs24_224", {"depth": 2}),
    Timm("ConViT", "convit_tiny"),
    Timm("TNT", "tnt_s_patch16_224", {"depth": 2}),
    Timm("VOLO", "volo_d1_224"),
    Timm("PiT", "pit_ti_224"),
    Timm("CrossViT", "crossvit_tiny_240"),
    Timm("LeViT", "levit_128s"),
    Timm("EfficientFormer", "efficientformer_l1"),
    Timm("EfficientFormerV2", "efficientformerv2_s0"),
    Timm("MLP-Mixer", "mixer_s32_224"),
    Timm("gMLP", "gmlp_ti16_224"),
    Timm("ResMLP", "resmlp_12_224"),
    Timm("CAFormer", "caformer_s18"),
    Timm("PoolFormer", "poolformer_s12"),
    Timm("MaxViT", "maxvit_rmlp_pico_rw_256"),
    Timm("CoAtNet", "coatnet_nano_rw_224"),
    Timm("TinyViT", "tiny_vit_5m_224"),
    Timm("DaViT", "davit_tiny", {"depths": (1, 1, 1, 1)}),
    Timm("FocalNet", "focalnet_tiny_srf"),
    Timm("Sequencer2D", "sequencer2d_s", {"layers": (1, 1, 1, 1)}),
    Timm("MambaOut", "mambaout_femto"),
    Timm("EdgeNeXt", "edgenext_xx_small"),
    Timm("MobileViT", "mobilevit_xxs"),
    Timm("FastViT", "fastvit_t8"),
    Timm("EfficientViT (MIT)", "efficientvit_b0"),
    Timm("EfficientViT (MSRA)", "efficientvit_m0"),
    Timm("RepVGG", "repvgg_a0"),
    Timm("VGG", "vgg11", {"mlp_ratio": 0.0625}),
    Timm("ResNet", "resnet10t"),
    Timm("RegNet", "regnetx_002"),
    Timm("DenseNet", "densenet121"),
    Timm("ConvNeXt", "convnext_atto"),
    Timm("InceptionNeXt", "inception_next_atto"),
    Timm("MobileNetV3", "mobilenetv3_small_050"),
    Timm("EfficientNet", "efficientnet_b0"),
    Timm("GhostNet", "ghostnet_100"),
    Transformers("ViT", "ViTConfig", FLAT),
    Transformers("DeiT, distilled", "DeiTConfig", FLAT),
    Transformers("BEiT", "BeitConfig", FLAT),
    Transformers("Data2Vec", "Data2VecVisionConfig", FLAT),
    Transformers("DINOv2", "Dinov2Config", FLAT),
    Transformers("DINOv2 with registers", "Dinov2WithRegistersConfig", FLAT),
    Transformers("DINOv3", "DINOv3ViTConfig", {**FLAT, "num_register_tokens": 4}),
    Transformers("DINOv3 ConvNeXt", "DINOv3ConvNextConfig", STAGES),
    Transformers("ViT-MSN", "ViTMSNConfig", FLAT),
    Transformers("ViT-MAE", "ViTMAEConfig", FLAT),
    Transformers("I-JEPA", "IJepaConfig", FLAT),
    Transformers("YOLOS", "YolosConfig", {**FLAT, "image_size": [64, 64], "num_detection_tokens": 5}),
    Transformers("CLIP", "CLIPConfig", {"vision_config": FLAT, "text_config": TEXT}),
    Transformers("Chinese-CLIP", "ChineseCLIPConfig", {"vision_config": FLAT, "text_config": TEXT}),
    Transformers("SigLIP", "SiglipConfig", {"vision_config": FLAT, "text_config": TEXT}),
    Transformers("Swin", "SwinConfig", {**HEADS, "image_size": 64, "window_size": 2}),
    Transformers("Swin V2", "Swinv2Config", {**HEADS, "image_size": 64, "window_size": 2}),
    Transformers("Donut's Swin", "DonutSwinConfig", {**HEADS, "image_size": 64, "window_size": 2}),
    Transformers("Hiera", "HieraConfig", {**HEADS, "image_size": [64, 64]}),
    Transformers("FocalNet", "FocalNetConfig", {"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64}),
    Transformers("PVT", "PvtConfig", {**STAGES, "image_size": 64, "num_attention_heads": [1, 1, 2, 2]}),
    Transformers("PVTv2", "PvtV2Config", {**STAGES, "image_size": 64, "num_attention_heads": [1, 1, 2, 2]}),
    Transformers("SegFormer", "SegformerConfig", {**STAGES, "num_attention_heads": [1, 1, 2, 2], "num_encoder_blocks": 4}),
    Transformers("PoolFormer", "PoolFormerConfig", STAGES),
    Transformers("CvT", "CvtConfig"),
    Transformers("LeViT", "LevitConfig", {"image_size": 224, "hidden_sizes": [16, 16, 32], "num_attention_heads": [1, 1, 2],
                                          "depths": [1, 1, 1], "key_dim": [8, 8, 8]}),
    Transformers("MobileViT", "MobileViTConfig", {"image_size": 256, "neck_hidden_sizes": [8, 8, 8, 16, 16, 24, 48],
                                                  "hidden_sizes": [16, 16, 16], "num_attention_heads": 2}),
    Transformers("MobileViTV2", "MobileViTV2Config", {"image_size": 256, "width_multiplier": 0.5}),
    Transformers("SwiftFormer", "SwiftFormerConfig", {"image_size": 224, "embed_dims": [16, 16, 16, 32], "depths": [1, 1, 1, 1]}),
    Transformers("ConvNeXt", "ConvNextConfig", {**STAGES, "image_size": 64}),
    Transformers("ConvNeXt V2", "ConvNextV2Config", {**STAGES, "image_size": 64}),
    Transformers("ResNet", "ResNetConfig", {**STAGES, "embedding_size": 16}),
    Transformers("RegNet", "RegNetConfig", {**STAGES, "embedding_size": 16, "groups_width": 8}),
    Transformers("BiT", "BitConfig", {**STAGES, "embedding_size": 16, "num_groups": 4}),
    Transformers("EfficientNet", "EfficientNetConfig", {"image_size": 224, "width_coefficient": 0.25, "depth_coefficient": 0.25,
                                                        "hidden_dim": 320, "initializer_range": 0.5}),
    Transformers("MobileNetV1", "MobileNetV1Config", {"image_size": 224, "depth_multiplier": 0.25}),
    Transformers("MobileNetV2", "MobileNetV2Config", {"image_size": 224, "depth_multiplier": 0.25}),
)  # fmt: skip


def rows(families: Iterable[Timm | Transformers] = FAMILIES) -> Iterator[tuple[str, ...]]:
    """Of each family: its name, its library, a model, and its tokens of each kind: length x width, or why there are none."""
    for of in families:
        with tempfile.TemporaryDirectory() as folder:
            of.write_config(Path(folder))
            tokens = vision_tokens(folder)
        yield of.family, of.library, f"`{of.model}`", *(_text(tokens, kind) for kind in KINDS)


def _text(tokens: Tokens, kind: str) -> str:
    if kind in tokens.refused:
        return f"refused: {tokens.refused[kind]}"
    length, width = tokens.shapes[kind]
    return f"`{length} x {width}`"
