"""How far a long loop is: a bar on a terminal, a few plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


def progress(iterable: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """Yield the items of `iterable`, reporting on stderr how many of `total` are done.

    On a terminal this is a tqdm bar. Elsewhere it is one plain line at each tenth of the way, and at
    least one in every ten seconds in which an item is finished, so that a log file stays short and can be
    followed.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, total=total, desc=description, file=sys.stderr)
    else:
        yield from _with_plain_lines(iterable, total, description)


def _with_plain_lines(iterable: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    last_time, last_tenth = time.monotonic(), 0
    for done, item in enumerate(iterable, start=1):
        yield item
        now, tenth = time.monotonic(), 10 * done // max(total, 1)
        if tenth > last_tenth or now - last_time >= SECONDS_BETWEEN_LINES:
            print(f"{description}: {done}/{total}", file=sys.stderr, flush=True)
            last_time, last_tenth = now, tenth
