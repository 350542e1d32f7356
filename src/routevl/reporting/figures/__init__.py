"""Stage `figure`: one module per figure, read F1 to F8; each has `draw(inputs) -> (figure, data)`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from routevl.errors import RoutevlError
from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.style import house_style, save

if TYPE_CHECKING:
    import argparse

FIGURES = ("F1_method", "F2_main", "F3_rank_budget", "F5_curves", "F6_question_types", "F8_examples")


def import_libraries() -> None:
    """Import at one point what the stage needs, so that start-up can be measured apart from work."""
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, metavar="FIGURE", help=f"which figure: {', '.join(FIGURES)}")
    parser.add_argument("--experiments", type=Path, metavar="TSV", help="experiments sheet (all but F1_method)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="results folder to read (all but F1_method)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="prepared test split (F8_examples)")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="SVG",
        help="the .svg; .png, .pdf and .csv are written beside it",
    )


def run(arguments: argparse.Namespace) -> None:
    """Draw one figure and write its four files.

    Raises:
        RoutevlError: an unknown figure, or an input that is missing or malformed.
    """
    if arguments.name not in FIGURES:
        raise RoutevlError(f"unknown figure {arguments.name!r}, expected one of {', '.join(FIGURES)}")
    if arguments.output.suffix != ".svg":
        raise RoutevlError(f"--output {arguments.output}: expected a name that ends in .svg")
    module = importlib.import_module(f"routevl.reporting.figures.{arguments.name.lower()}")
    inputs = FigureInputs(arguments.name, arguments.experiments, arguments.results, arguments.data)
    with house_style():
        figure, data = module.draw(inputs)
        save(figure, data, arguments.output)
