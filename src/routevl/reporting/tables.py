"""Stage `table`: the result tables as .csv (every column), .md, .tex and .html (what a reader needs).

The csv keeps the units of scores/<run>/metrics.json: percent for VQA, fractions for captioning. The other
forms show captioning metrics times 100, as papers print them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.reporting.claims import claims_table
from routevl.reporting.formats import Table, number, plus_minus, signed, write_table
from routevl.reporting.published import published_score, read_claims, read_published
from routevl.reporting.results import MAIN_METRIC, backbones, collect, gains_over_none
from routevl.reporting.statistics import RESAMPLES, Gain, Interval, mean_and_std
from routevl.reporting.style import METHOD_LABELS, SCORE_SCALE, TASK_LABELS, plural

if TYPE_CHECKING:
    import argparse

    import pandas

TABLES = ("T0_claims", "T1_vqa", "T2_caption", "T6_cost")
_TASK_OF = {"T1_vqa": "vqa", "T2_caption": "caption"}
_METRICS = {
    "vqa": ("accuracy", "yes_no", "number", "other"),
    "caption": ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE"),
}
_TASK_WORDS = {"vqa": "VQA", "caption": "captioning"}
_SHOWN_METRICS = {
    "vqa": {"accuracy": "Accuracy", "yes_no": "Yes/no", "number": "Number", "other": "Other"},
    "caption": {"Bleu_4": "B@4", "METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"},
}
_IDENTITY = (
    "experiment", "task", "method", "routing", "prefix", "rank", "epochs",
    "text_backbone", "vision_backbone", "visual_tokens",
)  # fmt: skip
_PARTS = ("bottleneck", "layer_norm", "head", "visual_projection")
_TIMINGS = ("step_ms_median", "samples_per_second", "peak_memory_mb", "train_seconds")


def import_libraries() -> None:
    """Import at one point what the stage needs, so that start-up can be measured apart from work."""
    import markdown_it  # noqa: F401
    import pandas  # noqa: F401


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, metavar="TABLE", help=f"which table: {', '.join(TABLES)}")
    parser.add_argument("--experiments", required=True, type=Path, metavar="TSV", help="experiments sheet")
    parser.add_argument("--results", required=True, type=Path, metavar="FOLDER", help="results folder to read")
    parser.add_argument("--published", required=True, type=Path, metavar="CSV", help="published figures")
    parser.add_argument("--claims", required=True, type=Path, metavar="TSV", help="the paper's claims")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="CSV",
        help="the .csv; .md, .tex and .html are written beside it",
    )


def run(arguments: argparse.Namespace) -> None:
    """Make one table and write its four files.

    Raises:
        RoutevlError: an unknown table, or an input that is missing or malformed.
    """
    if arguments.name not in TABLES:
        raise RoutevlError(f"unknown table {arguments.name!r}, expected one of {', '.join(TABLES)}")
    if arguments.output.suffix != ".csv":
        raise RoutevlError(f"--output {arguments.output}: expected a name that ends in .csv")
    published, claims = read_published(arguments.published), read_claims(arguments.claims)
    if arguments.name == "T0_claims":
        table = claims_table(arguments.experiments, arguments.results, claims)
    elif arguments.name == "T6_cost":
        table = cost_table(arguments.experiments, arguments.results)
    else:
        task = _TASK_OF[arguments.name]
        table = score_table(arguments.experiments, arguments.results, published, claims, task, arguments.name)
    write_table(arguments.output, arguments.name, table)


# Scores --------------------------------------------------------------------------------------------


def score_table(
    experiments_sheet: Path,
    results_folder: Path,
    published: pandas.DataFrame,
    claims: pandas.DataFrame,
    task: str,
    name: str,
) -> Table:
    """T1 or T2: one row per experiment, with its gain over the same experiment without routing."""
    import pandas as pd

    runs = collect(experiments_sheet, results_folder, name.split("_")[0])
    runs = runs[runs["task"] == task]
    if runs.empty:
        raise RoutevlError(f"{experiments_sheet}: no {task} experiment feeds {name.split('_')[0]}")
    gains = gains_over_none(runs, results_folder, MAIN_METRIC[task])
    records, rows, sentences, verdicts = [], [], [], []
    for experiment, group in runs.groupby("experiment", sort=False):
        record = _score_record(group, gains.get(experiment), published)
        records.append(record)
        rows.append(_score_row(record, gains.get(experiment), task))
        if experiment in gains:
            sentences.append(_sentence(record, gains[experiment], task))
            verdicts.append(gains[experiment].absolute.verdict)
    data = pd.DataFrame(records)
    header = [
        "Backbones", "Method", "Routing", "Prefix", "Rank", "Epochs", "Seeds", "Params (M)", "%",
        *_SHOWN_METRICS[task].values(),
        f"Gain in {_SHOWN_METRICS[task][MAIN_METRIC[task]]} [95% CI]", "Relative gain % [95% CI]",
        "Published",
    ]  # fmt: skip
    title = {"vqa": "VQA accuracy (%) on the test split", "caption": "Captioning on the test split"}[task]
    notes = [
        *_summary(verdicts, claims[(claims["task"] == task) & (claims["kind"] == "gain")]),
        *(f"- {sentence}" for sentence in sentences),
        "",
        *_score_notes(runs, task),
        *_published_notes(published, task),
    ]
    return Table(title, data, header, rows, notes)


def _score_record(group: pandas.DataFrame, gain: Gain | None, published: pandas.DataFrame) -> dict[str, Any]:
    first = group.iloc[0]
    record = _identity_record(group)
    for metric in _METRICS[first["task"]]:
        values = group.get(metric, [math.nan])
        record[f"{metric}_mean"], record[f"{metric}_std"] = mean_and_std(list(values))
    unknown = Interval(math.nan, math.nan, math.nan)
    gain = gain or Gain(unknown, unknown)
    main = MAIN_METRIC[first["task"]]
    return record | {
        "gain_vs_none": gain.absolute.estimate,
        "gain_ci_low": gain.absolute.low,
        "gain_ci_high": gain.absolute.high,
        "gain_vs_none_relative": gain.relative.estimate,
        "gain_relative_ci_low": gain.relative.low,
        "gain_relative_ci_high": gain.relative.high,
        "n_items": int(first["n"]),
        "published": published_score(published, first, main) / SCORE_SCALE[first["task"]],
    }


def _identity_record(group: pandas.DataFrame) -> dict[str, Any]:
    first = group.iloc[0]
    if group["trainable_params"].nunique() != 1:
        raise RoutevlError(f"models/{first['run']}/run.json: trainable_params differs from another seed of the experiment")
    record = {column: first[column] for column in _IDENTITY}
    record["prefix"] = "yes" if first["prefix"] else "no"
    return record | {
        "n_seeds": len(group),
        "trainable_params": int(first["trainable_params"]),
        "trainable_params_percent": 100 * first["trainable_params"] / first["total_params"],
    }


def _score_row(record: dict[str, Any], gain: Gain | None, task: str) -> list[str]:
    scale = SCORE_SCALE[task]
    scores = [plus_minus(record[f"{metric}_mean"] * scale, record[f"{metric}_std"] * scale) for metric in _SHOWN_METRICS[task]]
    gains = ["", ""] if gain is None else [signed(gain.absolute, scale), signed(gain.relative)]
    return [*_identity_row(record), *scores, *gains, number(record["published"] * scale)]


def _identity_row(record: dict[str, Any]) -> list[str]:
    blind = record["routing"] == "none" and record["prefix"] == "no"
    return [
        backbones(record),
        METHOD_LABELS.get(record["method"], record["method"]),
        "none (blind: no image)" if blind else record["routing"],
        record["prefix"],
        str(record["rank"]),
        str(record["epochs"]),
        str(record["n_seeds"]),
        f"{record['trainable_params'] / 1e6:.3f}",
        f"{record['trainable_params_percent']:.2f}",
    ]


def _sentence(record: dict[str, Any], gain: Gain, task: str) -> str:
    """The comparison in words, positive, negative or undecided by whether its interval contains 0."""
    method = METHOD_LABELS.get(record["method"], record["method"])
    where = f"At rank {record['rank']} after {plural(record['epochs'], 'epoch')}"
    size = gain.relative if math.isfinite(gain.relative.estimate) else gain.absolute
    unit = "%" if size is gain.relative else ""
    scale = 1.0 if size is gain.relative else SCORE_SCALE[task]
    interval = f"[{size.low * scale:+.1f}, {size.high * scale:+.1f}]"
    routing = f"routing (`{record['routing']}`)"
    on_task = f"on {_TASK_WORDS[task]} with {backbones(record)} (n={plural(record['n_seeds'], 'seed')})"
    if record["prefix"] == "no":
        on_task += " without a visual prefix, where the baseline sees no image"
    estimate = size.estimate * scale
    if gain.absolute.verdict > 0:
        return f"{where} {routing} improves {method} by {estimate:.1f}{unit} {interval} {on_task}."
    if gain.absolute.verdict < 0:
        return f"{where} {routing} harms {method} by {-estimate:.1f}{unit} {interval} {on_task}."
    return (
        f"{where} there is no significant difference between {routing} and plain {method}: "
        f"{estimate:+.1f}{unit} {interval} {on_task}."
    )


def _summary(verdicts: Sequence[int], claims: pandas.DataFrame) -> list[str]:
    if not verdicts:
        return ["No experiment here has a baseline (`none`) at the same setting, so no gain is computed."]
    better, worse = verdicts.count(1), verdicts.count(-1)
    lines = [
        f"Of {plural(len(verdicts), 'comparison')} with the same method without routing, routing improves "
        f"{better}, harms {worse}, and makes no significant difference in {verdicts.count(0)}.",
        "",
    ]
    lines += [f"The paper claims {claim.text} ({claim.where}). Measured here:" for claim in claims.itertuples()]
    return [*lines, ""]


def _score_notes(runs: pandas.DataFrame, task: str) -> list[str]:
    notes = [
        f"Mean ± standard deviation over seeds{_single_seed_note(runs)}. Gain: over `none` with the same "
        "backbones, method, rank, epochs and prefix; intervals are 95% percentile intervals of a paired bootstrap over "
        f"the test items ({int(runs['n'].max()):,} items, {RESAMPLES:,} resamples, scores averaged over "
        "seeds). They cover the choice of test items, not of seeds, and are not corrected for the number of "
        "comparisons.",
        "",
        "Params: all trainable parameters, with the layer norms, task head and visual projection; %: of all "
        "parameters of the adapted model, frozen ones included.",
    ]
    if task == "caption":
        notes += ["", "Captioning metrics are shown times 100; the csv holds fractions."]
        reasons = sorted({f"{metric} ({why})" for missing in runs["missing"] for metric, why in missing.items()})
        if reasons:
            notes += ["", f"Missing, hence blank in the csv: {'; '.join(reasons)}."]
    return notes


def _single_seed_note(runs: pandas.DataFrame) -> str:
    counts = runs.groupby("experiment").size()
    return " (with one seed the deviation is unknown and left out)" if (counts == 1).any() else ""


def _published_notes(published: pandas.DataFrame, task: str) -> list[str]:
    figures = published[published["task"] == task]
    if figures.empty:
        return []
    lines = ["", "Published figures of other systems on this task at full scale, for orientation only:", ""]
    for keys, group in figures.groupby(["source", "setting", "method"], sort=False):
        scores = ", ".join(f"{row.metric} {row.value:g}" for row in group.itertuples())
        lines.append(f"- {keys[2]} ({keys[0]}; {keys[1]}): {scores}")
    return lines


# Cost ----------------------------------------------------------------------------------------------


def cost_table(experiments_sheet: Path, results_folder: Path) -> Table:
    """T6: trainable parameters by part, time, memory and adapter size of every experiment."""
    import pandas as pd

    runs = collect(experiments_sheet, results_folder, "T6", files=("run", "timing"))
    records = [_cost_record(group, results_folder) for _, group in runs.groupby("experiment", sort=False)]
    header = [
        "Task", "Backbones", "Method", "Routing", "Prefix", "Rank", "Epochs", "Runs", "Params (M)", "%", "Bottleneck (M)",
        "Layer norms (M)", "Head (M)", "Visual projection (M)", "Step (ms)", "Samples/s", "Peak memory (MB)",
        "Adapter (MB)", "Training (s)", "Device",
    ]  # fmt: skip
    notes = [
        f"Means ± standard deviation over seeds{_single_seed_note(runs)}; step: median within a run. Timings "
        "compare only within one device and an otherwise idle machine. Adapter: size of "
        "adapter_model.safetensors, without the task head. %: of all parameters of the adapted model, frozen "
        "ones included.",
    ]
    return Table("Cost of training", pd.DataFrame(records), header, [_cost_row(record) for record in records], notes)


def _cost_record(group: pandas.DataFrame, results_folder: Path) -> dict[str, Any]:
    first = group.iloc[0]
    record = _identity_record(group)
    for part in _PARTS:
        record[f"{part}_params"] = int(first["trainable_params_by_part"].get(part, 0))
    for timing in _TIMINGS:
        values = [math.nan if value is None else value for value in group[timing]]
        record[f"{timing}_mean"], record[f"{timing}_std"] = mean_and_std(values)
    adapter = results_folder / "models" / first["run"] / "adapter_model.safetensors"
    try:
        record["adapter_bytes"] = adapter.stat().st_size
    except OSError:
        raise RoutevlError(f"{adapter}: no such file") from None
    return record | {"device": "; ".join(sorted({str(device) for device in group["device"]}))}


def _cost_row(record: dict[str, Any]) -> list[str]:
    millions = [f"{record[f'{part}_params'] / 1e6:.3f}" for part in _PARTS]
    step, samples, memory, train = (
        plus_minus(record[f"{timing}_mean"], record[f"{timing}_std"], digits)
        for timing, digits in zip(_TIMINGS, (1, 0, 0, 0), strict=True)
    )
    return [
        TASK_LABELS[record["task"]], *_identity_row(record), *millions, step, samples, memory,
        f"{record['adapter_bytes'] / 1e6:.2f}", train, record["device"],
    ]  # fmt: skip
