"""What is wrong is said early, and where the user looks: before the first job, or from the failed job's log."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tiny_project import BIN, environment, make_project, row

pytestmark = pytest.mark.slow


def snakemake(project: Path) -> str:
    """What a plain `snakemake` that must fail says."""
    done = subprocess.run(
        [str(BIN / "snakemake"), "--cores", "2"], cwd=project, env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_models_that_do_not_fit_are_refused_before_the_first_job(tmp_path: Path) -> None:
    rows = [row("good", "vqa"), row("bad", "vqa", "target_modules=nothing"), row("long", "caption", "max_text_tokens=500")]
    project = make_project(tmp_path, rows)
    said = snakemake(project)
    for experiment, key in (("bad", "target_modules"), ("long", "max_text_tokens 500 is too large")):
        [line] = [line for line in said.splitlines() if f"experiment '{experiment}': backbone " in line]
        assert key in line
    assert "experiment 'good'" not in said and "Traceback" not in said
    assert not (project / "results/world").exists() and not (project / "results/checked_models.json").exists()


def test_the_log_of_a_failed_job_is_printed(tmp_path: Path) -> None:
    project = make_project(tmp_path, [row("good", "vqa")])
    configuration = project / "config/config.yaml"
    configuration.write_text(configuration.read_text().replace("minimum_answer_count: 2", "minimum_answer_count: 9999"))
    assert "routevl: error: no answer occurs 9999 times in train, val; lower --minimum-answer-count" in snakemake(project)


def test_a_configuration_is_checked_once(tmp_path: Path) -> None:
    project = make_project(tmp_path, [row("good", "vqa")])
    command = [str(BIN / "snakemake"), "--cores", "2", "results/world"]
    times = []
    for text in ("", "", "\n"):
        sheet = project / "config/experiments/tiny.tsv"
        sheet.write_text(sheet.read_text() + text)
        subprocess.run([*command, "--forcerun", "world"], cwd=project, env=environment(), capture_output=True, check=True)
        times.append((project / "results/checked_models.json").stat().st_mtime_ns)
    assert times[0] == times[1] < times[2]
