"""One look for every figure: sizes, fonts, and a colour, marker, line style and hatch for each row.

The colour is that of the method's family, lighter or darker by the routing function, which also gives marker, line style and
hatch, so that readers in grey can tell them apart. All of it comes from `routevl.methods.table` and `routevl.routing`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from routevl.files import atomic_file
from routevl.methods.table import FAMILIES, METHODS, free_options
from routevl.reporting.names import DAGGER, differing, in_words, plural
from routevl.reporting.results import INTERNAL
from routevl.routing import ROUTING
from routevl.tasks.table import TASKS

TEXT_WIDTH = 7.0  # inches, the width at which figures are printed
INK, MUTED, FAINT = "#222222", "#6B6B6B", "#D9D9D9"
BLIND_LABEL = "no image (blind)"
BLIND_LINE = {"color": INK, "linestyle": (0, (4, 2.5)), "linewidth": 1.0, "zorder": 1.5}
BLIND_TICK = {"color": INK, "linestyle": "none", "marker": "|", "markersize": 7, "markeredgewidth": 1.4}
HALO = [withStroke(linewidth=2, foreground="white")]  # of text that stands on lines
INTERVAL_LINES = {"images and seeds": "solid", "images": (0, (1, 1))}  # by what an interval is over
MARKERS = ("p", "<", ">", "h", "P", "d", "X", "*")  # of methods without routing functions, by their place in the family
HATCHES = ("", "xxxx", "----", "oooo", "++++", "||||", "\\\\//", "**")

_RC = {
    "font.family": "DejaVu Sans", "font.size": 8, "mathtext.fontset": "dejavusans", "text.color": INK,
    "axes.titlesize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 8,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.linewidth": 0.7, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": FAINT, "grid.linewidth": 0.5,
    "xtick.color": MUTED, "xtick.labelcolor": INK, "xtick.labelsize": 7.5,
    "ytick.color": MUTED, "ytick.labelcolor": INK, "ytick.labelsize": 7.5,
    "legend.fontsize": 8, "legend.frameon": False, "lines.linewidth": 1.4, "lines.markersize": 4.5, "hatch.linewidth": 0.6,
    "svg.hashsalt": "routevl", "pdf.fonttype": 3, "figure.dpi": 100,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a row is drawn in every figure. `open`: white with a coloured edge, for a variant of a row that stands beside it."""

    label: str
    color: str
    marker: str
    hatch: str
    line: str
    open: bool = False

    def bar(self) -> dict[str, Any]:
        """Keywords of a bar or patch."""
        if self.open:
            return {"facecolor": "white", "hatch": self.hatch, "edgecolor": self.color, "linewidth": 0.9}
        return {"facecolor": self.color, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0}

    def points(self, line: bool = False) -> dict[str, Any]:
        """Keywords of a plot of markers, with or without the line through them."""
        edges = ("white", self.color, 1.1) if self.open else (self.color, "white", 0.5)
        style = dict(zip(("markerfacecolor", "markeredgecolor", "markeredgewidth"), edges, strict=True))
        return {"color": self.color, "marker": self.marker, "linestyle": self.line if line else "none", **style}


def has_routing(method: str) -> bool:
    """Whether a run of the method can have a routing function."""
    return "routing" in free_options(method)


def look(row: Any, color: str | None = None) -> Look:
    """The look of a row of `results.collect`, read by attributes; `color`: in place of the method's family's."""
    method = METHODS[row.method]
    color = color or FAMILIES[method.family]
    if has_routing(row.method):
        routing = ROUTING[row.routing]
        own = Look(routing.label, mixed(color, routing.shade), routing.marker, routing.hatch, routing.line)
    else:
        place = [name for name in METHODS if METHODS[name].family == method.family].index(row.method)
        line = list(ROUTING.values())[place % len(ROUTING)].line
        own = Look(method.label, color, MARKERS[place % len(MARKERS)], HATCHES[place % len(HATCHES)], line)
    if row.variant:
        number = row.variant_number % len(MARKERS)
        own = replace(own, label=f"{own.label}, {row.variant}", marker=MARKERS[number], hatch=HATCHES[number], open=True)
    return own


def mixed(color: str, shade: float) -> str:
    """A colour with white (`shade` from 0 to 1) or black (from 0 to -1) mixed in."""
    return to_hex([channel * (1 - abs(shade)) + max(shade, 0) for channel in to_rgb(color)])


def apart(data: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows that are compared, and the blind ones, which are drawn as a line; where all are blind, they are the former."""
    blind = data["blind"] & ~data["blind"].all()
    return data[~blind], data[blind]


def setting_label(row: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> str:
    """What a figure writes at a group of rows: its method, rank, epochs, and what varies among the groups.

    `row` is the group's first one, which is its baseline where that is shown; `others` are the first ones of all groups.
    """
    parts = [
        METHODS[row["method"]].label,
        f"rank {row['details']['r']}" if "r" in row["details"] else "",
        plural(row["epochs"], "epoch"),
        "" if row["prefix"] else "no prefix",
        in_words(differing(row, others, but=("r", "epochs", "prefix"))),
    ]
    return ", ".join(filter(None, parts))


def house_style() -> AbstractContextManager[None]:
    """Draw and save inside this context; the caller's matplotlib settings are untouched afterwards."""
    return matplotlib.rc_context(_RC)


def save(figure: Figure, data: pd.DataFrame, output: Path) -> None:
    """Write `output` (.svg), and before it the .pdf, the .png (200 dpi) and the .csv of the data drawn.

    Equal figures give equal bytes: no dates, fixed ids.
    """
    with atomic_file(output.with_suffix(".csv")) as temporary:
        shown = data.drop(columns=INTERNAL, errors="ignore")
        shown.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    for file_format, metadata in (("png", {}), ("pdf", {"CreationDate": None}), ("svg", {"Date": None})):
        with atomic_file(output.with_suffix(f".{file_format}")) as temporary:
            figure.savefig(temporary, format=file_format, dpi=200, metadata=metadata)


def figure_legend(figure: Figure, data: pd.DataFrame, kind: str) -> None:
    """One legend for all rows of a figure. `kind` is "bar", "line" or "marker".

    A routing function that occurs with several families is shown in grey, as its look in each of them differs in hue alone.
    """
    shown, blind = apart(data)
    routings, methods = list(ROUTING), list(METHODS)

    def place(row: Any) -> tuple:
        return not has_routing(row.method), routings.index(row.routing), methods.index(row.method), row.variant_number

    rows = sorted(shown.drop_duplicates(["method", "routing", "variant"]).itertuples(), key=place)
    grey = MUTED if len({METHODS[row.method].family for row in rows if has_routing(row.method)}) > 1 else None
    looks = {own.label: own for own in (look(row, grey if has_routing(row.method) else None) for row in rows)}
    if kind == "bar":
        handles = [Patch(label=label, **own.bar()) for label, own in looks.items()]
    else:
        handles = [Line2D([], [], label=label, **own.points(kind == "line")) for label, own in looks.items()]
    if len(blind):
        handles.append(Line2D([], [], label=blind_label(blind), **(BLIND_TICK if kind == "marker" else BLIND_LINE)))
    length = {"bar": 1.8, "line": 2.8, "marker": 1.0}[kind]
    room = figure.get_figwidth() / 0.111  # in units of the font's size, as are the lengths
    widths = [length + 1.9 + 0.6 * len(handle.get_label()) for handle in handles]
    columns = len(handles) if sum(widths) < room else max(1, int(room / max(widths)))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, columnspacing=1.4, handletextpad=0.5, handlelength=length
    )


def blind_label(blind: pd.DataFrame) -> str:
    """What a legend calls the blind rows."""
    return f"{BLIND_LABEL} {DAGGER}" if blind["n_not_learned"].any() else BLIND_LABEL


def task_panels(data: pd.DataFrame, height: float, stacked: bool = False) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel of `height` for each task of the data, by task: two side by side, or each of the text's width."""
    tasks = list(dict.fromkeys(data["task"]))
    columns = 1 if stacked else min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (TEXT_WIDTH if stacked or columns > 1 else 0.6 * TEXT_WIDTH, height * rows)
    figure = Figure(figsize=size, layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(tasks) :]:
        axes.remove()
    panels = dict(zip(tasks, places, strict=False))
    for task, axes in panels.items():
        axes.set(title=TASKS[task].label, ylabel=TASKS[task].score)
    return figure, panels


def wrapped(label: str, characters: int) -> str:
    """A `setting_label` in lines, broken at commas alone; the method has a line of its own."""
    method, *rest = (part.replace(" ", "\N{NO-BREAK SPACE}") for part in label.split(", "))
    lines = textwrap.wrap(", ".join(rest), characters, break_long_words=False, break_on_hyphens=False)
    return "\n".join([method, *lines])


def draw_interval(
    axes: Axes, place: float, row: Any, color: str, of: str = "score", horizontal: bool = False, **style: Any
) -> None:
    """The error bar of a row of `FigureInputs.scores` at its place on the other axis, its line by what the interval is over.

    `of`: the column of what the interval is of; `style`: of `Axes.errorbar`.

    Where a run learned nothing there is none: how far such a seed is from the others is no width of an interval.
    """
    if row.n_not_learned:
        return
    estimate = getattr(row, of)
    spread = [[estimate - row.ci_low], [row.ci_high - estimate]]
    drawn = (estimate, place, None, spread) if horizontal else (place, estimate, spread)
    *_, bars = axes.errorbar(*drawn, fmt="none", ecolor=color, **style)
    bars[0].set_linestyle(INTERVAL_LINES[row.ci_over])


def mark_not_learned(axes: Axes, x: float, y: float, offset: tuple[float, float] = (0, 8)) -> None:
    """Put a dagger beside a point whose row has a run that learned nothing, `offset` points away."""
    axes.annotate(
        DAGGER, (x, y), offset, textcoords="offset points", horizontalalignment="center", verticalalignment="center", color=INK,
        fontsize=9, fontweight="bold", zorder=7, path_effects=HALO,
    )  # fmt: skip


def lower_legend(figure: Figure, data: pd.DataFrame) -> None:
    """Says below the panels which of these rows have runs that learned nothing, and, of rows of `FigureInputs.scores` that are
    compared, what their error bars are."""
    text, handles = "", []
    failed = data[data["n_not_learned"] > 0].drop_duplicates("experiment")
    if len(failed):
        which = (f"{row.experiment} ({row.n_not_learned} of {plural(row.n_seeds, 'run')})" for row in failed.itertuples())
        text = f"{DAGGER} learned nothing, and is left out of intervals and gains: {', '.join(which)}"
    if "ci_over" in data:
        shown, _ = apart(data)
        found = set(shown.loc[shown["n_not_learned"] == 0, "ci_over"])
        for over, line in ((over, line) for over, line in INTERVAL_LINES.items() if over in found):
            handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=line, label=f"95% interval over {over}"))
    if text or handles:
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), handlelength=1.8)
        legend.set_title(textwrap.fill(text, int(figure.get_figwidth() / 0.06)), {"size": 8})
        legend.get_title().set_multialignment("center")


def horizontal_grid(axes: Axes) -> None:
    """Thin horizontal lines behind the data, and no tick marks where they would repeat them."""
    axes.grid(axis="y")
    axes.tick_params(axis="y", length=0)
