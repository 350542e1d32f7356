"""Manifests as `routevl record` writes them, and the comparison of what was made again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from routevl.errors import RoutevlError
from routevl.provenance import audit, manifest, rerun

ROUTEVL = str(Path(sys.executable).with_name("routevl"))
COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[3])"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("raw.json").write_text('{"value": 1.0}')
    Path("results").mkdir()
    return tmp_path


def record(name: str, inputs: list[str], outputs: list[str], *command: str) -> subprocess.CompletedProcess:
    """Run a command as rule `name` does, and write results/manifests/<name>/<name>.json."""
    words = ["record", "--manifest", f"results/manifests/{name}/{name}.json", "--inputs", *inputs, "--outputs", *outputs, "--"]
    return subprocess.run([ROUTEVL, *words, *command], capture_output=True, text=True)


def copying(name: str, source: str, target: str) -> subprocess.CompletedProcess:
    return record(name, [source], [target], sys.executable, "-c", COPY, source, "--to", target)


def read(name: str) -> manifest.Manifest:
    return manifest.read_manifest(Path(f"results/manifests/{name}/{name}.json"))


def problems(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What an audit finds wrong, where the configuration asks for the recorded commands."""
    records = audit.Records(Path("results"))
    planned = {str(job.path): job.manifest["command"] for job in records.jobs() if job.manifest}
    monkeypatch.setattr(audit, "planned_commands", lambda results: planned)
    found = audit.Audit(records)
    for job in records.jobs():
        found.check(job)
    return {path.stem: wrong for path, wrong in found.problems.items() if wrong}


def test_a_manifest_tells_what_was_run_and_on_what(project: Path) -> None:
    Path("folder").mkdir()
    Path("folder/a.txt").write_text("a")
    program = "import pathlib; pathlib.Path('results/out').mkdir(); pathlib.Path('results/out/b.txt').write_text('b')"
    command = [sys.executable, "-c", program]
    assert record("make", ["folder", "raw.json"], ["results/out"], *command).returncode == 0
    written = read("make")
    assert written["command"] == command and written["exit_status"] == 0
    [folder, raw] = written["inputs"]
    assert folder["files"] == {
        "a.txt": {"bytes": 1, "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}
    }
    assert raw["path"] == "raw.json" and raw["bytes"] == 14
    [output] = written["outputs"]
    assert list(output["files"]) == ["b.txt"]
    assert written["environment"]["packages"]["torch"] and written["machine"]["cores"] > 0
    assert written["cpu_seconds"] <= written["wall_seconds"] * os.cpu_count() + 1
    assert written["started"] < written["ended"]


def test_the_loaded_modules_of_a_stage_are_its_code(project: Path) -> None:
    command = [ROUTEVL, "world", "--output", "results/world", "--seed", "3", "--train-images", "2", "--val-images", "2",
               "--test-images", "2", "--image-size", "24", "--questions-per-image", "1"]  # fmt: skip
    assert record("world", [], ["results/world"], *command).returncode == 0
    written = read("world")
    assert {"cli.py", "data/world.py", "data/scenes.py"} <= set(written["code"]["files"])
    assert not any(name.startswith("training/") for name in written["code"]["files"])
    assert written["seed"] == 3 and written["config"]["image-size"] == ["24"]


def test_a_failed_command_leaves_its_status_and_a_manifest_of_the_past(project: Path) -> None:
    result = record("fail", ["raw.json"], ["results/out"], sys.executable, "-c", "raise SystemExit(7)")
    assert result.returncode == 7 and not Path("results/manifests/fail").exists()
    [past] = Path("results/manifests/.past/fail").iterdir()
    assert manifest.read_manifest(past)["exit_status"] == 7


def test_a_job_done_again_moves_its_first_manifest_to_the_past(project: Path) -> None:
    copying("copy", "raw.json", "results/copy.json")
    first = read("copy")
    copying("copy", "raw.json", "results/copy.json")
    [past] = Path("results/manifests/.past/copy").iterdir()
    assert manifest.read_manifest(past) == first != read("copy")


def test_an_output_that_was_not_written_is_an_error(project: Path) -> None:
    result = record("nothing", [], ["results/out"], sys.executable, "-c", "pass")
    assert result.returncode == 2 and "results/out: no such file" in result.stderr
    assert not Path("results/manifests/nothing").exists()


def test_stop_signals_reach_the_command(project: Path) -> None:
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print('ready', flush=True); time.sleep(60)"
    words = ["record", "--manifest", "results/manifests/sleep/sleep.json", "--outputs", "results/out", "--"]
    process = subprocess.Popen([ROUTEVL, *words, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    [past] = Path("results/manifests/.past/sleep").iterdir()
    assert manifest.read_manifest(past)["exit_status"] == 143


def test_remembered_hashes_follow_a_changed_file(tmp_path: Path) -> None:
    file, known = tmp_path / "file", tmp_path / "known"
    file.write_text("a")
    first = manifest.describe(file, known)
    assert manifest.describe(file, known) == first == manifest.describe(file)
    file.write_text("b")
    assert manifest.describe(file, known) == manifest.describe(file) != first


@pytest.mark.parametrize("change", [{"seed": 4}, {"command": ["a", "b"]}, {"unknown": 1}, {"exit_status": None}, {"outputs": []}])
def test_an_edited_manifest_is_noticed(project: Path, monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    copying("copy", "raw.json", "results/copy.json")
    path = Path("results/manifests/copy/copy.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RoutevlError, match="manifests/copy/copy.json: (not a manifest|was changed)"):
        manifest.read_manifest(path)
    assert "copy" in problems(monkeypatch)


def test_an_output_made_again_makes_what_was_read_from_it_stale(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying("first", "raw.json", "results/first.json")
    copying("second", "results/first.json", "results/second.json")
    assert problems(monkeypatch) == {}
    Path("raw.json").write_text('{"value": 2.0}')
    assert list(problems(monkeypatch)) == ["first"]
    copying("first", "raw.json", "results/first.json")
    found = problems(monkeypatch)
    assert list(found) == ["second"] and "was read before first first made it" in found["second"][0]


def test_the_command_of_another_configuration_names_the_option(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying("copy", "raw.json", "results/copy.json")
    records = audit.Records(Path("results"))
    [job] = records.jobs()
    now = [word.replace("raw.json", "other.json") for word in job.manifest["command"]]
    for planned, words in (({str(job.path): [*now, "--epochs", "3"]}, "--epochs was not given then, 3 now"), ({}, "no such job")):
        monkeypatch.setattr(audit, "planned_commands", lambda results, planned=planned: planned)
        found = audit.Audit(records)
        found.check(job)
        assert any(words in problem for problem in found.problems[job.path])


def test_a_job_is_made_again_in_a_scratch_folder(project: Path) -> None:
    copying("copy", "raw.json", "results/copy.json")
    again = rerun.rerun(read("copy"), Path("results"))
    assert again["verdict"] == "bit-equal" and again["differences"] == []
    Path("results/copy.json").write_text('{"value": 1.00001}')
    again = rerun.rerun(read("copy"), Path("results"))
    assert again["verdict"].startswith("equal within") and "value: 1.00001 then, 1.0 now" in again["differences"][0]
    assert Path("results/copy.json").read_text() == '{"value": 1.00001}'
    Path("results/copy.json").write_text('{"value": 2}')
    assert rerun.rerun(read("copy"), Path("results"))["verdict"] == "different"


def test_the_first_difference_of_tensors_is_shown(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    for folder, value in ((first, 1.0), (again, 1.5)):
        folder.mkdir()
        save_file({"weight": np.array([[0.0, value]], dtype=np.float32)}, folder / "model.safetensors")
        (folder / "timing.json").write_text(str(value))
    equal, difference = rerun.compare(first, again)
    assert equal == "different" and difference.endswith("model.safetensors: weight: 1.0 then, 1.5 now at [0, 1]")
    (again / "extra").write_text("")
    assert rerun.compare(first, again)[1].endswith("extra: only in one of both")


def test_an_edited_manifest_is_named_in_the_lineage_of_what_came_from_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying("first", "raw.json", "results/first.json")
    copying("second", "results/first.json", "results/second.json")
    path = Path("results/manifests/first/first.json")
    path.write_text(path.read_text().replace('"seed": null', '"seed": 1'))
    monkeypatch.setattr(audit, "planned_commands", lambda results: {})
    records = audit.Records(Path("results"))
    found = audit.Audit(records)
    job = records.job_of(Path("results/second.json"))
    found.check(job)
    assert any("first first: DOES NOT STAND" in line for line in found.lines([job]))
    assert any("manifests/first/first.json: was changed after it had been written" in line for line in found.lines([job]))
