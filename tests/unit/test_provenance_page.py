"""The page of stage `provenance`: what made the results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from synthetic_manifests import make_job

from routevl.errors import RoutevlError
from routevl.provenance import summary

GPU = {"host": "node1", "system": "Linux", "cpu": "EPYC", "cores": 8, "gpus": ["H100, 1.2"], "slurm_job_id": "7"}
CHANGED = {"version": "0.1.0", "commit": "badcafe", "dirty": True, "files": {}}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, a run made of them, and a table made of that; and a job that no table comes from."""
    monkeypatch.chdir(tmp_path)
    Path("sheet.tsv").write_text("experiment\tseeds\nvqa_mul\t1,2\n")
    manifests = Path("results/manifests")
    make_job(manifests / "prepare/prepare.json", [], ["results/data"], started="2026-01-01T00:00:00.000+00:00")
    run = {"started": "2026-01-02T03:04:05.678+00:00", "machine": GPU, "code": CHANGED}
    make_job(manifests / "train/vqa_mul_seed1.json", ["results/data"], ["results/models/vqa_mul_seed1"], **run)
    make_job(manifests / "train/stray_seed1.json", ["results/data"], ["results/models/stray_seed1"])
    table = {"started": "2026-01-03T00:00:00.000+00:00"}
    make_job(manifests / "table/T1_vqa.json", ["results/models/vqa_mul_seed1"], ["results/tables/T1_vqa.csv"], **table)


def page(configuration: str = '{"results": "results", "runs": {"beams": 5}}') -> str:
    output = Path("results/provenance.html")
    summary.run(
        argparse.Namespace(
            results=Path("results"), configuration=configuration, experiments=Path("sheet.tsv"), output=output
        )
    )  # fmt: skip
    return output.read_text(encoding="utf-8")


def test_it_tells_of_every_job_that_a_table_comes_from() -> None:
    text = page()
    assert "3 jobs that the tables and figures come from, 3.00 hours in all" in text
    places = [text.index(f"<code>results/{name}") for name in ("data", "models/vqa_mul_seed1", "tables/T1_vqa.csv")]
    assert places == sorted(places), "jobs stand in the order in which they started"
    assert "stray" not in text
    manifest = json.loads(Path("results/manifests/train/vqa_mul_seed1.json").read_text())
    assert f"<code>{manifest['outputs'][0]['sha256'][:12]}</code>" in text and "<td>2026-01-02 03:04:05</td>" in text


def test_it_tells_of_each_code_and_machine_and_of_the_configuration() -> None:
    text = page()
    assert "<td>routevl 0.1.0, commit badcafe with uncommitted changes</td>\n<td>1</td>" in text
    assert "<td>routevl 0.1.0, commit c0ffee</td>\n<td>2</td>" in text
    assert "<td>EPYC, 8 cores, H100, 1.2, Linux</td>" in text
    assert "<td>vqa_mul</td>\n<td>1,2</td>" in text
    assert "runs:\n  beams: 5\n" in text


def test_made_again_it_is_the_same() -> None:
    first = page()
    make_job(Path("results/manifests/provenance/provenance.json"), ["results/tables/T1_vqa.csv"], ["results/provenance.html"])
    assert page() == first


def test_a_broken_manifest_is_named() -> None:
    path = Path("results/manifests/train/vqa_mul_seed1.json")
    path.write_text(path.read_text().replace("EPYC", "Xeon"))
    assert f"{path}: was changed after it had been written" in page()


def test_bad_input_is_one_line_and_leaves_no_page() -> None:
    with pytest.raises(RoutevlError, match="--configuration is not JSON"):
        page("{")
    for path in Path("results/manifests").glob("*/*.json"):
        path.unlink()
    with pytest.raises(RoutevlError, match="no manifests"):
        page()
    assert not Path("results/provenance.html").exists()
