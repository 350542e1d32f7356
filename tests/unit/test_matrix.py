"""`make test-matrix`: which versions it chooses, what it asks for, and how it reads the tests' outcome."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    specification = importlib.util.spec_from_file_location("matrix_script", PROJECT / "workflow/test_matrix.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_newest_version_of_each_minor_release_is_chosen(matrix: ModuleType) -> None:
    available = ["2.13.0+cpu", "2.13.0", "1.9.0", "3.0.0rc1", "2.10.1", "2.9.5", "2.10.0", "3.0.0.dev1", "2.14.0", "2.14.1"]
    assert matrix.newest(available, 4) == ["2.14.1", "2.13.0", "2.10.1", "2.9.5"]
    assert matrix.newest(available, 9)[-1] == "1.9.0"


def test_one_library_is_varied_free_of_the_projects_own_ranges(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    lines = matrix.requirements_with(Requirement("peft==0.20.0"))
    ranges = {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)}
    assert {name: ranges[name] for name in matrix.MINORS} == {"peft": "==0.20.0", "transformers": "", "torch": ""}
    assert ranges["snakemake"] and "pytest" in ranges and "routevl" not in ranges
    locked = matrix.pins((PROJECT / "envs/requirements.lock").read_text())
    locked_names = {name.lower() for name in locked}
    assert {name.lower() for name in ranges} <= locked_names


CASE = '<testcase classname="tests.a" name="{}">{}</testcase>'


def test_the_outcome_counts_errors_in_fixtures_and_says_the_first(matrix: ModuleType) -> None:
    error = (
        '<error message="collection failure">E   ImportError: cannot import name &apos;a&apos; from &apos;b&apos;\nfile:1</error>'
    )
    cases = [
        CASE.format("passes", ""),
        CASE.format("skips", '<skipped message="not here"/>'),
        CASE.format("cannot be set up", error),
        CASE.format("fails", '<failure message="assert 1 == 2">E   assert 1 == 2</failure>'),
    ]
    report = ElementTree.fromstring(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    said = "ImportError: cannot import name 'a' from 'b'"
    assert matrix.outcome(report) == {"Passed": "1", "Failed": "2", "Skipped": "1", "First error": said}
    clean = ElementTree.fromstring(f"<testsuite>{cases[0]}</testsuite>")
    assert matrix.outcome(clean) == {"Passed": "1", "Failed": "0", "Skipped": "0", "First error": ""}


def test_its_tests_are_there_and_its_errors_are_one_short_line(matrix: ModuleType) -> None:
    for test in matrix.TESTS:
        path, _, name = test.partition("::")
        assert f"def {name}(" in (PROJECT / path).read_text() or not name and (PROJECT / path).is_file()
    said = matrix.shortened("  × No solution found:\n  ╰─▶ Because " + "torch " * 60)
    assert said.startswith("No solution found: Because torch") and len(said) <= matrix.WORDS + 4 and "\n" not in said


def test_the_committed_matrix_is_of_the_libraries_and_fits_the_ranges(matrix: ModuleType) -> None:
    table = (PROJECT / "docs/COMPATIBILITY.md").read_text(encoding="utf-8")
    text = (PROJECT / "pyproject.toml").read_text()
    for library in matrix.MINORS:
        rows = re.findall(rf"^\| {library} +\| ([\d.]+) +\| yes +\|[^|]*\| \d+ +\| (\d+) ", table, re.MULTILINE)
        allowed = Requirement(re.search(rf'"({library}[>=<][^"]*)"', text)[1]).specifier
        for version, failed in rows:
            assert (failed == "0") == (version in allowed), (library, version)
