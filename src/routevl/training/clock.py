"""How long training takes. Kept apart from the metrics, which are the same in every repetition."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """The time of all steps so far; on a GPU by its own clock, for a step goes on there after Python has passed it."""

    def __init__(
        self,
        device: torch.device,
        seconds: float = 0.0,
        step_seconds: list[float] | None = None,
        samples: int = 0,
        validation_seconds: float = 0.0,
        validated: int = 0,
    ) -> None:
        self.device = device
        self.seconds = seconds
        self.step_seconds = step_seconds or []
        self.samples = samples
        self.validation_seconds = validation_seconds
        self.validated = validated
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of steps that have not been read

    def start(self) -> None:
        """A step begins."""
        self._started = self._now()

    def stop(self, samples: int) -> None:
        """It ends; it had so many examples."""
        self.samples += samples
        if self.device.type == "cuda":
            self._events.append((self._started, self._now()))
        else:
            self._add(self._now() - self._started)

    @contextmanager
    def validation(self, examples: int) -> Iterator[None]:
        """A pass over so many validation examples, which ends with its results in memory; not counted where it raises."""
        started = time.perf_counter()
        yield
        self.validation_seconds += time.perf_counter() - started
        self.validated += examples

    def _now(self) -> Any:
        """Seconds; of a GPU an event that it will reach."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, seconds: float) -> None:
        self.step_seconds.append(round(seconds, 6))
        self.seconds += self.step_seconds[-1]

    def _read_events(self) -> None:
        for start, end in self._events:
            end.synchronize()
            self._add(start.elapsed_time(end) / 1000)
        self._events = []

    def as_record(self) -> dict[str, Any]:
        """What `Clock(device, **record)` resumes from."""
        self._read_events()
        return {
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "samples": self.samples,
            "validation_seconds": self.validation_seconds,
            "validated": self.validated,
        }

    def summary(self) -> dict[str, Any]:
        """What models/<run>/timing.json holds."""
        self._read_events()
        return {
            "train_seconds": round(self.seconds, 3),
            "steps": len(self.step_seconds),
            "step_ms_median": round(1000 * statistics.median(self.step_seconds), 3),
            "samples_per_second": round(self.samples / self.seconds, 1),
            "validation_seconds": round(self.validation_seconds, 3),
            "validated": self.validated,
            **usage_of(self.device),
        }


def usage_of(device: torch.device) -> dict[str, Any]:
    """The peak memory so far in MiB, of the GPU where there is one, else of this process; and the device's name."""
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"peak_memory_mb": round(peak, 1), "device": torch.cuda.get_device_name() if on_gpu else "cpu"}
