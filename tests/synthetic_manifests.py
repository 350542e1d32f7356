"""Manifests of jobs that never ran, with the files that they would have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from routevl.provenance.manifest import describe, write_manifest


def make_job(path: Path, inputs: list[str], outputs: list[str], **fields: Any) -> None:
    """Write a manifest at results/manifests/<rule>/<name>.json, and its outputs with their own names as content.

    Args:
        fields: of the manifest, in place of made-up ones.
    """
    for output in map(Path, outputs):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(str(output))
    made_up = {
        "rule": path.parent.name,
        "wildcards": {"name": path.stem},
        "command": ["routevl", path.parent.name],
        "config": {},
        "seed": None,
        "code": {"version": "0.1.0", "commit": "c0ffee", "dirty": False, "files": {}},
        "environment": {"python": "3.11.0", "lock": None, "packages": {}, "loaded": []},
        "machine": {"host": "node1", "system": "Linux", "cpu": None, "cores": 1, "gpus": [], "slurm_job_id": None},
        "started": "2026-01-01T00:00:00.000+00:00",
        "ended": "2026-01-01T01:00:00.000+00:00",
        "wall_seconds": 3600.0,
        "cpu_seconds": 1.0,
        "peak_memory_mb": 1.0,
        "exit_status": 0,
        "changed": [],
    }
    made = {"inputs": [describe(Path(file)) for file in inputs], "outputs": [describe(Path(file)) for file in outputs]}
    write_manifest(path, made_up | made | fields)
