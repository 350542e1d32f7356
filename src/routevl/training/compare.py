"""Stage `compare`: whether two trained runs ended in the same bits, tensor by tensor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.training.checkpoint import digests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl compare`."""
    parser.add_argument("first", metavar="FOLDER", help="a trained run")
    parser.add_argument("second", metavar="FOLDER", help="the same run, trained again")


def run(arguments: argparse.Namespace) -> None:
    """Say whether two trained runs ended in the same bits: weights, optimiser, random generators and metrics.

    Raises:
        RoutevlError: they differ; names the first tensor or line that does.
    """
    first, second = (_final_state(Path(folder)) for folder in (arguments.first, arguments.second))
    if name := first_difference(first, second):
        raise RoutevlError(f"{arguments.first} and {arguments.second} differ, first in {name}")
    print(f"bit-equal: {len(first)} tensors and lines")


def first_difference(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """The name of the first entry in which two final states (name -> digest or value) differ, or None."""
    return next((name for name in sorted(set(first) | set(second)) if first.get(name) != second.get(name)), None)


def _final_state(folder: Path) -> dict[str, Any]:
    state = dict(read_json(folder / "last" / "state.json"))
    try:
        for file in sorted(folder.glob("*.safetensors")):
            state |= {f"best/{file.name}/{tensor}": digest for tensor, digest in digests(load_file(file)).items()}
        lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, SafetensorError) as error:
        raise RoutevlError(f"{folder}: a damaged run ({error})") from error
    return state | {f"training.jsonl line {number:06d}": line for number, line in enumerate(lines, 1)}
