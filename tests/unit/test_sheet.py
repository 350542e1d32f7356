"""The run sheet: what is read of it, and which of configuration and row decides a run's settings."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from routevl import settings
from routevl.errors import RoutevlError
from routevl.methods.lora import Lora
from routevl.methods.table import METHODS, method_class
from routevl.options import words_of
from routevl.settings import RunSettings
from routevl.sheet import COLUMNS, Experiment, check, read_sheet, runs_of, settings_of, trials_of
from routevl.sheet import write_sheet as write_again

PROJECT = Path(__file__).parents[2]
CONFIGURATIONS = sorted((PROJECT / "config").glob("*.yaml"))
ROW = {
    "experiment": "mul",
    "task": "vqa",
    "text_backbone": "roberta",
    "vision_backbone": "vit",
    "method": "lora",
    "options": "r=4 routing=mul learning_rate=0.5",
    "versus": "",
    "epochs": "3",
    "prefix": "yes",
    "visual_tokens": "pooled",
    "seeds": "2,1",
    "feeds": "T1,F2",
}


def write_sheet(path: Path, *rows: dict[str, str], columns: tuple[str, ...] = tuple(COLUMNS)) -> Path:
    lines = ["\t".join(columns), *("\t".join((ROW | row)[name] for name in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def config(**sections: Any) -> dict[str, Any]:
    """The demo's configuration with some sections replaced."""
    return yaml.safe_load((PROJECT / "config/config.yaml").read_text()) | sections


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    [experiment] = read_sheet(write_sheet(tmp_path / "sheet.tsv", {}))
    return experiment


# ------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["..", ".hidden", "-n", "a b", "a/b", "a{b}", "a\nb", "é", "x" * 101, ""])
def test_b20_names_that_would_break_paths_or_patterns(name: str, tmp_path: Path) -> None:
    """A name is part of files, of Snakemake's rules and wildcards, and of SLURM's comments."""
    sheet = write_sheet(tmp_path / "sheet.tsv", {"experiment": f'"{name}"'})  # quoted: it may have a line break
    with pytest.raises(RoutevlError, match="is not of the form letters, digits, _, . and -, the first none of the last two"):
        read_sheet(sheet)


def test_a_row_is_read_with_its_types(experiment: Experiment) -> None:
    assert experiment == Experiment(
        experiment="mul",
        task="vqa",
        text_backbone="roberta",
        vision_backbone="vit",
        method="lora",
        options={"r": "4", "routing": "mul", "learning_rate": "0.5"},
        versus="",
        epochs=3,
        prefix=True,
        visual_tokens="pooled",
        seeds=(2, 1),
        feeds=("T1", "F2"),
    )
    assert experiment.method_options() == {"r": "4", "routing": "mul"}
    assert runs_of([experiment]) == {"mul_seed2": (experiment, 2), "mul_seed1": (experiment, 1)}


def test_columns_stand_in_any_order_and_lines_may_be_empty(tmp_path: Path, experiment: Experiment) -> None:
    path = write_sheet(tmp_path / "other.tsv", {}, {"experiment": "none", "feeds": ""}, columns=tuple(reversed(COLUMNS)))
    path.write_text("\ufeff" + path.read_text().replace("\n", "\n\n"), encoding="utf-8")
    first, second = read_sheet(path)
    assert first == experiment and second.feeds == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such run sheet"),
        ("", "not a readable run sheet .it is empty.; save it as tab-separated text or CSV, in UTF-8"),
        ("\t\t\n\n", "not a readable run sheet .it is empty."),
        ("experiment\ttask\n", "no column"),
        ("\t".join([*COLUMNS, "task"]) + "\n", "an unknown or double column 'task'"),
        ("\t".join(COLUMNS) + "\nmul\tvqa\n", "the row 'mul' has 2 cells for 12 columns"),
        ("\t".join(COLUMNS) + '\n"mul\tvqa\n', "not a readable run sheet .unexpected end of data."),
        ("\t".join(COLUMNS).encode("utf-16-le").decode(), "not a readable run sheet .it has null characters.; save it as"),
        ("PK\x03\x04\xff", "not a readable run sheet .*; save it as tab-separated text or CSV, in UTF-8"),
    ],
)
def test_what_is_no_sheet_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "sheet.tsv"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(RoutevlError, match=message) as error:
        read_sheet(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def quoted(text: str) -> str:
    return "\n".join("\t".join(f'"{cell}"' for cell in line.split("\t")) for line in text.splitlines())


def separated(text: str, separator: str) -> str:
    """As spreadsheets write CSV: cells that have the separator in them are quoted."""
    output = StringIO()
    csv.writer(output, delimiter=separator).writerows(line.split("\t") for line in text.splitlines())
    return output.getvalue()


SPREADSHEETS: dict[str, Callable[[str], bytes]] = {
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "byte-order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "UTF-16, the other order": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "quoted cells": lambda text: quoted(text).encode(),
    "lines of tabs": lambda text: text.replace("\n", "\n" + "\t" * 11 + "\n").encode(),
    "empty lines": lambda text: ("\n\n" + text + "\n\n").encode(),
    "trailing empty columns": lambda text: text.replace("\n", "\t\t\n").encode(),
    "blanks around cells": lambda text: text.replace("\t", " \t\u00a0").replace("\n", " \n").encode(),
    "no last line break": lambda text: text.rstrip("\n").encode(),
    "commas": lambda text: separated(text, ",").encode("utf-8-sig"),
    "semicolons": lambda text: separated(text, ";").encode(),
    "blanks after commas": lambda text: text.replace("2,1\t", "2, 1\t").replace("T1,F2\n", "T1, F2\n").encode(),
    "numbers as floats": lambda text: text.replace("\t3\t", "\t3.0\t").replace("2,1\t", "2.0,1e0\t").encode(),
}


@pytest.mark.parametrize("written", SPREADSHEETS.values(), ids=SPREADSHEETS)
def test_h13_a_sheet_is_read_as_spreadsheets_write_it(tmp_path: Path, written: Callable[[str], bytes]) -> None:
    sheet = write_sheet(tmp_path / "sheet.tsv", {"feeds": "T1,F2"}, {"experiment": "other", "versus": "mul", "options": ""})
    expected, content = read_sheet(sheet), written(sheet.read_text())
    assert content != sheet.read_bytes()
    sheet.write_bytes(content)
    assert read_sheet(sheet) == expected and len(expected) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("\t", ","), "the row 'mul' has 14 cells for 12 columns; quote cells that have the separator"),
        (lambda text: text.replace("F2\n", "F2\tsee mail\n"), "the row 'mul' has 13 cells for 12 columns"),
        (lambda text: text.replace("feeds\n", "feeds\t\n").replace("F2\n", "F2\tsee mail\n"),
         "the row 'mul' has 'see mail' in a column without a name"),
        (lambda text: text.replace("task\t", "\t"), "an unknown or double column ''"),
        (lambda text: "sep=;\n" + text.replace("\t", ";"), "no column 'epochs'|an unknown or double column"),
        (lambda text: text.replace("\t3\t", "\t3.5\t"), "epochs '3.5' is not of the form 3, a whole number above zero"),
        (lambda text: text.replace("\t3\t", "\t0\t"), "epochs '0' is not of the form 3"),
        (lambda text: text.replace("2,1", "2.1"), "seeds '2.1' is not of the form 1,2,3"),
        (lambda text: text.replace("2,1", "2,"), "seeds '2,' is not of the form 1,2,3"),
        (lambda text: text.replace("2,1", "-2"), "seeds '-2' is not of the form 1,2,3"),
        (lambda text: text.replace("2,1", "2,2.0"), "a seed stands twice in 2,2.0"),
        (lambda text: text.replace("2,1", "1e400"), "seeds '1e400' is not of the form 1,2,3"),
    ],
)  # fmt: skip
def test_h13_nothing_in_a_sheet_is_guessed(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    sheet = write_sheet(tmp_path / "sheet.tsv", {})
    sheet.write_text(change(sheet.read_text()))
    with pytest.raises(RoutevlError, match=message) as error:
        read_sheet(sheet)
    assert str(error.value).startswith(f"{sheet}: ") and "\n" not in str(error.value)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    words = "learning_rate=1E-4 batch_size=3.2e1 r=4.0 lora_alpha=1e1 warmup=1e3 max_train_examples=1e3 weight_decay=0"
    [experiment] = read_sheet(write_sheet(tmp_path / "sheet.tsv", {"options": words}))
    found = settings_of(experiment, 2, config())
    assert (found.learning_rate, found.warmup, found.weight_decay) == (0.0001, 1000.0, 0.0)
    assert (found.batch_size, found.max_train_examples, found.options["r"], found.options["lora_alpha"]) == (32, 1000, 4, 10.0)
    assert [type(found.as_record()[name]) for name in ("batch_size", "max_train_examples", "warmup")] == [int, int, float]


@pytest.mark.parametrize(
    "word",
    ["batch_size=2.5", "batch_size=1e400", "batch_size=yes", "r=1e-1", "r=1,5", "max_train_examples=0", "max_train_examples=",
     "learning_rate=0,001", "learning_rate=nan", "learning_rate=1e400", "learning_rate=1e-3x"],
)  # fmt: skip
def test_what_is_no_number_or_no_whole_one_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(
        RoutevlError, match=f"experiment 'mul': options: .*{word.partition('=')[0]}.* (expected|is not of the form)"
    ):
        read_sheet(write_sheet(tmp_path / "sheet.tsv", {"options": word}))


def test_versus_may_stand_anywhere_in_the_sheet(tmp_path: Path) -> None:
    rows = [{"versus": "none"}, {"experiment": "none", "options": "r=4"}]
    assert [row.versus for row in read_sheet(write_sheet(tmp_path / "sheet.tsv", *rows))] == ["none", ""]


# ------------------------------------------------------------------------------------------ with the configuration


def test_the_row_wins_over_methods_over_tasks_over_runs(tmp_path: Path, experiment: Experiment) -> None:
    everywhere = ("beams", "max_new_tokens", "batch_size", "learning_rate")
    sections = {
        "runs": config()["runs"] | {name: 1 for name in everywhere},
        "tasks": {"vqa": config()["tasks"]["vqa"] | {name: 2 for name in everywhere[1:]}, "caption": {"beams": 9}},
        "methods": {"lora": {"r": 64, "lora_alpha": 16, "batch_size": 3, "learning_rate": 3}, "adapter": {"r": 9}},
    }
    found = settings_of(experiment, 2, config(**sections))
    values = found.as_record()
    assert [values[name] for name in everywhere] == [1, 2, 3, 0.5]
    assert found.options == {
        "r": 4, "routing": "mul", "visual_scale": "none", "target_modules": None, "bottleneck": "shared",
        "routed_features": "image", "routed_tokens": None, "routed_positions": "all", "up_init": None,
        "layers_to_transform": None, "lora_alpha": 16.0, "lora_dropout": 0.0, "places": "attention", "tasks": 1, "bias": "none",
    }  # fmt: skip
    assert (found.seed, found.epochs, found.prefix, found.method, found.control) == (2, 3, True, "lora", "none")


def test_settings_come_back_from_their_record_and_from_the_command_line(tmp_path: Path) -> None:
    rows = [
        {"experiment": method, "method": method, "options": "control=noise"}
        for method in ("lora", "adapter", "dora", "lora_bias", "ia3", "gradient_norm", "bitfit")
    ]
    for experiment in read_sheet(write_sheet(tmp_path / "sheet.tsv", *rows)):
        found = settings_of(experiment, 1, config())
        record = json.loads(json.dumps(found.as_record()))
        assert RunSettings.from_record(record, "run.json") == found
        parser = argparse.ArgumentParser()
        settings.add_arguments(parser)
        own = found.new_method()
        options = words_of({k: v for k, v in record.pop("options").items() if experiment.method not in ("dora", "lora_bias")})
        words = [word for text in words_of(record) for word in ("--" + text.split("=")[0].replace("_", "-"), text.split("=")[1])]
        again = settings.from_arguments(parser.parse_args([*words, "--options", *options]))
        assert again == found and again.new_method().options == own.options


@pytest.mark.parametrize(
    "entry",
    [
        {"pretrain": {"architecture": "gpt2"}},
        {"derive": {"by": "magnitude", "from": "gpt2", "options": {"sparsity": 0.5}}},
        {"path": "folder"},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_a_method_on_a_model_or_task_that_it_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any]
) -> None:
    """Whatever tells the type of the model."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/config.json").write_text('{"model_type": "gpt2"}')
    backbones = config()["backbones"]
    backbones["text"]["own"] = entry
    configuration = config(backbones=backbones)
    experiments = read_sheet(write_sheet(tmp_path / "sheet.tsv", {"text_backbone": "own", "task": "caption"}))
    check(experiments, configuration)
    for what, kind in (("gpt2", "text model"), ("caption", "task")):
        monkeypatch.setattr(Lora, "refuses", {what: "it cannot be"})
        with pytest.raises(RoutevlError, match=f"experiment 'mul': the method lora refuses the {kind} {what}: it cannot be"):
            check(experiments, configuration)
    monkeypatch.setattr(Lora, "refuses", {"roberta": "it cannot be", "vqa": "nor this"})
    check(experiments, configuration)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_configuration_of_the_project_fits_its_sheet_and_needs_no_torch(path: Path) -> None:
    program = """
import sys
from routevl.backbones.derivations import check_backbones
from routevl.configuration import read_configuration
from routevl.sheet import check, read_sheet, runs_of, settings_of
config = read_configuration(sys.argv[1])
experiments = read_sheet(config["experiments"])
check_backbones(config["backbones"])
check(experiments, config)
for experiment, seed in runs_of(experiments).values():
    settings_of(experiment, seed, config)
print(len(experiments), sorted({"torch", "peft", "transformers", "numpy", "pandas"} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", program, path], cwd=PROJECT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    count, heavy = ended.stdout.split(maxsplit=1)
    assert int(count) > 0 and heavy.strip() == "[]"


# ------------------------------------------------------------------------------------------------- tuned learning rates


def test_a_tuned_row_has_trials_of_the_configurations_seed(tmp_path: Path) -> None:
    experiments = read_sheet(write_sheet(tmp_path / "sheet.tsv", {"options": "r=4 learning_rate=tuned"}, {"experiment": "fixed"}))
    sections = config(experiments="sheet.tsv", tuning={"factors": [0.5, 2], "seed": 7})
    check(experiments, sections)
    assert [experiment.tuned for experiment in experiments] == [True, False]
    assert trials_of(experiments, sections) == {"mul_seed7": (experiments[0], 7)}
    assert settings_of(experiments[0], 1, sections).learning_rate == sections["tasks"]["vqa"]["learning_rate"]
    write_again(tmp_path / "again.tsv", experiments)
    assert read_sheet(tmp_path / "again.tsv") == experiments


@pytest.mark.parametrize(
    ("tuning", "message"),
    [(None, "learning_rate=tuned, but the configuration has no section `tuning`"), (2, "the seed 2 is that of the trials")],
)
def test_a_tuned_row_needs_trials_of_a_seed_of_their_own(tmp_path: Path, tuning: int | None, message: str) -> None:
    experiments = read_sheet(write_sheet(tmp_path / "sheet.tsv", {"options": "r=4 learning_rate=tuned"}))
    sections = config(experiments="sheet.tsv", tuning={"factors": [0.5, 2], "seed": tuning})
    if tuning is None:
        del sections["tuning"]
    with pytest.raises(RoutevlError, match=message):
        check(experiments, sections)


# ------------------------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("sheet", ["full", "comparison"])
def test_every_method_is_compared_alike(sheet: str) -> None:
    """Each method in T7 and F4 on both tasks, with trials and three seeds, over plain LoRA of the same budget."""
    rows = [row for row in read_sheet(PROJECT / f"config/experiments/{sheet}.tsv") if "T7" in row.feeds]
    by_name = {row.experiment: row for row in rows}
    for task, kind in (("vqa", "roberta"), ("caption", "gpt2")):
        of_task = [row for row in rows if row.task == task and row.text_backbone != "meter" and row.prefix]
        expected = {method for method in METHODS if not method_class(method).refuses.keys() & {task, kind}}
        assert {row.method for row in of_task} == expected
        [plain] = [row for row in of_task if not row.versus]
        assert (plain.method, plain.options.get("routing")) == ("lora", None)
        for row in of_task:
            assert row.tuned and row.seeds == (1, 2, 3) and "F4" in row.feeds, row.experiment
            assert (row.epochs, row.prefix, row.visual_tokens) == (plain.epochs, plain.prefix, plain.visual_tokens)
            assert row is plain or by_name[row.versus] is plain
        [blind] = [row for row in rows if row.task == task and row.text_backbone == plain.text_backbone and not row.prefix]
        assert (blind.method, blind.options, blind.versus) == ("lora", {k: plain.options[k] for k in ("r", "lora_alpha")}, "")
        assert (blind.epochs, blind.seeds) == (plain.epochs, plain.seeds) and "F4" in blind.feeds


def test_pruned_models_are_compared_with_all_methods() -> None:
    """Each by one row, with plain LoRA, whose backbone is all that differs from the other rows' plain LoRA."""
    rows = {row.experiment: row for row in read_sheet(PROJECT / "config/experiments/full.tsv") if "T7" in row.feeds}
    plain = rows["vqa_lora_tuned_e3"]
    for column, backbone in (("text_backbone", "roberta-multiflow-63"), ("vision_backbone", "vit_spvit")):
        [row] = [row for row in rows.values() if getattr(row, column) == backbone]
        assert replace(row, experiment=plain.experiment, versus="", **{column: getattr(plain, column)}) == plain


def test_methods_in_meter_are_compared_with_plain_lora_in_it() -> None:
    rows = [row for row in read_sheet(PROJECT / "config/experiments/full.tsv") if row.text_backbone == "meter"]
    blind, plain, *others = rows
    assert all(set(row.feeds) == {"T7", "F4"} for row in rows)
    assert (plain.method, plain.options.get("routing"), plain.versus) == ("lora", None, "vqa_lora_tuned_e3")
    assert [row.method for row in others] == ["lora", "das", "full", "full_both"]
    for row in others:
        assert row.versus == plain.experiment and row.tuned and row.seeds == plain.seeds and row.epochs == plain.epochs
    assert {row.visual_tokens for row in rows} == {"all"}  # the class token first
    assert [row for row in rows if not row.prefix] == [blind]
    assert (blind.method, blind.options.get("routing"), blind.versus) == ("lora", None, "")
    assert (blind.epochs, blind.seeds) == (plain.epochs, plain.seeds)


@pytest.mark.parametrize("sheet", ["full", "comparison"])
def test_cross_attention_has_as_many_parameters_as_what_it_is_compared_with(sheet: str) -> None:
    """Per adapted module of width d: 2 r d, and 4 r^2 more with cross-attention."""
    rows = {row.experiment: row for row in read_sheet(PROJECT / f"config/experiments/{sheet}.tsv") if "T5" in row.feeds}
    crossed = [row for row in rows.values() if row.options.get("bottleneck") == "cross_attention"]
    assert {row.task for row in crossed} == {"vqa", "caption"}
    for row in crossed:
        width, r, of_baseline = {"full": 96, "comparison": 1024}[sheet], int(row.options["r"]), int(rows[row.versus].options["r"])
        assert 2 * r * width + 4 * r**2 == 2 * of_baseline * width
