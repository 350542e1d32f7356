"""Stage `table`: the result tables as .csv (every column), .md and .tex (what a reader needs).

The csv keeps the units of scores/<run>/metrics.json: percent for VQA, fractions for captioning. The .md and
.tex show captioning metrics times 100, as papers print them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.files import atomic_file
from routevl.reporting.published import CLAIM_METRIC, claim, published_score, read_published
from routevl.reporting.results import MAIN_METRIC, collect, read_items, require_same_items
from routevl.reporting.statistics import (
    BOOTSTRAP_SEED,
    RESAMPLES,
    Gain,
    Interval,
    mean_and_std,
    paired_bootstrap,
)
from routevl.reporting.style import METHOD_LABELS, SCORE_SCALE, TASK_LABELS, plural

if TYPE_CHECKING:
    import argparse

    import pandas

TABLES = ("T1_vqa", "T2_caption", "T6_cost")
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


@dataclass(frozen=True)
class Table:
    """A table in both forms: `data` is the csv; `header` and `rows` are for readers, `notes` go below."""

    title: str
    data: pandas.DataFrame
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def import_libraries() -> None:
    """Import at one point what the stage needs, so that start-up can be measured apart from work."""
    import pandas  # noqa: F401


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, metavar="TABLE", help=f"which table: {', '.join(TABLES)}")
    parser.add_argument("--experiments", required=True, type=Path, metavar="TSV", help="experiments sheet")
    parser.add_argument("--results", required=True, type=Path, metavar="FOLDER", help="results folder to read")
    parser.add_argument("--published", required=True, type=Path, metavar="CSV", help="published figures")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="CSV",
        help="the .csv; .md and .tex are written beside it",
    )


def run(arguments: argparse.Namespace) -> None:
    """Make one table and write its three files.

    Raises:
        RoutevlError: an unknown table, or an input that is missing or malformed.
    """
    if arguments.name not in TABLES:
        raise RoutevlError(f"unknown table {arguments.name!r}, expected one of {', '.join(TABLES)}")
    if arguments.output.suffix != ".csv":
        raise RoutevlError(f"--output {arguments.output}: expected a name that ends in .csv")
    published = read_published(arguments.published)
    if arguments.name == "T6_cost":
        table = cost_table(arguments.experiments, arguments.results)
    else:
        task = _TASK_OF[arguments.name]
        table = score_table(arguments.experiments, arguments.results, published, task, arguments.name)
    _write(arguments.output, arguments.name, table)


# Scores --------------------------------------------------------------------------------------------


def score_table(experiments_sheet: Path, results_folder: Path, published: pandas.DataFrame, task: str, name: str) -> Table:
    """T1 or T2: one row per experiment, with its gain over the same experiment without routing."""
    import pandas as pd

    runs = collect(experiments_sheet, results_folder, name.split("_")[0])
    runs = runs[runs["task"] == task]
    if runs.empty:
        raise RoutevlError(f"{experiments_sheet}: no {task} experiment feeds {name.split('_')[0]}")
    gains = _gains(runs, results_folder, MAIN_METRIC[task])
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
        *_summary(verdicts, claim(published, task)),
        *(f"- {sentence}" for sentence in sentences),
        "",
        *_score_notes(runs, task),
        *_published_notes(published, task),
    ]
    return Table(title, data, header, rows, notes)


def _gains(runs: pandas.DataFrame, results_folder: Path, metric: str) -> dict[str, Gain]:
    """Gain over `none` at the same setting, by experiment; without such a baseline there is no entry."""
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
    scores = [_plus_minus(record[f"{metric}_mean"] * scale, record[f"{metric}_std"] * scale) for metric in _SHOWN_METRICS[task]]
    gains = ["", ""] if gain is None else [_signed(gain.absolute, scale), _signed(gain.relative)]
    return [*_identity_row(record), *scores, *gains, _number(record["published"] * scale)]


def _identity_row(record: dict[str, Any]) -> list[str]:
    blind = record["routing"] == "none" and record["prefix"] == "no"
    return [
        _backbones(record),
        METHOD_LABELS.get(record["method"], record["method"]),
        "none (blind: no image)" if blind else record["routing"],
        record["prefix"],
        str(record["rank"]),
        str(record["epochs"]),
        str(record["n_seeds"]),
        f"{record['trainable_params'] / 1e6:.3f}",
        f"{record['trainable_params_percent']:.2f}",
    ]


def _backbones(record: dict[str, Any]) -> str:
    return f"{record['text_backbone']} + {record['vision_backbone']}"


def _sentence(record: dict[str, Any], gain: Gain, task: str) -> str:
    """The comparison in words, positive, negative or undecided by whether its interval contains 0."""
    method = METHOD_LABELS.get(record["method"], record["method"])
    where = f"At rank {record['rank']} after {plural(record['epochs'], 'epoch')}"
    size = gain.relative if math.isfinite(gain.relative.estimate) else gain.absolute
    unit = "%" if size is gain.relative else ""
    scale = 1.0 if size is gain.relative else SCORE_SCALE[task]
    interval = f"[{size.low * scale:+.1f}, {size.high * scale:+.1f}]"
    routing = f"routing (`{record['routing']}`)"
    on_task = f"on {_TASK_WORDS[task]} with {_backbones(record)} (n={plural(record['n_seeds'], 'seed')})"
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


def _summary(verdicts: Sequence[int], paper_claim: str) -> list[str]:
    if not verdicts:
        return ["No experiment here has a baseline (`none`) at the same setting, so no gain is computed."]
    better, worse = verdicts.count(1), verdicts.count(-1)
    lines = [
        f"Of {plural(len(verdicts), 'comparison')} with the same method without routing, routing improves "
        f"{better}, harms {worse}, and makes no significant difference in {verdicts.count(0)}.",
        "",
    ]
    if paper_claim:
        lines += [f"The paper reports a relative gain of {paper_claim}. Measured here:", ""]
    return lines


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
    figures = published[(published["task"] == task) & (published["metric"] != CLAIM_METRIC)]
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
        _plus_minus(record[f"{timing}_mean"], record[f"{timing}_std"], digits)
        for timing, digits in zip(_TIMINGS, (1, 0, 0, 0), strict=True)
    )
    return [
        TASK_LABELS[record["task"]], *_identity_row(record), *millions, step, samples, memory,
        f"{record['adapter_bytes'] / 1e6:.2f}", train, record["device"],
    ]  # fmt: skip


# Writing -------------------------------------------------------------------------------------------


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def _plus_minus(mean: float, std: float, digits: int = 2) -> str:
    if not math.isfinite(std):
        return _number(mean, digits)
    return f"{_number(mean, digits)} ± {_number(std, digits)}"


def _signed(interval: Interval, scale: float = 1.0) -> str:
    estimate, low, high = (value * scale for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate:+.2f} [{low:+.2f}, {high:+.2f}]" if math.isfinite(estimate) else ""


def _write(output: Path, name: str, table: Table) -> None:
    """Write the .md and .tex, then the .csv, each whole or not at all."""
    heading = f"{name}: {table.title}"
    for suffix, text in ((".md", _markdown(heading, table)), (".tex", _latex(heading, table))):
        with atomic_file(output.with_suffix(suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    with atomic_file(output) as temporary:
        table.data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")


def _markdown(heading: str, table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"# {heading}\n\n{body}\n\n" + "\n".join(table.notes) + "\n"


def _latex(heading: str, table: Table) -> str:
    """A booktabs table; the notes stand in the .md only."""
    left_columns = {"Task", "Backbones", "Method", "Routing", "Prefix", "Device"}
    alignment = "".join("l" if name in left_columns else "r" for name in table.header)
    lines = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in [table.header, *table.rows]]
    lines.insert(1, r"\midrule")
    return "\n".join(
        [
            "% Needs the booktabs and graphicx packages.",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(heading)}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    """Text as LaTeX sets it: special characters escaped, ± and signed numbers in maths."""
    import re

    text = re.sub(r"([&%$#_{}])", r"\\\1", text).replace("±", r"$\pm$")
    return re.sub(r"(?<![\w.])([+-])(?=\d)", r"$\1$", text)
