"""Published figures and claims (config/published.csv, config/claims.tsv): beside what was measured, never mixed with it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from routevl.errors import RoutevlError
from routevl.reporting.results import backbones

if TYPE_CHECKING:
    import pandas

COLUMNS = ("source", "table", "task", "setting", "method", "metric", "value", "std", "note")
CLAIM_COLUMNS = ("claim", "text", "where", "published", "unit", "task", "setting", "kind")
CLAIM_KINDS = ("gain", "parameters", "untested")


def read_published(path: str | Path) -> pandas.DataFrame:
    """Read published.csv; `value` and `std` are float, NaN where the source gives none.

    Raises:
        RoutevlError: no such file, a missing column, or a value that is not a number.
    """
    return _read(path, ",", COLUMNS, numeric=("value", "std"))


def read_claims(path: str | Path) -> pandas.DataFrame:
    """Read claims.tsv; `published` is float, NaN where the paper gives no figure.

    Raises:
        RoutevlError: as `read_published`; a claim of an unknown kind, or of a gain without its figure.
    """
    claims = _read(path, "\t", CLAIM_COLUMNS, numeric=("published",))
    for claim in claims.itertuples():
        if claim.kind not in CLAIM_KINDS:
            raise RoutevlError(f"{path}: kind of {claim.claim} is {claim.kind!r}, expected one of {', '.join(CLAIM_KINDS)}")
        if claim.kind == "gain" and not claim.published > 0:
            raise RoutevlError(f"{path}: {claim.claim} is the claim of a gain and needs its figure in `published`")
    return claims


def _read(path: str | Path, separator: str, columns: Collection[str], numeric: Collection[str]) -> pandas.DataFrame:
    import pandas as pd

    try:
        found = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise RoutevlError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise RoutevlError(f"{path}: not a readable table ({error})") from error
    missing = [column for column in columns if column not in found.columns]
    if missing:
        raise RoutevlError(f"{path}: the columns {', '.join(missing)} are missing")
    for column in numeric:
        try:
            found[column] = pd.to_numeric(found[column].replace("", None))
        except ValueError as error:
            raise RoutevlError(f"{path}: the column {column} holds something that is no number ({error})") from None
    return found


def published_score(published: pandas.DataFrame, row: pandas.Series, metric: str) -> float:
    """The published figure of an experiment, NaN when none is known.

    It counts only for the same backbones: `setting` is "<text_backbone> + <vision_backbone>" with the names
    of the experiments sheet, and `method` is "<method> <routing>", for example "lora attn".
    """
    found = published[
        (published["task"] == row["task"])
        & (published["setting"] == backbones(row))
        & (published["method"] == f"{row['method']} {row['routing']}")
        & (published["metric"] == metric)
    ]
    return float(found["value"].iloc[0]) if len(found) else float("nan")
