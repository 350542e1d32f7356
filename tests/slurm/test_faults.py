"""What a rehearsal on a real SLURM finds out in a minute, and how it is told."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import BIN, PROJECT, environment, make_project, row

from .conftest import MAX_TIME

# The shell of preparation takes more memory than its job asks for, where the file `hungry` stands.
SHELL = """
if [[ $BASH_EXECUTION_STRING == *"routevl prepare"* && -e hungry ]]; then
  head -c 2600M /dev/zero | tail -n 1 | sleep 5
fi
"""
DATA = "results/rehearsal/data"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm")]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy configuration with the demo world of its rehearsal."""
    project = make_project(tmp_path_factory.mktemp("original"), [row("none", "vqa", feeds="T1")])
    shutil.copytree(PROJECT / "slurm", project / "slurm")
    for key, seconds in (("slurm-init-seconds-before-status-checks", 1), ("latency-wait", 5)):
        change(project / "slurm/profile.yaml", key, seconds)
    (project / "shell.sh").write_text(SHELL)
    snakemake(project, "results/rehearsal/world", "--cores", "1", "--config", "rehearsal=yes")
    return project


@pytest.fixture
def project(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "project")


def snakemake(project: Path, *options: str) -> None:
    done = subprocess.run([str(BIN / "snakemake"), *options], cwd=project, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def change(path: Path, key: str, value: Any) -> None:
    """Set a key of a YAML file, given with the keys above it."""
    content = yaml.safe_load(path.read_text())
    *sections, last = key.split(".")
    section = content
    for name in sections:
        section = section[name]
    section[last] = value
    path.write_text(yaml.safe_dump(content))


def errors(project: Path, *targets: str) -> list[str]:
    """What a rehearsal on SLURM says that is wrong."""
    command = [str(BIN / "snakemake"), "--profile", "slurm", "--cores", "all", "--retries", "0", *targets]
    given = ["--config", "rehearsal=yes", "gpu_flag=gpus"]
    variables = environment() | {"BASH_ENV": str(project / "shell.sh"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(project / "hub")}
    done = subprocess.run([*command, *given], cwd=project, env=variables, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == (project / DATA).exists(), done.stdout + done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("routevl: error: ")]


def test_a_wrong_model_folder(project: Path) -> None:
    change(project / "config/config.yaml", "backbones.text.roberta", {"path": "models/nowhere"})
    [error] = errors(project)
    assert "experiment 'none': backbone models/nowhere at revision main: no such folder" in error and "backbone's path" in error


def test_a_wrong_partition(project: Path) -> None:
    change(project / "slurm/partitions.yaml", "partitions", {"nowhere": {"max_gpu": 0}})
    [error] = errors(project, DATA)
    assert error == (
        "routevl: error: rule prepare: SLURM has no partition 'nowhere': name yours, as sinfo does, in the profile's "
        "partitions.yaml"
    )


def test_a_partition_whose_time_is_too_short(project: Path) -> None:
    change(project / "config/config.yaml", "data.runtime", MAX_TIME + 30)
    [error] = errors(project, DATA)
    assert error == (
        "routevl: error: rule prepare: the partition cpu allows no job of 90 minutes: lower data.runtime, or give the partition "
        "its max_runtime in the profile's partitions.yaml, so that a longer one is taken"
    )


def test_too_little_memory_and_then_enough(project: Path) -> None:
    (project / "hungry").touch()
    assert errors(project, DATA) == ["routevl: error: rule prepare: killed for more memory than it asked for: raise data.mem_mb"]
    (project / "hungry").unlink()
    assert errors(project, DATA) == []
    assert not (project / "results/data").exists()
