"""The RO-Crate of a folder of results, from manifests of jobs that were done, failed and were superseded."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from routevl.errors import RoutevlError
from routevl.files import sha256_of
from routevl.provenance import crate
from routevl.provenance.manifest import Entry, describe, digest_of, manifest_paths, read_manifest, write_manifest
from routevl.startup import PACKAGE

pytestmark = pytest.mark.filterwarnings("ignore:ConjunctiveGraph:DeprecationWarning")

BASE, PROVENANCE = "ro-crate-1.1", "provenance-run-crate-0.5"
CONTEXT = Path(__file__).with_name("ro_crate_1.1_context.json")
HOME = "/home/jane.doe"
SOURCES = json.dumps([{"split": "val", "images": f"{HOME}/my coco/val2014", "captions": "data/captions.json"}])

# What the specifications recommend and the crate does not have, with the reason.
BASE_EXCEPTIONS = {
    "Root Data Entity: `author` property": "the manifests do not tell who made the results",
    "Root Data Entity: `publisher` property": "nor does anything tell who publishes them",
    "CreativeWork Author: RECOMMENDED affiliation property": "CITATION.cff has no affiliations of the paper's authors",
    "CreativeWork Author: RECOMMENDED Contextual Entity linked for the organizational `affiliation` property": "likewise",
    "Organization: RECOMMENDED url property": "the authors of the code have no address in CITATION.cff",
}
RUN_EXCEPTIONS = {
    "Application url": "the code has no address in CITATION.cff",
    "SoftwareApplication id": "and so its stages have none",
    "Action agent": "the manifests do not tell who started a job",
    "Action result": "a failed job has written nothing",
    "README.md about": "the results have no README",
    "README.md encodingFormat": "likewise",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished project of four jobs; `train/run_1` failed once, was done, and was done again; `train/run_2` failed."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("workflow/rules/train.smk", "Snakefile", "results/world/images/1.png", "results/world/captions.json",
                     "results/data/captions.json", "results/models/run 1/model.safetensors"):  # fmt: skip
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(name)
        world, data, model = (describe(Path(f"results/{name}")) for name in ("world", "data", "models/run 1"))
        images = {f"{number}.jpg": {"bytes": 3, "sha256": digest_of(number)} for number in range(crate.FILES_LISTED + 1)}
        given = [
            {"path": f"{HOME}/my coco/val2014", "bytes": 303, "sha256": digest_of(images), "files": images},
            {"path": "../elsewhere/captions.json.gz", "bytes": 2, "sha256": digest_of("captions")},
        ]
        old = {
            "path": model["path"],
            "bytes": 1,
            "sha256": digest_of("old"),
            "files": {"old.pt": model["files"]["model.safetensors"]},
        }
        write("world/world", "routevl world --output results/world", [], [world], minute=1)
        prepare = ["routevl", "prepare", "--root", "~/coco", "--sources", SOURCES, "--output", "results/data"]
        write("prepare/prepare", prepare, [world, *given], [data], minute=2)
        train = "routevl train --data results/data --model results/models/run --seed"
        write(".past/train/run_1.20260102T000300000", f"{train} 1", [data], [], minute=3, exit_status=137)
        write(".past/train/run_1.20260102T000400000", f"{train} 1", [data], [old], minute=4)
        write("train/run_1", f"{train} 1", [data], [model], minute=5)
        write(".past/train/run_2.20260102T000600000", f"{train} 2", [data], [], minute=6, exit_status=1)
        crate.run(argparse.Namespace(results=Path("results")))
        yield folder


def write(
    name: str, command: str | list[str], inputs: list[Entry], outputs: list[Entry], minute: int, exit_status: int = 0
) -> None:
    """Write results/manifests/<name>.json."""
    command = command.split() if isinstance(command, str) else command
    path = Path("results/manifests") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = {
        "rule": path.parent.name, "wildcards": {}, "command": command, "config": {}, "seed": None,
        "inputs": inputs, "outputs": outputs,
        "code": {"version": "0.1.0", "commit": "c" * 40, "dirty": True,
                 "files": {"errors.py": sha256_of(PACKAGE / "errors.py"),
                           "files.py": digest_of("changed"), "gone.py": digest_of("gone")}},
        "environment": {"python": "3.11.7", "lock": digest_of("lock"), "packages": {"snakemake": "9.27.1", "torch": "2.11.0"},
                        "loaded": ["torch"]},
        "machine": {"host": "janes-laptop", "system": "Linux", "cpu": None, "cores": 2, "gpus": [], "slurm_job_id": None},
        "started": f"2026-01-02T00:0{minute}:00.000+00:00", "ended": f"2026-01-02T00:0{minute}:30.500+00:00",
        "wall_seconds": 30.5, "cpu_seconds": 30.0, "peak_memory_mb": 100.0, "exit_status": exit_status, "changed": [],
    }  # fmt: skip
    write_manifest(path, manifest)


def metadata(project: Path) -> dict[str, Any]:
    return json.loads((project / "results/ro-crate-metadata.json").read_text())


def entities(project: Path) -> dict[str, dict[str, Any]]:
    return {entity["@id"]: entity for entity in metadata(project)["@graph"]}


def manifests(project: Path) -> list[Path]:
    return [*manifest_paths(project / "results"), *(project / "results/manifests/.past").glob("*/*.json")]


def references(value: Any) -> list[str]:
    return [reference["@id"] for reference in (value if isinstance(value, list) else [value])]


def hashes_of(value: Any) -> set[str]:
    return set(re.findall(r"\b[0-9a-f]{64}\b", json.dumps(value)))


def validate(project: Path, graph: list[dict[str, Any]], profile: str, severity: str, scratch: Path) -> dict[str, set[str]]:
    """The names of the checks that the results fail with that graph, and the entities that each fails on."""
    from rocrate_validator import services

    shutil.copytree(project / "results", scratch / "results", ignore=shutil.ignore_patterns("manifests"))
    # The terms of the context are written in place of its address: the validator would fetch them.
    context = [json.loads(CONTEXT.read_text())["@context"], *metadata(project)["@context"][1:]]
    (scratch / "results/ro-crate-metadata.json").write_text(json.dumps({"@context": context, "@graph": graph}))
    settings = services.ValidationSettings(
        rocrate_uri=str(scratch / "results"),
        profile_identifier=profile,
        requirement_severity=severity,
        offline=True,
        cache_path=scratch / "cache",
    )
    result = services.validate(settings)
    assert not result.skipped_checks
    failed: dict[str, set[str]] = {}
    for issue in result.get_issues():
        failed.setdefault(issue.check.name, set()).add((issue.violatingEntity or "").removeprefix("./"))
    return failed


def test_every_job_is_an_action_with_its_command_and_times(project: Path) -> None:
    actions = [entity for entity in entities(project).values() if entity["@id"].startswith("#job/")]
    found = {(entity["name"], entity["startTime"], entity["endTime"]): entity["description"] for entity in actions}
    expected = {}
    for path in manifests(project):
        manifest = read_manifest(path)
        command = [word.replace(f"{HOME}/my coco/", "").replace("~/", "") for word in manifest["command"]]
        name = f"{path.parent.name}/{path.stem.split('.')[0]}"
        expected[name, manifest["started"], manifest["ended"]] = shlex.join(command)
    assert found == expected and len(found) == 6


def test_every_hash_is_in_the_crate(project: Path) -> None:
    found = {entity["sha256"] for entity in entities(project).values() if "sha256" in entity}
    found |= hashes_of([entity.get("identifier") for entity in entities(project).values() if entity["@type"] == "Dataset"])
    expected: set[str] = set()
    for path in manifests(project):
        manifest = read_manifest(path)
        for entry in manifest["inputs"]:
            if len(entry.get("files", {})) > crate.FILES_LISTED:
                entry["files"] = {}
        expected |= hashes_of([manifest[part] for part in ("inputs", "outputs", "code", "environment")])
    assert expected and expected <= found


def test_what_is_on_disk_is_named_by_its_path_and_all_else_by_its_hash(project: Path) -> None:
    found = entities(project)
    [done_again] = references(found["#job/train/run_1/2026-01-02T00:05:00.000+00:00"]["result"])
    [superseded] = references(found["#job/train/run_1/2026-01-02T00:04:00.000+00:00"]["result"])
    assert done_again == "models/run%201/" and superseded == f"#{digest_of('old')[:16]}/results/models/run%201/"
    for reference in references(found["./"]["hasPart"]):
        assert (project / "results" / reference.replace("%20", " ")).exists()
        assert superseded != reference
    [file] = references(found["models/run%201/"]["hasPart"])
    path = project / "results/models/run 1/model.safetensors"
    assert found[file]["sha256"] == sha256_of(path) and found[file]["contentSize"] == str(path.stat().st_size)


def test_a_failed_job_is_a_failed_action_with_its_exit_status(project: Path) -> None:
    found = entities(project)
    failed = found["#job/train/run_1/2026-01-02T00:03:00.000+00:00"]
    assert failed["actionStatus"].endswith("FailedActionStatus") and failed["error"] == "train/run_1: exit status 137"
    assert "result" not in failed and references(failed["object"]) == ["data/"]
    superseded = found["#job/train/run_1/2026-01-02T00:04:00.000+00:00"]
    assert superseded["actionStatus"].endswith("CompletedActionStatus") and "error" not in superseded


def test_the_run_of_the_workflow_leads_from_what_was_given_to_what_is_there(project: Path) -> None:
    run = entities(project)["#workflow-run"]
    assert [reference.split("/", 1)[1] for reference in references(run["object"])] == ["val2014/", "captions.json.gz"]
    assert references(run["result"]) == ["world/", "data/", "models/run%201/"]
    # run_1 was done in the end, run_2 never
    assert run["actionStatus"].endswith("FailedActionStatus") and run["error"] == "train/run_2: exit status 1"


def test_jobs_of_a_rule_are_controlled_by_its_step(project: Path) -> None:
    found = entities(project)
    steps = {entity["name"]: entity for entity in found.values() if entity["@type"] == "HowToStep"}
    assert [steps[name]["position"] for name in ("world", "prepare", "train")] == ["1", "2", "3"]
    controls = [found[reference] for reference in references(found["#snakemake-run"]["object"])]
    by_step = {name: [control["object"]["@id"] for control in controls if control["instrument"]["@id"] == step["@id"]]
               for name, step in steps.items()}  # fmt: skip
    assert {name: len(jobs) for name, jobs in by_step.items()} == {"world": 1, "prepare": 1, "train": 4}
    assert all(job.startswith(f"#job/{name}/") for name, jobs in by_step.items() for job in jobs)


def test_a_large_folder_is_its_digest_and_size(project: Path) -> None:
    [folder] = [entity for entity in entities(project).values() if entity.get("name") == "val2014/"]
    assert "hasPart" not in folder and folder["contentSize"] == "303"
    assert folder["description"].startswith(f"{crate.FILES_LISTED + 1} files")


def test_a_size_that_no_manifest_tells_is_given_only_for_an_unchanged_file(project: Path) -> None:
    sources = {entity["name"]: entity for entity in entities(project).values() if "name" in entity}
    assert sources["src/routevl/errors.py"]["contentSize"] == str((PACKAGE / "errors.py").stat().st_size)
    for name in ("src/routevl/files.py", "src/routevl/gone.py", "envs/requirements.lock"):
        assert "contentSize" not in sources[name]


def test_nothing_personal_or_absolute_is_told(project: Path) -> None:
    text = (project / "results/ro-crate-metadata.json").read_text()
    assert "jane" not in text and "elsewhere" not in text and str(project) not in text and "/home" not in text
    for identifier, entity in entities(project).items():
        for value in (identifier, *entity.values()):
            if isinstance(value, str):
                words = value.split() if identifier.startswith("#job/") else [value]
                assert not [word for word in words if word.lstrip("'\"").startswith(("/", "~", "..", "file:"))]


@pytest.mark.parametrize(
    ("word", "public"),
    [
        (f"{HOME}/a b", "a b"),
        (f"file://{HOME}/a", "a"),
        (f"--root={HOME}/a", "--root=a"),
        ("~jane/a", "a"),
        ("../../jane/a", "a"),
        ("https://images.org/train/a.zip", "https://images.org/train/a.zip"),
        ("results/data/a.json", "results/data/a.json"),
        ("1e-3", "1e-3"),
        (".", "."),
    ],
)
def test_words_of_commands_keep_no_folder_outside_the_project(project: Path, word: str, public: str) -> None:
    described = crate.Crate(Path("results"), [], describe(Path("results/source")))
    assert described._public(word) == public
    assert described._public(str(project / "results/data")) == "results/data"


def test_equal_manifests_give_equal_bytes(project: Path) -> None:
    file = project / "results/ro-crate-metadata.json"
    before = file.read_bytes()
    crate.run(argparse.Namespace(results=project / "results"))
    assert file.read_bytes() == before


def test_a_damaged_manifest_leaves_no_crate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    world = {"path": "results/world", "bytes": 1, "sha256": digest_of("world")}
    write("world/world", "routevl world", [], [world], minute=1)
    path = Path("results/manifests/world/world.json")
    path.write_text(path.read_text().replace("routevl", "otherevl"))
    with pytest.raises(RoutevlError, match="world.json: was changed"):
        crate.run(argparse.Namespace(results=Path("results")))
    path.unlink()
    with pytest.raises(RoutevlError, match="no manifests"):
        crate.run(argparse.Namespace(results=Path("results")))
    write("world/world", "routevl world", [], [world], minute=1)
    with pytest.raises(RoutevlError, match="Snakefile: no such file"):
        crate.run(argparse.Namespace(results=Path("results")))
    assert [path.name for path in Path("results").iterdir()] == ["manifests"]


@pytest.mark.parametrize(("profile", "exceptions"), [(BASE, BASE_EXCEPTIONS), (PROVENANCE, BASE_EXCEPTIONS | RUN_EXCEPTIONS)])
def test_the_crate_is_all_that_the_profiles_recommend(
    project: Path, tmp_path: Path, profile: str, exceptions: dict[str, str]
) -> None:
    failed = validate(project, metadata(project)["@graph"], profile, "RECOMMENDED", tmp_path)
    assert failed.keys() == exceptions.keys()
    if profile == PROVENANCE:
        without_result = {entity["@id"] for entity in entities(project).values() if "error" in entity and "result" not in entity}
        assert failed["Action result"] == without_result and len(without_result) == 2


@pytest.mark.parametrize(
    ("entity", "removed", "check"),
    [
        ("./", "license", "Root Data Entity: `license` property"),
        ("#job/world/world/2026-01-02T00:01:00.000+00:00", "instrument", "Action instrument"),
        ("#rule/train", "workExample", "HowToStep workExample"),
    ],
)
def test_a_crate_without_a_required_property_is_not_valid(
    project: Path, tmp_path: Path, entity: str, removed: str, check: str
) -> None:
    graph = metadata(project)["@graph"]
    [node] = [node for node in graph if node["@id"] == entity]
    del node[removed]
    assert check in validate(project, graph, PROVENANCE, "REQUIRED", tmp_path)


def test_a_crate_whose_files_are_gone_is_not_valid(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "results", tmp_path / "project/results")
    (tmp_path / "project/results/source/Snakefile").unlink()
    failed = validate(tmp_path / "project", metadata(project)["@graph"], PROVENANCE, "REQUIRED", tmp_path)
    assert failed.keys() == {"Data Entity: REQUIRED resource availability", "Main Workflow file must exist"}
