"""F8: test images with the true, the plain and the routed answer, right ones and wrong ones, drawn by lot."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.reporting.results import MAIN_METRIC, is_blind, read_items
from routevl.reporting.style import (
    INK,
    MUTED,
    SCORE_SCALE,
    TASK_LABELS,
    TEXT_WIDTH,
    routing_style,
    setting_label,
)

if TYPE_CHECKING:
    import numpy
    import pandas
    from matplotlib.figure import Figure

    from routevl.reporting.figures.inputs import FigureInputs

CHOICE_SEED = 8
RIGHT_FROM = 50.0  # percent: an answer counts as right when its VQA accuracy reaches this
_COLUMNS = 4
_ROWS = {"vqa": 2, "caption": 1}
_SUBTITLES = {
    "vqa": "Seeded random draw within each column; in brackets: share of all test questions.",
    "caption": "Seeded random draw within each column; in brackets: CIDEr (×100) of each caption.",
}
_QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")

# Places and sizes in inches.
_MARGIN, _GUTTER, _IMAGE_HEIGHT, _LINE, _HEAD, _BETWEEN = 0.06, 0.16, 1.12, 0.125, 0.62, 0.14
_CELL = (TEXT_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GUTTER) / _COLUMNS
_LINE_CHARACTERS, _MOST_LINES = 31, 4
_IMAGE_PIXELS = 320


@dataclass(frozen=True)
class _System:
    """One trained run: its routing function, the answer and the score of every test item."""

    routing: str
    run: str
    answers: dict[int, str]
    scores: pandas.Series


@dataclass(frozen=True)
class _Line:
    """A paragraph below an image: a coloured key, the text, and a mark after it."""

    key: str
    text: str
    color: str | tuple[float, ...]
    wrapped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Example:
    """One cell of the figure."""

    item: int
    image_id: int
    image: Path
    lines: list[_Line]


@dataclass(frozen=True)
class _Section:
    """All examples of one task: per column its heading and its examples."""

    title: str
    subtitle: str
    headings: list[str]
    columns: list[list[_Example]]


def draw(inputs: FigureInputs) -> tuple[Figure, pandas.DataFrame]:
    """One section per task; columns are groups of test items, examples a seeded draw in each."""
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

    runs = inputs.runs(files=())
    images = {entry["id"]: Path(entry["file_name"]) for entry in _entries(inputs.need("data") / "images.json")}
    sections, rows = [], []
    for task, group in runs.groupby("task", sort=False):
        generator = np.random.default_rng(CHOICE_SEED)
        section, section_rows = _section(inputs, task, group, images, generator)
        sections.append(section)
        rows += section_rows
    height = sum(_section_height(section) for section in sections) + _BETWEEN * (len(sections) - 1) + _MARGIN
    figure = Figure(figsize=(TEXT_WIDTH, height))
    top = height
    for section in sections:
        _draw_section(figure, section, top)
        top -= _section_height(section) + _BETWEEN
    return figure, pd.DataFrame(rows)


# Choosing ------------------------------------------------------------------------------------------


def _section(
    inputs: FigureInputs,
    task: str,
    runs: pandas.DataFrame,
    images: dict[int, Path],
    generator: numpy.random.Generator,
) -> tuple[_Section, list[dict[str, Any]]]:
    setting, systems = _systems(inputs.need("results"), task, runs)
    items = (_questions if task == "vqa" else _references)(inputs.need("data"))
    unknown = [item for item in systems[-1].scores.index if item not in items]
    if unknown:
        raise RoutevlError(f"{inputs.data}: holds no item {unknown[0]}, which {systems[-1].run} was scored on")
    groups = _right_and_wrong(systems) if task == "vqa" else _quarters(systems[-1])
    repeats = _COLUMNS // len(groups)
    headings, columns, rows, used = [], [], [], set()
    for name, members in groups.items():
        drawn = _draw_items(members, items, used, repeats * _ROWS[task], generator)
        share = 100 * len(members) / len(systems[-1].scores)
        headings += [f"{name} ({share:.0f}%)" if task == "vqa" else name] + [""] * (repeats - 1)
        examples = [_example(item, items[item], systems, images, task) for item in drawn]
        columns += [examples[index::repeats] for index in range(repeats)]
        rows += [_row(task, name, share, item, items[item], systems) for item in drawn]
    title = f"{TASK_LABELS[task]}: {setting_label(setting, [setting])}"
    return _Section(title, _SUBTITLES[task], headings, columns), rows


def _systems(results_folder: Path, task: str, runs: pandas.DataFrame) -> tuple[tuple, list[_System]]:
    """The plain and the first routed model of the first setting that has both; otherwise what there is."""
    runs = runs[[not is_blind(row) for row in runs.to_dict("records")]]
    if runs.empty:
        raise RoutevlError(f"figure F8_examples: only the blind baseline of {task} feeds F8, nothing to compare")
    by_setting = {setting: group for setting, group in runs.groupby("setting", sort=False)}
    setting, group = max(by_setting.items(), key=lambda pair: (pair[1]["routing"] == "none").nunique())
    routed = group[group["routing"] != "none"].head(1)
    plain = group[group["routing"] == "none"].head(1)
    systems = []
    for row in [*plain.itertuples(), *routed.itertuples()]:
        path = results_folder / "predictions" / row.run / "results.json"
        item, answer = ("question_id", "answer") if task == "vqa" else ("image_id", "caption")
        answers = {entry[item]: str(entry[answer]) for entry in _entries(path, required=(item, answer))}
        scores = read_items(results_folder, [row.run], MAIN_METRIC[task])
        unanswered = scores.index.difference(list(answers))
        if len(unanswered):
            raise RoutevlError(f"{path}: no answer for item {unanswered[0]}, which was scored")
        systems.append(_System(row.routing, row.run, answers, scores))
    return setting, systems


def _right_and_wrong(systems: list[_System]) -> dict[str, list[int]]:
    """Test questions by which of the systems answers them right."""
    right = [set(system.scores.index[system.scores >= RIGHT_FROM]) for system in systems]
    everything = list(systems[-1].scores.index)
    if len(systems) == 1:
        groups = {"right": lambda item: item in right[0], "wrong": lambda item: item not in right[0]}
    else:
        routed = routing_style(systems[1].routing).label
        groups = {
            "both right": lambda item: item in right[0] and item in right[1],
            f"right only with {routed}": lambda item: item not in right[0] and item in right[1],
            "right only without routing": lambda item: item in right[0] and item not in right[1],
            "both wrong": lambda item: item not in right[0] and item not in right[1],
        }
    return {name: [item for item in everything if belongs(item)] for name, belongs in groups.items()}


def _quarters(system: _System) -> dict[str, list[int]]:
    """Test images by the CIDEr of the last system's caption, in quarters of equal size."""
    ranked = list(system.scores.sort_values(kind="stable").index)
    ends = [round(index * len(ranked) / len(_QUARTERS)) for index in range(len(_QUARTERS) + 1)]
    label = routing_style(system.routing).label
    return {
        f"CIDEr of {label}: {name}": sorted(ranked[start:stop])
        for name, start, stop in zip(_QUARTERS, ends, ends[1:], strict=False)
    }


def _draw_items(
    members: list[int], items: dict[int, dict], used: set[int], count: int, generator: numpy.random.Generator
) -> list[int]:
    """Up to `count` members in random order, each on an image not drawn yet; adds to `used`."""
    drawn: list[int] = []
    for index in generator.permutation(len(members)):
        image_id = items[members[index]]["image_id"]
        if len(drawn) < count and image_id not in used:
            used.add(image_id)
            drawn.append(members[index])
    return drawn


def _questions(data_folder: Path) -> dict[int, dict]:
    questions = _entries(data_folder / "questions.json", "questions", ("question_id", "image_id", "question"))
    annotations = _entries(data_folder / "annotations.json", "annotations", ("question_id", "multiple_choice_answer"))
    answers = {entry["question_id"]: entry["multiple_choice_answer"] for entry in annotations}
    return {
        entry["question_id"]: {
            "image_id": entry["image_id"],
            "question": entry["question"],
            "truth": answers.get(entry["question_id"], ""),
        }
        for entry in questions
    }  # fmt: skip


def _references(data_folder: Path) -> dict[int, dict]:
    """The first reference caption of every image."""
    captions: dict[int, dict] = {}
    for entry in _entries(data_folder / "captions.json", "annotations", ("image_id", "caption")):
        reference = {
            "image_id": entry["image_id"],
            "question": "",
            "truth": " ".join(entry["caption"].split()),
        }
        captions.setdefault(entry["image_id"], reference)
    return captions


def _entries(path: Path, key: str | None = None, required: Iterable[str] = ("id", "file_name")) -> list[dict]:
    content = read_json(path)
    entries = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RoutevlError(f"{path}: expected a list of objects" + (f' under "{key}"' if key else ""))
    for index, entry in enumerate(entries):
        missing = [name for name in required if name not in entry]
        if missing:
            raise RoutevlError(f'{path}: entry {index} has no "{missing[0]}"')
    return entries


def _example(item: int, entry: dict, systems: list[_System], images: dict[int, Path], task: str) -> _Example:
    if entry["image_id"] not in images:
        raise RoutevlError(f"images.json of the test split holds no image {entry['image_id']}")
    lines = [_Line("", entry["question"], INK)] if task == "vqa" else []
    lines.append(_Line("truth" if task == "vqa" else "reference", entry["truth"], MUTED))
    for system in systems:
        score = system.scores[item]
        if task == "vqa":
            mark = "✓" if score >= RIGHT_FROM else "✗"
        else:
            mark = f"({score * SCORE_SCALE[task]:.0f})"
        style = routing_style(system.routing)
        color = MUTED if system.routing == "none" else _darker(style.color)
        lines.append(_Line(style.label, f"{system.answers[item]} {mark}", color))
    lines = [_Line(line.key, line.text, line.color, _wrap(line)) for line in lines]
    return _Example(item, entry["image_id"], images[entry["image_id"]], lines)


def _darker(color: str) -> tuple[float, ...]:
    """The same hue, dark enough to be read as small text on white."""
    from matplotlib.colors import to_rgb

    return tuple(0.7 * channel for channel in to_rgb(color))


def _row(task: str, group: str, share: float, item: int, entry: dict, systems: list[_System]) -> dict[str, Any]:
    row = {
        "task": task, "group": group, "share_percent": share, "id": item, "image_id": entry["image_id"],
        "question": entry["question"], "truth": entry["truth"],
    }  # fmt: skip
    for system in systems:
        row |= {f"{system.routing}_run": system.run, f"{system.routing}_answer": system.answers[item]}
        row |= {f"{system.routing}_score": system.scores[item]}
    return row


# Drawing -------------------------------------------------------------------------------------------


def _wrap(line: _Line) -> list[str]:
    """The key and the text in lines of the cell's width; the key opens the first line."""
    text = f"{line.key}: {line.text}" if line.key else line.text
    lines = textwrap.wrap(text, _LINE_CHARACTERS)
    if len(lines) <= _MOST_LINES:
        return lines
    kept, mark = lines[:_MOST_LINES], text.rsplit(" ", 1)[-1]
    room = _LINE_CHARACTERS - len(mark) - 2
    return [*kept[:-1], f"{kept[-1][:room].rstrip()}… {mark}"]


def _row_height(section: _Section, row: int) -> float:
    cells = [column[row] for column in section.columns if row < len(column)]
    most_lines = max(sum(len(line.wrapped) for line in cell.lines) for cell in cells)
    return _IMAGE_HEIGHT + 0.08 + _LINE * most_lines


def _rows(section: _Section) -> int:
    return max((len(column) for column in section.columns), default=0)


def _section_height(section: _Section) -> float:
    rows = _rows(section)
    return _HEAD + sum(_row_height(section, row) for row in range(rows)) + _BETWEEN * max(0, rows - 1)


def _draw_section(figure: Figure, section: _Section, top: float) -> None:
    """Draw with `top`, in inches from the bottom of the figure, as the section's upper end."""
    _write(figure, _MARGIN, top - 0.16, section.title, fontsize=8.5, fontweight="bold")
    _write(figure, TEXT_WIDTH - _MARGIN, top - 0.16, section.subtitle, fontsize=7, color=MUTED, ha="right")
    for column, heading in enumerate(section.headings):
        left = _MARGIN + column * (_CELL + _GUTTER)
        _rule(figure, left, top - 0.31, joins=bool(column) and not heading)
        _write(figure, left, top - 0.47, heading, fontsize=7)
        if not section.columns[column]:
            _write(figure, left, top - _HEAD - 0.1, "none in the test split", fontsize=7, color=MUTED)
    upper = top - _HEAD
    for row in range(_rows(section)):
        for column, examples in enumerate(section.columns):
            if row < len(examples):
                _draw_example(figure, examples[row], _MARGIN + column * (_CELL + _GUTTER), upper)
        upper -= _row_height(section, row) + _BETWEEN


def _draw_example(figure: Figure, example: _Example, left: float, top: float) -> None:
    width, height = figure.get_size_inches()
    box = (left / width, (top - _IMAGE_HEIGHT) / height, _CELL / width, _IMAGE_HEIGHT / height)
    axes = figure.add_axes(box, anchor="W")
    axes.imshow(_read_image(example.image), interpolation="nearest")
    axes.set_axis_off()
    y = top - _IMAGE_HEIGHT - 0.14
    for line in example.lines:
        for text in line.wrapped:
            _write(figure, left, y, text, fontsize=7, color=line.color)
            y -= _LINE


def _read_image(path: Path) -> numpy.ndarray:
    """An RGB image, upright, and no larger than the page can show."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            upright.thumbnail((_IMAGE_PIXELS, _IMAGE_PIXELS))
            return np.asarray(upright)
    except OSError as error:
        raise RoutevlError(f"{path}: not a readable image ({error})") from None


def _write(figure: Figure, x: float, y: float, text: str, **options) -> None:
    width, height = figure.get_size_inches()
    # A dollar sign in an answer is a dollar sign, not the start of a formula.
    figure.text(x / width, y / height, text, va="baseline", parse_math=False, **options)


def _rule(figure: Figure, left: float, y: float, joins: bool) -> None:
    """The line above a column's heading; it joins the column before when both belong to one group."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    start = left - _GUTTER if joins else left
    figure.add_artist(Line2D([start / width, (left + _CELL) / width], [y / height] * 2, color=MUTED, linewidth=0.7))
