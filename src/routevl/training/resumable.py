"""What trains beside a run, a phase before it or a backbone that is derived, and can be killed: its steps and its checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from routevl.progress import progress
from routevl.signals import StopSignal, leave, stop_handlers_kept
from routevl.training.checkpoint import Checkpoint, refuse_other_names
from routevl.training.optimisation import Optimisation

OWN = "own/"  # in a checkpoint, before the names of what is kept beside the model and its optimisation
Batch = TypeVar("Batch")


class State(Protocol):
    """What the next step depends on, beside the model, its optimisation and the random generators."""

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`."""


class AllOf(nn.Module):
    """A model all of which is trained, as a checkpoint reads it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters, detached, by name."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def resumed_steps(
    batches_from: Callable[[int], Iterable[Batch]],
    total: int,
    checkpoint: Checkpoint,
    checkpoint_every: int,
    model: Any,
    optimisation: Optimisation,
    label: str,
    own: State | None = None,
    record: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> Iterator[Batch]:
    """The batches of so many steps, of which the caller makes one with each. The process can be killed in them and another begin
    again, which leaves out what its last checkpoint has seen, and ends in the same bits.

    Args:
        batches_from: the batches from a step on, counted from 0.
        total: how many they are in all.
        checkpoint: written after every `checkpoint_every` steps, after the last one, and after a stop signal.
        model: as `Checkpoint.save`.
        label: before what is said.
        own: kept in the checkpoint too.
        record: the same, JSON.
        resume: whether what the checkpoint has is of these steps.

    Raises:
        RoutevlError: the checkpoint is damaged or of another run.
        SystemExit: with `exit_status`, after a stop signal; the checkpoint is then on disk.
    """
    stop, done = StopSignal(), 0

    def take(tensors: dict[str, Tensor], found: dict[str, Any]) -> None:
        nonlocal done
        done, names = found["step"], [name for name in sorted(tensors) if name.startswith(OWN)]
        kept = {name.removeprefix(OWN): tensors.pop(name) for name in names}
        refuse_other_names(kept, own.tensors() if own else {})
        if own:
            own.restore(kept)

    with stop_handlers_kept():
        stop.remember()
        if resume and checkpoint.resume(model, optimisation, take):
            print(f"{label}: resuming from step {done} of {total}", file=sys.stderr, flush=True)
        for step, batch in enumerate(progress(batches_from(done), total - done, label), start=done + 1):
            yield batch
            if stop.number or step == total or step % checkpoint_every == 0:
                kept = {OWN + name: tensor for name, tensor in own.tensors().items()} if own else {}
                checkpoint.save(model, optimisation, kept, {**(record or {}), "step": step})
            if stop.number:
                leave(stop.number, f"{label}: told to stop, checkpoint at step {step}")
