"""The batches of training examples, a function of the seed and the epoch, and their loaders."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor

from routevl.signals import ignore_stop_signals_of_others
from routevl.tasks.base import LENGTH, Task

if TYPE_CHECKING:
    from datasets import Dataset

BATCHES_PER_POOL = 50  # as transformers' group_by_length


def epoch_batches(task: Task, examples: Dataset, epoch: int) -> list[numpy.ndarray]:
    """Which of n training examples each batch of an epoch has, int64 (m,) each; every example is in one of them.

    Those of each part of the task (`Task.parts`) are put into an order, and batches are cut off it, the last one smaller. The
    batches of several parts take turns.
    """
    generator = numpy.random.default_rng([task.settings.seed, epoch])
    lengths, of_parts = lengths_of(examples), []
    for part, size in task.parts(examples):
        if task.settings.group_by_length:
            order = grouped_by_length(lengths[part], size, generator)
        else:
            order = generator.permutation(len(part))
        of_parts.append(numpy.split(part[order], range(size, len(part), size)))
    if len(of_parts) == 1:
        return of_parts[0]
    taken = [iter(of_part) for of_part in of_parts]
    return [next(taken[number]) for number in turns([len(of_part) for of_part in of_parts], epoch)]


def turns(batches: Sequence[int], epoch: int) -> list[int]:
    """Which part each batch of an epoch is of, by its number, where part n has `batches[n]`: the same for every seed."""
    order = [number for number, count in enumerate(batches) for _ in range(count)]
    random.Random(epoch).shuffle(order)
    return order[::-1]  # CLIP-BART's original takes them from the end


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


def share_of_padding(lengths: numpy.ndarray, batches: Sequence[numpy.ndarray]) -> float:
    """The share of an epoch's text positions that is padding, where each batch is padded to its longest text."""
    positions = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / positions


class ShareOfBatches:
    """A batch sampler: one process's share of each batch.

    The processes take a batch's examples in turn. One that a batch has no example for gets the first, so that all have as many
    batches; it must not count.
    """

    drop_last = False

    def __init__(self, batches: Sequence[numpy.ndarray], process: int, processes: int) -> None:
        self.batches = batches
        self.process = process
        self.processes = processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield (batch[self.process :: self.processes] if self.process < len(batch) else batch[:1]).tolist()


def training_batches(
    task: Task, examples: Dataset, accelerator: Accelerator, workers: int, batches: Sequence[numpy.ndarray]
) -> Any:
    """Those of `epoch_batches` that are given, this process's share of each."""
    own = ShareOfBatches(batches, accelerator.process_index, accelerator.num_processes)
    return data_loader(task, examples, accelerator, workers, batch_sampler=own)


def first_batch(task: Task, examples: Dataset, accelerator: Accelerator) -> dict[str, Tensor]:
    """The first `batch_size` of some examples, as a batch on the accelerator's device."""
    return next(iter(data_loader(task, examples, accelerator, 0, batch_size=task.settings.batch_size)))


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
