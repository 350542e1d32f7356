"""codecheck.yml, from the manifests of tables and figures."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from synthetic_manifests import make_job

from routevl.provenance.records import Planned

PROJECT = Path(__file__).resolve().parents[2]
TABLE, FIGURE = Path("results/manifests/table/T1_vqa.json"), Path("results/manifests/figure/F2_main.json")


@pytest.fixture
def codecheck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, where its configuration asks for one table and one figure, and both have been made."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PROJECT / "workflow/report", "workflow/report")
    shutil.copy(PROJECT / "CITATION.cff", ".")
    make_job(TABLE, [], ["results/tables/T1_vqa.csv", "results/tables/T1_vqa.md"])
    make_job(FIGURE, [], ["results/figures/F2_main.png", "results/figures/F2_main.pdf"])
    specification = importlib.util.spec_from_file_location("codecheck", PROJECT / "workflow/codecheck.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    planned = [Planned(path, [], []) for path in (TABLE, Path("results/manifests/train/run.json"), FIGURE)]
    monkeypatch.setattr(module, "read_plan", lambda results: {str(job.manifest): job for job in planned})
    monkeypatch.setattr(sys, "argv", ["codecheck.py", "results"])
    return module


def test_it_is_what_the_specification_asks_for(codecheck: ModuleType) -> None:
    assert codecheck.main() == 0
    text = Path("codecheck.yml").read_text(encoding="utf-8")
    assert "\n%YAML 1.1\n---\n" in text
    content = yaml.safe_load(text)
    assert content["version"] == "https://codecheck.org.uk/spec/config/1.0/"
    assert [entry["file"] for entry in content["manifest"]] == ["results/figures/F2_main.pdf", "results/tables/T1_vqa.csv"]
    assert content["manifest"][1]["comment"].startswith("T1_vqa: VQA accuracy on the test split, overall and per answer type")
    assert not any(mark in entry["comment"] for entry in content["manifest"] for mark in "*`")
    assert content["paper"]["title"].startswith("Introducing Routing Functions")
    assert content["paper"]["authors"][0] == {"name": "Tingyu Qu", "ORCID": "0000-0002-0656-5745"}
    assert content["paper"]["reference"] == "https://doi.org/10.1007/978-3-031-73223-2_17"
    assert content["codechecker"] == [{"name": None, "ORCID": None}] and content["report"] is None
    assert {"source", "repository", "summary", "check_time", "certificate"} <= content.keys()


def test_what_was_filled_in_stays(codecheck: ModuleType) -> None:
    assert codecheck.main() == 0
    content = yaml.safe_load(Path("codecheck.yml").read_text(encoding="utf-8"))
    checker = [{"name": "Josiah Carberry", "ORCID": "0000-0002-1825-0097"}]
    Path("codecheck.yml").write_text(
        yaml.safe_dump(content | {"codechecker": checker, "manifest": [], "certificate": "2030-001"})
    )
    assert codecheck.main() == 0
    again = yaml.safe_load(Path("codecheck.yml").read_text(encoding="utf-8"))
    assert again == content | {"codechecker": checker, "certificate": "2030-001"}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda: Path("results/figures/F2_main.pdf").unlink(), "results/figures/F2_main.pdf: no such file"),
        (lambda: Path("results/tables/T1_vqa.csv").write_text("other"), "results/tables/T1_vqa.csv: was changed"),
        (TABLE.unlink, "results/manifests/table/T1_vqa.json: no such file"),
    ],
)
def test_missing_results_are_one_line_and_leave_no_file(codecheck: ModuleType, capsys, break_it, message: str) -> None:
    break_it()
    assert codecheck.main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"codecheck: error: {message}")
    assert not Path("codecheck.yml").exists()
