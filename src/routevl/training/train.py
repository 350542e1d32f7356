"""Stage `train`: one run from its inputs to its weights and the test split's predictions."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

from routevl import settings as run_settings
from routevl.files import check_replaceable, lock
from routevl.options import at_least
from routevl.training.distributed import new_accelerator
from routevl.training.inputs import add_arguments as add_inputs
from routevl.training.predict import write_predictions
from routevl.training.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl train`."""
    add_inputs(parser)
    parser.add_argument("--prepared", metavar="FILE", help="what `routevl probe` found, for a method that prepares")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="where the trained weights go")
    parser.add_argument("--predictions", required=True, metavar="FOLDER", help="where the test split's predictions go")
    parser.add_argument(
        "--checkpoint", required=True, metavar="FOLDER", help="state of an unfinished run; resumed from when there"
    )
    parser.add_argument("--checkpoint-every", type=at_least(1), default=200, metavar="STEPS", help="steps between checkpoints")
    parser.add_argument("--log-every", type=at_least(1), default=10, metavar="STEPS", help="steps between logged losses")
    run_settings.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train, resuming where an earlier process stopped; then write the run's folder and the predictions.

    Raises:
        RoutevlError: wrong settings or inputs; the loss is no longer a finite number.
        SystemExit: with `exit_status`, after a stop signal; the checkpoint is then on disk.
    """
    settings = run_settings.from_arguments(arguments)
    check_replaceable(arguments.model, "run.json")  # before the work, not after it
    check_replaceable(arguments.predictions, "results.json")
    accelerator = new_accelerator(settings)
    model, predictions, checkpoint = Path(arguments.model), Path(arguments.predictions), Path(arguments.checkpoint)
    with lock(checkpoint / "lock") if accelerator.is_main_process else nullcontext() as held:
        if held:
            os.register_at_fork(after_in_child=held.close)  # else loaders hold it for seconds after this process was killed
        accelerator.wait_for_everyone()
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
                (predictions / "results.json").unlink(missing_ok=True)  # of another model, as from here on
            trainer.write_model(model)
        if not finished:
            trainer.stop.exit_at_once(f"train {trainer.run}: told to stop, training is done, predictions are not")
            write_predictions(trainer.task, accelerator, predictions, trainer.to_predict, arguments.workers)
        if accelerator.is_main_process:
            _forget(checkpoint)
    accelerator.end_training()


def _forget(checkpoint: Path) -> None:
    """Delete what training has written into the checkpoint's folder, and the folder unless it holds anything else."""
    for path in [checkpoint / "checkpoint.safetensors", *checkpoint.glob(".checkpoint.safetensors.*.tmp"), checkpoint / "lock"]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        checkpoint.rmdir()
