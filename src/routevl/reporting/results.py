"""Collecting runs: the experiments sheet joined with what the runs left under `results/`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.reporting.statistics import BOOTSTRAP_SEED, Gain, paired_bootstrap
from routevl.routing import ROUTING

if TYPE_CHECKING:
    import pandas

MAIN_METRIC = {"vqa": "accuracy", "caption": "CIDEr"}
METHODS = ("lora", "adapter")

_REQUIRED_COLUMNS = (
    "experiment", "task", "text_backbone", "vision_backbone", "method", "routing", "rank", "epochs", "prefix",
    "visual_tokens", "seeds", "feeds",
)  # fmt: skip
_NOT_A_SETTING = {"experiment", "routing", "seeds", "feeds"}
_NUMBER = (int, float)
_RUN_FIELDS = {"trainable_params": int, "trainable_params_by_part": dict, "total_params": int}
_TIMING_FIELDS = {
    "train_seconds": _NUMBER,
    "step_ms_median": _NUMBER,
    "samples_per_second": _NUMBER,
    "peak_memory_mb": (int, float, type(None)),  # unknown on some devices
    "device": str,
}


def read_experiments(experiments_sheet: str | Path, feeds: str) -> pandas.DataFrame:
    """The rows of the experiments sheet whose `feeds` column names `feeds`, in the order of tables.

    Args:
        experiments_sheet: tab-separated file, one experiment a row.
        feeds: short name of a table or figure, for example "T1" or "F2".

    Returns:
        The sheet's columns as strings, but `rank` and `epochs` as int, `prefix` as bool and `seeds` as a list
        of strings; and `setting`, a tuple of (column, value) of all that two experiments must share for a
        fair comparison of routing functions. Sorted by task, backbones (as in the sheet), blind first, method, budget, routing.

    Raises:
        RoutevlError: no such sheet, a missing column, a value of the wrong type, or no experiment feeds it.
    """
    import pandas as pd

    try:
        sheet = pd.read_csv(experiments_sheet, sep="\t", dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise RoutevlError(f"{experiments_sheet}: no such experiments sheet") from None
    except (OSError, ValueError) as error:
        raise RoutevlError(f"{experiments_sheet}: not a readable tab-separated sheet ({error})") from error
    missing = [column for column in _REQUIRED_COLUMNS if column not in sheet.columns]
    if missing:
        raise RoutevlError(f"{experiments_sheet}: the columns {', '.join(missing)} are missing")
    chosen = [feeds in _split(value) for value in sheet["feeds"]]
    sheet = sheet[chosen].reset_index(drop=True)
    if sheet.empty:
        raise RoutevlError(f"{experiments_sheet}: no experiment names {feeds} in its `feeds` column")
    for column in ("rank", "epochs"):
        sheet[column] = [
            _integer(value, f"{experiments_sheet}: {column} of {experiment}")
            for experiment, value in zip(sheet["experiment"], sheet[column], strict=True)
        ]
    for row in sheet.itertuples():
        where = f"{experiments_sheet}: experiment {row.experiment}"
        _one_of(row.task, tuple(MAIN_METRIC), f"{where}: task")
        _one_of(row.prefix, ("yes", "no"), f"{where}: prefix")
        if not _split(row.seeds):
            raise RoutevlError(f"{where}: no seeds, expected for example 1,2,3")
    sheet["prefix"] = sheet["prefix"] == "yes"
    sheet["seeds"] = sheet["seeds"].map(_split)
    settings = [column for column in sheet.columns if column not in _NOT_A_SETTING]
    sheet["setting"] = [
        tuple(zip(settings, values, strict=True)) for values in sheet[settings].itertuples(index=False, name=None)
    ]
    backbones = list(dict.fromkeys(zip(sheet["text_backbone"], sheet["vision_backbone"], strict=True)))
    order = sorted(range(len(sheet)), key=lambda index: _display_order(sheet.iloc[index], backbones))
    return sheet.iloc[order].reset_index(drop=True)


def collect(
    experiments_sheet: str | Path,
    results_folder: str | Path,
    feeds: str,
    files: Collection[str] = ("run", "scores"),
) -> pandas.DataFrame:
    """One row per run (experiment and seed) of the experiments that feed a table or figure.

    Args:
        experiments_sheet, feeds: as in `read_experiments`.
        results_folder: the folder with models/<run>/ and scores/<run>/.
        files: which of a run's files are read and joined: "run" (models/<run>/run.json: parameter counts),
            "timing" (models/<run>/timing.json), "scores" (scores/<run>/metrics.json: `n`, every metric, and
            `missing`, the reasons by metric; a metric reported as missing is NaN).

    Returns:
        The columns of `read_experiments`, `run`, `seed` and those of the files asked for.

    Raises:
        RoutevlError: the sheet is wrong, or a file of a run is missing or malformed; names the file.
    """
    import pandas as pd

    results_folder = Path(results_folder)
    rows = []
    for experiment in read_experiments(experiments_sheet, feeds).to_dict("records"):
        for seed in experiment["seeds"]:
            run = f"{experiment['experiment']}_seed{seed}"
            row = {**experiment, "run": run, "seed": seed}
            if "run" in files:
                row |= _fields(results_folder / "models" / run / "run.json", _RUN_FIELDS)
            if "timing" in files:
                row |= _fields(results_folder / "models" / run / "timing.json", _TIMING_FIELDS)
            if "scores" in files:
                row |= _read_metrics(results_folder / "scores" / run / "metrics.json", experiment["task"])
            rows.append(row)
    return pd.DataFrame(rows)


def is_blind(row: Any) -> bool:
    """Whether a run never sees the image: neither routed nor given the visual prefix."""
    return row["routing"] == "none" and not row["prefix"]


def backbones(row: Any) -> str:
    """A run's backbones in one name, which is also how published figures and claims name their setting."""
    return f"{row['text_backbone']} + {row['vision_backbone']}"


def gains_over_none(runs: pandas.DataFrame, results_folder: str | Path, metric: str) -> dict[str, Gain]:
    """Gain over `none` at the same setting, by experiment; without such a baseline there is no entry.

    Args:
        runs: rows of `collect`, all of one task.
        metric: of scores/<run>/items.json.

    Raises:
        RoutevlError: scores per item are missing, malformed, or of other items than the baseline's.
    """
    gains = {}
    for _, same_setting in runs.groupby("setting", sort=False):
        plain = same_setting[same_setting["routing"] == "none"]
        routed = same_setting[same_setting["routing"] != "none"]
        if plain.empty or routed.empty:
            continue
        baseline = read_items(results_folder, list(plain["run"]), metric)
        for experiment, group in routed.groupby("experiment", sort=False):
            system = read_items(results_folder, list(group["run"]), metric)
            require_same_items(baseline, system, experiment)
            gains[experiment] = paired_bootstrap(baseline.to_numpy(), system.to_numpy(), BOOTSTRAP_SEED)
    return gains


def read_items(results_folder: str | Path, runs: Collection[str], metric: str) -> pandas.Series:
    """Scores per test item, averaged over runs (seeds).

    Returns:
        float64 Series indexed by item id in ascending order, in the unit of scores/<run>/items.json.

    Raises:
        RoutevlError: a file is missing or malformed, or the runs were scored on different items.
    """
    import pandas as pd

    columns = []
    for run in runs:
        path = Path(results_folder) / "scores" / run / "items.json"
        content = _object(path)
        ids, scores = content.get("ids"), content.get(metric)
        if not isinstance(ids, list) or not isinstance(scores, list) or len(ids) != len(scores) or not ids:
            raise RoutevlError(f'{path}: expected equally long, non-empty lists "ids" and "{metric}"')
        if len(set(ids)) != len(ids):
            raise RoutevlError(f'{path}: an id stands twice in "ids"')
        if not all(_is_finite(score) for score in scores):
            raise RoutevlError(f'{path}: a score in "{metric}" is not a finite number')
        columns.append(pd.Series(scores, index=ids, dtype="float64", name=run).sort_index())
        require_same_items(columns[0], columns[-1], path)
    return pd.concat(columns, axis=1).mean(axis=1)


def require_same_items(expected: pandas.Series, found: pandas.Series, name: object) -> None:
    """Raise RoutevlError unless both series have the same item ids, as a comparison item by item needs."""
    if not expected.index.equals(found.index):
        raise RoutevlError(
            f"{name}: scored on {len(found)} test items that are not the {len(expected)} items of "
            f"{expected.name or 'the baseline'}; score both on the same split"
        )


def read_training(results_folder: str | Path, run: str) -> pandas.DataFrame:
    """The training log of a run, models/<run>/training.jsonl: one row per line, absent values NaN.

    Raises:
        RoutevlError: the file is missing, empty or a line is not a JSON object with a "step" and an "epoch".
    """
    import pandas as pd

    path = Path(results_folder) / "models" / run / "training.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RoutevlError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise RoutevlError(f"{path}: not readable ({error})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            _ = record["step"], record["epoch"]
        except (ValueError, KeyError, TypeError):
            raise RoutevlError(f'{path}: line {number} is not a JSON object with "step" and "epoch"') from None
        records.append(record)
    if not records:
        raise RoutevlError(f"{path}: holds no line")
    return pd.DataFrame(records)


def _fields(path: Path, types: dict[str, type | tuple[type, ...]]) -> dict[str, Any]:
    content = _object(path)
    for name, expected in types.items():
        if name not in content:
            raise RoutevlError(f'{path}: "{name}" is missing')
        if not isinstance(content[name], expected):
            raise RoutevlError(f'{path}: "{name}" is {content[name]!r}, which is of the wrong type')
    return {name: content[name] for name in types}


def _read_metrics(path: Path, task: str) -> dict[str, Any]:
    content = _object(path)
    if content.get("task") != task:
        raise RoutevlError(f'{path}: "task" is {content.get("task")!r}, the experiments sheet says {task!r}')
    metrics = content.get("metrics")
    if not isinstance(metrics, dict) or not isinstance(content.get("n"), int):
        raise RoutevlError(f'{path}: expected an integer "n" and an object "metrics"')
    if not _is_finite(metrics.get(MAIN_METRIC[task])):
        raise RoutevlError(f'{path}: the metric "{MAIN_METRIC[task]}" is missing or not a finite number')
    for name, value in metrics.items():
        if not (value is None or _is_finite(value) or isinstance(value, dict)):
            raise RoutevlError(f'{path}: the metric "{name}" is {value!r}, expected a finite number or null')
    values = {name: math.nan if value is None else value for name, value in metrics.items()}
    return {"n": content["n"], "missing": content.get("missing", {}), **values}


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise RoutevlError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _integer(value: str, where: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise RoutevlError(f"{where} is {value!r}, expected a whole number") from None


def _one_of(value: str, allowed: tuple[str, ...], where: str) -> None:
    if value not in allowed:
        raise RoutevlError(f"{where} is {value!r}, expected one of {', '.join(allowed)}")


def _display_order(row: Any, backbones: list[tuple[str, str]]) -> tuple:
    return (
        list(MAIN_METRIC).index(row["task"]),
        backbones.index((row["text_backbone"], row["vision_backbone"])),
        not is_blind(row),
        _position(METHODS, row["method"]),
        not row["prefix"],
        row["rank"],
        row["epochs"],
        _position(tuple(ROUTING), row["routing"]),
    )


def _position(names: tuple[str, ...], name: str) -> tuple[int, str]:
    """Sort key that puts known names first, in their given order, and the others after them by name."""
    return (names.index(name), "") if name in names else (len(names), name)
