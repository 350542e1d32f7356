"""Stage `train`: runs from their inputs to their weights and the test split's predictions."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator

from routevl import settings as run_settings
from routevl.files import check_replaceable
from routevl.options import of_each_run
from routevl.settings import RunSettings
from routevl.signals import stop_handlers_kept
from routevl.training.checkpoint import forget, held
from routevl.training.distributed import new_accelerator
from routevl.training.predict import write_predictions
from routevl.training.trainer import Trainer, add_training_arguments
from routevl.training.tune import with_tuned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl train`."""
    add_training_arguments(parser, nargs="+")
    of_each = {"nargs": "+", "required": True, "metavar": "FOLDER"}
    parser.add_argument("--model", help="where the trained weights go; one for each seed, as of what follows", **of_each)
    parser.add_argument("--predictions", help="where the test split's predictions go", **of_each)
    parser.add_argument("--checkpoint", help="state of an unfinished run; resumed from when there", **of_each)
    parser.add_argument(
        "--tuned", metavar="JSON", help="what `routevl tune` chose: a learning rate that takes the place of --learning-rate"
    )
    run_settings.add_arguments(parser, several="seed")


def run(arguments: argparse.Namespace) -> None:
    """Train a run of each seed, one after another and independently of each other, resuming where an earlier process stopped; of
    each write the folder and the predictions.

    Raises:
        RoutevlError: wrong settings or inputs; the loss is no longer a finite number.
        SystemExit: with `exit_status`, after a stop signal; the checkpoint is then on disk.
    """
    runs = runs_in(arguments)
    settings = [run_settings.from_arguments(one) for one in runs]
    if arguments.tuned is not None:
        settings = [with_tuned(of_one, arguments.tuned) for of_one in settings]
    for one in runs:
        check_replaceable(one.model, "run.json")  # before the work, not after it
        check_replaceable(one.predictions, "results.json")
    accelerator = new_accelerator(settings[0])
    with ExitStack() as locks:
        for one, of_one in zip(runs, settings, strict=True):
            locks.enter_context(held(Path(one.checkpoint), accelerator))
            with stop_handlers_kept():
                _train(of_one, one, accelerator)
        # Not before: Snakemake deletes the outputs of a job that ends before its last run.
        if accelerator.is_main_process:
            for one in runs:
                forget(Path(one.checkpoint))
    accelerator.end_training()


def runs_in(arguments: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each run, and as `job` the folder of the first of them.

    Raises:
        RoutevlError: as `of_each_run`.
    """
    prepared = [] if arguments.prepared is None else ["prepared"]
    runs = of_each_run(arguments, "seed", "model", "predictions", "checkpoint", *prepared)
    for one in runs:
        one.job = arguments.model[0]
    return runs


def _train(settings: RunSettings, arguments: argparse.Namespace, accelerator: Accelerator) -> None:
    model, predictions = Path(arguments.model), Path(arguments.predictions)
    trainer = Trainer(settings, arguments, accelerator)
    # a job that waited for the lock finds what the other one has made, one that was killed what itself has
    trained = trainer.load_model(model)
    finished = trained and (predictions / "results.json").exists()
    accelerator.wait_for_everyone()
    if finished and accelerator.is_main_process:
        print(f"train {trainer.run}: {model} and {predictions} are finished: delete them to train again", file=sys.stderr)
    if not trained:
        trainer.fit()
        if accelerator.is_main_process:
            for name in ("timing.json", "results.json"):  # of another model, as from here on; the last one marks the folder
                (predictions / name).unlink(missing_ok=True)
        trainer.write_model(model)
    if not finished:
        trainer.stop.exit_at_once(f"train {trainer.run}: told to stop, training is done, predictions are not")
        write_predictions(trainer.task, accelerator, predictions, trainer.to_predict, arguments.workers)
