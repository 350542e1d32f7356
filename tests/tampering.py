"""Ways to tamper with a finished project's results, each with what an audit must say of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tampering:
    """What was done: the manifest whose job must not stand, and words that one of its problems must have."""

    manifest: str
    words: tuple[str, ...]


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
}
