"""docs/EXTENDING.md, done word for word in a fresh checkout: a method is one folder, one row and one line of a sheet."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tiny_project import BIN, PROJECT, environment, make_project, row

pytestmark = pytest.mark.slow


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def run(folder: Path, *words: str, status: int = 0) -> str:
    process = subprocess.run([f".venv/bin/{words[0]}", *words[1:]], cwd=folder, env=environment(), capture_output=True, text=True)
    assert process.returncode == status, process.stdout + process.stderr
    return process.stdout


def make_environment(folder: Path) -> None:
    """The environment of the tests, with the checkout's package before its own: jobs do not see PYTHONPATH."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    [packages] = (folder / ".venv/lib").glob("*/site-packages")
    (packages / "checkout.pth").write_text(f"{folder / 'src'}\n{sysconfig.get_path('purelib')}\n")
    for name in ("routevl", "snakemake"):
        program = folder / ".venv/bin" / name
        program.write_text((BIN / name).read_text().replace(str(BIN), str(program.parent)))
        program.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a tiny configuration, to which the example was added as the document says."""
    folder = make_project(tmp_path_factory.mktemp("checkout"), [row("vqa_lora_none", "vqa", feeds="T7,F4")])
    for name in ("src", "examples"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    make_environment(folder)
    (folder / ".gitignore").write_text(".venv/\n__pycache__/\n.snakemake/\nresults/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "a checkout")
    document = (PROJECT / "docs/EXTENDING.md").read_text()
    [copy] = re.findall(r"^ +cp -r (\S+) (\S+)$", document, re.MULTILINE)
    [method] = re.findall(r'^ +("steering": MethodRow.*)$', document, re.MULTILINE)
    [line] = re.findall(r"^ +(vqa_steering\t.*)$", document, re.MULTILINE)
    shutil.copytree(folder / copy[0], folder / copy[1])
    table, sheet = folder / "src/routevl/methods/table.py", folder / "config/experiments/tiny.tsv"
    before, full, after = table.read_text().partition('    "full": MethodRow')
    table.write_text(f"{before}    {method}\n{full}{after}")
    sheet.write_text(sheet.read_text() + line + "\n")
    return folder


def test_it_is_trained_to_its_row_in_a_table_and_no_other_file_changes(checkout: Path) -> None:
    run(checkout, "snakemake", "--cores", "2", "results/tables/T7_methods.csv", "results/figures/F4_methods.svg")
    with open(checkout / "results/tables/T7_methods.csv", encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["steering"]["label"] == "Steering vectors" and float(rows["steering"]["accuracy_mean"]) >= 0
    assert rows["steering"]["versus"] == "vqa_lora_none" and not rows["lora"]["versus"]
    assert "Steering vectors" in (checkout / "results/tables/T7_methods.md").read_text()
    model = checkout / "results/models/vqa_steering_seed1"
    record = json.loads((model / "run.json").read_text())
    assert record["settings"]["options"] == {"penalty": 0.001, "batches": 4}
    assert record["trainable_params_by_part"]["method"] == 32  # one layer of width 32
    logged = [json.loads(line) for line in (model / "training.jsonl").read_text().splitlines()]
    assert any("penalty" in line for line in logged)
    assert (checkout / "results/probes/vqa_steering_seed1/prepared.safetensors").is_file()
    changed = git(checkout, "status", "--porcelain").split("\n")
    expected = ["config/experiments/tiny.tsv", "src/routevl/methods/table.py", "src/routevl/methods/steering/"]
    assert sorted(line[3:] for line in changed if line) == sorted(expected)
    listed = json.loads(run(checkout, "routevl", "methods", "--json"))
    assert [option["name"] for method in listed for option in method["options"] if method["name"] == "steering"] == [
        "penalty",
        "batches",
    ]


def test_its_probe_is_audited_as_every_job(checkout: Path) -> None:
    assert run(checkout, "routevl", "audit", "results/models/vqa_steering_seed1")
    prepared = checkout / "results/probes/vqa_steering_seed1/prepared.safetensors"
    content = prepared.read_bytes()
    prepared.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = run(checkout, "routevl", "audit", "results/models/vqa_steering_seed1", status=1)
    prepared.write_bytes(content)
    assert "prepared.safetensors" in said
