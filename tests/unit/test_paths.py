"""Paths with any legal character: every rule's command, as a shell reads it, has them whole."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_project import BIN, PROJECT, copy_project, environment, make_project, row

from routevl.data.datasets import read_datasets

HOSTILE = """it's "my" $HOME `ls` [a-z]* ?&;|<>#!\\n é漢 (1)"""
PROJECT_NAME = "user's {folder} (1) $HOME é"
COMMAND = re.compile(r"^Shell command: (routevl record .*)$", re.MULTILINE)
EXPERIMENTS = [
    row("vqa_none", "vqa", feeds="T1,F2"),
    row("vqa_mul", "vqa", "routing=mul", versus="vqa_none", feeds="T1,F2"),
    row("vqa_chosen", "vqa", "share=0.1 batches=2", method="gradient_norm", versus="vqa_none", feeds="T1"),
    row("vqa_pruned", "vqa", method="ia3", text_backbone="pruned", feeds="T1"),
    row("caption_given", "caption", text_backbone="given", feeds="T2"),
]


def commands(project: Path, *options: str) -> list[list[str]]:
    """The words of every job's command, as bash reads them: of `routevl record`, and last what its output goes to."""
    command = [str(BIN / "snakemake"), "--dry-run", "--printshellcmds", "--forceall", "--cores", "1", *options]
    plan = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=100)
    assert plan.returncode == 0, plan.stdout + plan.stderr
    lines = [line.replace(" &> ", " ") for line in COMMAND.findall(plan.stdout)]
    script = "routevl() { printf '%s\\0' \"$@\"; printf '\\n\\0'; }\n" + "\n".join(lines)
    printed = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    words = [job.rstrip("\0").split("\0") for job in printed.split("\n\0")[:-1]]
    assert words == [shlex.split(line)[1:] for line in lines]  # as the audit reads them
    return words


def assert_whole(words: list[str], results: str, given: set[str]) -> str:
    """All inputs and outputs lie in the results or are given ones, no word has a part of the name alone; returns the rule."""
    manifest, inputs, outputs, inner = (words.index(option) for option in ("--manifest", "--inputs", "--outputs", "--"))
    assert words[manifest + 1].startswith(f"{results}/manifests/") and words[-1].startswith(f"{results}/logs/")
    for path in [*words[inputs + 1 : outputs], *words[outputs + 1 : inner]]:
        assert path.startswith(f"{results}/") or path in given, path
    for option, word in zip(words, words[1:], strict=False):
        if option in ("--sources", "--configuration"):
            word = json.dumps(json.loads(word), ensure_ascii=False).replace('\\"', '"').replace("\\\\", "\\")
        assert HOSTILE in word or not any(part in word for part in HOSTILE.split()), word
    return words[manifest + 1].split("/")[-2]


def change(path: Path, edit: Callable[[dict], None]) -> None:
    config = yaml.safe_load(path.read_text())
    edit(config)
    path.write_text(yaml.safe_dump(config))


def test_b20_h15_every_command_of_the_demos_rules_has_its_paths_whole(tmp_path: Path) -> None:
    folder = tmp_path / PROJECT_NAME
    folder.mkdir()
    project = make_project(folder, EXPERIMENTS)
    sheet, model = f"config/experiments/{HOSTILE}.tsv", f"models/{HOSTILE}"
    (project / "config/experiments/tiny.tsv").rename(project / sheet)
    (project / model).mkdir(parents=True)

    def edit(config: dict) -> None:
        config |= {"results": f"./{HOSTILE}//results/", "experiments": sheet}
        config["data"]["root"] = f"{HOSTILE}/results/world"
        config["backbones"]["text"]["given"] = {"path": f"{model}/"}

    change(project / "config/config.yaml", edit)
    given = {sheet, model, "config/published.csv", "config/claims.tsv", "envs/requirements.lock"}
    rules = {assert_whole(words, f"{HOSTILE}/results", given) for words in commands(project, "all", "release")}
    assert rules == set(
        "world prepare pretrain_text pretrain_vision derive_backbone extract index_features probe train score table figure "
        "provenance release".split()
    )


def test_b20_every_command_of_rules_that_download_has_its_paths_whole(tmp_path: Path) -> None:
    copy_project(tmp_path)
    sheet = tmp_path / "config/experiments/paper.tsv"
    sheet.write_text("\n".join(sheet.read_text().splitlines()[:2]) + "\n")
    table, root = f"config/{HOSTILE}.tsv", f"data of {HOSTILE}"
    (tmp_path / "config/datasets.tsv").rename(tmp_path / table)

    def edit(config: dict) -> None:
        config |= {"results": f"/tmp/{HOSTILE}"}
        config["data"] |= {"root": root, "downloads": table}
        config["training"]["gpus"] = 2  # torchrun

    change(tmp_path / "config/paper.yaml", edit)
    folders = {f"{root}/{archive.folder}" for archive in read_datasets(tmp_path / table).values()}
    given = folders | {"config/experiments/paper.tsv", "config/published.csv", "config/claims.tsv", "envs/requirements.lock"}
    rules = {assert_whole(words, f"/tmp/{HOSTILE}", given) for words in commands(tmp_path, "--configfile", "config/paper.yaml")}
    assert {"download", "unpack", "fetch_backbone", "prepare", "train"} <= rules


@pytest.mark.slow
def test_b20_h15_jobs_run_in_such_folders_and_touch_nothing_else(tmp_path: Path) -> None:
    """The project, its results and the environment, whose `routevl` the rules call, are all in folders of such names."""
    project, python = tmp_path / PROJECT_NAME, tmp_path / PROJECT_NAME.title() / "bin/python"
    python.parents[1].symlink_to(Path(sys.prefix), target_is_directory=True)
    project.mkdir()
    make_project(project, EXPERIMENTS[:2])
    (project / "it's").write_text("the user's")
    before = {path.name for path in project.iterdir()}
    figure = f"{HOSTILE}/figures/F1_method.svg"
    given = ["--config", f"results={HOSTILE}", f"data={json.dumps({'root': f'{HOSTILE}/world'}, ensure_ascii=False)}"]

    def run(*command: object) -> str:
        variables = environment() | {"PATH": "/usr/bin:/bin"}
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=project, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run(python, "-m", "snakemake", "--cores", 2, "--show-failed-logs", figure, *given)
    assert (project / figure).exists() and (project / "it's").read_text() == "the user's"
    assert {path.name for path in project.iterdir()} == before | {HOSTILE, ".snakemake"}
    assert "everything stands" in run(BIN / "routevl", "audit", figure)
    assert "Nothing to be done" in run(sys.executable, "workflow/run.py", HOSTILE, "--cores=2", "--only", figure, *given)


@pytest.mark.parametrize(
    ("target", "variable", "message"),
    [
        ("plan", "CONFIG", "plan: error: {}: no such file"),
        ("tables", "CONFIG", "routevl: error: CONFIG={} is not a file"),
        ("audit", "RESULTS", "routevl: error: {}: not in a folder of results that has manifests"),
        ("sample", "DATA", "sample: error: DATA={!r} is not a folder; see config/sample.yaml for what it holds"),
    ],
)
def test_b20_make_takes_any_path(target: str, variable: str, message: str) -> None:
    path = HOSTILE.replace("$", "")  # which is make's own
    command = ["make", "--old-file=env", f"BIN={BIN}", target, f"{variable}={path}"]
    made = subprocess.run(command, cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=60)
    assert made.returncode == 2
    assert made.stderr.splitlines()[0] == message.format(path)


def test_b20_the_sample_takes_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And makes only those backbones that are the demo's own."""
    data = tmp_path / HOSTILE
    data.mkdir()
    specification = importlib.util.spec_from_file_location("sample", PROJECT / "workflow/sample.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    ran: list[list[str]] = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(script.subprocess, "run", lambda command: ran.append(command[2:]) or done)
    given = ["sample.py", str(data), "--cores", "2", "--roberta", "results/backbones/roberta", "--gpt2", f"my {HOSTILE}", "--vit"]
    for vit in ("results/backbones/vit", "/models/vit"):
        monkeypatch.setattr(sys, "argv", [*given, vit])
        assert script.main() == 0
        made, (*options, data_word, backbones_word) = ran
        demos = ["results/backbones/roberta", vit][: 2 if vit.startswith("results") else 1]
        assert made == ["results", "--cores", "2", "--only", *demos]
        assert options == ["results/sample", "--cores", "2", "--configfile", "config/sample.yaml", "--config"]
        assert yaml.safe_load(data_word.removeprefix("data="))["root"] == str(data)
        assert yaml.safe_load(backbones_word.removeprefix("backbones="))["text"]["gpt2"] == {"path": f"my {HOSTILE}"}
        ran.clear()
