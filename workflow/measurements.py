"""What finished jobs tell of speed and memory, for `make plan`: those of the results first, else those of their rehearsal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from routevl.features.extract import TIMING
from routevl.files import read_json
from routevl.provenance.manifest import manifest_paths
from routevl.rehearsal import FOLDER, rehearsed_sheet
from routevl.sheet import Experiment, runs_of

MEASURED, REHEARSED, ESTIMATED = SOURCES = ("measured", "rehearsed", "estimated")
Timing = dict[str, Any]


class Measurements:
    """Of the results of a configuration, and of their rehearsal."""

    def __init__(self, results: Path, experiments: list[Experiment]) -> None:
        sheets = {MEASURED: experiments, REHEARSED: rehearsed_sheet(experiments)}
        self.folders = {MEASURED: results, REHEARSED: results / FOLDER}
        self.timings = {source: _timings(self.folders[source], sheets[source]) for source in sheets}

    def run(self, experiment: Experiment, value: Callable[[Timing], float | None]) -> tuple[str, float] | None:
        """(source, median) of a value over the runs that are like the experiment's but for epochs and seed; where there are none,
        over those of its task and text backbone. None where no run has the value."""
        for key in _keys(experiment):
            for source, by_key in self.timings.items():
                if values := [found for timing in by_key.get(key, ()) if (found := value(timing)) is not None]:
                    return source, statistics.median(values)
        return None

    def every_run(self, value: Callable[[Timing], float | None]) -> tuple[str, list[float]] | None:
        """(source, values) of all runs of the results, else of the rehearsal."""
        for source, by_key in self.timings.items():
            if values := [found for key in by_key if len(key) == 1 for t in by_key[key] if (found := value(t)) is not None]:
                return source, values
        return None

    def extraction(self, vision: str) -> tuple[str, float] | None:
        """(source, seconds per image) of a vision backbone's shards, as their logs have it."""
        for source, folder in self.folders.items():
            found = [TIMING.findall(log.read_text("utf-8")) for log in (folder / "logs/extract").glob(f"{vision}-[0-9]*.log")]
            images = sum(int(images) for lines in found for images, _ in lines)
            if images:
                return source, sum(float(seconds) for lines in found for _, seconds in lines) / images
        return None

    def memory(self, rule: str) -> tuple[str, float] | None:
        """(source, MB) of the largest process of all jobs of a rule."""
        for source, folder in self.folders.items():
            if peaks := [read_json(path)["peak_memory_mb"] for path in manifest_paths(folder) if path.parent.name == rule]:
                return source, max(peaks)
        return None


def _timings(results: Path, experiments: list[Experiment]) -> dict[tuple[str, ...], list[Timing]]:
    """What timing.json of the model and of the predictions, and run.json, say of each finished run; by both of its keys."""
    found: dict[tuple[str, ...], list[Timing]] = {}
    for run, (experiment, _) in runs_of(experiments).items():
        if files := list(_files(results, run)):
            timing = {name: value for file in files for name, value in file.items()}
            for key in _keys(experiment):
                found.setdefault(key, []).append(timing)
    return found


def _files(results: Path, run: str) -> Iterator[Mapping[str, Any]]:
    model, predictions = results / "models" / run, results / "predictions" / run / "timing.json"
    if (model / "run.json").exists():
        yield {"batch_size": read_json(model / "run.json")["settings"]["batch_size"]} | read_json(model / "timing.json")
    if predictions.exists():
        yield read_json(predictions)


def _keys(experiment: Experiment) -> tuple[tuple[str, ...], ...]:
    alike = replace(experiment, experiment="", versus="", epochs=1, seeds=(), feeds=())
    return (str(alike),), (experiment.task, experiment.text_backbone)
