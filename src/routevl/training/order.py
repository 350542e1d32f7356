"""The order of training examples, a function of the seed and the epoch, and the loaders of batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader

from routevl.signals import ignore_stop_signals_of_others
from routevl.tasks.base import Task


class EpochBatches:
    """A batch sampler: one process's share of each batch of `batch_size` examples in a given order, the last batch smaller.

    The processes take a batch's examples in turn. One that the last batch has no example for gets the first, so that all have as
    many batches; it must not count.
    """

    drop_last = False

    def __init__(self, order: list[int], batch_size: int, process: int, processes: int) -> None:
        self.order = order
        self.batch_size = batch_size
        self.process = process
        self.processes = processes

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.order), self.batch_size):
            batch = self.order[start : start + self.batch_size]
            yield batch[self.process :: self.processes] or batch[:1]


def training_batches(task: Task, examples: Any, accelerator: Accelerator, workers: int, epoch: int, first: int = 0) -> Any:
    """One epoch's batches from number `first` on, this process's share of each."""
    order = numpy.random.default_rng([task.settings.seed, epoch]).permutation(len(examples)).tolist()
    size = task.settings.batch_size
    batches = EpochBatches(order[first * size :], size, accelerator.process_index, accelerator.num_processes)
    return data_loader(task, examples, accelerator, workers, batch_sampler=batches)


def data_loader(task: Task, examples: Any, accelerator: Accelerator, workers: int, **options: Any) -> Any:
    """Batches of `examples`, collated by the task, on the accelerator's device."""
    loader = torch.utils.data.DataLoader(
        examples,
        collate_fn=task.collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),  # its own, so that making a loader does not advance the global one
        worker_init_fn=ignore_stop_signals_of_others,
        **options,
    )
    # for one process: where there are several, the options or the examples are this one's share already
    return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)
