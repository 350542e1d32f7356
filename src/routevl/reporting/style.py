"""One look for every figure: sizes, fonts, and a fixed colour, marker and hatch for each routing function.

Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart; markers, line styles and
hatches carry the same information for readers in grey.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from routevl.files import atomic_file

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT_WIDTH = 7.0  # inches, the width at which figures are printed
INK, MUTED, FAINT = "#222222", "#6B6B6B", "#D9D9D9"
METHOD_LABELS = {"lora": "LoRA", "adapter": "Adapter"}
TASK_LABELS = {"vqa": "VQA", "caption": "Captioning"}
SCORE_LABELS = {"vqa": "VQA accuracy (%)", "caption": "CIDEr (×100)"}
SCORE_SCALE = {"vqa": 1.0, "caption": 100.0}  # captioning metrics are stored as fractions

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "mathtext.fontset": "dejavusans",
    "svg.hashsalt": "routevl",
    "pdf.fonttype": 3,
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class RoutingStyle:
    """How one routing function is drawn in every figure."""

    label: str
    color: str
    marker: str
    hatch: str
    line: str


_ROUTING_STYLES = {
    "none": RoutingStyle("no routing", "#8A8A8A", "s", "", "-"),
    "mul": RoutingStyle("mul", "#E69F00", "o", "////", "--"),
    "add": RoutingStyle("add", "#56B4E9", "^", "....", "-."),
    "attn": RoutingStyle("attn", "#0072B2", "D", "", "-"),
    "expand": RoutingStyle("expand", "#009E73", "v", "\\\\\\\\", ":"),
    "self_attn": RoutingStyle("self_attn", "#CC79A7", "P", "xxxx", "--"),
    "attn_relu": RoutingStyle("attn_relu", "#D55E00", "X", "----", "-."),
    "attn_ones": RoutingStyle("attn_ones", "#F0E442", "*", "++++", ":"),
}
BLIND_LABEL = "no image (blind)"
BLIND_LINE = {"color": INK, "linestyle": (0, (4, 2.5)), "linewidth": 1.0, "zorder": 1.5}
BLIND_TICK = {"color": INK, "linestyle": "none", "marker": "|", "markersize": 7, "markeredgewidth": 1.4}


def routing_style(routing: str) -> RoutingStyle:
    """The style of a routing function; one without a style of its own is drawn in mid-grey under its name."""
    return _ROUTING_STYLES.get(routing, RoutingStyle(routing, "#999999", "h", "||||", "--"))


def in_order(routings: Iterable[str]) -> list[str]:
    """Each routing function once, in the order of legends and bars: known ones, then others by name."""
    known = list(_ROUTING_STYLES)
    return sorted(set(routings), key=lambda name: (known.index(name) if name in known else len(known), name))


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and save inside this context; the caller's matplotlib settings are untouched afterwards."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def save(figure: Figure, data: pandas.DataFrame, output: Path) -> None:
    """Write `output` (.svg), and beside it the .pdf, the .png (200 dpi) and the .csv of the data drawn.

    Equal figures give equal bytes: no dates, fixed ids. The SVG is written last, so it never stands alone.
    """
    with atomic_file(output.with_suffix(".csv")) as temporary:
        data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    without_date = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    for file_format, metadata in without_date.items():
        with atomic_file(output.with_suffix(f".{file_format}")) as temporary:
            figure.savefig(temporary, format=file_format, dpi=200, metadata=metadata)


def setting_label(setting: tuple, others: Collection[tuple]) -> str:
    """What sets `setting` apart for a reader: method, rank, epochs, and what varies among `others`."""
    task = dict(setting)["task"]
    others = [dict(other) for other in others if dict(other)["task"] == task]
    parts = []
    for column, value in setting:
        varies = len({other[column] for other in others}) > 1
        if column == "method":
            parts.append(METHOD_LABELS.get(value, value))
        elif column in ("rank", "epochs"):
            parts.append(f"rank {value}" if column == "rank" else plural(value, "epoch"))
        elif column == "prefix":
            if not value:
                parts.append("no prefix")
        elif column != "task" and varies:
            parts.append(f"{column.replace('_', ' ')} {value}")
    return ", ".join(parts)


def plural(count: int, noun: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def figure_legend(figure: Figure, routings: Collection[str], kind: str, blind: bool) -> None:
    """One legend for the figure. `kind` is "bar", "line" or "marker"; `blind` adds the blind baseline."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = []
    for routing in routings:
        style = routing_style(routing)
        if kind == "bar":
            handle = Patch(facecolor=style.color, hatch=style.hatch, edgecolor="white", label=style.label)
        else:
            line = style.line if kind == "line" else "none"
            handle = Line2D(
                [], [], color=style.color, marker=style.marker, linestyle=line, label=style.label,
                markeredgecolor="white", markeredgewidth=0.5,
            )  # fmt: skip
        handles.append(handle)
    if blind:
        handles.append(Line2D([], [], label=BLIND_LABEL, **(BLIND_TICK if kind == "marker" else BLIND_LINE)))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.4, handletextpad=0.5,
        handlelength={"bar": 1.8, "line": 2.8, "marker": 1.0}[kind],
    )  # fmt: skip


def horizontal_grid(axes: Axes) -> None:
    """Thin horizontal lines behind the data, and no tick marks where they would repeat them."""
    axes.grid(axis="y")
    axes.tick_params(axis="y", length=0)
