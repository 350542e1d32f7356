"""Table T0: each claim of the paper beside what was measured here, with a verdict by a fixed rule."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.methods.table import METHODS
from routevl.options import read_words, text_of
from routevl.reporting.formats import Table
from routevl.reporting.names import DAGGER, backbones
from routevl.reporting.published import read_claims
from routevl.reporting.results import collect, data_set_gains, gains, not_learned_note
from routevl.reporting.statistics import NOT_LEARNED, Gain, Interval

_RULE = (
    "The verdicts follow a fixed rule. The claim of a gain is judged by the comparisons with three seeds or more on both sides, "
    "all of which learned something, and with a baseline clear of zero, and by no others, which are counted as left out. It "
    "*holds*, for a method and its backbones, if routing improves significantly (at 5%, after Holm's correction for the number "
    "of comparisons of the task that are judged here) in every one of these, and the lower end of the largest gain's interval "
    "reaches the published figure. It *holds in part* if routing improves significantly in some of them, and *does not hold* if "
    "in none. The claim of gains in several data sets is judged alike, but has no figure, and a comparison supports it only "
    "where routing improves their average significantly and gains something, significant or not, in each of them. "
    "The claim about parameters *holds* if every experiment with routing has as many trainable parameters as the one "
    "without at the same setting, *in part* if some have, and *does not hold* if none has. A claim without a comparison that is "
    "judged is *not tested*."
)
_SCALE = (
    "**Scale.** The paper's figures are for the backbones named in the claims, on all of VQAv2 and COCO 2014. A row whose scale "
    "is *not the paper's* was measured with other backbones and on the data of this configuration: its verdict says whether "
    "the effect shows there, and neither confirms nor refutes the paper's figure."
)
_DETAILS = ("Scale", "Backbones", "Rank", "Epochs", "Test items")
_INTERVALS = (
    "Gains are those of tables T1 (accuracy), T2 (CIDEr) and T3 (average), in percent of the experiment without routing; the "
    "paper's figures are read as such relative gains. The largest and smallest are of those that are judged; their 95% intervals "
    "cover the choice of test images, each with all its questions or captions, and of seeds (below these tables), and are not "
    "corrected for having been chosen among several."
)


def claims_table(arguments: argparse.Namespace) -> Table:
    """T0: one row per claim, method with a routing function, and, for a claimed gain, backbones.

    Raises RoutevlError where an experiment feeds T0 without the visual prefix, so that its baseline sees no image, or where
    none of them has a routing function and a `versus`.
    """
    claims = list(read_claims(arguments.claims).itertuples())
    runs = collect(arguments.experiments, arguments.results, "T0")
    for experiment in runs[~runs["prefix"]]["experiment"]:
        where = f"{arguments.experiments}: experiment {experiment}"
        raise RoutevlError(f"{where} feeds T0 with prefix no: its baseline sees no image")
    compared = runs[(runs["versus"] != "") & (runs["routing"] != "none")]
    if compared.empty:
        raise RoutevlError(f"{arguments.experiments}: no experiment that feeds T0 has a routing function and a `versus`")
    found, of_data_sets = gains(compared, arguments.results), data_set_gains(compared, arguments.results)
    comparisons = [
        group.iloc[0].to_dict()
        | {"backbones": backbones(group.iloc[0]), "seeds": len(group), "gain": found[experiment]}
        | {"equal_parameters": _equal_parameters(group, arguments.results)}
        | {"data_set_gains": [of[experiment] for of in of_data_sets.values() if experiment in of]}
        for experiment, group in compared.groupby("experiment", sort=False)
    ]
    methods = [method for method in METHODS if any(c["method"] == method for c in comparisons)]
    records = [record for claim in claims for record in _records(claim, _about(claim, claims, comparisons), methods)]
    notes = [
        _RULE,
        "",
        _SCALE,
        "",
        "The claims, with where they stand in the paper:",
        "",
        *(f"- `{claim.claim}` ({claim.where}): {claim.text}" for claim in claims),
        "",
        _INTERVALS,
        *(["", note] if (note := not_learned_note(runs)) else []),
    ]
    title = "The paper's claims and what was measured here"
    return Table(title, pd.DataFrame(records), pd.DataFrame(map(_shown, records)), notes, _DETAILS)


def _equal_parameters(group: pd.DataFrame, results: Path) -> bool:
    """Whether all seeds of an experiment and of its baseline have the same number of trainable parameters."""
    baseline = [read_json(results / "models" / run / "run.json") for run in group["versus_runs"].iloc[0]]
    return len({run["trainable_params"] for run in baseline} | set(group["trainable_params"])) == 1


def verdict(supporting: int, comparisons: int, reaches_figure: bool = True) -> str:
    """The rule that stands below the table, of judged comparisons; `reaches_figure`: whether the largest gain's interval does."""
    if comparisons == 0:
        return "not tested"
    if supporting == 0:
        return "does not hold"
    return "holds" if supporting == comparisons and reaches_figure else "holds in part"


def _about(claim: Any, claims: Sequence[Any], comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons that have a claim's options; of a claim without options those that have no other claim's."""

    def has_options(of: Any, comparison: dict[str, Any]) -> bool:
        known = {"routing": comparison["routing"], **comparison["details"]}
        return all(text_of(known.get(name)) == value for name, value in read_words(of.options.split(), of.claim).items())

    if claim.options:
        return [c for c in comparisons if has_options(claim, c)]
    return [c for c in comparisons if not any(other.options and has_options(other, c) for other in claims)]


def _records(claim: Any, about: Sequence[dict[str, Any]], methods: Collection[str]) -> Iterator[dict[str, Any]]:
    """A claim's lines for each of the methods, by the comparisons that it is about; one for each pair of backbones where it has a
    figure, which is for the paper's."""
    for method in methods:
        found = [c for c in about if c["method"] == method and claim.task in (c["task"], "any")]
        if claim.kind in ("gain", "gains") and found:
            for name in dict.fromkeys(c["backbones"] for c in found):
                yield _record(claim, method, [c for c in found if c["backbones"] == name])
        else:
            yield _record(claim, method, found)


def _gains_everywhere(comparison: dict[str, Any]) -> bool:
    everywhere = all(gain.absolute.estimate > 0 for gain in comparison["data_set_gains"])
    return comparison["gain"].verdict == 1 and everywhere


_SUPPORTS = {  # kind of a claim -> whether a comparison that is judged supports it
    "gain": lambda comparison: comparison["gain"].verdict == 1,
    "gains": _gains_everywhere,
    "no gain": lambda comparison: comparison["gain"].verdict != 1,
    "parameters": lambda comparison: comparison["equal_parameters"],
}


def _record(claim: Any, method: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    of_gain = claim.kind != "parameters"
    judged = [c for c in found if not (of_gain and c["gain"].no_verdict)]
    extremes = {"default": {"gain": Gain(), "routing": ""}, "key": lambda c: c["gain"].relative.estimate}
    largest, smallest = (choose(judged if of_gain else [], **extremes) for choose in (max, min))
    verdicts = [c["gain"].verdict for c in judged]
    supporting = sum(map(_SUPPORTS[claim.kind], judged))
    reaches_figure = claim.kind != "gain" or largest["gain"].relative.low >= claim.published
    same_scale = "the paper's backbones" if found and found[0]["backbones"] == claim.setting else "not the paper's"
    counted = of_gain and found
    return {
        **{column: getattr(claim, column) for column in ("claim", "text", "where", "published", "unit", "kind")},
        "method": method,
        "backbones": _each(c["backbones"] for c in found),
        "ranks": _each(sorted(c["rank"] for c in found)),
        "epochs": _each(sorted(c["epochs"] for c in found)),
        "seeds": _each(sorted(c["seeds"] for c in found)),
        "test_items": _each(sorted(c["n"] for c in found)),
        "routing": _each(c["routing"] for c in found),
        "comparisons": len(judged),
        "left_out": len(found) - len(judged),
        "not_learned": sum(c["gain"].no_verdict == NOT_LEARNED for c in found) if counted else None,
        "supporting": supporting,
        "improve": verdicts.count(1) if counted else None,
        "harm": verdicts.count(-1) if counted else None,
        "no_significant_difference": verdicts.count(0) if counted else None,
        **largest["gain"].relative.columns("largest_gain_relative", "largest_gain_ci"),
        "largest_gain_routing": largest["routing"],
        **smallest["gain"].relative.columns("smallest_gain_relative", "smallest_gain_ci"),
        "smallest_gain_routing": smallest["routing"],
        "scale": same_scale if counted else "",  # the claim about parameters is for any
        "verdict": verdict(supporting, len(judged), reaches_figure),
    }


def _each(values: Iterable[Any]) -> str:
    return "; ".join(dict.fromkeys(map(str, values)))


def _shown(record: dict[str, Any]) -> dict[str, str]:
    return {
        "Claim": record["claim"],
        "Method": METHODS[record["method"]].label,
        "Published": f"{record['published']:g} {record['unit']}" if math.isfinite(record["published"]) else "",
        "Verdict": record["verdict"],
        "Largest gain % [95% CI]": _shown_extreme(record, "largest"),
        "Smallest gain % [95% CI]": _shown_extreme(record, "smallest"),
        "Supported by": f"{record['supporting']} of {record['comparisons']}" if record["comparisons"] else "",
        "Harmed in": str(record["harm"]) if record["harm"] is not None and record["comparisons"] else "",
        "Left out": "" if record["harm"] is None else str(record["left_out"]) + (f" {DAGGER}" if record["not_learned"] else ""),
        "Scale": record["scale"],
        "Backbones": record["backbones"],
        "Rank": record["ranks"],
        "Epochs": record["epochs"],
        "Test items": record["test_items"],
    }


def _shown_extreme(record: dict[str, Any], name: str) -> str:
    gain = Interval(*(record[f"{name}_gain_{part}"] for part in ("relative", "ci_low", "ci_high")))
    return f"{gain.signed()} ({record[f'{name}_gain_routing']})" if math.isfinite(gain.estimate) else ""
