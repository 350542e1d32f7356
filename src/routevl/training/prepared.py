"""The phase before training: stage `probe`, for methods that look at the model and the data first, and its one file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
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
from routevl.methods.base import Method
from routevl.methods.selective import Full
from routevl.options import add_checkpoint_every, of_each_run
from routevl.settings import RunSettings
from routevl.tasks.base import Task
from routevl.training.checkpoint import Checkpoint, forget, held
from routevl.training.distributed import new_accelerator
from routevl.training.inputs import add_arguments as add_inputs
from routevl.training.inputs import fingerprint_of_data, load_task
from routevl.training.optimisation import Optimisation, prepare_torch
from routevl.training.order import epoch_batches, first_batch, training_batches
from routevl.training.resumable import State, resumed_steps

PREPARED = "prepared.safetensors"  # in the folder of a run whose method prepares: what it was built with


class Batches:
    """What a phase before training looks at: batches, collated and on the model's device. Iterating gives the first epoch's.

    Args:
        task: of the run.
        workers: processes that load batches.
        checkpoint: of `steps`, which writes it after every `checkpoint_every` of them.
    """

    def __init__(self, task: Task, accelerator: Accelerator, workers: int, checkpoint: Checkpoint, checkpoint_every: int) -> None:
        self.task, self.accelerator, self.workers = task, accelerator, workers
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.examples = task.training_examples()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.of_epoch(0))

    def of_epoch(self, epoch: int, first: int = 0) -> Any:
        """The training batches of an epoch from the `first` on, in the order of training; they have a length."""
        batches = epoch_batches(self.task, self.examples, epoch)[first:]
        return training_batches(self.task, self.task.of_epoch(self.examples, epoch), self.accelerator, self.workers, batches)

    def validation(self) -> dict[str, Tensor]:
        """The first `batch_size` examples of the validation split."""
        return first_batch(self.task, self.task.examples("val"), self.accelerator)

    def steps(self, epochs: int, optimisation: Optimisation, own: State) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The batches of several epochs, each with its epoch's number, for a phase that trains on one after another.

        They are `resumed_steps`, with their errors.

        Args:
            optimisation: of the task's model.
        """
        in_epoch = len(self.of_epoch(0))

        def batches_from(step: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
            first = {step // in_epoch: step % in_epoch}  # batch of the epoch that is gone on with
            epochs_left = range(step // in_epoch, epochs)
            return ((epoch, batch) for epoch in epochs_left for batch in self.of_epoch(epoch, first.get(epoch, 0)))

        return resumed_steps(
            batches_from, epochs * in_epoch, self.checkpoint, self.checkpoint_every, self.task.model, optimisation, "probe", own
        )


def bare(method: Method) -> Method:
    """What stands in for a method while it prepares: the text model as it is, all of it trainable."""
    full = Full(Full.Options())
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
    of_each = {"nargs": "+", "required": True}
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the result goes, a safetensors file; one for each seed, as of what follows",
        **of_each,
    )
    parser.add_argument(
        "--checkpoint", metavar="FOLDER", help="state of an unfinished search; resumed from when there", **of_each
    )
    add_checkpoint_every(parser)
    run_settings.add_arguments(parser, several="seed")


def run(arguments: argparse.Namespace) -> None:
    """Let the method of each seed's run look at the bare text model with the task's head and the training split, and keep what it
    found.

    Raises:
        RoutevlError: wrong settings or inputs, or a method without such a phase; see also `Batches.steps`.
        SystemExit: as `Batches.steps`.
    """
    runs = of_each_run(arguments, "seed", "output", "checkpoint")
    settings = [run_settings.from_arguments(one) for one in runs]
    if not settings[0].new_method().prepares():
        raise RoutevlError(f"the method {settings[0].method} has no phase before training")
    accelerator = new_accelerator(settings[0])
    prepare_torch(arguments.threads)
    with ExitStack() as locks:
        for one, of_one in zip(runs, settings, strict=True):
            locks.enter_context(held(Path(one.checkpoint), accelerator))
            _prepare(of_one, one, accelerator)
        for one in runs:  # not before: Snakemake deletes the outputs of a job that ends before its last run
            forget(Path(one.checkpoint))


def _prepare(settings: RunSettings, arguments: argparse.Namespace, accelerator: Accelerator) -> None:
    method = settings.new_method()
    set_seed(settings.seed)
    task, inputs = load_task(settings, bare(method), {}, arguments)
    identity = settings.as_record() | inputs | {"data": fingerprint_of_data(task), "threads": arguments.threads}
    task.model = accelerator.prepare_model(task.model, evaluation_mode=True)
    checkpoint = Checkpoint(Path(arguments.checkpoint), identity, accelerator)
    tensors = method.prepare(task, Batches(task, accelerator, arguments.workers, checkpoint, arguments.checkpoint_every))
    with atomic_file(arguments.output) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
