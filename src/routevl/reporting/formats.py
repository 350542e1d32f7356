"""A table in its four forms: .csv with every column; .md, .tex and .html with what a reader needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from routevl.files import atomic_file

if TYPE_CHECKING:
    import pandas

    from routevl.reporting.statistics import Interval

_LEFT_COLUMNS = {"Claim", "Published", "Task", "Backbones", "Method", "Routing", "Prefix", "Device", "Scale", "Verdict"}
_STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; margin: 1.5rem; }
h1 { font-size: 1.3rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #d9d9d9; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #222; }
td { white-space: nowrap; }
p, li { max-width: 60rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow: auto; }
"""


@dataclass(frozen=True)
class Table:
    """A table in both forms: `data` is the csv; `header` and `rows` are for readers, `notes` (Markdown) go below."""

    title: str
    data: pandas.DataFrame
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def write_table(output: Path, name: str, table: Table) -> None:
    """Write the .md, .tex and .html beside `output`, then the .csv, each whole or not at all."""
    heading = f"{name}: {table.title}"
    text = f"# {heading}\n\n{markdown_table(table.header, table.rows)}\n\n" + "\n".join(table.notes) + "\n"
    for suffix, content in ((".md", text), (".tex", _latex(heading, table)), (".html", html_page(heading, text))):
        with atomic_file(output.with_suffix(suffix)) as temporary:
            temporary.write_text(content, encoding="utf-8")
    with atomic_file(output) as temporary:
        table.data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")


def number(value: float, digits: int = 2) -> str:
    """A number for readers; "" where it is unknown (NaN)."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def plus_minus(mean: float, std: float, digits: int = 2) -> str:
    """Mean ± standard deviation; the mean alone where the deviation is unknown."""
    if not math.isfinite(std):
        return number(mean, digits)
    return f"{number(mean, digits)} ± {number(std, digits)}"


def signed(interval: Interval, scale: float = 1.0) -> str:
    """An estimate and its interval with their signs; "" where they are unknown."""
    estimate, low, high = (value * scale for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate:+.2f} [{low:+.2f}, {high:+.2f}]" if math.isfinite(estimate) else ""


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, without a newline at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def html_page(title: str, markdown: str) -> str:
    """Markdown with tables as a whole HTML page, which runs no script and loads nothing."""
    from html import escape

    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}</body>\n</html>\n'


def _latex(heading: str, table: Table) -> str:
    """A booktabs table; the notes stand in the .md and .html only."""
    alignment = "".join("l" if name in _LEFT_COLUMNS else "r" for name in table.header)
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
