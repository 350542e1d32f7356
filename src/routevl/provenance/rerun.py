"""Making a job's outputs again, from its recorded inputs and command, in a scratch folder; and comparing them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from routevl.errors import RoutevlError
from routevl.provenance.manifest import Manifest, describe

RELATIVE_TOLERANCE = 1e-3  # other hardware sums in another order
ABSOLUTE_TOLERANCE = 1e-5
MEASUREMENTS = ("timing.json",)  # how long it took is different every time


def rerun(manifest: Manifest, results: Path) -> dict[str, Any]:
    """Run a job's recorded command again, where its outputs fall into a scratch folder, and compare them with the first ones.

    Returns:
        outputs: their paths; verdict: "bit-equal", "equal within ..." or "different"; differences: the first of each output.
    """
    outputs = [Path(entry["path"]) for entry in manifest["outputs"]]
    with tempfile.TemporaryDirectory(prefix="routevl-rerun-") as scratch:
        overlay(Path(scratch), _written(manifest, results))
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # where `routevl` lies
        done = subprocess.run(manifest["command"], cwd=scratch, env=os.environ | {"PATH": search}, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return {"outputs": list(map(str, outputs)), "verdict": "different: it failed", "differences": [last]}
        compared = [compare(output, Path(scratch) / output) for output in outputs]
    differences = [difference for _, difference in compared if difference]
    within = f"equal within {RELATIVE_TOLERANCE:g} relative or {ABSOLUTE_TOLERANCE:g} absolute"
    verdicts = {"different": "different", "close": within, "bit-equal": "bit-equal"}
    verdict = next(words for equal, words in verdicts.items() if any(equal == found for found, _ in compared))
    return {"outputs": list(map(str, outputs)), "verdict": verdict, "differences": differences}


def _written(manifest: Manifest, results: Path) -> list[Path]:
    """The paths that a job writes: its outputs, and what else of the results its command names but does not read."""
    inputs = [Path(entry["path"]) for entry in manifest["inputs"]]
    words = [Path(word) for word in manifest["command"] if results in Path(word).parents]
    read = [word for word in words for entry in inputs if word == entry or word in entry.parents or entry in word.parents]
    return list(
        dict.fromkeys([Path(entry["path"]) for entry in manifest["outputs"]] + [word for word in words if word not in read])
    )


def overlay(scratch: Path, written: list[Path]) -> None:
    """Make `scratch` look like the working folder, by links, but for the paths that will be written: they are not there.

    Raises:
        RoutevlError: one of them lies outside of the working folder.
    """
    for path in written:
        if path.is_absolute() or ".." in path.parts:
            raise RoutevlError(f"{path}: was written outside of the project, so it cannot be made again in a scratch folder")
    folders = {parent for path in written for parent in path.parents}
    for folder in sorted(folders, key=lambda folder: len(folder.parts)):
        (scratch / folder).mkdir(exist_ok=True)
        for child in folder.iterdir() if folder.exists() else ():
            if child not in folders and child not in written:
                (scratch / child).symlink_to(child.absolute())


def compare(first: Path, again: Path) -> tuple[str, str]:
    """("bit-equal" | "close" | "different", the first difference in words or "") of two files or folders."""
    if not again.exists():
        return "different", f"{first}: was not made again"
    then, now = describe(first), describe(again)
    if "files" not in then:
        return ("bit-equal", "") if then["sha256"] == now["sha256"] else _compare_files(first, again)
    worst, difference = "bit-equal", ""
    for name in sorted(then["files"].keys() | now["files"].keys()):
        if Path(name).name in MEASUREMENTS:
            continue
        if name not in then["files"] or name not in now["files"]:
            return "different", f"{first / name}: only in one of both"
        if then["files"][name] != now["files"][name]:
            equal, found = _compare_files(first / name, again / name)
            if equal == "different":
                return equal, found
            worst, difference = equal, difference or found
    return worst, difference


def _compare_files(first: Path, again: Path) -> tuple[str, str]:
    readers = {".json": _json_values, ".jsonl": _json_values, ".csv": _csv_values, ".safetensors": _tensors}
    reader = readers.get(first.suffix)
    if reader is None:
        return "different", f"{first}: other bytes"
    then, now = reader(first), reader(again)
    if then.keys() != now.keys():
        return "different", f"{first}: {sorted(then.keys() ^ now.keys())[0]} is only in one of both"
    difference = ""
    for key, value in then.items():
        found = _difference(value, now[key])
        if found is not None:
            equal, words = found
            difference = difference or f"{first}: {key}: {words}"
            if equal == "different":
                return equal, f"{first}: {key}: {words}"
    return "close", difference


def _difference(then: Any, now: Any) -> tuple[str, str] | None:
    """("close" | "different", the first difference in words) of two values or arrays; None where they are equal."""
    import numpy as np

    then, now = np.asarray(then), np.asarray(now)
    if then.shape != now.shape:
        return "different", f"shape {then.shape} then, {now.shape} now"
    if np.array_equal(then, now):
        return None
    place = np.unravel_index(int(np.argmax(then != now)), then.shape)
    words = f"{then[place]} then, {now[place]} now" + (f" at {list(map(int, place))}" if place else "")
    numbers = then.dtype.kind in "fiu" and now.dtype.kind in "fiu"
    close = numbers and np.allclose(then, now, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)
    return ("close" if close else "different"), words


def _json_values(path: Path) -> dict[str, Any]:
    """The values of a JSON (lines) file by their places in it, numbers as floats."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
    values: dict[str, Any] = {}
    for number, line in enumerate(lines, start=1):
        _flatten(json.loads(line), f"line {number}" if path.suffix == ".jsonl" else "", values)
    return values


def _flatten(value: Any, place: str, values: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            _flatten(child, f"{place}/{key}", values)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _flatten(child, f"{place}[{index}]", values)
    else:
        values[place] = float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _csv_values(path: Path) -> dict[str, Any]:
    import csv

    values: dict[str, Any] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            for column, text in row.items():
                try:
                    values[f"row {number}, {column}"] = float(text)
                except ValueError:
                    values[f"row {number}, {column}"] = text
    return values


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(path)
