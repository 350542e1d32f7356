"""Manifests as `routevl record` writes them, and the comparison of what was made again."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from routevl.errors import RoutevlError
from routevl.files import sha256_of
from routevl.provenance import audit, manifest, rerun
from routevl.provenance import record as record_module
from routevl.provenance.audit import Audit, lost_jobs
from routevl.provenance.records import Planned, Records, place
from routevl.startup import PACKAGE
from routevl.surroundings import variables_for_snakemake

Capture = pytest.CaptureFixture
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


def plan_of(results: Path = Path("results")) -> dict[str, Planned]:
    """The plan of a configuration that asks for the recorded commands."""
    jobs = Records(results).jobs
    return {place(job.path): Planned(job.path, job.outputs, job.manifest["command"]) for job in jobs if job.manifest}


def audited(plan: dict[str, Planned] | None = None) -> Audit:
    """An audit of all jobs that the plan has, and so of all that they come from."""
    Path("results/manifests/config.json").write_text('{"configfiles": [], "config": []}')
    plan = plan_of() if plan is None else plan
    records = Records(Path("results"), plan)
    found = Audit(records, plan)
    for job in [*records.jobs, *lost_jobs(records, plan)]:
        found.check(job)
    return found


def problems(plan: dict[str, Planned] | None = None) -> dict[str, list[str]]:
    """What an audit finds wrong, by job."""
    return {path.stem: wrong for path, wrong in audited(plan).problems.items() if wrong}


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
def test_an_edited_manifest_is_noticed(project: Path, change: dict) -> None:
    copying("copy", "raw.json", "results/copy.json")
    path = Path("results/manifests/copy/copy.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RoutevlError, match="manifests/copy/copy.json: (not a manifest|was changed)"):
        manifest.read_manifest(path)
    assert "copy" in problems({place(path): Planned(path, ["results/copy.json"], [])})


def test_an_output_made_again_makes_what_was_read_from_it_stale(project: Path) -> None:
    copying("first", "raw.json", "results/first.json")
    copying("second", "results/first.json", "results/second.json")
    assert problems() == {}
    Path("raw.json").write_text('{"value": 2.0}')
    assert list(problems()) == ["first"]
    copying("first", "raw.json", "results/first.json")
    found = problems()
    assert list(found) == ["second"] and "was read before first first made it" in found["second"][0]


def test_the_command_of_another_configuration_names_the_option(project: Path) -> None:
    copying("copy", "raw.json", "results/copy.json")
    [(key, planned)] = plan_of().items()
    now = [word.replace("raw.json", "other.json") for word in planned.command]
    [found] = problems({key: replace(planned, command=[*now, "--epochs", "3"])}).values()
    assert "stale: --epochs was not given then, 3 now" in found


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


def test_an_edited_manifest_is_named_in_the_lineage_of_what_came_from_it(project: Path) -> None:
    copying("first", "raw.json", "results/first.json")
    copying("second", "results/first.json", "results/second.json")
    plan = plan_of()
    path = Path("results/manifests/first/first.json")
    path.write_text(path.read_text().replace('"seed": null', '"seed": 1'))
    found = audited(plan)
    lines = found.lines([found.records.job_of(Path("results/second.json"))])
    assert any("first first: DOES NOT STAND" in line for line in lines)
    assert any("manifests/first/first.json: was changed after it had been written" in line for line in lines)
    assert any(
        line.startswith("    > ") and line.endswith("/snakemake --cores 1 --forcerun results/first.json") for line in lines
    )


# ------------------------------------------------------------------------------ b01, b11: what changes while a job runs


def package_of(folder: Path) -> dict[str, str]:
    """A copy of the package in a folder, and the environment in which `python -m routevl.cli` is that copy."""
    shutil.copytree(PACKAGE, folder / "routevl", ignore=shutil.ignore_patterns("__pycache__"))
    return os.environ | {"PYTHONPATH": str(folder)}


WORLD = ("--seed", "3", "--train-images", "1", "--val-images", "1", "--test-images", "1", "--image-size", "24",
         "--questions-per-image", "1")  # fmt: skip


def test_b01_code_is_hashed_before_the_job_and_its_change_meanwhile_is_said(project: Path) -> None:
    """The job loads the package, changes a module that it has loaded, and ends well."""
    own = package_of(project / "code")
    program = f"""
import sys
sys.path.insert(0, {str(project / "code")!r})
from routevl import cli, startup
cli.main()
with open(startup.PACKAGE / "data/world.py", "a") as file:
    file.write("# edited")
"""
    words = ["--manifest", "results/manifests/world/world.json", "--outputs", "results/world", "--"]
    command = [sys.executable, "-c", program, "world", *WORLD, "--output", "results/world"]
    record = ["-c", f"import sys; sys.path.insert(0, {str(project / 'code')!r}); from routevl import cli; cli.main()", "record"]
    before = sha256_of(project / "code/routevl/data/world.py")
    done = subprocess.run([sys.executable, *record, *words, *command], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "changed while the job ran, so it does not stand: routevl/data/world.py" in done.stderr
    written = read("world")
    assert written["changed"] == ["routevl/data/world.py"] and written["code"]["files"]["data/world.py"] == before
    found = problems()["world"]
    assert "routevl/data/world.py: was changed while the job ran" in found


def test_b11_an_input_that_is_changed_while_the_job_reads_it_is_said(project: Path) -> None:
    program = "import pathlib; pathlib.Path('results/out').write_text('a'); pathlib.Path('raw.json').write_text('{}')"
    done = record("edit", ["raw.json"], ["results/out"], sys.executable, "-c", program)
    assert done.returncode == 0 and "changed while the job ran, so it does not stand: raw.json" in done.stderr
    assert "raw.json: was changed while the job ran" in problems()["edit"]


def test_b11_an_input_that_was_swapped_and_put_back_in_time_and_size_is_hashed_again(project: Path) -> None:
    known, raw = Path("results/known"), Path("raw.json")
    first, stamp = manifest.describe(raw, known), raw.stat()
    Path("other.json").write_text('{"value": 2.0}')
    os.utime("other.json", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    os.replace("other.json", raw)
    assert raw.stat().st_mtime_ns == stamp.st_mtime_ns and raw.stat().st_size == stamp.st_size
    assert manifest.describe(raw, known)["sha256"] == sha256_of(raw) != first["sha256"]


# ------------------------------------------------------------------------------ b02, h27: a path is one, however it is spelled


@pytest.fixture
def planned(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copying("first", "raw.json", "results/first.json")
    copying("second", "results/first.json", "results/second.json")
    Path("results/manifests/config.json").write_text('{"configfiles": [], "config": []}')
    monkeypatch.setattr(audit, "read_plan", plan_of)
    return project


def verdict(path: Path | str, capsys: Capture, *options: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    audit.add_arguments(parser)
    try:
        audit.run(parser.parse_args([str(path), *options]))
        status = 0
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().out


@pytest.mark.parametrize("sound", [True, False])
def test_b02_h27_every_spelling_of_a_path_gets_one_verdict(
    planned: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, sound: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not sound:
        Path("results/first.json").write_text("{}")
    expected = verdict("results/second.json", capsys)
    assert expected[0] == (not sound) and ("everything stands" in expected[1]) == sound
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "link").symlink_to(planned)
    (elsewhere / "disk").symlink_to(planned / "results")
    relative = ("./results/second.json", "results/../results/second.json")
    through_links = (elsewhere / "link/results/second.json", elsewhere / "disk/second.json")
    spellings = [*relative, *through_links, planned / "results/second.json", f"{planned}/results//second.json"]
    for spelling in spellings:
        assert verdict(spelling, capsys) == expected, spelling
    monkeypatch.chdir(elsewhere)
    for spelling in (planned / "results/second.json", "link/results/second.json", "disk/../results/second.json"):
        assert verdict(spelling, capsys) == expected, spelling
    monkeypatch.chdir(planned / "results")
    for spelling in ("second.json", "./../results/second.json"):
        assert verdict(spelling, capsys) == expected, spelling


def test_b02_results_on_another_disk_are_audited_by_either_path(planned: Path, capsys: Capture) -> None:
    expected = verdict("results", capsys)
    scratch = planned.parent / f"{planned.name}-scratch"
    shutil.move("results", scratch)
    Path("results").symlink_to(scratch)
    assert expected[0] == 0
    for spelling in ("results", scratch, scratch / "manifests/..", planned / "results/"):
        assert verdict(spelling, capsys) == expected


@pytest.mark.parametrize("spelling", ["results/model", "{}/results/model", "results/../results/model"])
def test_b02_a_rerun_never_touches_what_is_there(project: Path, spelling: str) -> None:
    """A job that has a folder of its own beside its outputs, which it removes at the end, as training does its checkpoint."""
    program = "import pathlib, shutil, sys; shutil.rmtree(sys.argv[2]); pathlib.Path(sys.argv[4]).write_text('model')"
    kept = spelling.format(project).replace("model", "checkpoints")
    Path("results/checkpoints").mkdir()
    output = spelling.format(project)
    assert record("train", [], [output], sys.executable, "-c", program, "--checkpoint", kept, "--model", output).returncode == 0
    Path("results/checkpoints").mkdir()
    Path("results/checkpoints/of another run").write_text("a week's work")
    try:
        again = rerun.rerun(read("train"), Path("results"))
        assert again["verdict"].startswith("different")  # there is nothing to be removed, so the job fails
    except RoutevlError as error:
        assert "was written outside of the project" in str(error)
    assert Path("results/checkpoints/of another run").read_text() == "a week's work"
    assert Path("results/model").read_text() == "model"


# ------------------------------------------------------------------------------ b04: packages


def environment_of(monkeypatch: pytest.MonkeyPatch, **packages: str | None) -> None:
    """Let this environment have packages of these versions; None: not have them."""
    found = audit.environment()
    versions = {name: version for name, version in (found["packages"] | packages).items() if version}
    monkeypatch.setattr(audit, "environment", lambda: found | {"packages": versions})


def test_b04_only_packages_that_the_job_loaded_make_it_stale(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [ROUTEVL, "world", *WORLD, "--output", "results/world"]
    assert record("world", [], ["results/world"], *command).returncode == 0
    assert {"numpy", "pillow"} <= set(read("world")["environment"]["loaded"])
    assert not {"torch", "matplotlib", "ipython"} & set(read("world")["environment"]["loaded"])
    environment_of(monkeypatch, ipython="9.0.0", matplotlib="9.0.0", torch=None)
    assert problems() == {}
    environment_of(monkeypatch, pillow="0.1")
    assert [problem for problem in problems()["world"] if "another environment: pillow" in problem and ", 0.1 now" in problem]


# ------------------------------------------------------------------------------ b12: retired jobs


def test_b12_retired_jobs_are_told_apart_and_set_aside(planned: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """`second` was renamed to `third`, which writes the same output."""
    copying("third", "results/first.json", "results/second.json")
    whole = plan_of()
    plan = {key: job for key, job in whole.items() if job.manifest.stem != "second"}
    monkeypatch.setattr(audit, "read_plan", lambda results: plan)
    status, said = verdict("results", capsys)
    assert (
        status == 0
        and "2 jobs checked: everything stands; retired, as the configuration has no such jobs now: second second" in said
    )
    status, said = verdict("results/second.json", capsys)
    assert status == 0 and "third third: stands" in said
    monkeypatch.setattr(
        audit, "read_plan", lambda results: {key: job for key, job in whole.items() if job.manifest.stem == "first"}
    )
    status, said = verdict("results/second.json", capsys)
    assert status == 1 and "retired: the configuration has no such job now" in said and "routevl audit --retire results" in said
    monkeypatch.setattr(audit, "read_plan", lambda results: plan)
    status, said = verdict("results", capsys, "--retire")
    assert status == 0 and "retired" not in said
    assert not Path("results/manifests/second/second.json").exists()
    assert len(list(Path("results/manifests/.past/second").iterdir())) == 1
    assert Path("results/second.json").exists()


def test_b12_an_output_whose_manifest_is_gone_does_not_stand(
    planned: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of()
    monkeypatch.setattr(audit, "read_plan", lambda results: plan)
    Path("results/manifests/second/second.json").unlink()
    status, said = verdict("results", capsys)
    assert status == 1 and "results/second.json: no manifest tells how it was made" in said
    Path("results/second.json").unlink()  # as before the job has been run
    assert verdict("results", capsys)[0] == 0


# ------------------------------------------------------------------------------ h28: the machine's environment


def test_h28_a_folder_of_the_module_system_is_neither_seen_by_jobs_nor_recorded(project: Path) -> None:
    foreign = project / "foreign"
    for name in ("tqdm", "tqdm-0.0.1.dist-info"):
        (foreign / name).mkdir(parents=True)
    (foreign / "tqdm/__init__.py").write_text("__version__ = '0.0.1'")
    program = "import tqdm; open('results/version', 'w').write(tqdm.__version__)"
    words = ["record", "--manifest", "results/manifests/job/job.json", "--outputs", "results/version", "--"]
    done = subprocess.run(
        [ROUTEVL, *words, sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(foreign)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path("results/version").read_text() == version("tqdm") == read("job")["environment"]["packages"]["tqdm"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")
def test_h28_the_commit_is_read_whoever_owns_the_checkout(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(PACKAGE, "checkout/src/routevl")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *words], cwd="checkout", check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd="checkout", capture_output=True, text=True).stdout.strip()
    for path in (project / "checkout").rglob("*"):
        os.chown(path, 1234, 1234)
    os.chown("checkout", 1234, 1234)
    monkeypatch.setattr(record_module, "PACKAGE", project / "checkout/src/routevl")
    monkeypatch.setenv("HOME", str(project))
    assert record_module._version_control() == {"commit": commit, "dirty": False}


@pytest.mark.parametrize("writable", [True, False])
def test_h28_snakemake_gets_a_cache_where_the_home_cannot_be_written(
    project: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(project if writable else project / "raw.json"))
    cache = variables_for_snakemake().get("XDG_CACHE_HOME")
    assert cache == (None if writable else str(project / ".snakemake/cache"))


def test_a_torn_memory_of_hashes_is_an_empty_one(project: Path) -> None:
    """Also b07: another node's process was killed while it wrote, or the file is of another version."""
    known = Path("results/known")
    expected = manifest.describe(Path("raw.json"), known)
    [memory] = known.iterdir()
    for torn in ("", '{"."', "[1]", '{".": 3}', '{".": []}', '{".": ["a", "b"]}'):
        memory.write_text(torn)
        assert manifest.describe(Path("raw.json"), known) == expected


def test_a_torn_manifest_does_not_stop_the_job_from_being_done_again(project: Path) -> None:
    copying("copy", "raw.json", "results/copy.json")
    Path("results/manifests/copy/copy.json").write_text('{"rule"')
    assert copying("copy", "raw.json", "results/copy.json").returncode == 0
    assert problems() == {} and len(list(Path("results/manifests/.past/copy").iterdir())) == 1
