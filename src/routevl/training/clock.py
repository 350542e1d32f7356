"""How long training takes. Kept apart from the metrics, which are the same in every repetition."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import torch


class Clock:
    """The time of all steps so far."""

    def __init__(self, seconds: float = 0.0, step_seconds: list[float] | None = None, samples: int = 0) -> None:
        self.seconds = seconds
        self.step_seconds = step_seconds or []
        self.samples = samples

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def stop(self, samples: int) -> None:
        """It ends; it had so many examples."""
        self.step_seconds.append(round(time.perf_counter() - self._started, 6))
        self.seconds += self.step_seconds[-1]
        self.samples += samples

    def as_record(self) -> dict[str, Any]:
        """What `Clock(**record)` resumes from."""
        return {"seconds": self.seconds, "step_seconds": self.step_seconds, "samples": self.samples}

    def summary(self, device: torch.device) -> dict[str, Any]:
        """What timing.json holds; memory in MiB, of the GPU where there is one, else of this process."""
        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {
            "train_seconds": round(self.seconds, 3),
            "steps": len(self.step_seconds),
            "step_ms_median": round(1000 * statistics.median(self.step_seconds), 3),
            "samples_per_second": round(self.samples / self.seconds, 1),
            "peak_memory_mb": round(peak, 1),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        }
