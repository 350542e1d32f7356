"""The documents: generated parts are up to date; links, stages, targets, options and examples are real."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from dry_runs import dry_run
from jsonschema import Draft202012Validator
from synthetic_results import experiment, make_table, write_results, write_sheet

from routevl.cli import STAGES
from routevl.errors import RoutevlError
from routevl.methods.table import METHODS
from routevl.reporting.published import read_published
from routevl.settings import from_arguments
from routevl.sheet import check, read_sheet, runs_of, settings_of
from routevl.training.train import runs_in

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENTS = [PROJECT / "README.md", PROJECT / "config/README.md", *sorted((PROJECT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PYTHON = [match[3] for match in FENCE.finditer(DOCUMENTS[0].read_text(encoding="utf-8")) if match[2] == "python"]

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))


def code_in(document: Path) -> str:
    """Code blocks and code spans of a document, one a line; lines that end in a backslash are joined."""
    text = document.read_text(encoding="utf-8")
    blocks = [match[3] for match in FENCE.finditer(text) if match[2] in ("", "bash", "sh")]
    rest = FENCE.sub("", text)
    indented = re.findall(r"^(?: {4,}|\t)(.*)$", rest, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return re.sub(r"\\\n\s*", "", "\n".join([*blocks, *indented, *spans]))


def commands_in(document: Path) -> Iterator[list[str]]:
    """The words of each `routevl <stage> --option ...` that is shown with options."""
    for line in code_in(document).splitlines():
        if match := re.match(r"(?:\.venv/bin/)?routevl ([a-z0-9-]+ .*)$", line):
            yield shlex.split(match[1], comments=True)


def stage_parser(stage: str) -> argparse.ArgumentParser:
    module, suffix, _ = STAGES[stage]
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    getattr(importlib.import_module(module), "add_arguments" + suffix)(parser)
    return parser


def heading_ids(text: str) -> set[str]:
    """As GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ------------------------------------------------------------------------------------------ what is generated


def docs_script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("docs_script", PROJECT / "workflow/docs.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_generated_parts_are_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    assert docs_script().main() == 0, capsys.readouterr().err


def test_what_is_not_up_to_date_is_one_line_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = docs_script()
    for document in script.PARTS:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text((PROJECT / document).read_text())
    shutil.copy(PROJECT / "config/published.csv", tmp_path / "config")
    shutil.copytree(PROJECT / "docs/results", tmp_path / "docs/results")
    monkeypatch.setattr(script, "PROJECT", tmp_path)
    monkeypatch.setitem(script.PARTS["config/README.md"], "outputs", lambda: "a table")
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    assert script.main() == 1
    assert capsys.readouterr().err == "docs: error: config/README.md is not up to date: run `make docs`\n"
    monkeypatch.setattr(sys, "argv", ["docs.py"])
    assert script.main() == 0
    assert "<!-- make docs: outputs -->\n\na table\n\n<!-- end -->" in (tmp_path / "config/README.md").read_text()
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    assert script.main() == 0
    methods = tmp_path / "docs/METHODS.md"
    methods.write_text(methods.read_text().replace("<!-- make docs: options -->", ""))
    assert script.main() == 1
    assert capsys.readouterr().err.endswith(
        "docs/METHODS.md has the parts methods, published, published-elsewhere, config-fields, not methods, published, "
        "published-elsewhere, options, config-fields\n"
    )


def test_the_results_of_methods_are_those_of_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gains with a verdict are bold, a run that learned nothing has none, and methods without a row are named.

    So are the rows that do not lie above the blind baseline, where these are few.
    """
    plain = {task: experiment(task, seeds="1,2,3", feeds="T7") for task in ("vqa", "caption")}
    others = [
        experiment(routing="mul", seeds="1,2,3", feeds="T7", versus=plain["vqa"]["experiment"]),
        experiment(method="ia3", seeds="1,2,3", feeds="T7", versus=plain["vqa"]["experiment"]),
        experiment("caption", "bitfit", seeds="1,2,3", feeds="T7", versus=plain["caption"]["experiment"]),
        experiment(experiment="vqa_other", text_backbone="other", seeds="1,2,3", feeds="T7", versus=plain["vqa"]["experiment"]),
        experiment(experiment="vqa_vision", vision_backbone="small", seeds="1,2,3", feeds="T7"),
        experiment(prefix="no", seeds="1,2,3", feeds="T7"),
        experiment(prefix="no", seeds="1,2,3", feeds="T7", experiment="blind_ia3", method="ia3"),
    ]
    folder = write_results(tmp_path / "results", [*plain.values(), *others], images=20, collapsed=("vqa_ia3_e2_seed2",))
    write_sheet(folder / "experiments.tsv", [*plain.values(), *others])
    with open(make_table("T7_methods", folder, tmp_path / "docs/results/T7_methods.csv"), encoding="utf-8", newline="") as file:
        rows = {row["experiment"]: row for row in csv.DictReader(file)}
    script = docs_script()
    monkeypatch.setattr(script, "PROJECT", tmp_path)
    text = script.results_of_methods()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    cells = {name: of for name, *of in lines}
    assert next(iter(cells.values())) == [
        "VQA accuracy (%)",
        "over blind",
        "over LoRA",
        "CIDEr (×100)",
        "over blind",
        "over LoRA",
    ]
    blind = ["LoRA, no image (blind)", "(IA)³, no image (blind)"]
    assert [*cells][2:] == [*blind, "LoRA", "LoRA, `other`", "LoRA, `mul`", "LoRA, `small`", "(IA)³", "BitFit"]
    for name, place, row, scale, metric in (
        ("LoRA, `mul`", 0, others[0], 1, "accuracy"),
        ("BitFit", 3, others[2], 100, "CIDEr"),
    ):
        found = rows[row["experiment"]]
        mean, std = (float(found[f"{metric}_{of}"]) * scale for of in ("mean", "std"))
        expected = [f"{mean:.1f} ± {std:.1f}"]
        for columns in (
            ("gain_vs_blind", "blind_ci_low", "blind_ci_high", "blind_p_holm"),
            ("gain_vs_lora", "gain_ci_low", "gain_ci_high", "p_holm"),
        ):
            gain, low, high, p = (float(found[column] or "nan") * scale for column in columns)
            shown = f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]" if found[columns[0]] else ""
            expected.append(f"**{shown}**" if p < 0.05 * scale else shown)
        assert cells[name][place : place + 3] == expected
        assert cells[name][3 - place : 6 - place] == ["", "", ""]
    assert all(cell.startswith("**+") for cell in cells["LoRA, `mul`"][1:3])  # of which the synthetic scores are far better
    assert cells["(IA)³"][2] == "learned nothing" and cells["LoRA"][2] == cells["LoRA"][5] == "" != cells["LoRA"][1]
    assert cells["BitFit"][4] == "" and cells[blind[0]][1:] == [""] * 5  # captioning has no blind row
    words = " ".join(text.split())
    assert "In VQA 4 of 5 rows, all but `blind_ia3`, lie wholly above blind." in words and "In captioning" not in words
    monkeypatch.setattr(script, "MOST_NAMED", 0)
    assert "In VQA 4 of 5 rows lie wholly above blind." in " ".join(script.results_of_methods().split())
    named = text.replace("\n", " ").partition("Without a row: ")[2]
    assert (
        "Of 5 gains over blind the" in words
        and "Of 3 gains over LoRA the" in words
        and ", DoRA, " in named
        and "(IA)³," not in named
    )


def test_the_results_of_a_task_are_those_of_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = experiment(seeds="1,2,3", feeds="T1")
    runs = [plain, experiment(prefix="no", feeds="T1"), experiment(routing="mul", feeds="T1", versus=plain["experiment"])]
    folder = write_results(tmp_path / "results", runs, images=20)
    write_sheet(folder / "experiments.tsv", runs)
    with open(make_table("T1_vqa", folder, tmp_path / "docs/results/T1_vqa.csv"), encoding="utf-8", newline="") as file:
        of = {row["experiment"]: row for row in csv.DictReader(file)}
    script = docs_script()
    monkeypatch.setattr(script, "PROJECT", tmp_path)
    blind, none, mul = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in script._results_of("T1_vqa").splitlines()[2:]
    )
    assert blind[:4] == ["LoRA", "none, no image (blind)", "2", "1"] and none[1:4] == ["none", "2", "3"]
    found = of[plain["experiment"]]
    assert none[4:] == [f"{float(found['accuracy_mean']):.1f} ± {float(found['accuracy_std']):.1f}", ""]
    found = of[runs[2]["experiment"]]
    gain, low, high = (f"{float(found[name]):+.1f}" for name in ("gain", "gain_ci_low", "gain_ci_high"))
    assert mul[1:] == ["mul", "2", "1", f"{float(found['accuracy_mean']):.1f}", f"{gain} [{low}, {high}]"]


def test_a_table_of_results_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "docs/results").mkdir(parents=True)
    shutil.copy(PROJECT / "README.md", tmp_path)
    file = tmp_path / "docs/results/T7_methods.csv"
    script = docs_script()
    monkeypatch.setattr(script, "PROJECT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["docs.py"])
    for content, words in (
        ("experiment,task,method,text_backbone\na,vqa,lora,x\n", "not a table of this version (KeyError('vision_backbone'))"),
        (
            "experiment,task,method,routing,prefix,text_backbone,vision_backbone\na,vqa,lora,none,yes,x,y\nb,vqa,lora,none,yes,x,y\n",
            "a and b are of one method and task",
        ),
    ):
        file.write_text(content)
        assert script.main() == 1
        error = capsys.readouterr().err
        assert error.startswith(f"docs: error: {file}: {words}") and error.count("\n") == 1


def test_every_key_has_a_description() -> None:
    script = docs_script()
    schema = yaml.safe_load(script.SCHEMA.read_text())
    for name, node in schema["properties"].items():
        for path, _, meaning in [(name, "", node["description"]), *script._rows(name, node, schema)]:
            assert meaning.endswith("."), path


def test_methods_name_published_figures_that_are_there() -> None:
    """Else their line would be missing without a word."""
    named = [row.published for row in METHODS.values() if row.published]
    there = set(read_published(PROJECT / "config/published.csv")["method"])
    assert len(set(named)) == len(named) > 5 and set(named) <= there


def test_defaults_of_pretraining_are_those_of_the_command_line() -> None:
    backbones = yaml.safe_load((PROJECT / "workflow/schemas/config.schema.yaml").read_text())["properties"]["backbones"]
    for modality, stage in (("text", "pretrain-text"), ("vision", "pretrain-vision")):
        [pretrain] = [
            a for a in backbones["properties"][modality]["additionalProperties"]["oneOf"] if "pretrain" in a["properties"]
        ]
        pretrain = pretrain["properties"]["pretrain"]
        parser = stage_parser(stage)
        for name, node in pretrain["properties"].items():
            if name not in pretrain["required"]:
                assert f"; {parser.get_default(name)} where left out." in node["description"], name


# -------------------------------------------------------------------------------------------- what is named


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{link} in {document}"
        assert not heading or heading in heading_ids(target.read_text(encoding="utf-8")), f"{link} in {document}"


@every_document
def test_files_that_are_named_are_there(document: Path) -> None:
    named = re.compile(
        r"(?:src|workflow|config|docs|slurm|tests|examples|envs|benchmarks)/[\w./-]*\w\.(?:py|md|yaml|tsv|csv|lock|smk|json)"
    )
    for name in set(named.findall(code_in(document))):
        assert (PROJECT / name).exists(), f"{name} in {document}"


@every_document
def test_stages_and_targets_exist(document: Path) -> None:
    code = code_in(document)
    assert set(re.findall(r"^(?:\.venv/bin/)?routevl ([a-z][a-z0-9-]*)", code, re.MULTILINE)) <= STAGES.keys()
    targets = set(" ".join(re.findall(r"^([a-z][a-z -]*):", (PROJECT / "Makefile").read_text(), re.MULTILINE)).split())
    assert set(re.findall(r"^make ([a-z][a-z-]*)", code, re.MULTILINE)) <= targets


@every_document
def test_the_options_of_commands_exist(document: Path) -> None:
    for stage, *words in commands_in(document):
        if not words or words[-1] == "..." or words == ["--help"]:
            continue
        parser = stage_parser(stage)
        known = {option for action in parser._actions for option in action.option_strings}
        given = [word for word in words if word.startswith("--")]
        assert set(given) <= known, f"routevl {stage} in {document}"
        if "--output" in given or "--predictions" in given or not given:  # whole commands, not options in a sentence
            parser.parse_args(words)


def snakemake_commands() -> list[str]:
    """The options of each Snakemake that the documents, the Snakefile or a configuration's head show."""
    lines = [line for document in DOCUMENTS for line in code_in(document).splitlines()]
    files = [PROJECT / "Snakefile", *PROJECT.glob("slurm/*.yaml"), *PROJECT.glob("config/*.yaml")]
    lines += [line.removeprefix("#").strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [re.split(r" {3,}|  #", line)[0] for line in lines]
    found = [match[1] for line in lines if (match := re.match(r"(?:\.venv/bin/)?snakemake((?: .*)?)$", line))]
    return sorted({command.strip() for command in found if "<" not in command and "--lint" not in command})


@pytest.mark.slow
@pytest.mark.parametrize("command", snakemake_commands(), ids=str)
def test_every_snakemake_command_is_one(command: str, workflow: Path) -> None:
    """The wrong order of targets and --configfile ends in a traceback."""
    shutil.copytree(PROJECT / "slurm", workflow / "slurm")
    for name in ("photos", "images.json", "questions.json", "annotations.json", "captions.json"):
        (workflow / "own" / name).mkdir(parents=True)
    (workflow / "own/own.yaml").write_text(example("yaml"))
    (workflow / "own/own.tsv").write_text(example("tsv"))
    status, output = dry_run(workflow, *shlex.split(command))
    missing = "--report" in command and "marked for report but does not exist" in output  # yet
    assert (status == 0 or missing) and "Traceback" not in output, output


def test_the_command_of_the_readme_trains_the_run_of_the_sheet() -> None:
    [words] = [words for stage, *words in commands_in(DOCUMENTS[0]) if stage == "train" and len(words) > 9]
    [arguments] = runs_in(stage_parser("train").parse_args(words))
    settings = from_arguments(arguments)
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    experiment, seed = runs_of(read_sheet(PROJECT / "config/experiments/demo.tsv"))["vqa_lora_mul_r8_e8_seed1"]
    assert settings == settings_of(experiment, seed, config)


# ---------------------------------------------------------------------------------------------- what runs


def run_block(block: str) -> None:
    """Run a block, and look that the document shows each line that it prints as a comment."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    comments = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]
    assert comments and printed.getvalue().splitlines() == comments


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_the_examples_of_the_readme_print_what_it_says(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the first one needs nothing but the core, and no import before it, is tests/unit/test_core_install.py's."""
    needed = [path for path in re.findall(r'"(results/[^"]+)"', block) if not (PROJECT / path).exists()]
    if needed:
        pytest.skip(f"{needed[0]} is not there: make demo")
    (tmp_path / "results").symlink_to(PROJECT / "results")
    monkeypatch.chdir(tmp_path)
    run_block(block)


def example(language: str) -> str:
    """The block of docs/OWN.md in this language."""
    text = (PROJECT / "docs/OWN.md").read_text(encoding="utf-8")
    [block] = [match[3] for match in FENCE.finditer(text) if match[2] == language]
    return block


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The example of one's own data: its run sheet and its configuration."""
    (tmp_path / "own.tsv").write_text(example("tsv"))
    return tmp_path / "own.tsv", yaml.safe_load(example("yaml"))


def test_the_example_of_ones_own_data_is_a_configuration(own: tuple[Path, dict[str, Any]]) -> None:
    sheet, config = own
    schema = yaml.safe_load((PROJECT / "workflow/schemas/config.schema.yaml").read_text())
    assert list(Draft202012Validator(schema).iter_errors(config)) == []
    experiments = read_sheet(sheet)
    check(experiments, config)
    with pytest.raises(RoutevlError, match="routing"):
        check(experiments, config | {"methods": {"lora": {"routing": "nothing"}}})
