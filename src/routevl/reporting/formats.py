"""A table in its four forms: .csv with every column; .md, .tex and .html with what a reader needs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from markdown_it import MarkdownIt

from routevl.files import atomic_file
from routevl.reporting.names import DAGGER

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
_TEX = r"""%% Needs the booktabs and graphicx packages.
\begin{table}
\centering
\caption{%s}
\resizebox{\linewidth}{!}{%%
%s}
\end{table}
"""

_PARTLY = ", where there is one"


@dataclass(frozen=True)
class Table:
    """A table in both forms: `data` is the csv; `shown`, all of it text, is for readers, `notes` (Markdown) go below it.

    `details`: the columns of `shown` that are a sentence above the table where all rows agree in them.
    """

    title: str
    data: pd.DataFrame
    shown: pd.DataFrame
    notes: list[str]
    details: Collection[str]


def write_table(output: Path, name: str, table: Table) -> None:
    """Write the .md, .tex and .html beside `output`, then the .csv, each whole or not at all."""
    heading = f"{name}: {table.title}"
    sentence, shown = without_shared(table.shown, table.details)
    numeric = shown.apply(lambda cells: cells.str.match(r"[+-]?\d|$").all())
    alignment = ["right" if right else "left" for right in numeric]
    markdown = markdown_table(shown, tablefmt="pipe", colalign=alignment)
    text = "\n\n".join([f"# {heading}", *filter(None, [sentence]), markdown, "\n".join(table.notes)]) + "\n"
    caption = [f"{heading}.", sentence, *(note.replace("`", "") for note in table.notes if note.startswith(DAGGER))]
    tex = _latex(" ".join(filter(None, caption)), shown, "".join(side[0] for side in alignment))
    for suffix, content in ((".md", text), (".tex", tex), (".html", html_page(heading, text))):
        with atomic_file(output.with_suffix(suffix)) as temporary:
            temporary.write_text(content, encoding="utf-8")
    with atomic_file(output) as temporary:
        table.data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")


def without_shared(shown: pd.DataFrame, details: Collection[str]) -> tuple[str, pd.DataFrame]:
    """What all rows of a table share, in a sentence, and the table without it.

    Args:
        shown: (rows, columns) text; "" where a row has nothing to say of a column.
        details: the columns that may go. A column goes where all rows that have a value in it agree; where the table has a column
            Task, all rows of each task.
    """
    whole = {"All rows": shown}
    by_task = dict(tuple(shown.groupby("Task", sort=False))) if "Task" in shown else {}
    words: dict[str, list[str]] = {name + which: [] for name in (*whole, *by_task) for which in ("", _PARTLY)}
    shared = []
    for column in details:
        cells = {name: table[column] for name, table in whole.items()}
        if not _agree(cells):
            cells = {name: table[column] for name, table in by_task.items()}
        if cells and _agree(cells):
            shared.append(column)
            for name, those in cells.items():
                if value := max(those):  # "" is less than any other
                    words[name if all(those) else name + _PARTLY].append(f"{column[0].lower()}{column[1:]} {value}")
    sentence = " ".join(f"{name}: {', '.join(those)}." for name, those in words.items() if those)
    return sentence, shown.drop(columns=shared)


def _agree(cells: Mapping[str, pd.Series]) -> bool:
    """Whether in each of these columns all values, blanks aside, are the same."""
    return all(len(set(those) - {""}) <= 1 for those in cells.values())


def number(value: float, digits: int = 2) -> str:
    """A number for readers; "" where it is unknown (NaN)."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def markdown_table(shown: pd.DataFrame, **options: Any) -> str:
    """A table of texts in Markdown, without a newline at its end; `options` are tabulate's."""
    cells = shown.map(lambda cell: cell.replace("|", "\\|"))
    return cells.to_markdown(index=False, disable_numparse=True, **options)


def html_page(title: str, markdown: str) -> str:
    """Markdown with tables as a whole HTML page, which runs no script and loads nothing."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}</body>\n</html>\n'


def _latex(caption: str, shown: pd.DataFrame, alignment: str) -> str:
    """A booktabs table, with ±, † and signed numbers in maths; all other notes stand in the .md and .html only."""
    caption = re.sub(r"([&%$#_{}])", r"\\\1", caption)
    styler = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    text = _TEX % (caption, styler.to_latex(hrules=True, column_format=alignment))
    return re.sub(r"(?<![\w.])([+-])(?=\d)", r"$\1$", text.replace("±", r"$\pm$").replace(DAGGER, r"$\dagger$"))
