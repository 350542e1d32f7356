"""Images per second of `routevl extract` against the bare forward pass of the same vision model, on generated photographs.

    python benchmarks/extraction.py --workers 24 --output benchmarks/results/extraction.json
    python benchmarks/extraction.py --small

`routevl extract` is the stage itself: it reads and decodes JPEG files (the operating system has them in memory), preprocesses,
encodes and stores the pooled features. An extraction of the first batch alone is measured beside it and subtracted, median from
median, so that what each job pays once (loading the model, hashing its weights, starting the workers) does not count. The bare
forward pass encodes as many batches of pixels that lie on the device already. The vision model is ViT-L/16 at 224 pixels in
bfloat16, with random weights; --small takes ViT-Ti/16 in float32, since few CPUs are made for bfloat16. On a GPU with enough
workers, extraction should run at 0.90 of the forward pass or more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
from common import add_arguments, in_turn, prepare, report
from vision import draw_images, run_stage, save_random_backbone

from routevl.backbones.vision import load_vision_backbone
from routevl.features import extract
from routevl.features.images import read_image, read_image_lists

EXTRACT, FIRST_BATCH, FORWARD = "routevl extract", "routevl extract, first batch", "forward pass"
SMALL = {
    "vision_model": "vit_tiny_patch16_224",
    "images": 64,
    "batch_size": 8,
    "workers": 1,
    "precision": "float32",
    "warm_up": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny ViT and few images: under a minute on two CPU cores")
    parser.add_argument("--vision-model", default="vit_large_patch16_224", help="a timm model; its weights are random here")
    parser.add_argument("--images", type=int, default=8192, help="a multiple of --batch-size")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--precision", choices=extract.PRECISIONS, default="bfloat16")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    add_arguments(parser, rounds=3)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    if parser.parse_known_args()[0].small:
        parser.set_defaults(**SMALL)
    arguments = parser.parse_args()
    if (arguments.device == "cuda") != torch.cuda.is_available():
        parser.error("routevl extract runs on the GPU where there is one, and only there: leave --device out")
    if arguments.images % arguments.batch_size or arguments.images == arguments.batch_size:
        parser.error("--images must be at least twice --batch-size, and a multiple of it")
    device = prepare(arguments)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments, device)


def compare(folder: Path, arguments: argparse.Namespace, device: torch.device) -> None:
    """Make photographs and backbone in `folder`; time extraction and forward pass."""
    image_list, backbone_folder = folder / "images.json", folder / "backbone"
    draw_images(folder, image_list, arguments.images)
    save_random_backbone(backbone_folder, arguments.vision_model)
    backbone = load_vision_backbone(backbone_folder)
    backbone.model.to(device)
    first_batch = read_image_lists([image_list])[: arguments.batch_size]
    pixels = torch.stack([backbone.transform(read_image(image)) for image in first_batch]).to(device)
    batches = arguments.images // arguments.batch_size
    autocast = torch.autocast(device.type, getattr(torch, arguments.precision), enabled=arguments.precision != "float32")

    def extract_shard(shards: int) -> None:
        run_stage(extract, "--images", image_list, "--backbone", backbone_folder, "--tokens", "pooled", "--shards", shards,
                  "--batch-size", arguments.batch_size, "--precision", arguments.precision, "--threads", arguments.threads,
                  "--workers", arguments.workers, "--output", folder / "shard.safetensors")  # fmt: skip

    def forward() -> None:
        with torch.inference_mode(), autocast:
            for _ in range(batches):
                backbone.encode(pixels, ["pooled"])

    variants = {EXTRACT: lambda: extract_shard(1), FIRST_BATCH: lambda: extract_shard(batches), FORWARD: forward}
    seconds = in_turn(variants, arguments.rounds, device, arguments.warm_up)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {"variant": name, "seconds": round(medians[name], 3), "lowest": round(min(times), 3), "highest": round(max(times), 3)}
        for name, times in seconds.items()
    ]
    report(rows, arguments, seconds=seconds)
    beyond_first = medians[EXTRACT] - medians[FIRST_BATCH]
    if beyond_first <= 0:
        raise SystemExit("the first batch took as long as all images did: the machine is too busy to be measured")
    extraction, forward_pass = (arguments.images - arguments.batch_size) / beyond_first, arguments.images / medians[FORWARD]
    print(f"\nimages/s: extraction {extraction:.1f}, forward pass {forward_pass:.1f}; ratio {extraction / forward_pass:.2f}")


if __name__ == "__main__":
    main()
