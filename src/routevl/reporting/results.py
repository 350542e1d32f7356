"""Collecting runs: the run sheet joined with what the runs left under `results/`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.methods.table import METHODS
from routevl.options import words_of
from routevl.reporting.names import BACKBONES, DAGGER, backbones, differing, in_words, plural
from routevl.reporting.statistics import NOT_LEARNED, Gain, paired_gain, with_holm
from routevl.routing import ROUTING
from routevl.settings import SHARED_SETTINGS, RunSettings
from routevl.sheet import Experiment, read_sheet
from routevl.tasks.table import TASKS

INTERNAL = ["root", "blind", "details", "variant", "variant_number"]  # columns of `collect` that no file shows
_SHEET_COLUMNS = ("experiment", "task", *BACKBONES, "method", "versus", "epochs", "prefix", "visual_tokens")
LEAST_BASELINE = 1.0  # percent or CIDEr x 100: below it a model has learned nothing, and nothing is measured against it
_COUNTS = ("trainable_params", "trainable_params_by_part", "total_params")


def collect(experiments_sheet: Path, results: Path, feeds: str) -> pd.DataFrame:
    """One row per run (experiment and seed) of the experiments that feed a table or figure, in the order of tables.

    Args:
        feeds: short name of the table or figure, for example "T1" or "F2".

    Returns:
        The sheet's columns, `run`, `seed`, the counts of models/<run>/run.json, all of models/<run>/timing.json, of
        scores/<run>/metrics.json `n`, every metric, and `missing`, the reasons by metric (a missing metric is NaN); and:
        forward_flops: of a forward pass per example; NaN of runs that an earlier version trained, which did not count them.
        root: the experiment at the end of the chain of `versus`, but for a blind baseline; figures group by it.
        versus_runs: the runs of `versus`.
        rank, routing: of the method's options; missing and "none" where it has no such option.
        options: all options of the method, and the settings that the sheet's row has, as text.
        details: all settings and options by name, beside task, method, routing and seed, which may tell runs apart.
        variant, variant_number: in words, and counted from 1, how a row differs from the first one of its group and method in
            more than the routing function; "" and 0 where it does not.
        learning_rates_tried: how many its learning rate was chosen among, 1 where it was not; at_edge: whether it is the smallest
            or the largest of several.
        learned: as in `has_learned`.
        blind: whether the run never sees the image: neither its method nor its prefix reads it. Not so a run whose `control`
            replaces the image, which reads what stands in for it.

    Raises:
        RoutevlError: the sheet is wrong, nothing feeds this, or a file of a run is missing or malformed; names the file.
    """
    experiments = {experiment.experiment: experiment for experiment in read_sheet(experiments_sheet)}
    rows = []
    for experiment in experiments.values():
        if feeds not in experiment.feeds:
            continue
        shared = {column: getattr(experiment, column) for column in _SHEET_COLUMNS}
        shared["root"] = _root(experiment, experiments)
        shared["versus_runs"] = experiments[experiment.versus].runs if experiment.versus else []
        for run, seed in zip(experiment.runs, experiment.seeds, strict=True):
            rows.append({**shared, "run": run, "seed": seed, **_read_run(results, run, experiment)})
    if not rows:
        raise RoutevlError(f"{experiments_sheet}: no experiment names {feeds} in its `feeds` column")
    runs = pd.DataFrame(_with_variants(_in_order(rows)))
    return runs.astype({"rank": "Int64"})  # which has a missing value, unlike int


def _root(experiment: Experiment, experiments: Mapping[str, Experiment]) -> str:
    while experiment.versus:  # read_sheet refuses circles
        versus = experiments[experiment.versus]
        if experiment.prefix and not versus.prefix:  # a blind baseline, beside which no group stands
            break
        experiment = versus
    return experiment.experiment


def _read_run(results: Path, run: str, experiment: Experiment) -> dict[str, Any]:
    model, scores = results / "models" / run, results / "scores" / run / "metrics.json"
    content, scored = read_json(model / "run.json"), read_json(scores)
    settings = RunSettings.from_record(content["settings"], str(model / "run.json"))
    of_sheet = {name: getattr(settings, name) for name in experiment.options if name in SHARED_SETTINGS}
    record = settings.as_record()
    details = {column: getattr(experiment, column) for column in BACKBONES} | record | record["options"]
    metrics = {name: math.nan if value is None else value for name, value in scored["metrics"].items()}
    main = TASKS[experiment.task].metric
    if not math.isfinite(metrics.get(main, math.nan)):
        raise RoutevlError(f'{scores}: the metric "{main}" is not a finite number')
    return {
        "rank": settings.options.get("r"),
        "routing": settings.options.get("routing", "none"),
        "options": " ".join(words_of(record["options"] | of_sheet)),
        "details": {k: v for k, v in details.items() if k not in ("task", "method", "routing", "seed", "options")},
        **_choice(content, settings),
        "learned": has_learned(model),
        "blind": not (settings.prefix or settings.new_method().uses_image),
        **{name: content[name] for name in _COUNTS},
        "forward_flops": content.get("forward_flops", math.nan),
        **read_json(model / "timing.json"),
        "n": scored["n"],
        "missing": scored.get("missing", {}),
        **metrics,
    }


def _choice(run: Mapping[str, Any], settings: RunSettings) -> dict[str, Any]:
    """How a run's learning rate was chosen, of its run.json."""
    tried = [trial["learning_rate"] for trial in run["tuned"]["trials"]] if "tuned" in run else [settings.learning_rate]
    return {
        "learning_rates_tried": len(tried),
        "at_edge": len(tried) > 1 and settings.learning_rate in (min(tried), max(tried)),
    }


def has_learned(model: Path) -> bool:
    """Whether some epoch of a run, given by its folder, was better in validation than the best constant answers (VQA, multi-task
    learning), or than the frequencies of words alone (captioning).

    Raises RoutevlError where run.json does not say it.
    """
    path = model / "run.json"
    record = read_json(path)
    if "learned" not in record:
        raise RoutevlError(f"{path}: an earlier version wrote it, without whether it learned: remove {model} and train again")
    return record["learned"]


def not_learned_note(runs: pd.DataFrame) -> str:
    """What a table says below it of those runs of `collect` that learned nothing; "" where all learned."""
    counts = (~runs["learned"]).groupby(runs["experiment"], sort=False).agg(["sum", "size"])
    failed = counts[counts["sum"] > 0].itertuples()
    which = ", ".join(f"`{row.Index}` ({row.sum} of {plural(row.size, 'run')})" for row in failed)
    return which and (
        f"{DAGGER} Learned nothing: {which}. In no epoch of such a run the validation score is better than that of one answer to "
        "all questions (VQA; multi-task learning, of each data set), or the validation loss lower than that of the frequencies "
        "of words alone (captioning). Such a row is left out of gains and verdicts, as a system and as a baseline, with all its "
        "seeds: without those that failed it would look better than it is."
    )


def _in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By task, backbones (as in the sheet), blind ones first, then by groups: a root, and after it what is compared with it."""
    first: dict[str, dict[str, Any]] = {}  # root -> the row that gives its group its place
    for row in rows:
        if row["root"] not in first or row["experiment"] == row["root"]:
            first[row["root"]] = row
    groups, pairs = list(first), list(dict.fromkeys(map(backbones, rows)))
    methods, routings = list(METHODS), list(ROUTING)

    def place(row: dict[str, Any]) -> tuple:
        of = first[row["root"]]
        group = (methods.index(of["method"]), not of["prefix"], of["rank"] or 0, of["epochs"], groups.index(row["root"]))
        within = (row["experiment"] != row["root"], methods.index(row["method"]), routings.index(row["routing"]))
        return (list(TASKS).index(of["task"]), pairs.index(backbones(of)), not of["blind"], *group, *within)

    return sorted(rows, key=place)


def _with_variants(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[tuple[str, str], dict[str, Any]] = {}
    numbers = {"": 0}
    for row in rows:
        row["variant"] = in_words(differing(row, [first.setdefault((row["root"], row["method"]), row)]))
        row["variant_number"] = numbers.setdefault(row["variant"], len(numbers))
    return rows


def gains(runs: pd.DataFrame, results: Path, metric: str | None = None) -> dict[str, Gain]:
    """Gain in a metric, the task's main one where none is given, over the experiment that `versus` names, by experiment; those
    without one have none.

    Holm's correction is for the comparisons of one task among these runs. Where a run of either side learned nothing, none is
    computed: not even from the seeds that did, as without those that failed a method looks better than it is.
    """
    found: dict[str, Gain] = {}
    compared = runs[runs["versus"] != ""]
    for name, of_task in compared.groupby("task", sort=False):
        task, of_this_task = TASKS[name], {}
        for _, versus in of_task.groupby("versus", sort=False):  # a baseline's scores are read once for all
            baseline = versus["versus_runs"].iloc[0]
            baseline_learned = all(has_learned(results / "models" / run) for run in baseline)
            items = read_items(results, [*baseline, *versus["run"]], metric or task.metric)
            images, least = items.index.get_level_values("image"), LEAST_BASELINE / task.scale
            for experiment, group in versus.groupby("experiment", sort=False):
                if not (baseline_learned and group["learned"].all()):
                    of_this_task[experiment] = Gain(no_verdict=NOT_LEARNED)
                    continue
                systems = (items[those].to_numpy().T for those in (baseline, list(group["run"])))
                of_this_task[experiment] = paired_gain(*systems, images, least)
        found |= with_holm(of_this_task)
    return found


def data_set_gains(runs: pd.DataFrame, results: Path) -> dict[str, dict[str, Gain]]:
    """`gains` of multi-task runs in the score of each data set, by its metric."""
    task = TASKS["multitask"]
    of_task = runs[runs["task"] == "multitask"]
    return {metric: gains(of_task, results, metric) for metric in task.shown if metric != task.metric}


def read_items(results: Path, runs: Sequence[str], metric: str) -> pd.DataFrame:
    """`read_scores` of each run as a column.

    Raises RoutevlError where the runs were scored on different items.
    """
    columns: dict[str, pd.Series] = {}
    for run in runs:
        folder = results / "scores" / run
        found = columns[run] = read_scores(folder, metric)
        expected = columns[runs[0]]
        if not expected.index.equals(found.index):
            raise RoutevlError(
                f"{folder / 'items.json'}: scored on {len(found)} test items that are not the {len(expected)} items of "
                f"{runs[0]}; score both on the same split"
            )
    return pd.DataFrame(columns)


def read_scores(folder: Path, metric: str) -> pd.Series:
    """A run's scores in the unit of its items.json, indexed by `item` in ascending order and the `image` of each; of those items
    that have the metric, which in multi-task learning are one data set's.

    Raises RoutevlError where the file does not name the images.
    """
    path = folder / "items.json"
    content = read_json(path)
    if "images" not in content:
        raise RoutevlError(f"{path}: an earlier version wrote it, without the items' images: remove {folder} and score again")
    index = pd.MultiIndex.from_arrays([content["ids"], content["images"]], names=["item", "image"])
    return pd.Series(content[metric], index=index, dtype="float64").dropna().sort_index()
