"""Stage `predict`: a split's predictions by a trained run."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from routevl.errors import RoutevlError
from routevl.files import atomic_folder, check_replaceable, read_json, write_json
from routevl.progress import progress
from routevl.settings import RunSettings
from routevl.tasks.base import Task
from routevl.training.clock import usage_of
from routevl.training.distributed import new_accelerator
from routevl.training.inputs import add_arguments as add_inputs
from routevl.training.inputs import load_task
from routevl.training.optimisation import prepare_torch
from routevl.training.order import data_loader
from routevl.training.prepared import PREPARED, load_prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl predict`."""
    add_inputs(parser)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a trained run")
    parser.add_argument(
        "--split",
        default="test",
        help="split of --data to predict: its questions.json, or images.json for captioning; no answers or captions are needed",
    )
    parser.add_argument("--predictions", required=True, metavar="FOLDER", help="where results.json goes")


def run(arguments: argparse.Namespace) -> None:
    """Predict a split with a trained run.

    It needs the run's backbones, but not its number of threads or processes: nothing is trained on from here, and other last bits
    of the logits change no prediction but where two are equal to these bits.

    Raises:
        RoutevlError: as `load_trained`.
    """
    check_replaceable(arguments.predictions, "results.json")
    task, accelerator = load_trained(arguments)
    write_predictions(task, accelerator, Path(arguments.predictions), task.to_predict(arguments.split), arguments.workers)
    accelerator.end_training()


def load_trained(arguments: argparse.Namespace) -> tuple[Task, Accelerator]:
    """The task of a trained run with its weights, on the accelerator's device, from the inputs and the `model` of a command line.

    Raises:
        RoutevlError: not a trained run, or one of another text or vision model than those given.
    """
    prepare_torch(arguments.threads)
    folder = Path(arguments.model)
    record = read_json(folder / "run.json")
    if not (isinstance(record, dict) and all(isinstance(record.get(name), dict) for name in ("settings", "inputs"))):
        raise RoutevlError(f"{folder / 'run.json'}: not the record of a trained run")
    settings = RunSettings.from_record(record["settings"], str(folder / "run.json"))
    accelerator = new_accelerator(settings)
    method = settings.new_method()
    prepared, of_prepared = load_prepared(method, folder / PREPARED if method.prepares() else None)
    task, inputs = load_task(settings, method, prepared, arguments)
    for name, fingerprint in (inputs | of_prepared).items():
        trained = record["inputs"].get(name, "none")
        if trained != fingerprint:
            files = {"answers": f"{arguments.data}/answers.json", "prepared": folder / PREPARED}
            raise RoutevlError(
                f"{arguments.model}: an adapter of another model: it was trained with the {name} of fingerprint "
                f"{trained[:12]}, but {files.get(name) or getattr(arguments, name)} has {fingerprint[:12]}"
            )
    task.model.load(folder)
    task.model.to(accelerator.device)
    return task, accelerator


def write_predictions(task: Task, accelerator: Accelerator, folder: Path, items: Any, workers: int) -> None:
    """Predict items with the task's model and write its predictions in the official format, in the order of the items; and
    timing.json, how long it took all processes together."""
    model = task.model.eval()
    with accelerator.split_between_processes(items) as share:  # in their order, which gathering keeps
        loader = data_loader(task, share, accelerator, workers, batch_size=task.settings.prediction_batch_size)
    results = []
    started = time.perf_counter()
    with torch.inference_mode(), accelerator.autocast():
        for batch in progress(loader, len(loader), f"predict {folder.name}"):
            results += task.predict(model, batch)
    results = gather_object(results)
    timing = {"prediction_seconds": round(time.perf_counter() - started, 3), "predicted": len(results)}
    if accelerator.is_main_process:
        with atomic_folder(folder, "results.json") as temporary:
            task.write_predictions(results, temporary)
            write_json(temporary / "timing.json", timing | usage_of(accelerator.device))
