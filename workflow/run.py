"""Run the workflow as `make demo` does: Snakemake, started again safely after any kind of death; then the report and a summary.

While it runs there is one line of progress; Snakemake's own words are in RESULTS/logs/snakemake.log.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from snakemake_log import SnakemakeLog

from routevl.files import atomic_file, lock
from routevl.startup import LOG_VARIABLE
from routevl.surroundings import variables_for_snakemake

PROGRAMS = Path(sys.executable).parent
SNAKEMAKE = [str(PROGRAMS / "snakemake"), "--rerun-incomplete", "--show-failed-logs"]
SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LINES = 0.2, 30.0


def main() -> int:
    """Returns Snakemake's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("results", type=Path, metavar="RESULTS", help="the results folder of the configuration")
    parser.add_argument("--cores", "-c", required=True, help="jobs side by side")
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="make these alone, and no report")
    parser.add_argument("--configfile", nargs="+", metavar="YAML", help="as Snakemake's")
    parser.add_argument("--config", nargs="+", metavar="KEY=VALUE", help="as Snakemake's")
    arguments = parser.parse_args()
    started = float(os.environ.get("ROUTEVL_STARTED", time.time()))  # `make demo` counts the set-up of the environment too
    # targets stand before --configfile, which would take them for more configuration files
    options = ["--cores", arguments.cores, *arguments.only]
    for name in ("configfile", "config"):
        options += [f"--{name}", *getattr(arguments, name)] if getattr(arguments, name) else []
    logs = arguments.results / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    startup_log = logs / "startup.jsonl"
    startup_log.unlink(missing_ok=True)
    # Jobs inherit the lock: those that outlive a killed Snakemake end before a new one starts beside them.
    with lock(".snakemake/run.lock") as held:
        # the terminal tells Snakemake too, which ends its jobs in order; this process waits for it
        signal.signal(signal.SIGINT, lambda number, frame: None)
        environment = variables_for_snakemake() | {LOG_VARIABLE: str(startup_log.absolute())}
        if any(Path(".snakemake/locks").glob("*")):  # left by a Snakemake that was killed; none other can be running
            subprocess.run([*SNAKEMAKE, *options, "--unlock", "--quiet", "all"], env=environment, check=True)
        status = follow([*SNAKEMAKE, *options], logs / "snakemake.log", environment, held)
        wall = time.time() - started
        if status == 0 and not arguments.only:
            status = make_report(arguments.results, options, environment, held)
    if status == 0 and startup_log.exists() and len(startup_log.read_text().splitlines()) > 1:
        cores = str(os.cpu_count() if arguments.cores == "all" else arguments.cores)
        accounting = ["startup-report", "--log", str(startup_log), "--wall-seconds", f"{wall:.0f}", "--cores", cores]
        with atomic_file(logs / "startup.txt") as temporary, open(temporary, "w") as file:
            subprocess.run([str(PROGRAMS / "routevl"), *accounting], stdout=file, check=True)
    if status == 0 and not arguments.only:
        status = subprocess.run([str(PROGRAMS / "routevl"), "headline", "--results", str(arguments.results)]).returncode
    return status


def follow(command: list[str], log: Path, environment: dict[str, str], held: IO) -> int:
    """Run Snakemake, which writes to the end of `log`, and show how far it is and, in the end, what failed. Returns its status.

    It writes to a file, not into a pipe, so that it goes on where this process is killed.
    """
    said, line = SnakemakeLog(), ProgressLine()
    with open(log, "ab") as written, open(log, "rb") as file:
        file.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, env=environment, pass_fds=(held.fileno(),), stdout=written, stderr=subprocess.STDOUT
        )  # fmt: skip
        rest, ended = b"", False
        while not ended:
            ended = process.poll() is not None  # before the last look at what it has written
            *lines, rest = (rest + file.read()).split(b"\n")
            now = time.monotonic()
            for text in lines:
                said.read(text.decode(errors="replace"), now)
            line.show(said.progress(now))
            if not ended:
                time.sleep(SECONDS_BETWEEN_LOOKS)
    line.clear()
    if said.nothing_to_do:
        print("Nothing to be done: all is up to date.", flush=True)
    if process.returncode != 0:
        print(_what_failed(said), f"All that Snakemake says: {log}", sep="\n", file=sys.stderr, flush=True)
    return process.returncode


def _what_failed(said: SnakemakeLog) -> str:
    """The failed jobs with the ends of their logs; where there is none, what Snakemake said last, or all before the first job."""
    if said.failures:
        return "\n".join(text for failure in said.failures for text in failure)
    return "\n".join(said.lines[-10:] if said.done else said.lines)


class ProgressLine:
    """A line on stderr: on a terminal it is rewritten, elsewhere it is written anew from time to time."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown, self._written = "", -math.inf

    def show(self, text: str) -> None:
        """Show how far it is; "" leaves what is there."""
        now = time.monotonic()
        if not text or text == self._shown or not (self._terminal or now - self._written >= SECONDS_BETWEEN_LINES):
            return
        if self._terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
        print(f"\r{text}\033[K" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr, flush=True)
        self._shown, self._written = text, now

    def clear(self) -> None:
        """Take the line away from a terminal."""
        if self._terminal and self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def make_report(results: Path, options: list[str], environment: dict[str, str], held: IO) -> int:
    """Put all tables and figures into RESULTS/report.html, unless it is newer than they are. Returns Snakemake's exit status."""
    page, last = results / "report.html", results / "provenance.html"  # which is made when all tables and figures are
    if page.exists() and page.stat().st_mtime >= last.stat().st_mtime:
        return 0
    temporary = page.with_suffix(".tmp.html")
    status = follow([*SNAKEMAKE, "--report", str(temporary), *options], results / "logs/report.log", environment, held)
    if status == 0:
        temporary.replace(page)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while it waited for the lock
        sys.exit(130)
