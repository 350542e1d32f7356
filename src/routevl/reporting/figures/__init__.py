"""Stage `figure`: one module per figure; each has `draw(inputs) -> (figure, data)`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from routevl.errors import RoutevlError
from routevl.reporting import FIGURES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl figure`."""
    parser.add_argument("--name", required=True, metavar="FIGURE", help=f"which figure: {', '.join(FIGURES)}")
    parser.add_argument("--experiments", type=Path, metavar="TSV", help="experiments sheet (all but F1_method)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="results folder to read (all but F1_method)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="prepared test split (F8_examples)")
    parser.add_argument("--output", required=True, type=Path, metavar="SVG", help="beside it: .png, .pdf and .csv")


def run(arguments: argparse.Namespace) -> None:
    """Draw one figure and write its four files."""
    # here, so that the names of figures can be had without pandas and matplotlib
    from routevl.reporting.figures.inputs import FigureInputs
    from routevl.reporting.style import house_style, save

    if arguments.name not in FIGURES:
        raise RoutevlError(f"unknown figure {arguments.name!r}, expected one of {', '.join(FIGURES)}")
    if arguments.output.suffix != ".svg":
        raise RoutevlError(f"--output {arguments.output}: expected a name that ends in .svg")
    module = importlib.import_module(f"routevl.reporting.figures.{arguments.name.lower()}")
    inputs = FigureInputs(arguments.name, arguments.experiments, arguments.results, arguments.data)
    with house_style():
        save(*module.draw(inputs), arguments.output)
