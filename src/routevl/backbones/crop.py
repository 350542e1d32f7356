"""Another crop: a vision model of timm whose preprocessing brings images to its size in another way."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from routevl.backbones.derivations import CropOptions
from routevl.errors import RoutevlError
from routevl.files import read_json, write_json


def crop(source: Path, options: CropOptions, output: Path) -> dict[str, Any]:
    """Copy a backbone's folder with another crop in its config.json; the weights are the same.

    Returns:
        what stood there.

    Raises:
        RoutevlError: it is no folder of timm's, whose config.json has the preprocessing.
    """
    config = read_json(source / "config.json")
    if "pretrained_cfg" not in config:
        raise RoutevlError(
            f"backbone {source}: config.json has no pretrained_cfg, timm's preprocessing; derive it of a model of timm"
        )
    wanted, preprocessing = asdict(options), config["pretrained_cfg"]
    before = {f"{name}_before": preprocessing.get(name) for name in wanted}
    shutil.copytree(source, output, dirs_exist_ok=True)
    write_json(output / "config.json", config | {"pretrained_cfg": preprocessing | wanted})
    return before
