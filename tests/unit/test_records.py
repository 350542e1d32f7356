"""JSON files: what is legal JSON but nothing that a later stage can carry is read by a stated rule, or refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from routevl.data.coco import read_captions
from routevl.errors import RoutevlError
from routevl.files import read_json


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'"a bus \ud83d"', "a bus \ufffd"),
        (r'"\uDE00 a bus"', "\ufffd a bus"),
        (r'"\ud83d\ud83d\ude00"', "\ufffd😀"),
        (r'"\ude00\ud83d"', "\ufffd\ufffd"),
        (r'"\\ud83d"', r"\ud83d"),
        (r'"\\\ud83d\n"', "\\\ufffd\n"),
        (r'{"\ud83d": ["\ud83d\ude00"]}', {"\ufffd": ["😀"]}),
        ('"\ud83d"', "\ufffd"),
        ('"\ud83d\ude00 \ude00"', "😀 \ufffd"),
        ('{"a": 1, "a": 2}', {"a": 2}),
        (r'"a\u0000b"', "a\0b"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_h10_half_characters_become_the_replacement_character(tmp_path: Path, text: str, expected: Any, encoding: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    assert read_json(path) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("3.0", 3),
        ("3e0", 3),
        ("-3.0", -3),
        ("9007199254740993.0", 9007199254740993),
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
        ("3.5", "must be integer"),
        ("1e400", "must be integer"),
        ("NaN", "must be integer"),
        ("-Infinity", "must be integer"),
        ("true", "must be integer"),
        ('"3"', "must be integer"),
        (str(2**63), f"must be smaller than or equal to {2**63 - 1}"),
        (str(-(2**63) - 1), f"must be bigger than or equal to {-(2**63)}"),
        ("1e300", "must be smaller than or equal to"),
        ("1" * 4000, "must be smaller than or equal to"),
    ],
)
def test_h10_ids_are_integers_that_a_tensor_holds(tmp_path: Path, value: str, expected: int | str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(f'{{"annotations": [{{"id": 1, "image_id": {value}, "caption": "a"}}]}}')
    if isinstance(expected, int):
        found = read_captions(path)["annotations"][0]["image_id"]
        assert found == expected and type(found) is int
    else:
        with pytest.raises(RoutevlError, match=rf"captions\.json: .*annotations\[0\]\.image_id {expected}"):
            read_captions(path)
