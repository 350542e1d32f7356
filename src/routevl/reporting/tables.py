"""Stage `table`: the result tables as .csv (every column), .md, .tex and .html (what a reader needs).

The csv keeps the units of scores/<run>/metrics.json: fractions for captioning, percent for the other tasks. The other
forms show captioning metrics times 100, as papers print them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from routevl.errors import RoutevlError
from routevl.methods.base import WEIGHTS
from routevl.methods.table import BASELINE, METHODS
from routevl.reporting import TABLES
from routevl.reporting.blind import OverBlind
from routevl.reporting.claims import claims_table
from routevl.reporting.formats import Table, number, without_shared, write_table
from routevl.reporting.names import BACKBONES, DAGGER, backbones, choices, differing, heading_of, in_words, plural, setting_cells
from routevl.reporting.published import published_score, read_claims, read_published
from routevl.reporting.results import LEAST_BASELINE, collect, gains, not_learned_note
from routevl.reporting.statistics import LEVEL, NO_VERDICTS, RESAMPLES, Gain
from routevl.sheet import read_sheet
from routevl.tasks.table import TASKS

_IDENTITY = [
    "experiment", "task", "method", "routing", "prefix", "rank", "epochs",
    "text_backbone", "vision_backbone", "visual_tokens", "versus", "options",
]  # fmt: skip
_PARTS = ("method", "layer_norm", "head", "visual_projection")  # of the trainable parameters; a method may have others
_TIMINGS = {"step_ms_median": 1, "samples_per_second": 0, "peak_memory_mb": 0, "train_seconds": 0}  # column -> digits shown
_FORWARD = "Forward (MFLOPs)"
_FORWARD_NOTE = (
    f"{_FORWARD}: millions of floating-point operations of a forward pass for each of the first examples of the validation "
    "split, padding included, a multiplication with its addition being two. They are counted by shapes, as torch counts products "
    "of matrices, attention and convolutions: what is masked or pruned to zero costs what any other weight does, a layer that is "
    "skipped nothing. Stored features cost nothing, a vision model that runs in training is counted."
)
_SAVED = ("adapter_model.safetensors", WEIGHTS)  # where a run has its method's own tensors

COMPARISONS = {
    "T4_ablations": "Ablations and controls",
    "T5_cross_attention": "Routing against cross-attention with parameters",
    "T7_methods": "Methods",
}

_INTERVALS = (
    "Intervals are 95% intervals, paired by item, over what is independent, which `Interval over` names. *Images*: images "
    f"are drawn with replacement ({RESAMPLES:,} resamples), each with all its questions or captions and the same ones for both "
    "sides, of scores averaged over seeds; the choice of seeds is not covered. *Images and seeds*, where both sides have three "
    "seeds or more: how far seeds differ comes on top, by Student's t with Satterthwaite's degrees of freedom."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl table`."""
    parser.add_argument("--name", required=True, metavar="TABLE", help=f"which table: {', '.join(TABLES)}")
    parser.add_argument("--experiments", required=True, type=Path, metavar="TSV", help="experiments sheet")
    parser.add_argument("--results", required=True, type=Path, metavar="FOLDER", help="results folder to read")
    parser.add_argument("--published", required=True, type=Path, metavar="CSV", help="published figures")
    parser.add_argument("--claims", required=True, type=Path, metavar="TSV", help="the paper's claims")
    parser.add_argument("--output", required=True, type=Path, metavar="CSV", help="beside it: .md, .tex and .html")


def run(arguments: argparse.Namespace) -> None:
    """Make one table and write its four files."""
    if arguments.name not in TABLES:
        raise RoutevlError(f"unknown table {arguments.name!r}, expected one of {', '.join(TABLES)}")
    if arguments.output.suffix != ".csv":
        raise RoutevlError(f"--output {arguments.output}: expected a name that ends in .csv")
    makers = {"T0_claims": claims_table, "T6_cost": cost_table, **dict.fromkeys(COMPARISONS, comparison_table)}
    table = makers.get(arguments.name, score_table)(arguments)
    write_table(arguments.output, arguments.name, table)


def _identity(group: pd.DataFrame) -> dict[str, Any]:
    """What the csv has of an experiment's rows of `collect`, beside what was measured."""
    first, percent = group.iloc[0], 100 * group["trainable_params"].iloc[0] / group["total_params"].iloc[0]
    return first[_IDENTITY].to_dict() | {
        "prefix": "yes" if first["prefix"] else "no",
        "n_seeds": len(group),
        "n_not_learned": (~group["learned"]).sum(),
        "trainable_params": first["trainable_params"],
        "trainable_params_percent": percent,
    }


def _marked(name: str, group: pd.DataFrame) -> str:
    """A name of an experiment's row, with a dagger where one of its runs learned nothing."""
    return name if group["learned"].all() else f"{name} {DAGGER}"


def _head(group: pd.DataFrame, settings: Mapping[str, str]) -> dict[str, str]:
    """With what a row begins for readers: method, routing function, and each of its `setting_cells`."""
    first = group.iloc[0]
    routing = "none (blind)" if first["blind"] else first["routing"]
    return {"Method": _marked(METHODS[first["method"]].label, group), "Routing": routing, **settings}


def _size(record: Mapping[str, Any]) -> dict[str, str]:
    """How much an experiment trains, of its `_identity`, for readers."""
    return {"Params (M)": f"{record['trainable_params'] / 1e6:.3f}", "%": f"{record['trainable_params_percent']:.2f}"}


def _by_experiment(runs: pd.DataFrame) -> list[tuple[pd.DataFrame, dict[str, str]]]:
    """Each experiment's rows of `collect` with its `setting_cells`."""
    groups = [group for _, group in runs.groupby("experiment", sort=False)]
    return list(zip(groups, setting_cells([group.iloc[0].to_dict() for group in groups]), strict=True))


def _over_seeds(group: pd.DataFrame, columns: Iterable[str]) -> dict[str, float]:
    """<column>_mean and <column>_std; NaN for a column that the task does not have, and for the deviation of one seed."""
    found = group.reindex(columns=list(columns)).astype(float).agg(["mean", "std"])
    return {f"{column}_{part}": found.loc[part, column] for column in found for part in ("mean", "std")}


def _plus_minus(record: Mapping[str, float], column: str, scale: float = 1.0, digits: int = 2) -> str:
    """A column of `_over_seeds` for readers; the mean alone where the deviation is unknown."""
    mean, std = (number(record[f"{column}_{part}"] * scale, digits) for part in ("mean", "std"))
    return f"{mean} ± {std}" if std else mean


def _single_seed_note(runs: pd.DataFrame) -> str:
    counts = runs.groupby("experiment").size()
    return " (with one seed the deviation is unknown and left out)" if (counts == 1).any() else ""


def score_table(arguments: argparse.Namespace) -> Table:
    """T1, T2 or T3: one row per experiment, with its gains over what its `versus` names and over its blind baseline."""
    feeds, task = arguments.name.split("_")
    published, claims = read_published(arguments.published), read_claims(arguments.claims)
    runs = collect(arguments.experiments, arguments.results, feeds)
    runs = runs[runs["task"] == task]
    if runs.empty:
        raise RoutevlError(f"{arguments.experiments}: no {task} experiment feeds {feeds}")
    found, row, scale = gains(runs, arguments.results), TASKS[task], TASKS[task].scale
    over_blind = OverBlind(runs, arguments.results)
    records, shown, sentences = [], [], []
    for group, settings in _by_experiment(runs):
        experiment = group["experiment"].iloc[0]
        gain = found.get(experiment, Gain())
        record = _identity(group) | _over_seeds(group, row.metrics)
        record["versus_seeds"] = len(group["versus_runs"].iloc[0]) or None
        record |= gain.absolute.columns("gain", "gain_ci") | gain.relative.columns("gain_relative", "gain_relative_ci")
        record |= gain.tested() | over_blind.columns(experiment)
        record["n_items"] = group["n"].iloc[0]
        record["published"] = published_score(published, group.iloc[0], row.metric) / scale
        records.append(record)
        scores = {title: _plus_minus(record, metric, scale) for metric, title in row.shown.items()}
        main = row.shown[row.metric]
        shown.append(
            _head(group, settings)
            | {main: scores.pop(main), "Gain [95% CI]": gain.absolute.times(scale).signed()}
            | {"Relative gain % [95% CI]": gain.relative.signed()}
            | (over_blind.cells(experiment, scale) if over_blind.gains else {})
            | {"Interval over": gain.absolute.over, "Seeds": str(len(group))}
            | scores
            | _size(record)
            | {"Published": number(record["published"] * scale)}
        )
        if experiment in found:
            sentences.append(f"- {_sentence(record, gain, group['variant'].iloc[0])}")
    notes = [
        *_summary(list(found.values()), claims[(claims["task"] == task) & claims["kind"].isin(["gain", "gains"])]),
        *sentences,
        "",
        *(over_blind.notes() if over_blind.gains else []),
        *_score_notes(runs, task),
        *_published_notes(published[published["task"] == task]),
    ]
    details = [*settings, "Interval over", "Seeds", "Params (M)", "%", "Published"]
    return Table(row.title, pd.DataFrame(records), pd.DataFrame(shown), notes, details)


def _sentence(record: dict[str, Any], gain: Gain, variant: str) -> str:
    """The comparison in words, by its verdict; a harm and its interval are positive numbers. `variant` as in `collect`."""
    method, task = METHODS[record["method"]].label, TASKS[record["task"]]
    when = f"after {plural(record['epochs'], 'epoch')}"
    where = when.capitalize() if pd.isna(record["rank"]) else f"At rank {record['rank']} {when}"
    relative = math.isfinite(gain.relative.estimate)
    size, unit = (gain.relative, "%") if relative else (gain.absolute.times(task.scale), "")
    seeds = plural(record["n_seeds"], "seed") + (f" against {n}" if (n := record["versus_seeds"]) != record["n_seeds"] else "")
    on_task = f"over {size.over} on {task.word} with {backbones(record)} (n={seeds})"
    if record["prefix"] == "no":
        on_task += " without a visual prefix, where the baseline sees no image"
    if record["routing"] == "none":
        what, of, plain, better, worse = method, f"`{record['versus']}`", f"`{record['versus']}`", "improves on", "falls behind"
    else:
        what = f"routing (`{record['routing']}`{variant and ', '}{variant})"
        of, plain, better, worse = method, f"plain {method}", "improves", "harms"
    if math.isnan(gain.absolute.estimate):
        return f"{where} {what} against {plain} on {task.word} with {backbones(record)}: no gain ({gain.no_verdict})."
    difference = f"{size.estimate:+.1f}{unit} [{size.low:+.1f}, {size.high:+.1f}] {on_task}"
    if gain.no_verdict:
        return f"{where} {what} against {plain}: {difference}; no verdict ({gain.no_verdict})."
    test = f"p = {gain.p:.2g}, {gain.holm:.2g} after Holm's correction"
    if not gain.verdict:
        return f"{where} there is no significant difference between {what} and {plain}: {difference}; {test}."
    verb, size = (better if gain.verdict > 0 else worse), size.times(gain.verdict)
    return f"{where} {what} {verb} {of} by {size.estimate:.1f}{unit} [{size.low:.1f}, {size.high:.1f}] {on_task}; {test}."


def _summary(found: Sequence[Gain], claims: pd.DataFrame) -> list[str]:
    if not found:
        return ["No experiment here names a baseline in the run sheet's column `versus`, so no gain is computed."]
    judged, reasons = [gain for gain in found if not gain.no_verdict], [gain.no_verdict for gain in found]
    better, worse, same = ([gain.verdict for gain in judged].count(sign) for sign in (1, -1, 0))
    without = [f", no verdict in {reasons.count(reason)} ({reason})" for reason in NO_VERDICTS if reason in reasons]
    lines = [
        f"Of {plural(len(found), 'comparison')} with the baseline that the run sheet names: an improvement in {better}, harm in "
        f"{worse}, no significant difference in {same}{''.join(without)}.",
        "",
    ]
    lines += [f"The paper claims {claim.text} ({claim.where}). Measured here:" for claim in claims.itertuples()]
    return [*lines, ""]


def _score_notes(runs: pd.DataFrame, task: str) -> list[str]:
    notes = [
        f"Mean ± standard deviation over seeds{_single_seed_note(runs)}, on {runs['n'].max():,} test items. Gain: over the "
        f"experiment that the run sheet names in its column `versus` (also in the csv). {_INTERVALS}",
        "",
        "A verdict is given where both sides have three seeds or more, all of which learned something: a difference is "
        f"significant at {LEVEL:.0%} after Holm's correction for the number of comparisons in this table that have one. The "
        "intervals are not corrected. Over a baseline next to zero, whose own interval reaches below "
        f"{LEAST_BASELINE:g}, there is neither a verdict nor a relative gain.",
        *_not_learned_notes(runs),
        "",
        "Params: all trainable parameters, with the layer norms, task head and visual projection; %: of all parameters of the "
        "adapted model, frozen ones included.",
    ]
    if TASKS[task].scale != 1:
        notes += ["", f"Metrics are shown times {TASKS[task].scale:g}; the csv holds fractions."]
    if reasons := sorted({f"{metric} ({why})" for missing in runs["missing"] for metric, why in missing.items()}):
        notes += ["", f"Missing, hence blank in the csv: {'; '.join(reasons)}."]
    return notes


def _not_learned_notes(runs: pd.DataFrame) -> list[str]:
    return ["", note] if (note := not_learned_note(runs)) else []


def _published_notes(published: pd.DataFrame) -> list[str]:
    lines = ["", "Published figures of other systems on this task at full scale, for orientation only:", ""]
    for (source, setting, method), group in published.groupby(["source", "setting", "method"], sort=False):
        scores = ", ".join(f"{row.metric} {row.value:g}" for row in group.itertuples())
        lines.append(f"- {method} ({source}; {setting}): {scores}")
    return lines if len(published) else []


def cost_table(arguments: argparse.Namespace) -> Table:
    """T6: trainable parameters by part, time, memory and size of the saved tensors of every experiment."""
    runs = collect(arguments.experiments, arguments.results, "T6")
    parts = list(dict.fromkeys([*_PARTS, *(part for by in runs["trainable_params_by_part"] for part in by)]))
    records, shown = [], []
    for group, settings in _by_experiment(runs):
        first = group.iloc[0]
        record = _identity(group)
        record |= {f"{part}_params": first["trainable_params_by_part"].get(part, 0) for part in parts}
        record["forward_flops"] = _forward_flops(group)
        record |= _over_seeds(group, _TIMINGS)
        record["saved_bytes"] = _saved_bytes(arguments.results, group)
        record["device"] = "; ".join(sorted(set(group["device"])))
        step, samples, memory, train = (_plus_minus(record, timing, digits=digits) for timing, digits in _TIMINGS.items())
        records.append(record)
        shown.append(
            {"Task": TASKS[record["task"]].label}
            | _head(group, settings)
            | _size(record)
            | {_FORWARD: number(record["forward_flops"] / 1e6, 1)}
            | {"Step (ms)": step, "Samples/s": samples, "Peak memory (MB)": memory}
            | {"Saved (MB)": f"{record['saved_bytes'] / 1e6:.2f}", "Training (s)": train}
            | {"Runs": str(len(group)), "Device": record["device"]}
            | {f"{heading_of(part)} (M)": f"{record[f'{part}_params'] / 1e6:.3f}" for part in parts}
        )
    notes = [
        f"Means ± standard deviation over seeds{_single_seed_note(runs)}; step: median within a run. Timings "
        "compare only within one device and an otherwise idle machine. Saved: size of the method's own tensors, without the task "
        "head. %: of all parameters of the adapted model, frozen ones included. The last columns, in millions (M): the parts of "
        "Params.",
        "",
        _FORWARD_NOTE,
        *_not_learned_notes(runs),
    ]
    details = ["Routing", *settings, "Runs", "Device", *(f"{heading_of(part)} (M)" for part in parts)]
    return Table("Cost of training", pd.DataFrame(records), pd.DataFrame(shown), notes, details)


def comparison_table(arguments: argparse.Namespace) -> Table:
    """T4, T5 or T7: what each experiment of all tasks scores, gains over the one that its `versus` names, trains and costs; T7 in
    the order of the list of methods, blind baselines first, and with the gains over these.

    Raises RoutevlError where an experiment feeds T7 whose gain is over something else than the plain BASELINE.
    """
    feeds, of_methods = arguments.name.split("_")[0], arguments.name == "T7_methods"
    runs = collect(arguments.experiments, arguments.results, feeds)
    found = gains(runs, arguments.results)
    if of_methods:
        _check_baselines(arguments.experiments, runs)
        over_blind = OverBlind(runs, arguments.results)
        order = [*TASKS, True, False, *METHODS]
        runs = runs.sort_values(["task", "blind", "method"], key=lambda values: values.map(order.index), kind="stable")
    tasks = [TASKS[task] for task in runs["task"].unique()]
    named = {row["experiment"]: row for row in runs.drop_duplicates("experiment").to_dict("records")}
    records, shown = [], []
    for group, settings in _by_experiment(runs):
        first = group.iloc[0]
        gain, task, method = found.get(first["experiment"], Gain()), TASKS[first["task"]], METHODS[first["method"]]
        means = group[["step_ms_median", "peak_memory_mb"]].astype(float).mean()
        scores = _over_seeds(group, [of.metric for of in tasks])
        row, alike = named[first["experiment"]], ("task", "method", "blind")
        others = [other for other in named.values() if all(other[name] == row[name] for name in alike)]
        other = named.get(first["versus"], others[0])
        own = {name: value for name, value in choices(row).items() if value != choices(other).get(name)}
        differs = in_words(own if row["method"] == other["method"] else differing(row, [other]))
        record = _identity(group) | {"label": method.label, "family": method.family, "differs": differs}
        record |= {name: first[name] for name in ("learning_rates_tried", "at_edge")}
        record |= {"learning_rate": first["details"]["learning_rate"], **scores}
        record |= gain.absolute.columns(f"gain_vs_{BASELINE}" if of_methods else "gain", "gain_ci")
        record |= gain.tested()
        names = {"Differs in": differs, "Against": first["versus"]}
        beside = {}
        if of_methods:
            record |= over_blind.columns(first["experiment"])
            of_backbones = {name: value for name, value in differing(row, named.values()).items() if name in BACKBONES}
            names = {"Method": _marked(", ".join(filter(None, [method.label, in_words(of_backbones)])), group)}
            beside = over_blind.cells(first["experiment"], task.scale)
        record["forward_flops"] = _forward_flops(group)
        record |= {"step_ms": means["step_ms_median"], "peak_memory_mb": means["peak_memory_mb"]}
        record["saved_bytes"] = _saved_bytes(arguments.results, group)
        records.append(record)
        shown.append(
            {"Task": task.label}
            | _head(group, names)
            | {of.shown[of.metric]: _plus_minus(scores, of.metric, of.scale) for of in tasks}
            | {"Gain [95% CI]": gain.absolute.times(task.scale).signed(), "Verdict": gain.word}
            | beside
            | {"Interval over": gain.absolute.over, "Seeds": str(len(group)), **_size(record)}
            | {_FORWARD: number(record["forward_flops"] / 1e6, 1)}
            | {"Step (ms)": number(means["step_ms_median"], 1), "Peak memory (MB)": number(means["peak_memory_mb"], 0)}
            | {"Saved (MB)": f"{record['saved_bytes'] / 1e6:.2f}", "Rates tried": str(record["learning_rates_tried"])}
            | settings
        )
    readable = pd.DataFrame(shown)
    if not of_methods:  # `Differs in` tells what not all rows share
        readable = readable.drop(columns=[*settings.keys() & without_shared(readable, settings)[1].keys()])
    scaled = [f"{of.word} are shown times {of.scale:g}" for of in tasks if of.scale != 1]
    versus = f", plain {METHODS[BASELINE].label}" if of_methods else ""
    notes = [
        f"Mean ± standard deviation over seeds{_single_seed_note(runs)}. Gain: in the task's score over the experiment that the "
        f"run sheet names in its column `versus`{versus}. {_INTERVALS} Verdict: at {LEVEL:.0%}, after Holm's correction for the "
        "number of comparisons of the task in this table. Params: all trainable parameters, with the layer norms, task head and "
        "visual projection. Saved: the method's own tensors. Timings compare only within one device."
        + (f" Scores and gains in {', '.join(scaled)}; the csv holds fractions." if scaled else ""),
        "",
        *(over_blind.notes() if of_methods else []),
        _FORWARD_NOTE,
        *_tuning_notes(runs),
        *_not_learned_notes(runs),
    ]
    details = [name for name in ("Routing", *settings, "Interval over", "Seeds", "Rates tried") if name in readable]
    return Table(COMPARISONS[arguments.name], pd.DataFrame(records), readable, notes, details)


def _check_baselines(sheet: Path, runs: pd.DataFrame) -> None:
    plain = {e.experiment for e in read_sheet(sheet) if e.method == BASELINE and e.options.get("routing", "none") == "none"}
    name = METHODS[BASELINE].label
    for experiment, versus in runs[["experiment", "versus"]].drop_duplicates().itertuples(index=False):
        if versus and versus not in plain:
            raise RoutevlError(
                f"{sheet}: experiment {experiment} feeds T7, whose gains are over plain {name}: {versus} is not that"
            )


def _tuning_notes(runs: pd.DataFrame) -> list[str]:
    """How the learning rates were chosen, and where the best one stands at the end of those that were tried."""
    tuned = runs[runs["learning_rates_tried"] > 1].drop_duplicates("experiment")
    if tuned.empty:
        return []
    tried = " or ".join(map(str, sorted(set(tuned["learning_rates_tried"]))))
    edge = ", ".join(f"`{name}`" for name in tuned[tuned["at_edge"]]["experiment"])
    which = f" It is the smallest or largest of them, so that a better one may lie beyond, in {edge}." if edge else ""
    rows = plural(len(tuned), "row")
    return ["", f"The learning rate of {rows} was chosen among {tried} on the validation split, by runs of another seed.{which}"]


def _forward_flops(group: pd.DataFrame) -> float:
    """FLOPs of an experiment's forward pass, the mean over its seeds, which may leave other layers out."""
    return group["forward_flops"].astype(float).mean()


def _saved_bytes(results: Path, group: pd.DataFrame) -> int:
    """Size of the tensors of an experiment's method. Raises RoutevlError where a run has none."""
    model = results / "models" / group["run"].iloc[0]
    saved = [path for path in map(model.joinpath, _SAVED) if path.is_file()]
    if not saved:
        raise RoutevlError(f"{model}: holds neither {' nor '.join(_SAVED)}")
    return sum(path.stat().st_size for path in saved)
