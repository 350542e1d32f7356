"""Making a job's outputs again, from its recorded inputs and command, in a scratch folder; and comparing them."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from routevl.errors import RoutevlError
from routevl.provenance.manifest import Manifest, describe
from routevl.provenance.records import is_inside, place

RELATIVE_TOLERANCE = 1e-3  # other hardware sums in another order
ABSOLUTE_TOLERANCE = 1e-5
VERDICTS = {
    "bit-equal": "bit-equal",
    "close": f"equal within {RELATIVE_TOLERANCE:g} relative or {ABSOLUTE_TOLERANCE:g} absolute",
    "different": "different",
}
MEASUREMENTS = ("timing.json",)  # how long it took is different every time


def rerun(manifest: Manifest, results: Path) -> dict[str, Any]:
    """Run a job's recorded command again, where its outputs fall into a scratch folder, and compare them with the first ones.

    Returns:
        outputs: their paths; verdict: "bit-equal", "equal within ..." or "different"; differences: the first of each output.
    """
    outputs = [Path(entry["path"]) for entry in manifest["outputs"]]
    found = {"outputs": list(map(str, outputs))}
    with tempfile.TemporaryDirectory(prefix="routevl-rerun-") as scratch:
        overlay(Path(scratch), _written(manifest, results))
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # where `routevl` lies
        done = subprocess.run(manifest["command"], cwd=scratch, env=os.environ | {"PATH": search}, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return found | {"verdict": "different: it failed", "differences": [last]}
        compared = [compare(output, Path(scratch) / output) for output in outputs]
    worst = max((equal for equal, _ in compared), key=list(VERDICTS).index)
    return found | {"verdict": VERDICTS[worst], "differences": [difference for _, difference in compared if difference]}


def _written(manifest: Manifest, results: Path) -> list[Path]:
    """The paths that a job writes: its outputs, and what else of the results its command names but does not read."""
    inputs, outputs = ([Path(entry["path"]) for entry in manifest[part]] for part in ("inputs", "outputs"))
    named = [Path(word) for word in manifest["command"] if is_inside(word, results)]
    read = [path for path in named for entry in inputs if _within(entry, path) or _within(path, entry)]
    return [*outputs, *(path for path in named if path not in read)]


def _within(path: Path, folder: Path) -> bool:
    return place(path) == place(folder) or is_inside(path, folder)


def overlay(scratch: Path, written: list[Path]) -> None:
    """Make `scratch` look like the working folder, by links, but for the paths that will be written: they are not there."""
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
    """(a key of VERDICTS, the first difference of that kind in words or "") of two files or folders."""
    found = [("bit-equal", ""), *_differences(first, again)]
    worst = max((equal for equal, _ in found), key=list(VERDICTS).index)
    return worst, next((words for equal, words in found if equal == worst and words), "")


def _differences(first: Path, again: Path) -> Iterator[tuple[str, str]]:
    if not again.exists():
        yield "different", f"{first}: was not made again"
        return
    then, now = (describe(path).get("files", {"": None}) for path in (first, again))
    for name in sorted(then.keys() | now.keys()):
        if Path(name).name in MEASUREMENTS:
            continue
        if name not in then or name not in now:
            yield "different", f"{first / name}: only in one of both"
        elif not filecmp.cmp(first / name, again / name, shallow=False):
            yield from _differences_of_files(first / name, again / name)


def _differences_of_files(first: Path, again: Path) -> Iterator[tuple[str, str]]:
    readers = {".json": _json_values, ".jsonl": _json_values, ".csv": _csv_values, ".safetensors": load_file}
    if first.suffix not in readers:
        yield "different", f"{first}: other bytes"
        return
    then, now = (readers[first.suffix](path) for path in (first, again))
    yield "close", ""  # as the bytes are not equal
    for key in sorted(then.keys() ^ now.keys()):
        yield "different", f"{first}: {key} is only in one of both"
    for key in [key for key in then if key in now]:
        for equal, words in _differences_of_values(np.asarray(then[key]), np.asarray(now[key])):
            yield equal, f"{first}: {key}: {words}"


def _differences_of_values(then: np.ndarray, now: np.ndarray) -> Iterator[tuple[str, str]]:
    if then.shape != now.shape:
        yield "different", f"shape {then.shape} then, {now.shape} now"
    elif not np.array_equal(then, now):
        place = np.unravel_index(int(np.argmax(then != now)), then.shape)
        words = f"{then[place]} then, {now[place]} now" + (f" at {list(map(int, place))}" if place else "")
        numbers = then.dtype.kind in "fiu" and now.dtype.kind in "fiu"
        close = numbers and np.allclose(then, now, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)
        yield "close" if close else "different", words


def _json_values(path: Path) -> dict[str, Any]:
    """The values of a JSON (lines) file by their places in it."""
    text = path.read_text(encoding="utf-8")
    lines = {f"line {number}": line for number, line in enumerate(text.splitlines(), start=1)}
    return _flat({name: json.loads(line) for name, line in lines.items()} if path.suffix == ".jsonl" else json.loads(text), "")


def _csv_values(path: Path) -> dict[str, Any]:
    rows = pd.read_csv(path).astype(object).fillna("").to_dict("records")
    return _flat({f"row {number}": row for number, row in enumerate(rows, start=1)}, "")


def _flat(value: Any, place: str) -> dict[str, Any]:
    """All values in nested objects and lists by their places, numbers as floats."""
    if isinstance(value, dict):
        children = {f"{place}/{key}": child for key, child in value.items()}
    elif isinstance(value, list):
        children = {f"{place}[{index}]": child for index, child in enumerate(value)}
    else:
        return {place: float(value) if isinstance(value, int) and not isinstance(value, bool) else value}
    return {where: leaf for at, child in children.items() for where, leaf in _flat(child, at).items()}
