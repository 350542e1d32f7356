"""The methods' tests on other versions of the libraries that they build on: a Markdown table for docs/COMPATIBILITY.md.

One library is varied at a time. All else stays as in the lock, but for what that version forces: uv keeps the pins that it can.
Each environment is .venv-matrix/<library>-<version>, and is deleted after its turn.

    make test-matrix                                   the newest minor releases that the package registry has
    make test-matrix VERSIONS='torch==2.12.1'          these versions alone
    make test-matrix KEEP=1                            keep the environments
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from packaging.requirements import Requirement
from packaging.version import Version

from routevl.errors import RoutevlError
from routevl.provenance.record import LOCK
from routevl.reporting.formats import markdown_table

MINORS = {"peft": 2, "transformers": 4, "torch": 4}  # library -> of how many minor releases the newest version is tested
ENVIRONMENTS = Path(".venv-matrix")
TESTS = [
    *(f"tests/unit/test_{name}.py" for name in ("methods", "routed", "conditioning", "routing")),
    "tests/training/test_training.py::test_adapter_folder_loads_with_plain_peft_on_the_unmodified_text_model",
]
SECONDS = 3600  # the longest that the tests of one environment may take
WORDS = 110  # characters of an error that the table shows


def main() -> None:
    """Test each version and print the table. Exits with status 1 where a version cannot be installed or fails a test."""
    parser = argparse.ArgumentParser(prog="test_matrix", description="the methods' tests on other versions of their libraries")
    parser.add_argument("versions", nargs="*", type=Requirement, metavar="LIBRARY==VERSION", help="default: the newest releases")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    arguments = parser.parse_args()
    locked = pins(LOCK.read_text(encoding="utf-8"))
    chosen = arguments.versions or newest_releases()
    rows, usual = [], {}
    for varied in [None, *(r for r in chosen if version_of(r) != locked[r.name])]:
        row, installed = tested(varied, usual, arguments.keep)
        usual = usual or installed
        rows.append(row)
        print(f"== {'; '.join(row.values())}", file=sys.stderr, flush=True)
    print(f"Python {sys.version.split()[0]}, {len(rows)} environments:\n\n{markdown_table(pd.DataFrame(rows))}")
    sys.exit(any(row["Failed"] != "0" for row in rows))


# ------------------------------------------------------------------------------------------------------------- versions


def newest_releases() -> list[Requirement]:
    """The newest version of each of the newest minor releases that the registry has for this Python."""
    chosen = []
    for library, count in MINORS.items():
        asked = subprocess.run([sys.executable, "-m", "pip", "index", "versions", library], capture_output=True, text=True)
        available = re.search(r"^Available versions: (.*)$", asked.stdout, re.MULTILINE)
        if not available:
            raise RoutevlError(f"the package registry tells no versions of {library}: {asked.stderr.strip()}")
        chosen += [Requirement(f"{library}=={version}") for version in newest(available[1].split(", "), count)]
    return chosen


def newest(available: Iterable[str], count: int) -> list[str]:
    """Of versions, the newest of each of the `count` newest minor releases, newest first; no pre-releases or local builds."""
    releases: dict[tuple[int, int], Version] = {}
    for version in sorted(map(Version, available), reverse=True):
        if not version.is_prerelease and not version.local:
            releases.setdefault((version.major, version.minor), version)
    return [str(version) for version in list(releases.values())[:count]]


def pins(requirements: str) -> dict[str, str]:
    """Name -> version of a file of pinned requirements; of several pins of one package the last."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", requirements, re.MULTILINE))


def version_of(requirement: Requirement) -> str:
    """The version that a requirement pins."""
    return next(iter(requirement.specifier)).version


def requirements_with(varied: Requirement | None) -> list[str]:
    """The project's requirements with all extras, without its own ranges for the libraries of the matrix, one of them pinned."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for group in (project["dependencies"], *project["optional-dependencies"].values()) for line in group]
    named = [requirement for requirement in map(Requirement, lines) if requirement.name not in (project["name"], *MINORS)]
    return [*map(str, named), *(name for name in MINORS if not varied or name != varied.name), *([str(varied)] if varied else [])]


# --------------------------------------------------------------------------------------------------------- environments


def tested(varied: Requirement | None, usual: dict[str, str], keep: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Make an environment with this version (None: as locked), run the tests in it, delete it.

    Args:
        usual: the packages of the locked environment, name -> version.

    Returns:
        The row of the table, and the packages that were installed.
    """
    library, version = (varied.name, version_of(varied)) if varied else ("as locked", "")
    environment = ENVIRONMENTS / (f"{library}-{version}" if varied else "locked")
    installed: dict[str, str] = {}
    try:
        installed = install(environment, varied)
        forced = [f"{name} {v}" for name, v in installed.items() if varied and name != library and usual.get(name) != v]
        few = ", ".join(forced) if len(forced) <= 3 else f"{', '.join(forced[:2])} and {len(forced) - 2} more"
        found = {"Installed": "yes", "With it": few} | run_tests(environment)
    except subprocess.CalledProcessError as error:
        found = {"Installed": "no"} | dict.fromkeys(("With it", "Passed", "Failed", "Skipped"), "")
        found["First error"] = shortened(error.stderr)
    finally:
        if not keep:
            shutil.rmtree(environment, ignore_errors=True)
    shown = version or ", ".join(f"{name} {installed.get(name)}" for name in MINORS)
    return {"Library": library, "Version": shown} | found, installed


def install(environment: Path, varied: Requirement | None) -> dict[str, str]:
    """Make the environment anew. Returns its packages, name -> version; raises CalledProcessError where uv cannot."""
    asked, pinned = environment / "asked.in", environment / "pinned.txt"
    uv("venv", "--clear", "--python", sys.executable, environment)
    asked.write_text("\n".join(requirements_with(varied)) + "\n", encoding="utf-8")
    shutil.copy(LOCK, pinned)  # uv keeps what the output file pins where the requirements allow it
    uv("pip", "compile", asked, "--output-file", pinned, "--python", environment / "bin/python")
    for what in (("--requirement", pinned), ("--editable", ".")):
        uv("pip", "install", "--python", environment / "bin/python", "--no-deps", *what)
    return pins(pinned.read_text(encoding="utf-8"))


def uv(*arguments: object) -> None:
    command = [str(Path(sys.executable).with_name("uv")), *map(str, arguments), "--quiet"]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def run_tests(environment: Path) -> dict[str, str]:
    """How many tests passed, failed and were skipped, and what the first failure says."""
    report = environment / "tests.xml"
    command = [str(environment / "bin/python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    try:
        ended = subprocess.run(command, env=variables, timeout=SECONDS, stdout=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return {"Passed": "", "Failed": "all", "Skipped": "", "First error": f"not finished after {SECONDS} s"}
    if not report.exists():  # the tests could not even be read
        said = re.findall(r"^E? *(\w+(?:Error|Exception|Warning): .*)$", ended.stdout, re.MULTILINE)
        return {"Passed": "0", "Failed": "all", "Skipped": "", "First error": shortened((said or [ended.stdout])[-1])}
    return outcome(ElementTree.parse(report).getroot())


def outcome(report: ElementTree.Element) -> dict[str, str]:
    """The same from pytest's JUnit report; an error in a fixture or at import counts as a failure."""
    cases = list(report.iter("testcase"))
    failures = [found for case in cases for found in (case.find("failure"), case.find("error")) if found is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    counts = {"Passed": len(cases) - failed - skipped, "Failed": failed, "Skipped": skipped}
    # at an import that fails, the message says only so, and the text ends with the reason
    said = failures[0].get("message", "") if failures else ""
    reasons = re.findall(r"^E +(\w+(?:\.\w+)*(?:Error|Exception)\b.*)$", failures[0].text or "", re.MULTILINE) if failures else []
    return {name: str(count) for name, count in counts.items()} | {"First error": shortened((reasons or [said])[0])}


def shortened(text: str) -> str:
    """What an error says, on one line, in a few words."""
    words = " ".join(re.sub(r"[×╰─▶│]", " ", text).split())
    return words if len(words) <= WORDS else words[:WORDS].rpartition(" ")[0] + " ..."


if __name__ == "__main__":
    try:
        main()
    except RoutevlError as error:
        print(f"test_matrix: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
