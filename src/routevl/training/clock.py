"""How long training takes. Kept apart from the metrics, which are the same in every repetition."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import torch


class Clock:
    """The time of all steps so far; on a GPU by its own clock, for a step goes on there after Python has passed it."""

    def __init__(
        self, device: torch.device, seconds: float = 0.0, step_seconds: list[float] | None = None, samples: int = 0
    ) -> None:
        self.device = device
        self.seconds = seconds
        self.step_seconds = step_seconds or []
        self.samples = samples
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
        return {"seconds": self.seconds, "step_seconds": self.step_seconds, "samples": self.samples}

    def summary(self) -> dict[str, Any]:
        """What timing.json holds; memory in MiB, of the GPU where there is one, else of this process."""
        self._read_events()
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {
            "train_seconds": round(self.seconds, 3),
            "steps": len(self.step_seconds),
            "step_ms_median": round(1000 * statistics.median(self.step_seconds), 3),
            "samples_per_second": round(self.samples / self.seconds, 1),
            "peak_memory_mb": round(peak, 1),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        }
