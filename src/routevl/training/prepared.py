"""The phase before training: stage `probe`, for methods that look at the model and the data first, and its one file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from routevl import settings as run_settings
from routevl.errors import RoutevlError
from routevl.files import atomic_file, sha256_of
from routevl.methods.base import Method, NoOptions
from routevl.methods.selective import Full
from routevl.tasks.base import Task
from routevl.training.distributed import new_accelerator
from routevl.training.inputs import add_arguments as add_inputs
from routevl.training.inputs import load_task
from routevl.training.optimisation import prepare_torch
from routevl.training.order import data_loader, epoch_batches, training_batches

PREPARED = "prepared.safetensors"  # in the folder of a run whose method prepares: what it was built with


class Batches:
    """What a phase before training looks at: batches, collated and on the model's device. Iterating gives the first epoch's.

    Args:
        task: of the run.
        workers: processes that load batches.
    """

    def __init__(self, task: Task, accelerator: Accelerator, workers: int) -> None:
        self.task, self.accelerator, self.workers = task, accelerator, workers
        self.examples = task.training_examples()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.of_epoch(0))

    def of_epoch(self, epoch: int) -> Any:
        """The training batches of an epoch, in the order of training; they have a length."""
        batches = epoch_batches(self.task, self.examples, epoch)
        return training_batches(self.task, self.task.of_epoch(self.examples, epoch), self.accelerator, self.workers, batches)

    def validation(self) -> dict[str, Tensor]:
        """The first `batch_size` examples of the validation split."""
        size = self.task.settings.batch_size
        return next(iter(data_loader(self.task, self.task.examples("val"), self.accelerator, 0, batch_size=size)))


def bare(method: Method) -> Method:
    """What stands in for a method while it prepares: the text model as it is, all of it trainable."""
    full = Full(NoOptions())
    full.needs, full.refuses = method.needs, method.refuses
    return full


def load_prepared(method: Method, path: str | Path | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a method's phase before training found, and its fingerprint among a run's inputs; nothing of a method without one.

    Raises:
        RoutevlError: the file is missing or unreadable, or the method has no such phase.
    """
    if not method.prepares():
        if path is not None:
            raise RoutevlError(f"--prepared {path}: the method has no phase before training")
        return {}, {}
    if path is None:
        raise RoutevlError("the method prepares before training: give what `routevl probe` wrote as --prepared")
    try:
        return load_file(path), {"prepared": sha256_of(path)}
    except (OSError, SafetensorError) as error:
        raise RoutevlError(f"{path}: not what `routevl probe` writes ({error})") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl probe`."""
    add_inputs(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="where the result goes, a safetensors file")
    run_settings.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Let a run's method look at the bare text model with the task's head and the training split, and keep what it found.

    Raises:
        RoutevlError: wrong settings or inputs, or a method without such a phase.
    """
    settings = run_settings.from_arguments(arguments)
    method = settings.new_method()
    if not method.prepares():
        raise RoutevlError(f"the method {settings.method} has no phase before training")
    accelerator = new_accelerator(settings)
    prepare_torch(arguments.threads)
    set_seed(settings.seed)
    task, _ = load_task(settings, bare(method), {}, arguments)
    task.model = accelerator.prepare_model(task.model, evaluation_mode=True)
    tensors = method.prepare(task, Batches(task, accelerator, arguments.workers))
    with atomic_file(arguments.output) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
