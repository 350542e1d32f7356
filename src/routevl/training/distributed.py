"""Several processes that make the steps of one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from routevl.errors import RoutevlError
from routevl.settings import RunSettings


def new_accelerator(settings: RunSettings) -> Accelerator:
    """accelerate's view of the devices and processes at hand: a GPU for each process, else the CPU for all.

    Raises:
        RoutevlError: several processes were started on this machine, but it has GPUs and not enough of them.
    """
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < processes:
        raise RoutevlError(f"{processes} processes: each needs a GPU of its own, but there are {gpus}")
    # processes can wait long for the one that waits for the lock, or has the slowest captions; dead ones are seen by the launcher
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    precision = "bf16" if settings.precision == "bfloat16" else "no"
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])


def average(
    accelerator: Accelerator, parameters: Sequence[nn.Parameter], losses: Mapping[str, Tensor], count: Tensor, examples: int
) -> dict[str, Tensor]:
    """Give all processes the gradients of the losses over the whole batch of `examples`, and return these losses.

    Each process has means over `count` terms of its own, which weigh as much; a process without an example weighs nothing. The
    sum is over one flat tensor: DDP would sum in buckets that it regroups after its first step, so that from three processes on a
    resumed run would have other last bits. A parameter that no process has a gradient for keeps none.
    """
    losses = {name: loss.detach() for name, loss in losses.items()}
    if accelerator.num_processes == 1:
        return losses
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=count.device)
    means = torch.cat(
        [*(g.reshape(-1) for g in gradients), torch.stack([*losses.values(), torch.ones_like(count, dtype=there.dtype)])]
    )
    sums = accelerator.reduce(means * count * (accelerator.process_index < examples), "sum")
    anywhere = accelerator.reduce(there, "sum")
    averaged, offset = sums / sums[-1], 0
    for parameter, gradient, found in zip(parameters, gradients, anywhere.tolist(), strict=True):
        parameter.grad = averaged[offset : offset + gradient.numel()].view_as(gradient).clone() if found else None
        offset += gradient.numel()
    return dict(zip(losses, averaged[offset:-1], strict=True))


def greatest(accelerator: Accelerator, value: int) -> int:
    """The greatest of the processes' values, which all ask for at the same points."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())
