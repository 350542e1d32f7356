"""Published figures and claims (config/published.csv, config/claims.tsv): beside what was measured, never mixed with it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from routevl.errors import RoutevlError
from routevl.methods.table import METHODS
from routevl.options import read_words
from routevl.reporting.names import backbones

COLUMNS = ("source", "table", "task", "setting", "method", "metric", "value", "std", "note")
CLAIM_COLUMNS = ("claim", "text", "where", "published", "unit", "task", "setting", "kind", "options")
CLAIM_KINDS = ("gain", "gains", "no gain", "parameters")


def read_published(path: Path) -> pd.DataFrame:
    """Read published.csv; `value` and `std` are float, NaN where the source gives none."""
    return _read(path, ",", COLUMNS, numeric=("value", "std"))


def read_claims(path: Path) -> pd.DataFrame:
    """Read claims.tsv; `published` is float, NaN where the paper gives no figure, which the claim of a gain must have.

    `options`: the claim is about runs with these, key=value; where it names none, about those that no other claim's options name.
    """
    claims = _read(path, "\t", CLAIM_COLUMNS, numeric=("published",))
    for claim in claims.itertuples():
        if claim.kind not in CLAIM_KINDS:
            raise RoutevlError(f"{path}: kind of {claim.claim} is {claim.kind!r}, expected one of {', '.join(CLAIM_KINDS)}")
        if claim.kind == "gain" and not claim.published > 0:
            raise RoutevlError(f"{path}: {claim.claim} is the claim of a gain and needs its figure in `published`")
        if claim.kind == "gains" and claim.task != "multitask":
            raise RoutevlError(
                f"{path}: {claim.claim} is the claim of gains, which is about the task multitask, not {claim.task}"
            )
        read_words(claim.options.split(), f"{path}: options of {claim.claim}")
    return claims


def _read(path: Path, separator: str, columns: Collection[str], numeric: Collection[str]) -> pd.DataFrame:
    types = dict.fromkeys(columns, str) | dict.fromkeys(numeric, float)
    blank = dict.fromkeys(numeric, "")
    try:
        return pd.read_csv(path, sep=separator, usecols=columns, dtype=types, keep_default_na=False, na_values=blank)
    except ValueError as error:
        raise RoutevlError(f"{path}: not a readable table ({error})") from error


def published_score(published: pd.DataFrame, row: pd.Series, metric: str) -> float:
    """The published figure of an experiment, NaN when none is known.

    It counts only for the same backbones: `setting` is "<text_backbone> + <vision_backbone>" with the names of the experiments
    sheet, and `method` is what the list of methods says it is called there, with a routing function behind it: "LoRA attn".
    """
    method = METHODS[row["method"]].published or METHODS[row["method"]].label
    method += "" if row["routing"] == "none" else f" {row['routing']}"
    sought = {"task": row["task"], "setting": backbones(row), "method": method, "metric": metric}
    found = published[(published[list(sought)] == pd.Series(sought)).all(axis=1)]
    return float(found["value"].iloc[0]) if len(found) else float("nan")
