"""A configuration that extends another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from routevl.configuration import read_configuration
from routevl.errors import RoutevlError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_sections_are_merged_and_own_values_win(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "results: a\nruns: {beams: 5, precision: float32}\nlist: [1, 2]\n")
    own = write(tmp_path, "own.yaml", f"extends: {base}\nresults: b\nruns: {{beams: 1}}\nlist: [3]\nmore: {{key: 1}}\n")
    merged = {"results": "b", "runs": {"beams": 1, "precision": "float32"}, "list": [3], "more": {"key": 1}}
    assert read_configuration(own) == merged
    last = write(tmp_path, "last.yaml", f"extends: {own}\nmore: {{other: 2}}\n")
    assert read_configuration(last) == merged | {"more": {"key": 1, "other": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere.yaml\n", "nowhere.yaml: no such file"),
        ("a: [\n", "own.yaml: not a readable YAML file"),
        ("- a\n", "own.yaml: not a configuration"),
        ("extends: 3\n", "own.yaml: extends: 3 is no name of a file"),
        ("extends: own.yaml\n", "own.yaml: extends itself"),
    ],
)
def test_what_is_no_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "own.yaml", text)
    with pytest.raises(RoutevlError, match=message):
        read_configuration("own.yaml")
