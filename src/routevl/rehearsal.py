"""What a rehearsal of a configuration is, and stage `rehearsal-sheet`, which writes its run sheet.

A rehearsal runs every rule at its real shapes on a few items, so that a wrong path, too little memory or a wrong partition shows
within minutes. It is a configuration and a run sheet like any other, made from the real ones: the rules do not know of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from routevl.backbones.derivations import DERIVATIONS, read_options
from routevl.sheet import Experiment, read_sheet, settings_of, write_sheet

FOLDER = "rehearsal"  # of the results, with results of its own
PRETRAINING = {"sentences": 1000, "images": 500, "epochs": 1}  # at most
DERIVATION = {"search_epochs": 1, "tune_epochs": 1, "epochs": 1, "examples": 500}  # at most, of one that trains


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl rehearsal-sheet`."""
    parser.add_argument("--experiments", required=True, type=Path, metavar="FILE", help="run sheet")
    parser.add_argument("--output", required=True, type=Path, metavar="TSV", help="where the rehearsal's run sheet goes")


def run(arguments: argparse.Namespace) -> None:
    """Write the run sheet of a rehearsal. Raises RoutevlError where the real one is wrong."""
    write_sheet(arguments.output, rehearsed_sheet(read_sheet(arguments.experiments)))


def rehearsed_sheet(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Every experiment with its first seed alone, and as few epochs as tell the budgets of the sheet apart: 1, 2, 3, ..."""
    budgets = sorted({experiment.epochs for experiment in experiments})
    return [replace(e, epochs=1 + budgets.index(e.epochs), seeds=e.seeds[:1]) for e in experiments]


def rehearsed(config: Mapping[str, Any], experiments: Sequence[Experiment]) -> dict[str, Any]:
    """The configuration of a rehearsal: results and run sheet in a folder of its own, and less of everything that takes long.

    What decides the shapes, the memory and where jobs run stays: models, answer vocabulary, batch sizes, precision, resources.
    Of the data it keeps as many texts as the largest batch has, and as many of the longest ones, so that full batches of both are
    learned from.
    """
    results = Path(config["results"]) / FOLDER
    settings = [settings_of(experiment, experiment.seeds[0], config) for experiment in experiments]
    data = config["data"] | {"few": max(max(s.batch_size, s.prediction_batch_size) for s in settings)}
    if "world" in config and Path(data["root"]).is_relative_to(config["results"]):  # the demo world is made again
        data["root"] = str(results / Path(data["root"]).relative_to(config["results"]))
    backbones = {
        modality: {name: _made_briefly(entry) for name, entry in entries.items()}
        for modality, entries in config["backbones"].items()
    }
    return {
        **config,
        "results": str(results),
        "experiments": str(results / "experiments.tsv"),
        "data": data,
        "backbones": backbones,
        "features": config["features"] | {"shards": 1},  # so that it has full batches
    }


def _made_briefly(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    if "derive" in entry and DERIVATIONS[entry["derive"]["by"]].trains:
        options = entry["derive"].get("options", {})
        all_options = asdict(read_options(entry["derive"]["by"], options, "configuration"))
        return {**entry, "derive": {**entry["derive"], "options": options | _at_most(DERIVATION, all_options)}}
    if "pretrain" not in entry:
        return entry
    return {"pretrain": entry["pretrain"] | _at_most(PRETRAINING, entry["pretrain"])}


def _at_most(most: Mapping[str, int], options: Mapping[str, Any]) -> dict[str, int]:
    return {key: min(value, options[key]) for key, value in most.items() if key in options}
