"""One epoch of training from stored features against one that runs the vision model at every step, on the same batches.

    python benchmarks/stored_features.py --threads 2 --output benchmarks/results/stored_features.json

Images are JPEG files of COCO's usual size. The one epoch reads what `routevl extract` stored, by `Features`;
the other decodes, resizes and encodes the batch's images. Both train the VQA model (routed LoRA, `mul`) on the result.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import add_arguments, in_turn, prepare, random_roberta, ratios, report, seconds_of
from torch import Tensor
from vision import draw_images, run_stage, save_random_backbone

from routevl.backbones.vision import VisionBackbone, load_vision_backbone
from routevl.features import extract, index
from routevl.features.images import read_image, read_image_lists
from routevl.features.store import Features
from routevl.methods.base import layer_norms
from routevl.methods.table import new_method
from routevl.tasks.vqa import VqaModel
from routevl.visual import StoredFeatures, VisualSource

ANSWERS = 3129


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision-model", default="vit_base_patch16_224", help="a timm model; its weights are random here")
    parser.add_argument("--layers", type=int, default=12, help="of the text model")
    parser.add_argument("--width", type=int, default=768, help="of the text model")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--images", type=int, default=96, help="one question about each makes an epoch")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=20, help="text tokens, L_t")
    add_arguments(parser, rounds=3)
    arguments = parser.parse_args()
    device = prepare(arguments)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments, device)


def compare(folder: Path, arguments: argparse.Namespace, device: torch.device) -> None:
    """Make images, backbone and features in `folder`, and time both kinds of epochs."""
    image_list, backbone_folder = folder / "images.json", folder / "backbone"
    draw_images(folder, image_list, arguments.images)
    save_random_backbone(backbone_folder, arguments.vision_model)
    extraction = seconds_of(lambda: store_features(folder, image_list, backbone_folder, arguments), device)
    stored = StoredFeatures(Features(folder))
    backbone = load_vision_backbone(backbone_folder)
    backbone.model.to(device)
    training = Training(arguments, stored, device)
    images = read_image_lists([image_list])
    batches = [images[start : start + arguments.batch_size] for start in range(0, len(images), arguments.batch_size)]

    def epoch_from_storage() -> None:
        for batch in batches:
            training.step(stored.of([image.image_id for image in batch]))

    def epoch_with_vision_model() -> None:
        for batch in batches:
            training.step(encode(backbone, torch.stack([backbone.transform(read_image(image)) for image in batch]), device))

    variants = {"stored features": epoch_from_storage, "vision model at every step": epoch_with_vision_model}
    seconds = in_turn(variants, arguments.rounds, device, arguments.warm_up)
    report(ratios(seconds, "stored features"), arguments, seconds=seconds, extraction_seconds=extraction)
    print(f"\nextraction, once for all epochs and runs: {extraction:.1f} s")


def store_features(folder: Path, image_list: Path, backbone: Path, arguments: argparse.Namespace) -> None:
    """The package's own stages, with one shard of pooled features."""
    shard = folder / "shard-00000-of-00001.safetensors"
    run_stage(extract, "--images", image_list, "--backbone", backbone, "--tokens", "pooled", "--threads", arguments.threads,
              "--batch-size", arguments.batch_size, "--output", shard)  # fmt: skip
    run_stage(index, "--shards", shard, "--output", folder / "index.json")


def encode(backbone: VisionBackbone, pixels: Tensor, device: torch.device) -> Tensor:
    """Pixels (B, 3, H, W) -> pooled features (B, 1, d)."""
    with torch.no_grad():
        pooled = backbone.encode(pixels.to(device), ["pooled"])["pooled"]
    return pooled.unsqueeze(1)


class Training:
    """The VQA model and its optimiser; questions and answers are random, but the same at every step."""

    def __init__(self, arguments: argparse.Namespace, visual: VisualSource, device: torch.device) -> None:
        method = new_method("lora", {"r": arguments.rank, "routing": "mul"}, "benchmark")
        text_model = random_roberta(arguments.layers, arguments.width)
        model = VqaModel(ANSWERS, text_model, method, {}, layer_norms(text_model), visual, True)
        self.model = model.to(device).train()
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        self.device = device
        self.questions = torch.randint(5, 50000, (arguments.batch_size, arguments.tokens), device=device)
        self.answers = torch.rand(arguments.batch_size, ANSWERS, device=device)

    def step(self, image: Tensor) -> None:
        """One step on a batch's features (B, 1, d_v)."""
        size = len(image)
        questions = self.questions[:size]
        output = self.model(questions, torch.ones_like(questions), image.to(self.device), answer_scores=self.answers[:size])
        output["loss"].backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


if __name__ == "__main__":
    main()
