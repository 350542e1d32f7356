"""The run sheet: one experiment a row, one run per seed. Read and checked here alone, free of torch.

The workflow, the plan, tables and figures read it with `read_sheet`; before anything runs, `check` compares it with the
configuration.
"""

from __future__ import annotations

import csv
import math
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from routevl.backbones.derivations import DERIVATIONS
from routevl.errors import RoutevlError
from routevl.features.index import TOKENS
from routevl.files import atomic_file, read_json
from routevl.methods.table import METHODS, free_options, method_class, refuse_fixed
from routevl.options import check_value, parse_number, read_words, words_of
from routevl.settings import SHARED_SETTINGS, RunSettings, check_setting
from routevl.tasks.table import TASKS

# column -> what it means, for the documents; all are required, in any order
COLUMNS = {
    "experiment": "unique name of letters, digits, `_`, `.` and `-`, the first none of the last two; at most 100",
    "task": f"what is learned: {', '.join(f'`{task}`' for task in TASKS)}",
    "text_backbone": "name of an entry under `backbones.text` of the configuration",
    "vision_backbone": "name of an entry under `backbones.vision`",
    "method": "fine-tuning method; `routevl methods` lists them with their options",
    "options": "`key=value`, separated by blanks: options of the method, and settings that differ from the configuration's; "
    "`learning_rate=tuned`: chosen on the validation split among those of the configuration's `tuning`",
    "versus": "the experiment that this one is compared with: gains are over it. Empty: no gain is computed",
    "epochs": "passes over the training split",
    "prefix": "`yes`: the visual tokens also stand before the text. `no` with a method that does not read the image is the blind "
    "baseline",
    "visual_tokens": f"which features are used: {', '.join(f'`{tokens}`' for tokens in TOKENS)}",
    "seeds": "comma-separated, one run each, called `<experiment>_seed<seed>`",
    "feeds": "comma-separated short names of the tables and figures that show the experiment",
}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # part of file and rule names
TUNED = "tuned"  # as learning_rate: chosen on the validation split before the runs
FEEDS = re.compile(r"([TF][0-9]+( *, *[TF][0-9]+)*)?")


@dataclass(frozen=True)
class Experiment:
    """One row of the sheet; the columns as in COLUMNS. `options` are still text."""

    experiment: str
    task: str
    text_backbone: str
    vision_backbone: str
    method: str
    options: Mapping[str, str]
    versus: str
    epochs: int
    prefix: bool
    visual_tokens: str
    seeds: tuple[int, ...]
    feeds: tuple[str, ...]

    @property
    def runs(self) -> list[str]:
        """The names of its runs, in the order of its seeds."""
        return [f"{self.experiment}_seed{seed}" for seed in self.seeds]

    @property
    def tuned(self) -> bool:
        """Whether its learning rate is chosen before its runs (`routevl tune`)."""
        return self.options.get("learning_rate") == TUNED

    def given_options(self) -> dict[str, str]:
        """Its options but for a learning rate that is tuned."""
        return {name: value for name, value in self.options.items() if not (name == "learning_rate" and self.tuned)}

    def method_options(self) -> dict[str, str]:
        """Those of its options that are the method's."""
        return {name: value for name, value in self.options.items() if name not in SHARED_SETTINGS}


def read_sheet(path: str | Path) -> list[Experiment]:
    """The experiments of a sheet, in its order.

    It is tab-separated text, or CSV with commas or semicolons, as spreadsheets write it: in UTF-8 or, with a byte-order mark,
    UTF-16; cells may be quoted and have blanks around them; empty lines and empty columns at the end are left out.

    Raises:
        RoutevlError: no such file; an unknown, missing or double column; a wrong value, option or reference. One line that names
            the file and the experiment.
    """
    header, lines = _read_cells(path)
    width = len(header)
    while header and not header[-1]:
        header.pop()
    if wrong := sorted(set(header) ^ set(COLUMNS)) or [name for name in header if header.count(name) > 1]:
        what = "no column" if wrong[0] in COLUMNS and wrong[0] not in header else "an unknown or double column"
        raise RoutevlError(f"{path}: {what} {wrong[0]!r}; the columns are {' '.join(COLUMNS)}")
    experiments = []
    for line in lines:
        row = dict(zip(header, line, strict=False))
        where = f"{path}: the row {line[0]!r}"
        if len(line) != width:
            quote = "; quote cells that have the separator in them" if len(line) > width else ""
            raise RoutevlError(f"{where} has {len(line)} cells for {width} columns{quote}")
        if beyond := list(filter(None, line[len(header) :])):
            raise RoutevlError(f"{where} has {beyond[0]!r} in a column without a name")
        experiments.append(_experiment(row, f"{path}: experiment {row['experiment']!r}"))
    _check_names(experiments, path)
    return experiments


def write_sheet(path: str | Path, experiments: Sequence[Experiment]) -> None:
    """Write a sheet as `read_sheet` reads it, whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for experiment in experiments:
            row = {column: getattr(experiment, column) for column in COLUMNS}
            row |= {"options": " ".join(words_of(experiment.options)), "prefix": "yes" if experiment.prefix else "no"}
            writer.writerow(row | {column: ",".join(map(str, row[column])) for column in ("seeds", "feeds")})


def _read_cells(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """The cells of the first line and of the others, without lines that have none, and without blanks around them."""
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
        # names of columns have no separator in them, so that the first line tells which one it is
        delimiter = next((mark for mark in "\t;," if mark in text.lstrip().partition("\n")[0]), "\t")
        reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [cells for line in reader if any(cells := [cell.strip() for cell in line])]
        if not lines or "\0" in text:
            raise ValueError("it has null characters" if lines else "it is empty")
    except FileNotFoundError:
        raise RoutevlError(f"{path}: no such run sheet (config key experiments)") from None
    except (OSError, ValueError, csv.Error) as error:
        raise RoutevlError(
            f"{path}: not a readable run sheet ({error}); save it as tab-separated text or CSV, in UTF-8"
        ) from None
    return lines[0], lines[1:]


def _experiment(row: dict[str, str], where: str) -> Experiment:
    def one_of(column: str, choices: Sequence[str]) -> str:
        if row[column] not in choices:
            raise RoutevlError(f"{where}: {column} {row[column]!r} is not one of {', '.join(choices)}")
        return row[column]

    def fits(column: str, pattern: re.Pattern, example: str) -> str:
        if not pattern.fullmatch(row[column]):
            raise RoutevlError(f"{where}: {column} {row[column]!r} is not of the form {example}")
        return row[column]

    def whole(column: str, text: str, least: int, example: str) -> int:
        try:
            value = parse_number(text)
        except ValueError:
            value = math.nan
        if type(value) is not int or value < least:
            raise RoutevlError(f"{where}: {column} {row[column]!r} is not of the form {example}")
        return value

    experiment = Experiment(
        experiment=fits("experiment", NAME, "letters, digits, _, . and -, the first none of the last two, at most 100"),
        task=one_of("task", tuple(TASKS)),
        text_backbone=row["text_backbone"],
        vision_backbone=row["vision_backbone"],
        method=one_of("method", tuple(METHODS)),
        options=read_words(row["options"].split(), f"{where}: options"),
        versus=row["versus"],
        epochs=whole("epochs", row["epochs"], 1, "3, a whole number above zero"),
        prefix=one_of("prefix", ("yes", "no")) == "yes",
        visual_tokens=one_of("visual_tokens", TOKENS),
        seeds=tuple(whole("seeds", seed, 0, "1,2,3") for seed in row["seeds"].split(",")),
        feeds=tuple(re.findall("[^ ,]+", fits("feeds", FEEDS, "T1,F2"))),
    )
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise RoutevlError(f"{where}: a seed stands twice in {row['seeds']}")
    for name, value in experiment.given_options().items():
        if name in SHARED_SETTINGS:
            check_setting(name, value, f"{where}: options")
        else:
            _check_option(experiment.method, name, value, f"{where}: options")
    return experiment


def _check_option(method: str, name: str, value: Any, where: str) -> None:
    """Raise RoutevlError where the method has no such option, fixes it, or the value is wrong."""
    refuse_fixed(method, name, where)
    known = free_options(method)
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise RoutevlError(f"{where}: the method {method} has no option {name!r} ({has}), and no setting has that name")
    check_value(method_class(method).Options, name, value, where)


def _check_names(experiments: Sequence[Experiment], path: str | Path) -> None:
    by_name: dict[str, Experiment] = {}
    for experiment in experiments:
        if by_name.setdefault(experiment.experiment, experiment) is not experiment:
            raise RoutevlError(f"{path}: two rows have the experiment name {experiment.experiment!r}")
    for experiment in experiments:
        compared, where = [experiment], f"{path}: experiment {experiment.experiment!r}: versus {experiment.versus!r}"
        while compared[-1].versus:
            baseline = by_name.get(compared[-1].versus)
            if baseline is None or baseline in compared:
                raise RoutevlError(f"{where} is no other experiment of the sheet, or leads back to itself")
            if baseline.task != experiment.task:
                raise RoutevlError(f"{where} is an experiment of another task, {baseline.task}")
            compared.append(baseline)


def runs_of(experiments: Sequence[Experiment]) -> dict[str, tuple[Experiment, int]]:
    """Name of each run -> its experiment and seed."""
    return {run: (e, seed) for e in experiments for run, seed in zip(e.runs, e.seeds, strict=True)}


# ---------------------------------------------------------------------------------------- with the configuration


def settings_of(experiment: Experiment, seed: int, config: Mapping[str, Any]) -> RunSettings:
    """The settings of a run: `runs`, then `tasks`, then `methods` of the configuration, then the text backbone's `target_modules`
    for the method, then the row; the later ones win. A learning rate that is tuned is here the one that its trials are multiples
    of.

    Raises:
        RoutevlError: a setting is missing everywhere, or one of the configuration's is wrong.
    """
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    sections = [config["runs"], config["tasks"].get(experiment.task, {}), config.get("methods", {}).get(experiment.method, {})]
    modules = target_modules(config["backbones"]["text"], experiment.text_backbone).get(experiment.method)
    of_backbone = {} if modules is None else {"target_modules": ",".join(modules)}
    for section in (*sections, of_backbone, experiment.given_options()):
        for name, value in section.items():
            (values if name in SHARED_SETTINGS else options)[name] = value
    columns = {"task": experiment.task, "method": experiment.method, "epochs": experiment.epochs, "prefix": experiment.prefix}
    values |= {**columns, "visual_tokens": experiment.visual_tokens, "seed": seed}
    return RunSettings.read(values, options, f"{config['experiments']}: experiment {experiment.experiment!r}")


def trials_of(experiments: Sequence[Experiment], config: Mapping[str, Any]) -> dict[str, tuple[Experiment, int]]:
    """Name -> experiment and seed of the run that the learning rates of a tuned experiment are tried as; no run of the sheet has
    its seed."""
    return {f"{e.experiment}_seed{seed}": (e, seed) for e in experiments if e.tuned for seed in [config["tuning"]["seed"]]}


def check(experiments: Sequence[Experiment], config: Mapping[str, Any]) -> None:
    """Compare a sheet with its configuration, before anything runs.

    Raises:
        RoutevlError: a name that the configuration does not have; a missing or wrong setting; a method on a task, model or
            setting that it refuses.
    """
    for section, known in (("tasks", TASKS), ("methods", METHODS)):
        for name in config.get(section, {}):
            if name not in known:
                raise RoutevlError(f"configuration: {section}: {name!r} is not one of {', '.join(known)}")
    for section in ("runs", "tasks", "methods"):
        for where, values in _sections(section, config.get(section, {})):
            for name, value in values.items():
                if section != "methods" or name in SHARED_SETTINGS:
                    check_setting(name, value, f"configuration: {where}")
                else:
                    _check_option(where.partition(".")[2], name, value, f"configuration: {where}")
    for name in config["backbones"]["text"]:
        for method, modules in target_modules(config["backbones"]["text"], name).items():
            if method not in METHODS:
                raise RoutevlError(f"configuration: backbones.text.{name}.target_modules: {method!r} is not a method")
            _check_option(method, "target_modules", ",".join(modules), f"configuration: backbones.text.{name}.target_modules")
    for experiment in experiments:
        where = f"{config['experiments']}: experiment {experiment.experiment!r}"
        known = {
            "task": config["tasks"],
            "text_backbone": config["backbones"]["text"],
            "vision_backbone": config["backbones"]["vision"],
            "visual_tokens": config["features"]["tokens"],
        }
        for column, names in known.items():
            if getattr(experiment, column) not in names:
                raise RoutevlError(f"{where}: {column} {getattr(experiment, column)!r} is not one of {', '.join(names)}")
        if experiment.tuned and "tuning" not in config:
            raise RoutevlError(f"{where}: learning_rate={TUNED}, but the configuration has no section `tuning`")
        if experiment.tuned and config["tuning"]["seed"] in experiment.seeds:
            raise RoutevlError(f"{where}: the seed {config['tuning']['seed']} is that of the trials (tuning.seed): take others")
        settings = settings_of(experiment, max(experiment.seeds), config)
        refuses = method_class(experiment.method).refuses
        chosen = {
            "gradient_checkpointing": settings.gradient_checkpointing,
            "freeze_layer_norm=no": not settings.freeze_layer_norm,
            "prefix=no": not settings.prefix,
        }
        of = {experiment.task: "task", model_type(config["backbones"]["text"], experiment.text_backbone): "text model"}
        for what, kind in (of | {name: "setting" for name, is_so in chosen.items() if is_so}).items():
            if what in refuses:
                raise RoutevlError(f"{where}: the method {experiment.method} refuses the {kind} {what}: {refuses[what]}")


def _sections(name: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if name == "runs":
        yield name, section
    else:
        yield from ((f"{name}.{key}", values) for key, values in section.items())


def target_modules(backbones: Mapping[str, Any], name: str) -> Mapping[str, Sequence[str]]:
    """Method -> the modules of a text backbone that it adapts, as far as the configuration names them; those of its source, of a
    derived backbone that names none."""
    entry = backbones[name]
    if "derive" in entry and "target_modules" not in entry:
        return target_modules(backbones, entry["derive"]["from"])
    return entry.get("target_modules", {})


def model_type(backbones: Mapping[str, Any], name: str) -> str | None:
    """The transformers model type of a text backbone, as far as the configuration and the disk tell before anything runs."""
    entry = backbones[name]
    if "derive" in entry:
        return DERIVATIONS[entry["derive"]["by"]].model_type or model_type(backbones, entry["derive"]["from"])
    if "pretrain" in entry:
        return entry["pretrain"]["architecture"]
    path = Path(entry["path"]) / "config.json"
    return read_json(path).get("model_type") if path.is_file() else None
