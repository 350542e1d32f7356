"""What the stages `pretrain-text` and `pretrain-vision` share: the demo's own small backbones, each made of one modality alone.

Fine-tuning then has to learn how images and words belong together, as with the paper's backbones. Pretraining runs on the CPU:
the models are tiny, and the same seed and thread count give the same bits on one machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from routevl.backbones.folder import PRETRAINING
from routevl.errors import RoutevlError
from routevl.files import write_json
from routevl.options import at_least
from routevl.progress import progress
from routevl.training.optimisation import Optimisation, prepare_torch
from routevl.training.order import grouped_by_length

HELD_OUT = 1000  # sentences or scenes that the quality is measured on
TRAINING_DATA, HELD_OUT_DATA, TRAINING_ORDER, NOISE = range(4)  # independent random streams of one seed
WARM_UP = 0.1  # of all steps
WEIGHT_DECAY = 0.01


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both stages."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the backbone's folder")
    parser.add_argument("--seed", type=at_least(0), required=True)
    parser.add_argument("--epochs", type=at_least(1), required=True, help="passes over the training data")
    parser.add_argument("--hidden-size", type=at_least(1), default=128)
    parser.add_argument("--layers", type=at_least(1), default=4)
    parser.add_argument("--heads", type=at_least(1), default=4)
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="highest of the one-cycle schedule")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")


def arguments_of(add_arguments: Callable[[argparse.ArgumentParser], None], options: Mapping[str, Any]) -> argparse.Namespace:
    """A stage's arguments, which its `add_arguments` declares, by the options that a configuration has under `pretrain`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return parser.parse_args([*words, "--output=none"])


def prepare(arguments: argparse.Namespace) -> None:
    """Make torch ready: threads, deterministic kernels, seed.

    Raises:
        RoutevlError: the hidden size is not a multiple of the heads, or the learning rate is not positive.
    """
    if not arguments.learning_rate > 0:
        raise RoutevlError(f"--learning-rate {arguments.learning_rate}: expected a positive number")
    if arguments.hidden_size % arguments.heads:
        raise RoutevlError(f"--hidden-size {arguments.hidden_size} is not a multiple of --heads {arguments.heads}")
    prepare_torch(arguments.threads)
    torch.manual_seed(arguments.seed)


def random_generator(seed: int, stream: int) -> numpy.random.Generator:
    """A numpy generator for one use (`stream`) of a seed."""
    return numpy.random.default_rng([seed, stream])


def train(
    parameters: Iterable[nn.Parameter],
    lengths: Sequence[int],
    loss_of: Callable[[list[int]], Tensor],
    arguments: argparse.Namespace,
    description: str,
    steps_of: Callable[[list[list[int]], Optimisation], Iterable[list[int]]] | None = None,
) -> None:
    """Minimise the loss over all epochs: AdamW, one-cycle learning rate, gradient norm at most 1.

    Args:
        lengths: of the training examples.
        loss_of: indices of a batch's examples -> their loss.
        steps_of: the batches, and their optimisation -> those that are left to a process that goes on; None: all.

    Raises:
        RoutevlError: the loss became infinite or not a number.
    """
    batches = list(batch_indices(lengths, arguments.batch_size, arguments.epochs, arguments.seed))
    total = max(len(batches), 3)
    warm_up = max(WARM_UP, 2 / total)  # torch divides by the lengths of warm-up and decay, less a step
    optimisation = Optimisation(
        [{"params": list(parameters), "lr": arguments.learning_rate}],
        WEIGHT_DECAY,
        lambda optimiser: OneCycleLR(
            optimiser, max_lr=arguments.learning_rate, total_steps=total, pct_start=warm_up, cycle_momentum=False
        ),
        max_grad_norm=1.0,
    )
    for batch in steps_of(batches, optimisation) if steps_of else progress(batches, len(batches), description):
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise RoutevlError(f"{description}: the loss is {loss.item()}; set a lower --learning-rate")
        loss.backward()
        optimisation.step()


def batch_indices(lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """The members of each batch: a new order in every epoch, like lengths together to save padding."""
    generator = random_generator(seed, TRAINING_ORDER)
    for _ in range(epochs):
        order = grouped_by_length(numpy.array(lengths), batch_size, generator).tolist()
        yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def write_record(folder: Path, stage: str, quality: dict[str, float], arguments: argparse.Namespace) -> None:
    """Write pretraining.json, the held-out quality and the settings, into the backbone's folder; print the quality."""
    settings: dict[str, Any] = {
        name: value
        for name, value in vars(arguments).items()
        if isinstance(value, int | float | str) and name not in ("output", "stage")
    }
    write_json(folder / PRETRAINING, {"stage": stage, "held_out": quality, "settings": settings})
    print(f"{stage}: held-out " + ", ".join(f"{name} {value:.4g}" for name, value in quality.items()))
