"""Stage `release`: a run's folder as it can be published, with the scores of the test split on its model card."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from routevl.backbones.folder import public_name
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, read_json
from routevl.provenance.manifest import describe, read_manifest
from routevl.reporting.formats import markdown_table, number
from routevl.reporting.results import read_scores
from routevl.reporting.statistics import RESAMPLES, Interval, mean_interval
from routevl.tasks.table import TASKS, TaskRow
from routevl.training.card import CARD, PROVENANCE, TAG, provenance


def add_arguments(parser: ArgumentParser) -> None:
    """Options of `routevl release`."""
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="a trained run")
    parser.add_argument("--scores", required=True, type=Path, metavar="FOLDER", help="its scores (routevl score)")
    parser.add_argument("--manifest", required=True, type=Path, metavar="JSON", help="manifest of the job that trained it")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the files to publish go")


def run(arguments: Namespace) -> None:
    """Copy a run's files, but for last/, and write their card with the test scores.

    Raises:
        RoutevlError: not a run with a card of this package, or the scores or the manifest are of another run.
    """
    model, scores = arguments.model, arguments.scores
    name, scored = read_json(model / "run.json")["run"], read_json(scores / "metrics.json")
    manifest, card = read_manifest(arguments.manifest), read_card(model / CARD)
    if scored["run"] != name:
        raise RoutevlError(f"{scores}: scores of the run {scored['run']}, not of {name}")
    if describe(model)["sha256"] not in {output["sha256"] for output in manifest["outputs"]}:
        raise RoutevlError(f"{arguments.manifest}: not of {model} as it is now: no output of the job has its sha256")
    task = TASKS[scored["task"]]
    items = read_scores(scores, task.metric)
    card.data = _with_results(card.data, name, task, scored)
    before, _, _ = card.text.replace(public_name(model), public_name(arguments.output)).partition(PROVENANCE)
    digest = f"Digest of this manifest: `{manifest['digest']}`"
    after = provenance(public_name(arguments.manifest), digest)
    card.text = f"{before}## Test scores\n\n{_scores(task, scored, items)}\n\n{PROVENANCE}\n\n{after}\n"
    with atomic_folder(arguments.output, "README.md") as folder:
        for file in sorted(model.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, folder / file.name)
        card.save(folder / CARD)


def read_card(path: Path) -> ModelCard:
    """The card that training wrote. Raises RoutevlError where there is none, or another program's."""
    if not path.is_file():
        raise RoutevlError(f"{path}: no such file: the run has no model card")
    try:
        card = ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        raise RoutevlError(f"{path}: not a readable model card ({error})") from None
    if TAG not in (card.data.tags or []) or PROVENANCE not in card.text:
        raise RoutevlError(f"{path}: not a card that `routevl train` wrote: train the run again")
    return card


def _shown(task: TaskRow, scored: Mapping[str, Any]) -> dict[str, float]:
    """Heading -> score, in the readers' unit, of the metrics that were computed."""
    return {task.shown[m]: scored["metrics"][m] * task.scale for m in task.shown if scored["metrics"].get(m) is not None}


def _with_results(data: ModelCardData, name: str, task: TaskRow, scored: Mapping[str, Any]) -> ModelCardData:
    """The card's metadata with a model index."""
    types = {task.shown[metric]: type for metric, type in task.metric_types.items()}
    unit = f" (×{task.scale:g})" if task.scale != 1 else ""
    results = [
        EvalResult(
            task_type=task.pipeline_tag,
            dataset_type="custom",
            dataset_name=f"the prepared data's test split, {scored['n']:,} items",
            dataset_split="test",
            metric_type=types[heading],
            metric_name=heading + unit,
            metric_value=round(score, 4),
        )
        for heading, score in _shown(task, scored).items()
    ]
    return ModelCardData(**data.to_dict(), model_name=name, eval_results=results)


def _scores(task: TaskRow, scored: Mapping[str, Any], items: pd.Series) -> str:
    """Table of the test scores, and what its numbers mean."""
    interval = mean_interval(items.to_numpy()[None], items.index.get_level_values("image")).times(task.scale)
    main = task.shown[task.metric]
    rows = [
        {"Metric": heading, "Score": number(score), "95% interval": _ends(interval) if heading == main else ""}
        for heading, score in _shown(task, scored).items()
    ]
    notes = [
        f"On the {scored['n']:,} items of the test split{f', times {task.scale:g}' if task.scale != 1 else ''}, by the official "
        f"metrics. Interval: 95% percentile bootstrap over {interval.over} ({RESAMPLES:,} resamples, each image with all its "
        "items); it covers the choice of test images, not of the seed."
    ]
    if missing := scored.get("missing"):
        notes.append(f"Missing: {'; '.join(f'{metric} ({why})' for metric, why in missing.items())}.")
    return "\n\n".join([markdown_table(pd.DataFrame(rows), tablefmt="pipe"), *notes])


def _ends(interval: Interval) -> str:
    return f"[{number(interval.low)}, {number(interval.high)}]"
