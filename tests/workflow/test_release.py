"""A release is a job of the workflow: asked for, recorded, and then kept up to date with all else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_project import BIN, environment, make_project, row

from routevl.provenance.manifest import read_manifest

pytestmark = pytest.mark.slow


def said_by(project: Path, program: str, *options: str) -> str:
    """What a program of the environment prints in the project, when it succeeds."""
    ended = subprocess.run(
        [str(BIN / program), *options], cwd=project, env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_a_release_is_asked_for_recorded_and_kept_up_to_date(tmp_path: Path) -> None:
    project = make_project(tmp_path, [row("vqa", "vqa", "routing=mul", seeds="1,2")])
    assert "results/release" not in said_by(project, "snakemake", "--cores", "2", "--dry-run")
    plan = said_by(project, "snakemake", "--cores", "2", "--dry-run", "release")
    assert all(f"output: results/release/vqa_seed{seed}" in plan for seed in (1, 2))
    said_by(project, "snakemake", "--cores", "2", "results/release/vqa_seed1")
    folder, trained = project / "results/release/vqa_seed1", project / "results/manifests/train/vqa_seed1.json"
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results and read_manifest(trained)["digest"] in card.text
    assert "`./results/manifests/train/vqa_seed1.json`" in card.text and '"./results/release/vqa_seed1"' in card.text
    manifest = read_manifest(project / "results/manifests/release/vqa_seed1.json")
    assert [entry["path"] for entry in manifest["outputs"]] == ["results/release/vqa_seed1"]
    assert "everything stands" in said_by(project, "routevl", "audit", "results/release/vqa_seed1")
    (project / "results/release/vqa_seed1/README.md").unlink()
    (project / "results/models/vqa_seed1").touch()
    (project / "results/models/vqa_seed1/.snakemake_timestamp").touch()
    plan = said_by(project, "snakemake", "--cores", "2", "--dry-run")
    assert "output: results/release/vqa_seed1" in plan and "results/release/vqa_seed2" not in plan
