"""The order of training examples, a function of the seed and the epoch, and the loaders of batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader

from routevl.settings import RunSettings
from routevl.signals import ignore_stop_signals_of_others
from routevl.tasks.base import LENGTH, Task

if TYPE_CHECKING:
    from datasets import Dataset

BATCHES_PER_POOL = 50  # as transformers' group_by_length


def epoch_order(examples: Dataset, settings: RunSettings, epoch: int) -> numpy.ndarray:
    """The order in which an epoch takes its n training examples, batch after batch: int64 (n,)."""
    generator = numpy.random.default_rng([settings.seed, epoch])
    if settings.group_by_length:
        return grouped_by_length(lengths_of(examples), settings.batch_size, generator)
    return generator.permutation(len(examples))


def lengths_of(examples: Dataset) -> numpy.ndarray:
    """How many tokens each training example has: int64 (n,)."""
    return numpy.asarray(examples.with_format("numpy", columns=[LENGTH])[LENGTH][:])  # which makes no Python numbers of them


def grouped_by_length(lengths: numpy.ndarray, batch_size: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """A random order of n examples whose batches have texts of about one length, each: int64 (n,).

    The examples of each BATCHES_PER_POOL batches, drawn at random, are sorted by length among themselves; then the batches are
    shuffled, but for one that is smaller, which is the last: the longest texts of its pool, for they cost the least there.
    """
    order, size = generator.permutation(len(lengths)), batch_size * BATCHES_PER_POOL
    pools = [pool[numpy.argsort(lengths[pool], kind="stable")] for pool in numpy.split(order, range(size, len(order), size))]
    pools[-1], last = numpy.split(pools[-1], [len(pools[-1]) // batch_size * batch_size])
    batches = numpy.concatenate(pools).reshape(-1, batch_size)
    generator.shuffle(batches)
    return numpy.concatenate([batches.ravel(), last])


def share_of_padding(lengths: numpy.ndarray, order: numpy.ndarray, batch_size: int) -> float:
    """The share of an epoch's text positions that is padding, where each batch is padded to its longest text."""
    ordered = lengths[order]
    starts = range(0, len(ordered), batch_size)
    positions = sum(len(batch) * int(batch.max()) for batch in (ordered[start : start + batch_size] for start in starts))
    return 1 - int(ordered.sum()) / positions


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
    size = task.settings.batch_size
    order = epoch_order(examples, task.settings, epoch).tolist()
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
