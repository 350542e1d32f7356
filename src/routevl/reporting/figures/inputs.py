"""What a figure may read, with a clear error for what it needs and was not given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from routevl.errors import RoutevlError
from routevl.reporting.results import collect

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class FigureInputs:
    """The command line of stage `figure`: the figure's name and the folders to read."""

    name: str
    experiments: Path | None = None
    results: Path | None = None
    data: Path | None = None

    def runs(self, files: Collection[str]) -> pandas.DataFrame:
        """The runs that feed this figure, one a row; `files` as in `results.collect`."""
        return collect(self.need("experiments"), self.need("results"), self.name.split("_")[0], files)

    def need(self, option: str) -> Path:
        """A path of the command line, or a RoutevlError that says which option is missing."""
        path = getattr(self, option)
        if path is None:
            raise RoutevlError(f"figure {self.name} needs --{option}")
        return path
