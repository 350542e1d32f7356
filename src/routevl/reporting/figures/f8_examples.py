"""F8: test images with the true answer and those of a baseline and of what is compared with it, drawn by lot."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from routevl.data.vqav2 import usual_answer
from routevl.errors import RoutevlError
from routevl.features.images import ImageFile, read_image, read_image_lists
from routevl.files import read_json
from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.results import read_items
from routevl.reporting.style import INK, MUTED, TEXT_WIDTH, Look, apart, look, mixed, setting_label
from routevl.tasks.table import TASKS

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


class _System(NamedTuple):
    """One trained run: its role in the data, its look, the answer and the score of every test item."""

    role: str
    run: str
    look: Look
    answers: dict[int, str]
    scores: pd.Series


class _Example(NamedTuple):
    """One cell of the figure: an image, and the lines below it with their colours."""

    image: ImageFile
    lines: list[tuple[str, str]]


class _Section(NamedTuple):
    """All examples of one task: per column its heading and its examples."""

    title: str
    subtitle: str
    headings: list[str]
    columns: list[list[_Example]]

    def rows(self) -> list[tuple[tuple[_Example | None, ...], float]]:
        """Each row's cells, and its height."""
        rows = list(zip_longest(*self.columns))
        most_lines = [max(len(cell.lines) for cell in row if cell) for row in rows]
        return [(row, _IMAGE_HEIGHT + 0.08 + _LINE * lines) for row, lines in zip(rows, most_lines, strict=True)]

    def height(self) -> float:
        heights = [height for _, height in self.rows()]
        return _HEAD + sum(heights) + _BETWEEN * max(0, len(heights) - 1)


def draw(inputs: FigureInputs) -> tuple[Figure, pd.DataFrame]:
    """One section per task; columns are groups of test items, examples a seeded draw in each.

    Raises RoutevlError where an experiment of another task than VQA and captioning feeds F8.
    """
    sections, rows = [], []
    all_runs = inputs.runs()
    for experiment in all_runs.loc[~all_runs["task"].isin(_ROWS), "experiment"]:
        raise RoutevlError(
            f"{inputs.experiments}: experiment {experiment} feeds F8, which shows the tasks {' and '.join(_ROWS)} alone"
        )
    for task, runs in all_runs.groupby("task", sort=False):
        section, section_rows = _section(inputs, task, runs)
        sections.append(section)
        rows += section_rows
    top = sum(section.height() for section in sections) + _BETWEEN * (len(sections) - 1) + _MARGIN
    figure = Figure(figsize=(TEXT_WIDTH, top))
    for section in sections:
        _draw_section(figure, section, top)
        top -= section.height() + _BETWEEN
    return figure, pd.DataFrame(rows)


def _section(inputs: FigureInputs, task: str, runs: pd.DataFrame) -> tuple[_Section, list[dict[str, Any]]]:
    title, systems = _systems(inputs, task, runs)
    scored = systems[-1].scores.index
    items = (_questions if task == "vqa" else _references)(inputs.need("data"))
    images = {image.image_id: image for image in read_image_lists([inputs.need("data") / "images.json"])}
    if unknown := [item for item in scored if item not in items]:
        raise RoutevlError(f"{inputs.data}: holds no item {unknown[0]}, which {systems[-1].run} was scored on")
    groups = _right_and_wrong(systems) if task == "vqa" else _quarters(systems[-1])
    repeats = _COLUMNS // len(groups)
    generator = np.random.default_rng(CHOICE_SEED)
    headings, columns, rows, used = [], [], [], set()
    for name, members in groups.items():
        drawn = _draw_items(members, items, used, repeats * _ROWS[task], generator)
        share = 100 * len(members) / len(scored)
        headings += [f"{name} ({share:.0f}%)" if task == "vqa" else name] + [""] * (repeats - 1)
        examples = [_Example(images[items[item]["image_id"]], _lines(item, items[item], systems, task)) for item in drawn]
        columns += [examples[index::repeats] for index in range(repeats)]
        for item in drawn:
            row = {"task": task, "group": name, "share_percent": share, "id": item, **items[item]}
            for role, run, _, answers, scores in systems:
                row |= {f"{role}_run": run, f"{role}_answer": answers[item], f"{role}_score": scores[item]}
            rows.append(row)
    return _Section(title, _SUBTITLES[task], headings, columns), rows


def _systems(inputs: FigureInputs, task: str, runs: pd.DataFrame) -> tuple[str, list[_System]]:
    """The first two experiments, baseline first, of the first group that has two; otherwise what there is. Their first seeds."""
    shown = apart(runs)[0].drop_duplicates("experiment")
    if shown["blind"].all():
        raise RoutevlError(f"figure F8_examples: only the blind baseline of {task} feeds F8, nothing to compare")
    root = max(shown["root"].drop_duplicates(), key=lambda root: min((shown["root"] == root).sum(), 2))
    group = shown[shown["root"] == root].head(2)
    scores = read_items(inputs.need("results"), list(group["run"]), TASKS[task].metric).droplevel("image")
    item, answer = ("question_id", "answer") if task == "vqa" else ("image_id", "caption")
    systems = []
    for role, row in zip(("baseline", "compared")[-len(group) :], group.itertuples(), strict=True):
        entries = read_json(inputs.need("results") / "predictions" / row.run / "results.json")
        answers = {entry[item]: str(entry[answer]) for entry in entries}
        systems.append(_System(role, row.run, look(row), answers, scores[row.run]))
    first = group.iloc[0].to_dict()
    return f"{TASKS[task].label}: {setting_label(first, [first])}", systems


def _right_and_wrong(systems: list[_System]) -> dict[str, list[int]]:
    """Test questions by which of the systems answers them right."""
    names = {(True,): "right", (False,): "wrong"}
    if len(systems) == 2:
        first, second = (f"right only with {system.look.label}" for system in systems)
        names = {(True, True): "both right", (False, True): second, (True, False): first, (False, False): "both wrong"}
    right = list(zip(*(system.scores >= RIGHT_FROM for system in systems), strict=True))
    items = systems[-1].scores.index
    return {name: [item for item, found in zip(items, right, strict=True) if found == which] for which, name in names.items()}


def _quarters(system: _System) -> dict[str, list[int]]:
    """Test images by the CIDEr of the last system's caption, in quarters of equal size."""
    ranked = list(system.scores.sort_values(kind="stable").index)
    ends = [round(index * len(ranked) / len(_QUARTERS)) for index in range(len(_QUARTERS) + 1)]
    return {
        f"CIDEr of {system.look.label}: {name}": sorted(ranked[start:stop])
        for name, start, stop in zip(_QUARTERS, ends, ends[1:], strict=False)
    }


def _draw_items(
    members: list[int], items: dict[int, dict], used: set[int], count: int, generator: np.random.Generator
) -> list[int]:
    """Up to `count` members in random order, each on an image not drawn yet; adds to `used`."""
    drawn: list[int] = []
    for index in generator.permutation(len(members)):
        image_id = items[members[index]]["image_id"]
        if len(drawn) < count and image_id not in used:
            used.add(image_id)
            drawn.append(members[index])
    return drawn


def _questions(data: Path) -> dict[int, dict]:
    annotations = read_json(data / "annotations.json")["annotations"]
    answers = {entry["question_id"]: usual_answer(entry) for entry in annotations}
    return {
        entry["question_id"]: {
            "image_id": entry["image_id"], "question": entry["question"], "truth": answers[entry["question_id"]]
        }
        for entry in read_json(data / "questions.json")["questions"]
    }  # fmt: skip


def _references(data: Path) -> dict[int, dict]:
    """The first reference caption of every image."""
    return {
        entry["image_id"]: {"image_id": entry["image_id"], "question": "", "truth": " ".join(entry["caption"].split())}
        for entry in reversed(read_json(data / "captions.json")["annotations"])
    }


def _lines(item: int, entry: dict, systems: list[_System], task: str) -> list[tuple[str, str]]:
    """What stands below an image, in lines of the cell's width, with their colours."""
    paragraphs = [(entry["question"], INK)] if task == "vqa" else []
    paragraphs.append((f"{'truth' if task == 'vqa' else 'reference'}: {entry['truth']}", MUTED))
    for system in systems:
        score = system.scores[item]
        mark = f"({score * TASKS[task].scale:.0f})"
        if task == "vqa":
            mark = "✓" if score >= RIGHT_FROM else "✗"
        # of the system's hue, but dark enough to be read as small text
        color = mixed(system.look.color, -0.3) if system.role == "compared" else MUTED
        paragraphs.append((f"{system.look.label}: {system.answers[item]} {mark}", color))
    return [(line, color) for text, color in paragraphs for line in _wrapped(text)]


def _wrapped(text: str) -> list[str]:
    """A paragraph's lines; one that is too long is cut before its last word."""
    lines = textwrap.wrap(text, _LINE_CHARACTERS)
    if len(lines) <= _MOST_LINES:
        return lines
    *kept, last = lines[:_MOST_LINES]
    mark = text.rsplit(" ", 1)[-1]
    return [*kept, f"{last[: _LINE_CHARACTERS - len(mark) - 2].rstrip()}… {mark}"]


def _draw_section(figure: Figure, section: _Section, top: float) -> None:
    """Draw with `top`, in inches from the bottom of the figure, as the section's upper end."""
    _write(figure, _MARGIN, top - 0.16, section.title, fontsize=8.5, fontweight="bold")
    _write(figure, TEXT_WIDTH - _MARGIN, top - 0.16, section.subtitle, color=MUTED, ha="right")
    lefts = [_MARGIN + column * (_CELL + _GUTTER) for column in range(_COLUMNS)]
    for left, heading, examples in zip(lefts, section.headings, section.columns, strict=True):
        start = left if heading or left == lefts[0] else left - _GUTTER  # joined to the column before, of the same group
        y = [top - 0.31] * 2
        rule = Line2D([start, left + _CELL], y, color=MUTED, linewidth=0.7, transform=figure.dpi_scale_trans)
        figure.add_artist(rule)
        _write(figure, left, top - 0.47, heading)
        if not examples:
            _write(figure, left, top - _HEAD - 0.1, "none in the test split", color=MUTED)
    upper = top - _HEAD
    for row, height in section.rows():
        for left, example in zip(lefts, row, strict=True):
            if example:
                _draw_example(figure, example, left, upper)
        upper -= height + _BETWEEN


def _draw_example(figure: Figure, example: _Example, left: float, top: float) -> None:
    width, height = figure.get_size_inches()
    box = (left / width, (top - _IMAGE_HEIGHT) / height, _CELL / width, _IMAGE_HEIGHT / height)
    axes = figure.add_axes(box, anchor="W")
    axes.imshow(_pixels(example.image), interpolation="nearest")
    axes.set_axis_off()
    for number, (line, color) in enumerate(example.lines):
        _write(figure, left, top - _IMAGE_HEIGHT - 0.14 - number * _LINE, line, color=color)


def _pixels(file: ImageFile) -> np.ndarray:
    """An image's pixels, uint8 (H, W, 3), no more than the page can show."""
    image = read_image(file)
    image.thumbnail((_IMAGE_PIXELS, _IMAGE_PIXELS))
    return np.asarray(image)


def _write(figure: Figure, x: float, y: float, text: str, fontsize: float = 7, **options: Any) -> None:
    """Write at a place in inches. A dollar sign in an answer is a dollar sign, not the start of a formula."""
    figure.text(x, y, text, fontsize=fontsize, parse_math=False, transform=figure.dpi_scale_trans, **options)
