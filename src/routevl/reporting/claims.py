"""Table T0: each claim of the paper beside what was measured here, with a verdict by a fixed rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.reporting.formats import Table, signed
from routevl.reporting.results import MAIN_METRIC, METHODS, backbones, collect, gains_over_none
from routevl.reporting.statistics import Gain, Interval
from routevl.reporting.style import METHOD_LABELS

if TYPE_CHECKING:
    import pandas

_RULE = (
    "The verdicts follow a fixed rule. The claim of a gain *holds*, for a method and its backbones, if routing improves "
    "significantly (the 95% interval lies above 0) in every comparison and the lower end of the largest gain's interval "
    "reaches the published figure. It *holds in part* if routing improves significantly in some comparison, and *does not "
    "hold* if in none. The claim about parameters *holds* if every experiment with routing has as many trainable parameters "
    "as the one without at the same setting, *in part* if some have, and *does not hold* if none has. A claim without a "
    "comparison is *not tested*."
)
_SCALE = (
    "**Scale.** The paper's figures are for the backbones named in the claims, on all of VQAv2 and COCO 2014. A row whose scale "
    "is *not the paper's* was measured with other backbones and on the data of this configuration: its verdict says whether "
    "the effect shows there, and neither confirms nor refutes the paper's figure."
)
_INTERVALS = (
    "Gains are those of tables T1 (accuracy) and T2 (CIDEr), in percent of the experiment without routing; the paper's "
    "figures are read as such relative gains. Intervals cover the choice of test items, not of seeds. That of the largest of "
    "several gains is not corrected for having been chosen among them."
)


@dataclass(frozen=True)
class Comparison:
    """An experiment with routing against the one without at the same setting.

    Attributes:
        items: test items that both were scored on.
        equal_parameters: whether all seeds of both have the same number of trainable parameters.
    """

    task: str
    method: str
    routing: str
    backbones: str
    rank: int
    epochs: int
    seeds: int
    items: int
    gain: Gain
    equal_parameters: bool


def claims_table(experiments_sheet: Path, results_folder: Path, claims: pandas.DataFrame) -> Table:
    """T0: one row per claim, method and, for a claimed gain, backbones.

    Args:
        claims: as `read_claims` gives them.

    Raises:
        RoutevlError: an experiment feeds T0 without the visual prefix, so that its baseline sees no image; or a file of a
            run is missing or malformed.
    """
    import pandas as pd

    runs = collect(experiments_sheet, results_folder, "T0")
    for experiment in runs[~runs["prefix"]]["experiment"]:
        raise RoutevlError(f"{experiments_sheet}: experiment {experiment} feeds T0 with prefix no: its baseline sees no image")
    comparisons = compare(runs, results_folder)
    records = [record for claim in claims.itertuples() for record in _records(claim, comparisons)]
    header = [
        "Claim", "Published", "Method", "Verdict", "Scale", "Supported by", "Harmed in", "Largest gain % [95% CI]",
        "Smallest gain % [95% CI]", "Backbones", "Rank", "Epochs", "Test items",
    ]  # fmt: skip
    notes = [
        _RULE,
        "",
        _SCALE,
        "",
        "The claims, with where they stand in the paper:",
        "",
        *(f"- `{claim.claim}` ({claim.where}): {claim.text}" for claim in claims.itertuples()),
        "",
        _INTERVALS,
    ]
    return Table("The paper's claims and what was measured here", pd.DataFrame(records), header, list(map(_row, records)), notes)


def compare(runs: pandas.DataFrame, results_folder: Path) -> list[Comparison]:
    """All comparisons of routing with `none` among the rows of `collect`, in their order."""
    comparisons = []
    for task, of_task in runs.groupby("task", sort=False):
        gains = gains_over_none(of_task, results_folder, MAIN_METRIC[task])
        for _, same_setting in of_task.groupby("setting", sort=False):
            plain_params = set(same_setting[same_setting["routing"] == "none"]["trainable_params"])
            for experiment, group in same_setting.groupby("experiment", sort=False):
                if experiment not in gains:
                    continue
                first = group.iloc[0]
                comparisons.append(
                    Comparison(
                        task=task,
                        method=first["method"],
                        routing=first["routing"],
                        backbones=backbones(first),
                        rank=first["rank"],
                        epochs=first["epochs"],
                        seeds=len(group),
                        items=first["n"],
                        gain=gains[experiment],
                        equal_parameters=len(plain_params | set(group["trainable_params"])) == 1,
                    )
                )
    return comparisons


def verdict(supporting: int, comparisons: int, reaches_figure: bool = True) -> str:
    """The rule that stands below the table.

    Args:
        supporting: how many comparisons support the claim: with a significant gain, or with equal numbers of parameters.
        reaches_figure: whether the largest gain's interval lies at or above the published figure.
    """
    if comparisons == 0:
        return "not tested"
    if supporting == 0:
        return "does not hold"
    return "holds" if supporting == comparisons and reaches_figure else "holds in part"


def _records(claim: Any, comparisons: Sequence[Comparison]) -> Iterable[dict[str, Any]]:
    for method in METHODS:
        found = [c for c in comparisons if c.method == method and claim.task in (c.task, "any")]
        if claim.kind == "untested" or not found:
            yield _record(claim, method, [])
        elif claim.kind == "parameters":
            yield _record(claim, method, found)
        else:
            for name in dict.fromkeys(c.backbones for c in found):
                yield _record(claim, method, [c for c in found if c.backbones == name])


def _record(claim: Any, method: str, found: Sequence[Comparison]) -> dict[str, Any]:
    gains = found if claim.kind == "gain" else []
    measured = [c for c in gains if math.isfinite(c.gain.relative.estimate)]  # a baseline of 0 has no relative gain
    largest = max(measured, key=lambda c: c.gain.relative.estimate, default=None)
    smallest = min(measured, key=lambda c: c.gain.relative.estimate, default=None)
    improve, harm, undecided = (sum(c.gain.absolute.verdict == sign for c in gains) for sign in (1, -1, 0))
    supporting = sum(c.equal_parameters for c in found) if claim.kind == "parameters" else improve
    reaches_figure = claim.kind == "parameters" or largest is not None and largest.gain.relative.low >= claim.published
    return {
        "claim": claim.claim,
        "text": claim.text,
        "where": claim.where,
        "published": claim.published,
        "unit": claim.unit,
        "kind": claim.kind,
        "method": method,
        "backbones": "; ".join(dict.fromkeys(c.backbones for c in found)),
        "ranks": _each(c.rank for c in found),
        "epochs": _each(c.epochs for c in found),
        "seeds": _each(c.seeds for c in found),
        "test_items": _each(c.items for c in found),
        "routing": "; ".join(dict.fromkeys(c.routing for c in found)),
        "comparisons": len(found),
        "supporting": supporting,
        "improve": improve if gains else None,
        "harm": harm if gains else None,
        "no_significant_difference": undecided if gains else None,
        **_extreme("largest", largest),
        **_extreme("smallest", smallest),
        "scale": _scale(claim, found),
        "verdict": verdict(supporting, len(found), reaches_figure),
    }


def _each(values: Iterable[int]) -> str:
    return "; ".join(map(str, sorted(set(values))))


def _extreme(name: str, comparison: Comparison | None) -> dict[str, Any]:
    gain = comparison.gain.relative if comparison else Interval(math.nan, math.nan, math.nan)
    return {
        f"{name}_gain_relative": gain.estimate,
        f"{name}_gain_ci_low": gain.low,
        f"{name}_gain_ci_high": gain.high,
        f"{name}_gain_routing": comparison.routing if comparison else "",
    }


def _row(record: dict[str, Any]) -> list[str]:
    return [
        record["claim"],
        f"{record['published']:g} {record['unit']}" if math.isfinite(record["published"]) else "",
        METHOD_LABELS[record["method"]],
        record["verdict"],
        record["scale"],
        f"{record['supporting']} of {record['comparisons']}" if record["comparisons"] else "",
        "" if record["harm"] is None else str(record["harm"]),
        *(_shown_extreme(record, name) for name in ("largest", "smallest")),
        *(record[column] for column in ("backbones", "ranks", "epochs", "test_items")),
    ]


def _shown_extreme(record: dict[str, Any], name: str) -> str:
    gain = Interval(*(record[f"{name}_gain_{part}"] for part in ("relative", "ci_low", "ci_high")))
    return f"{signed(gain)} ({record[f'{name}_gain_routing']})" if math.isfinite(gain.estimate) else ""


def _scale(claim: Any, found: Sequence[Comparison]) -> str:
    """Whose scale a row is of; the claim about parameters is for any."""
    if not found or claim.kind == "parameters":
        return ""
    return "the paper's backbones" if found[0].backbones == claim.setting else "not the paper's"
