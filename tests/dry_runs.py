"""`snakemake --dry-run` in a folder that holds a configuration, in processes forked from the tests' own: half a second each."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from tiny_project import PROJECT


def dry_run(folder: Path, *options: str) -> tuple[int, str]:
    """Exit status and output of `snakemake --dry-run`, in a process forked from this one."""
    log = folder / "output.log"

    def main() -> None:
        with open(log, "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        from snakemake.cli import main as snakemake

        os.chdir(folder)
        snakemake(["--dry-run", "--cores", "1", "--snakefile", str(PROJECT / "Snakefile"), *options])

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(120)
    output = log.read_text()
    log.unlink()
    return process.exitcode, output


def change_configuration(workflow: Path, key: str, value: Any) -> None:
    """Change one value of config/config.yaml; None: leave it out."""
    path = workflow / "config/config.yaml"
    config = yaml.safe_load(path.read_text())
    *sections, last = key.split(".")
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    if value is None:
        del section[last]
    path.write_text(yaml.safe_dump(config))


def expect_message(workflow: Path, message: str, source: str = "") -> None:
    """One line that says what is wrong and where, not a traceback, and nothing written."""
    before = {path for path in workflow.rglob("*") if ".snakemake" not in path.parts}
    status, output = dry_run(workflow)
    assert status != 0
    [line] = [line for line in output.splitlines() if message in line]
    assert line.startswith(source), output
    assert "Traceback" not in output
    assert {path for path in workflow.rglob("*") if ".snakemake" not in path.parts} == before
