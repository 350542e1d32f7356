"""Ways to tamper with a finished project's results, each with what an audit must say of it."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from routevl.features.images import BadImages, read_image_lists, read_images
from routevl.provenance import record
from routevl.provenance.manifest import describe
from routevl.provenance.records import Plan, read_plan


@dataclass(frozen=True)
class Tampering:
    """What was done, and what must be said of it.

    Attributes:
        manifest: of the job that must not stand; None where all must.
        words: that one of its problems must have.
        plan, packages: what the configuration plans, and the versions of packages, from now on; None: as before.
        spelling: the path to ask for, in place of all results.
    """

    manifest: str | None
    words: tuple[str, ...] = ()
    plan: Plan | None = None
    packages: dict[str, str | None] | None = None
    spelling: str | None = None


def files_under(results: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in results.glob(pattern) if path.is_file())


def maker_of(results: Path, path: Path) -> str:
    """The manifest of the job that wrote a file."""
    for manifest in sorted((results / "manifests").glob("[!.]*/*.json")):
        for entry in json.loads(manifest.read_text())["outputs"]:
            if results.parent / entry["path"] in (path, *path.parents):
                return str(manifest.relative_to(results.parent))
    raise AssertionError(path)


def flip_a_byte(*patterns: str) -> Callable[[random.Random, Path], Tampering]:
    def tamper(rng: random.Random, results: Path) -> Tampering:
        path = rng.choice([file for file in files_under(results, *patterns) if file.stat().st_size])
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return Tampering(maker_of(results, path), (str(path.relative_to(results.parent)), "changed"))

    return tamper


def edit_a_prediction(rng: random.Random, results: Path) -> Tampering:
    path = rng.choice(files_under(results, "predictions/vqa_*/results.json"))
    answers = json.loads(path.read_text())
    answers[rng.randrange(len(answers))]["answer"] += " indeed"
    path.write_text(json.dumps(answers))
    return Tampering(maker_of(results, path), (str(path.relative_to(results.parent)), "changed"))


def swap_two(pattern: str) -> Callable[[random.Random, Path], Tampering]:
    def tamper(rng: random.Random, results: Path) -> Tampering:
        first, second = rng.sample(files_under(results, pattern), 2)
        contents = first.read_bytes(), second.read_bytes()
        assert contents[0] != contents[1]
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        return Tampering(maker_of(results, first), (str(first.relative_to(results.parent)), "changed"))

    return tamper


def delete_a_file(rng: random.Random, results: Path) -> Tampering:
    path = rng.choice(files_under(results, "data/*/*.json", "models/*/*.json", "features/*/*.safetensors", "scores/*/*.json"))
    maker = maker_of(results, path)
    path.unlink()
    return Tampering(maker, (str(path.relative_to(results.parent)), "missing"))


def add_a_file(rng: random.Random, results: Path) -> Tampering:
    path = rng.choice(sorted((results / "models").iterdir())) / "extra.json"
    path.write_text("{}")
    return Tampering(maker_of(results, path), (str(path.relative_to(results.parent)), "added"))


def edit_a_manifest(rng: random.Random, results: Path) -> Tampering:
    path = rng.choice(sorted((results / "manifests").glob("[!.]*/*.json")))
    manifest = json.loads(path.read_text())
    places: list[tuple[dict | list, str | int]] = []
    collect_values(manifest, places)
    place, key = rng.choice(places)
    value = place[key]
    place[key] = value + 1 if isinstance(value, (int, float)) else f"{value}x" if isinstance(value, str) else "x"
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return Tampering(str(path.relative_to(results.parent)), (str(path.relative_to(results.parent)),))


def collect_values(value: object, places: list[tuple[dict | list, str | int]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        if isinstance(child, (dict, list)):
            collect_values(child, places)
        else:
            places.append((value, key))  # type: ignore[arg-type]


def edit_the_lock(rng: random.Random, results: Path) -> Tampering:
    path = results.parent / "envs/requirements.lock"
    lines = path.read_text().splitlines()
    pins = [index for index, line in enumerate(lines) if "==" in line]
    chosen = rng.choice(pins)
    lines[chosen] = lines[chosen].replace("==", "==9.", 1)
    path.write_text("\n".join(lines) + "\n")
    manifest = rng.choice(sorted((results / "manifests").glob("[!.]*/*.json")))
    return Tampering(str(manifest.relative_to(results.parent)), ("requirements.lock",))


# ----------------------------------------------------------------------------------- what is no change of a file of the results


def edit_code_during_a_job(rng: random.Random, results: Path) -> Tampering:
    """A job is recorded again, by its own command's name; while it runs, a module that it has loaded is edited."""
    path = rng.choice(files_under(results, "manifests/table/*.json", "manifests/prepare/*.json", "manifests/score/*.json"))
    manifest = json.loads(path.read_text())
    name = rng.choice([name for name in manifest["code"]["files"] if name != "__init__.py"])
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "src/routevl"
        shutil.copytree(record.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        program = (
            "import json, os, pathlib, sys\n"
            "module = pathlib.Path(sys.argv[1]); module.write_text(module.read_text() + '# edited\\n')\n"
            "pathlib.Path(os.environ['ROUTEVL_MODULES_LOG']).write_text(json.dumps({'own': sys.argv[2:], 'others': []}))\n"
        )
        own, before = sorted(manifest["code"]["files"]), record.PACKAGE
        command = [sys.executable, "-c", program, str(package / name), *own]
        inputs, outputs = ([Path(entry["path"]) for entry in manifest[part]] for part in ("inputs", "outputs"))
        record.PACKAGE = package
        try:
            record.run(argparse.Namespace(manifest=path, wildcards=[], inputs=inputs, outputs=outputs, command=command))
        finally:
            record.PACKAGE = before
    return Tampering(str(path.relative_to(results.parent)), (f"routevl/{name}", "was changed while the job ran"))


def swap_an_input_during_a_job(rng: random.Random, results: Path) -> Tampering:
    """A job is recorded again; meanwhile one of its inputs is replaced by another of the same size and time of change."""
    path = rng.choice(files_under(results, "manifests/table/*.json", "manifests/score/*.json", "manifests/index_features/*.json"))
    manifest = json.loads(path.read_text())
    inputs, outputs = ([Path(entry["path"]) for entry in manifest[part]] for part in ("inputs", "outputs"))
    chosen = rng.choice([entry for entry in inputs if results.name in entry.parts])
    file = rng.choice([file for file in files_under(chosen, "**/*") if file.stat().st_size]) if chosen.is_dir() else chosen
    program = (
        "import os, pathlib, sys\n"
        "file = pathlib.Path(sys.argv[1]); old = file.stat(); content = bytearray(file.read_bytes()); content[-1] ^= 1\n"
        "other = file.with_name('other'); other.write_bytes(content); os.replace(other, file)\n"
        "os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))\n"
    )
    command = [sys.executable, "-c", program, str(file)]
    record.run(argparse.Namespace(manifest=path, wildcards=[], inputs=inputs, outputs=outputs, command=command))
    return Tampering(str(path.relative_to(results.parent)), (str(chosen), "was changed while the job ran"))


def swap_images_between_two_jobs(rng: random.Random, results: Path) -> Tampering:
    """After the data were prepared, before something reads the images: it must refuse them, and the audit must see it."""
    split = rng.choice(files_under(results, "data/*/images.json"))
    images = read_image_lists([split])
    first, second = rng.sample(images, 2)
    contents = [Path(image.file_name).read_bytes() for image in (second, first)]
    for path, content in zip((Path(image.file_name) for image in (first, second)), contents, strict=True):
        path.write_bytes(content)
    try:
        read_images(images)
    except BadImages as error:
        assert len(error.problems) == 2 and all(image.file_name in str(error) for image in (first, second))
        return Tampering(maker_of(results, Path(first.file_name)), (first.file_name, "changed"))
    raise AssertionError("swapped images were read")


def another_version_of_a_package(rng: random.Random, results: Path) -> Tampering:
    manifest = rng.choice(sorted((results / "manifests").glob("[!.]*/*.json")))
    package = rng.choice(json.loads(manifest.read_text())["environment"]["loaded"])
    packages = {package: rng.choice(["0.0.1", None])}
    return Tampering(str(manifest.relative_to(results.parent)), ("another environment", package), packages=packages)


def an_extra_package(rng: random.Random, results: Path) -> Tampering:
    """No job has loaded it, nor the one that is gone."""
    environments = [json.loads(path.read_text())["environment"] for path in (results / "manifests").glob("[!.]*/*.json")]
    unused = environments[0]["packages"].keys() - {name for environment in environments for name in environment["loaded"]}
    return Tampering(None, packages={f"extra-{rng.randrange(9)}": "1.0", rng.choice(sorted(unused)): None})


def flip_a_byte_and_ask_by_an_absolute_path(rng: random.Random, results: Path) -> Tampering:
    found = flip_a_byte("tables/*", "figures/*", "scores/*/*.json", "models/*/run.json")(rng, results)
    path = results.parent.resolve() / found.words[0]
    spelling = rng.choice([str(path), f"{path.parent}/../{path.parent.name}/{path.name}", f"./{found.words[0]}"])
    return Tampering(found.manifest, found.words, spelling=spelling)


def ask_for_what_stands_by_an_absolute_path(rng: random.Random, results: Path) -> Tampering:
    return Tampering(None, spelling=str(rng.choice(files_under(results, "tables/*", "scores/*/*.json", "models/*/*")).resolve()))


def rename_an_experiment(rng: random.Random, results: Path) -> Tampering:
    """The configuration plans its jobs under another name; those that were done read from jobs that are no more."""
    plan = read_plan(results)
    trained = rng.choice(sorted(key for key in plan if "/manifests/train/" in key))
    renamed = {key: job for key, job in plan.items() if key != trained}
    return Tampering(str(plan[trained].manifest), ("retired: the configuration has no such job now",), plan=renamed)


def another_nodes_memory_of_hashes(rng: random.Random, results: Path) -> Tampering:
    """Torn, of another version, or of another file of the same path: neither an audit nor a new record may believe it."""
    entry = rng.choice(json.loads(rng.choice(files_under(results, "manifests/prepare/*.json")).read_text())["outputs"])
    memory = results / "manifests/.hashes"
    described = describe(Path(entry["path"]), memory)
    for file in memory.iterdir():
        other = {name: [1, 1, 1, 1, "0" * 64] for name in described["files"]}
        file.write_text(rng.choice(["", '{"a"', "[]", '{".": 1}', json.dumps(other)]))
    assert describe(Path(entry["path"]), memory) == described == describe(Path(entry["path"]))
    return Tampering(None)


def delete_a_manifest(rng: random.Random, results: Path) -> Tampering:
    path = rng.choice(sorted((results / "manifests").glob("[!.]*/*.json")))
    path.unlink()
    return Tampering(str(path.relative_to(results.parent)), ("no manifest tells how it was made",))


TAMPERINGS = {
    "data": flip_a_byte("data/*/*.json", "data/*.json", "world/*/*.json", "world/*/images/*"),
    "features": flip_a_byte("features/*/*.safetensors", "features/*/index.json"),
    "adapters": flip_a_byte("models/*/*.safetensors", "models/*/last/*.safetensors"),
    "probes": flip_a_byte("probes/*/*.safetensors"),
    "backbones": flip_a_byte("backbones/*/*.safetensors", "backbones/*/*.json"),
    "predictions": edit_a_prediction,
    "scores": flip_a_byte("scores/*/*.json"),
    "tables": flip_a_byte("tables/*", "figures/*"),
    "swapped splits": swap_two("data/*/questions.json"),
    "swapped adapters": swap_two("models/vqa_*/adapter_model.safetensors"),
    "deleted": delete_a_file,
    "added": add_a_file,
    "manifests": edit_a_manifest,
    "lock": edit_the_lock,
    "code during a job": edit_code_during_a_job,
    "input during a job": swap_an_input_during_a_job,
    "images": swap_images_between_two_jobs,
    "package": another_version_of_a_package,
    "extra package": an_extra_package,
    "absolute path": flip_a_byte_and_ask_by_an_absolute_path,
    "absolute path, nothing changed": ask_for_what_stands_by_an_absolute_path,
    "renamed": rename_an_experiment,
    "another node's cache": another_nodes_memory_of_hashes,
    "deleted manifest": delete_a_manifest,
}
