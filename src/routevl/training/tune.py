"""Stage `tune`: an experiment's learning rate, chosen by the validation split before its runs; and how these take it over."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from routevl import settings as run_settings
from routevl.errors import RoutevlError
from routevl.files import read_json, write_json
from routevl.settings import RunSettings
from routevl.signals import stop_handlers_kept
from routevl.training.checkpoint import forget, held
from routevl.training.distributed import new_accelerator
from routevl.training.trainer import Diverged, Trainer, add_training_arguments

OF_RUNS = ("learning_rate", "seed")  # settings in which an experiment's runs may differ from its trials


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl tune`."""
    add_training_arguments(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="JSON", help="where the trials and the choice go")
    parser.add_argument(
        "--checkpoint", required=True, metavar="FOLDER", help="state of unfinished trials; resumed from when there"
    )
    run_settings.add_arguments(parser, several="learning_rate")


def run(arguments: Namespace) -> None:
    """Train with each learning rate in turn, and write down how each did and which did best.

    Raises:
        RoutevlError: wrong settings or inputs; training diverges with all of them.
        SystemExit: with `exit_status`, after a stop signal; the checkpoints are then on disk.
    """
    folder = Path(arguments.checkpoint)
    trials = []
    for rate in arguments.learning_rate:
        of_trial = {"learning_rate": rate, "checkpoint": folder / rate, "model": f"{arguments.output.stem} {rate}"}
        trials.append(Namespace(**vars(arguments) | of_trial))
    settings = [run_settings.from_arguments(trial) for trial in trials]
    accelerator = new_accelerator(settings[0])
    with held(folder, accelerator):
        tried = [_try(of_one, one, accelerator) for of_one, one in zip(settings, trials, strict=True)]
        if accelerator.is_main_process:
            write_json(arguments.output, chosen(tried, settings[0]))
            for one in trials:
                forget(one.checkpoint)
    if accelerator.is_main_process:
        forget(folder)
    accelerator.end_training()


def _try(settings: RunSettings, arguments: Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Train once; its best epoch's line with what it is judged by, or `diverged`."""
    trainer = Trainer(settings, arguments, accelerator)
    metric, more_is_better = trainer.task.selection
    judged = {"learning_rate": settings.learning_rate, "metric": metric, "more_is_better": more_is_better}
    try:
        with stop_handlers_kept():
            trainer.fit()
    except Diverged as error:
        accelerator.print(f"tune: {error}", flush=True)
        return judged | {"diverged": True}
    return judged | {"diverged": False, "learned": trainer.learned, **trainer.best_epoch}


def chosen(trials: list[dict[str, Any]], settings: RunSettings) -> dict[str, Any]:
    """The record of a choice: the trials, and the learning rate with the best validation score, of equals the first.

    Raises:
        RoutevlError: all of them diverged.
    """
    finished = [trial for trial in trials if not trial["diverged"]]
    if not finished:
        raise RoutevlError(f"training diverges with all of {len(trials)} learning rates: try lower ones (tuning.factors)")
    choose = max if finished[0]["more_is_better"] else min
    best = choose(finished, key=lambda trial: trial[trial["metric"]])
    return {"learning_rate": best["learning_rate"], "seed": settings.seed, "trials": trials, "settings": _shared(settings)}


def _shared(settings: RunSettings) -> dict[str, Any]:
    return {name: value for name, value in settings.as_record().items() if name not in OF_RUNS}


def read_tuned(path: str | Path) -> dict[str, Any]:
    """What `routevl tune` wrote. Raises RoutevlError where it is not that."""
    record = read_json(path)
    if not (isinstance(record, Mapping) and {"learning_rate", "seed", "trials", "settings"} <= record.keys()):
        raise RoutevlError(f"{path}: not what `routevl tune` writes")
    return dict(record)


def with_tuned(settings: RunSettings, path: str | Path) -> RunSettings:
    """The settings of a run with the learning rate that was chosen for it.

    Raises:
        RoutevlError: it was chosen for other settings.
    """
    record, own = read_tuned(path), _shared(settings)
    for name in own.keys() | record["settings"].keys():
        if own.get(name) != record["settings"].get(name):
            raise RoutevlError(f"{path}: chosen with {name} {record['settings'].get(name)!r}, but the run has {own.get(name)!r}")
    return replace(settings, learning_rate=record["learning_rate"])
