"""Run the workflow as `make demo` does: Snakemake, started again safely after any kind of death, and timed.

usage: python workflow/run.py RESULTS [Snakemake options]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from routevl.files import lock
from routevl.startup import LOG_VARIABLE
from routevl.surroundings import variables_for_snakemake

SNAKEMAKE = [str(Path(sys.executable).with_name("snakemake")), "--rerun-incomplete", "--show-failed-logs"]


def main() -> int:
    """Returns Snakemake's exit status."""
    results, *options = sys.argv[1:]
    started = float(os.environ.get("ROUTEVL_STARTED", time.time()))  # `make demo` counts the set-up of the environment too
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--cores", "-c", required=True)
    cores = parser.parse_known_args(options)[0].cores
    startup_log = Path(results) / "logs" / "startup.jsonl"
    startup_log.unlink(missing_ok=True)
    # Jobs inherit the lock: those that outlive a killed Snakemake end before a new one starts beside them.
    with lock(".snakemake/run.lock") as held:
        # the terminal tells Snakemake too, which ends its jobs in order; `subprocess.run` would kill it
        signal.signal(signal.SIGINT, lambda number, frame: None)
        environment = variables_for_snakemake() | {LOG_VARIABLE: str(startup_log.absolute())}
        if any(Path(".snakemake/locks").glob("*")):  # left by a Snakemake that was killed; none other can be running
            subprocess.run([*SNAKEMAKE, *options, "--unlock", "--quiet", "all"], env=environment, check=True)
        status = subprocess.run([*SNAKEMAKE, *options], env=environment, pass_fds=(held.fileno(),)).returncode
        wall = time.time() - started
    if status == 0 and startup_log.exists() and len(startup_log.read_text().splitlines()) > 1:
        used = ["--wall-seconds", f"{wall:.0f}", "--cores", str(os.cpu_count() if cores == "all" else cores)]
        report = ["startup-report", "--log", str(startup_log), *used]
        subprocess.run([str(Path(sys.executable).with_name("routevl")), *report], check=True)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while it waited for the lock
        sys.exit(130)
