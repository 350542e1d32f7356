"""What benchmarks with images share: generated photographs, a vision backbone with random weights, the package's own stages."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import numpy
import timm
from PIL import Image
from timm.models import save_for_hf

COCO_SIZE = (640, 480)
NOISE = 16  # standard deviation of a photograph's grain; the files then weigh as much as COCO's, about 160 kB
FILES = 256


def draw_images(folder: Path, image_list: Path, count: int) -> None:
    """JPEG files of soft shapes with grain, and their images.json with `count` images: after FILES files it starts again with
    the first, under another id."""
    generator = numpy.random.default_rng(0)
    paths = [folder / f"{number:012d}.jpg" for number in range(min(count, FILES))]
    for path in paths:
        shapes = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=numpy.uint8)).resize(COCO_SIZE)
        grain = generator.normal(scale=NOISE, size=(*reversed(COCO_SIZE), 1))
        Image.fromarray((numpy.asarray(shapes) + grain).clip(0, 255).astype(numpy.uint8)).save(path, quality=90)
    entries = [{"id": image_id, "file_name": str(paths[image_id % len(paths)])} for image_id in range(count)]
    image_list.write_text(json.dumps(entries), encoding="utf-8")


def save_random_backbone(folder: Path, architecture: str) -> None:
    """A timm model of random weights as a backbone folder."""
    model = timm.create_model(architecture, num_classes=0)
    save_for_hf(model, str(folder), model_args=dict(model._model_args), safe_serialization=True)


def run_stage(stage: ModuleType, *options: object) -> None:
    """Run a stage of routevl, by its module, with command-line options, in this process."""
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    stage.run(parser.parse_args([str(option) for option in options]))
