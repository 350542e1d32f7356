"""Write those parts of the documents that the code describes: keys, settings, columns, derivations, methods, options.

usage: python workflow/docs.py [--models] [--check]

Each part stands between the lines `<!-- make docs: <part> -->` and `<!-- end -->` of its document; what is around them is written
by hand. With --models the parts are those for which models of many families are built, which takes half a minute, and no others.
With --check nothing is written: the exit status is 1, with one line, where a document is not up to date.

README.md's results are made of the csv in docs/results: T1, T2 and T3 are copied from the tables of a finished `make demo`, T7
from those of a finished `make demo-full`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from routevl.backbones.derivations import DERIVATIONS
from routevl.errors import RoutevlError
from routevl.files import atomic_file
from routevl.methods.table import BASELINE, METHODS, method_class, method_records
from routevl.options import describe, text_of, words_of
from routevl.reporting import FIGURES, TABLES
from routevl.reporting.names import BACKBONES, plural
from routevl.reporting.published import read_published
from routevl.reporting.rows import Row, gain_of, of_this_version, read_rows, score_of
from routevl.settings import shared_setting_records
from routevl.sheet import COLUMNS
from routevl.tasks.table import TASKS

PROJECT = Path(__file__).resolve().parents[1]
SCHEMA = PROJECT / "workflow/schemas/config.schema.yaml"
PART = re.compile(r"(<!-- make docs: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 130  # of a line of text; a table may have longer ones
BOUNDS = {"least": "{} or more", "most": "{} or less", "above": "more than {}", "below": "less than {}"}
BOUNDS_OF_SCHEMA = {"least": "minimum", "most": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
OVER = {  # what T7's gains are over -> the columns of `gain_of`
    "blind": ("gain_vs_blind", "blind_ci", "blind_"),
    METHODS[BASELINE].label: (f"gain_vs_{BASELINE}",),
}
MOST_NAMED = 10  # rows that a sentence names
TYPES_OF_SCHEMA = {"string": "text", "boolean": "yes or no", "object": "keys and values"}


# -------------------------------------------------------------------------------------- words and tables


def table(header: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _filled(text: str) -> str:
    """A paragraph, its lines of WIDTH characters at most."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def code(value: object) -> str:
    return f"`{value}`"


def alternatives(values: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))


def bounded(kind: str, bounds: Mapping[str, Any]) -> str:
    """A type with its bounds by their names in BOUNDS."""
    return ", ".join([kind, *(BOUNDS[name].format(text_of(bounds[name])) for name in BOUNDS if name in bounds)])


def value_of(record: Mapping[str, Any]) -> str:
    """What values an option has, from its record by `routevl.options.describe`."""
    if "choices" in record:
        return alternatives([code(choice) for choice in record["choices"]])
    return bounded(record["type"], record)


def default_of(record: Mapping[str, Any]) -> str:
    return code(text_of(record["default"])) if "default" in record else ""


def first_paragraph(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("*", "\\*")


def first_sentence(path: Path) -> str:
    """Of a caption, without line breaks."""
    return re.split(r"(?<=\.) ", " ".join(path.read_text(encoding="utf-8").split()))[0].replace("``", "`")


# ---------------------------------------------------------------------------------------- README.md


def results() -> str:
    """The rows of T1, T2 and T3, a table for each."""
    return "\n\n".join(_results_of(name) for name in ("T1_vqa", "T2_caption", "T3_multitask"))


def _results_of(name: str) -> str:
    """The rows of a table of one task: its main score or, where it is a mean over data sets, each of them too."""
    file, task = PROJECT / f"docs/results/{name}.csv", TASKS[name.partition("_")[2]]
    scores = task.shown if name == "T3_multitask" else {task.metric: task.score}
    gain = f"gain in the {task.shown[task.metric].lower()}" if len(scores) > 1 else "gain"
    with of_this_version(file):
        rows = [
            (
                METHODS[row["method"]].label,
                row["routing"] + _unseen(row),
                row["epochs"],
                row["n_seeds"],
                *(score_of(row, task, metric) for metric in scores),
                gain_of(row, task).absolute.signed(1),
            )
            for row in read_rows(file)
        ]
        return table((task.label, "routing", "epochs", "seeds", *scores.values(), gain), rows)


def _unseen(row: Row) -> str:
    """What a row's name ends with where its run has no visual prefix."""
    return "" if row["prefix"] == "yes" else ", no image (blind)" if row["routing"] == "none" else ", no prefix"


def results_of_methods() -> str:
    """The rows of T7, those of all tasks in a line, and what is to be known of them."""
    file = PROJECT / "docs/results/T7_methods.csv"
    with of_this_version(file):
        rows = read_rows(file)
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        usual = {task: next(row for row in rows if row["task"] == task) for task in tasks}
        lines: dict[str, dict[str, Row]] = {}  # by the method's name, and the task's
        for row in rows:
            own = [row[column] for column in BACKBONES if row[column] != usual[row["task"]][column]]
            told = map(code, [*([] if row["routing"] == "none" else [row["routing"]]), *own])
            of = lines.setdefault(", ".join([METHODS[row["method"]].label, *told]) + _unseen(row), {})
            if row["task"] in of:
                raise RoutevlError(f"{file}: {of[row['task']]['experiment']} and {row['experiment']} are of one method and task")
            of[row["task"]] = row
        head = ["method", *(words for task in tasks for words in (TASKS[task].score, *(f"over {of}" for of in OVER)))]
        cells = ((name, *(cell for task in tasks for cell in _result(of.get(task)))) for name, of in lines.items())
        return f"{table(head, cells)}\n\n{_filled(' '.join(_facts(rows)))}"


def _result(row: Row | None) -> Iterator[str]:
    """Score and gains of a method in a task; blank where it has no run. A gain with a verdict is bold."""
    if row is None:
        yield from [""] * (1 + len(OVER))
        return
    yield score_of(row, TASKS[row["task"]])
    for columns in OVER.values():
        gain = gain_of(row, TASKS[row["task"]], *columns)
        shown = gain.absolute.signed(1) if row["n_not_learned"] == "0" else "learned nothing"
        yield f"**{shown}**" if gain.verdict else shown


def _facts(rows: Sequence[Row]) -> Iterator[str]:
    """What is to be known of these results, in sentences."""
    seeds = alternatives(sorted({row["n_seeds"] for row in rows}))
    yield f"Mean ± standard deviation of {seeds} seeds; gains with 95% intervals, in bold those with a verdict."
    for of, columns in OVER.items():
        gains = [gain_of(row, TASKS[row["task"]], *columns) for row in rows]
        known = [gain.absolute for gain in gains if gain.absolute.signed()]
        zero = sum(interval.low <= 0 <= interval.high for interval in known)
        better, worse = ([gain.verdict for gain in gains].count(sign) for sign in (1, -1))
        yield f"Of {plural(len(known), 'gain')} over {of} the intervals of {zero} hold zero; {better} better, {worse} worse."
    yield from _above_blind(rows)
    if tuned := [row for row in rows if int(row["learning_rates_tried"]) > 1]:
        tried = alternatives(sorted({row["learning_rates_tried"] for row in tuned}))
        edge = sum(row["at_edge"] == "True" for row in tuned)
        yield f"The learning rate of {len(tuned)} of {len(rows)} rows of `T7_methods` was chosen among {tried}."
        yield f"In {edge} of these it is the smallest or the largest."
    if without := [row.label for name, row in METHODS.items() if name not in {row["method"] for row in rows}]:
        yield f"Without a row: {', '.join(without)}."


def _above_blind(rows: Sequence[Row]) -> Iterator[str]:
    """How many rows of each task lie above the blind baseline, and which do not, a sentence for each task."""
    for task in dict.fromkeys(row["task"] for row in rows if row["versus_blind"]):
        lows = {row["experiment"]: gain_of(row, TASKS[task], *OVER["blind"]).absolute.low for row in rows if row["task"] == task}
        known = {name: low for name, low in lows.items() if low == low}
        below = [code(name) for name, low in known.items() if low <= 0]
        but = f", all but {', '.join(below)}," if 0 < len(below) <= MOST_NAMED else ""
        yield f"In {TASKS[task].word} {len(known) - len(below)} of {plural(len(known), 'row')}{but} lie wholly above blind."


# --------------------------------------------------------------------------------- config/README.md


def keys() -> str:
    """The keys of a configuration, a heading and a table for each section."""
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    plain, sections = [], []
    for name, node in schema["properties"].items():
        rows = list(_together(_rows(name, node, schema)))
        optional = "" if name in schema["required"] else " Optional."
        if rows:
            text = _filled(node["description"] + optional)
            sections.append(f"### `{name}`\n\n{text}\n\n{table(('key', 'value', 'meaning'), rows)}")
        else:
            plain.append((code(name), _value(node, schema), node["description"] + optional))
    return "\n\n".join([table(("key", "value", "meaning"), plain), *sections])


def _rows(path: str, node: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(path, value, meaning) of every key below a node."""
    node = _resolved(node, schema)
    for alternative in node.get("oneOf", ()):
        yield from _rows(path, alternative, schema)
    for name, child in node.get("properties", {}).items():
        child, below = _resolved(child, schema), f"{path}.{name}"
        optional = "" if name in node.get("required", ()) else ", optional"
        yield below, _value(child, schema) + optional, child["description"]
        yield from _rows(below, child, schema)
    if node.get("additionalProperties"):
        yield from _rows(f"{path}.<name>", node["additionalProperties"], schema)
    if "items" in node:
        yield from _rows(f"{path}[]", node["items"], schema)


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _value(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What values a key has."""
    node = _resolved(node, schema)
    if "enum" in node:
        return alternatives([code(choice) for choice in node["enum"]])
    if "items" in node:
        of = _resolved(node["items"], schema)
        if "properties" in of:
            return "list, each with the keys below"
        return f"list of {', '.join(map(code, of['enum']))}" if "enum" in of else f"list, each {_value(of, schema)}"
    if "properties" in node:
        return "the keys below"
    if isinstance(node.get("additionalProperties"), Mapping):
        return "by name"
    if "oneOf" in node:
        return "; or ".join(dict.fromkeys(_value(alternative, schema) for alternative in node["oneOf"]))
    kind = TYPES_OF_SCHEMA.get(node["type"], node["type"])
    return bounded(kind, {name: node[key] for name, key in BOUNDS_OF_SCHEMA.items() if key in node})


def _together(rows: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """Rows that differ in the second part of their paths alone as one row, in the place of the first: `a.{b,c}.d`."""
    merged: dict[tuple, tuple[list[str], list[str]]] = {}
    for path, value, meaning in rows:
        parts = path.split(".")
        below = tuple(parts[2:]) or parts[1]  # what stands directly in a section is not merged
        merged.setdefault((below, value, meaning), (parts, []))[1].append(parts[1])
    for (_, value, meaning), (parts, names) in merged.items():
        second = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
        yield code(".".join([parts[0], second, *parts[2:]])), value, meaning


def settings() -> str:
    rows = [(code(r["name"]), value_of(r), default_of(r), r["help"]) for r in shared_setting_records()]
    return table(("setting", "value", "default", "meaning"), rows)


def columns() -> str:
    return table(("column", "meaning"), [(code(name), meaning) for name, meaning in COLUMNS.items()])


def outputs() -> str:
    """The tables and figures, by the short names that `feeds` has."""
    names = [*TABLES, *FIGURES]
    rows = [(code(n.split("_")[0]), code(n), first_sentence(PROJECT / f"workflow/report/{n}.rst")) for n in names]
    return table(("in `feeds`", "file", "what it shows"), rows)


def derivations() -> str:
    """Each way of deriving a backbone, with its options."""
    rows = []
    for name, row in DERIVATIONS.items():
        for number, option in enumerate(describe(row.options)):
            what = f"{row.label}. {row.source}" + (f"; differs from it: {row.differs}" if row.differs else "")
            first = (code(name), what) if number == 0 else ("", "")
            rows.append((*first, code(option["name"]), value_of(option), default_of(option), option["help"]))
    return table(("`by`", "what it is", "option", "value", "default", "meaning"), rows)


# ---------------------------------------------------------------------------------- docs/METHODS.md


def methods() -> str:
    """All methods; the options are another table."""
    rows = []
    for record in method_records():
        cls, fixed = method_class(record["name"]), METHODS[record["name"]].fixed
        what = first_paragraph(cls) + (f" With {' '.join(map(code, words_of(fixed)))}." if fixed else "")
        notes = ["a phase before training (`routevl probe`)."] if cls.prepares() else []
        notes += ["the vision model runs in training."] if "pixels" in cls.needs else []
        notes += [f"refuses {code(thing)}: {reason}." for thing, reason in record["refuses"].items()]
        notes = [note[0].upper() + note[1:] for note in notes]
        differs = METHODS[record["name"]].differs
        rows.append((code(record["name"]), record["label"], record["family"], what, record["source"], differs, " ".join(notes)))
    return table(("method", "name", "family", "what is trained", "source", "differs from it in", "notes"), rows)


def published() -> str:
    """The published figures of the methods that have some, a line for each."""
    figures, names = read_published(PROJECT / "config/published.csv"), _named_there()
    figures = figures[figures["method"].isin(names)]
    metrics = list(dict.fromkeys(figures["metric"]))
    rows = []
    for (source, setting, of), group in figures.groupby(["source", "setting", "method"], sort=False):
        values = {row.metric: f"{row.value:g}" + (f" ± {row.std:g}" if row.std == row.std else "") for row in group.itertuples()}
        rows.append((code(names[of]), of, f"{source}, {setting}", *(values.get(metric, "") for metric in metrics)))
    return table(("method", "there", "source and setting", *(metric.replace("_", " ") for metric in metrics)), rows)


def published_elsewhere() -> str:
    """The other published figures, which are of other settings, a line for each system and setting."""
    figures = read_published(PROJECT / "config/published.csv")
    figures = figures[~figures["method"].isin(_named_there())]
    rows = []
    for (method, setting, source), group in figures.groupby(["method", "setting", "source"], sort=False):
        values = [
            f"{row.metric.replace('_', ' ')} {row.value:g}" + (f" ({row.note})" if row.note else "")
            for row in group.itertuples()
            if row.value == row.value
        ]
        rows.append((method, setting, source, "; ".join(values)))
    return table(("system", "setting", "source", "figures"), rows)


def _named_there() -> dict[str, str]:
    """What a method is called among the published figures -> its name in the list of methods."""
    return {row.published: name for name, row in METHODS.items() if row.published}


def options() -> str:
    """The options of all methods that have some; methods of one class together."""
    names: dict[type, list[str]] = {}
    for name in METHODS:
        names.setdefault(method_class(name), []).append(name)
    rows = []
    for cls, of in names.items():
        for number, option in enumerate(describe(cls.Options)):
            fixed = [code(name) for name in of if option["name"] in METHODS[name].fixed]
            meaning = option["help"] + (f" (fixed in {alternatives(fixed)})" if fixed else "")
            methods = ", ".join(map(code, of)) if number == 0 else ""
            rows.append((methods, code(option["name"]), value_of(option), default_of(option), meaning))
    return table(("methods", "option", "value", "default", "meaning"), rows)


def config_fields() -> str:
    """The fields of the routed methods' peft configs that are no options of a run."""
    from routevl.methods import RoutedAdapterConfig, RoutedLoraConfig
    from routevl.methods.routed.config import RoutedConfig

    rows = []
    owners = {RoutedConfig: ("both", "lora"), RoutedLoraConfig: ("`RoutedLoraConfig`", "lora"),
              RoutedAdapterConfig: ("`RoutedAdapterConfig`", "adapter")}  # fmt: skip
    for cls, (of, method) in owners.items():
        known = {f.name for f in fields(method_class(method).Options)}
        for field in fields(cls):
            if field.name in cls.__annotations__ and field.name not in known and "help" in field.metadata:
                rows.append((of, code(field.name), code(repr(field.default)), field.metadata["help"]))
    return table(("of", "field", "default", "meaning"), rows)


# --------------------------------------------------------------------------- docs/COMPATIBILITY.md


def text_models() -> str:
    """Which methods work on each architecture of text models."""
    from text_models import rows  # beside this file; transformers takes seconds to load

    return table(("architecture", "task", "LoRA", "Adapter", "(IA)³"), rows())


def vision_models() -> str:
    """What the package reads of each family of vision models."""
    from vision_models import KINDS, rows  # beside this file; timm takes seconds to load

    return table(("family", "library", "model", *KINDS), rows())


# ------------------------------------------------------------------------------------------- all of them

Parts = Mapping[str, Mapping[str, Callable[[], str]]]  # document -> part -> what makes it
PARTS: Parts = {
    "README.md": {"results-of-methods": results_of_methods, "results": results},
    "config/README.md": {
        "keys": keys, "settings": settings, "columns": columns, "outputs": outputs, "derivations": derivations,
    },
    "docs/METHODS.md": {
        "methods": methods, "published": published, "published-elsewhere": published_elsewhere,
        "options": options, "config-fields": config_fields,
    },
}  # fmt: skip
PARTS_OF_MODELS: Parts = {"docs/COMPATIBILITY.md": {"text-models": text_models, "vision-models": vision_models}}


def written(document: str, text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """A document with its parts written anew. Raises ValueError where it lacks one, or has one too many."""
    if (found := [name for _, name, _ in PART.findall(text)]) != list(dict.fromkeys(found)) or set(found) != set(parts):
        raise ValueError(f"{document} has the parts {', '.join(found)}, not {', '.join(parts)}")
    return PART.sub(lambda match: f"{match[1]}\n{parts[match[2]]()}\n\n{match[3]}", text)


def main() -> int:
    """Returns 1 where a document is not up to date, or its parts are not those that it should have."""
    parser = argparse.ArgumentParser(prog="docs", description="write the generated parts of the documents")
    parser.add_argument("--models", action="store_true", help="the parts for which models are built, instead of the others")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document is not up to date")
    arguments = parser.parse_args()
    for document, parts in (PARTS_OF_MODELS if arguments.models else PARTS).items():
        path = PROJECT / document
        text = path.read_text(encoding="utf-8")
        try:
            new = written(document, text, parts)
        except ValueError as error:
            print(f"docs: error: {error}", file=sys.stderr)
            return 1
        if new == text:
            continue
        if arguments.check:
            print(f"docs: error: {document} is not up to date: run `make docs`", file=sys.stderr)
            return 1
        with atomic_file(path) as temporary:
            temporary.write_text(new, encoding="utf-8")
        print(f"docs: wrote {document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
