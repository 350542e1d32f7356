"""What starting a process takes, and which modules it loaded."""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from routevl.errors import RoutevlError

LOG_VARIABLE = "ROUTEVL_STARTUP_LOG"
MODULES_VARIABLE = "ROUTEVL_MODULES_LOG"
PACKAGE = Path(__file__).parent


@contextmanager
def importing(stage: str) -> Iterator[None]:
    """Import a stage's libraries in the body. Where ROUTEVL_STARTUP_LOG names a file, note there how long this process has
    lived before its own work began. Garbage collection waits meanwhile: imports only allocate, and are a tenth faster. It then
    leaves alone what the libraries have made, until the interpreter takes it down."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)
    log_startup(stage)


def log_startup(stage: str) -> None:
    """Note the age of this process, where ROUTEVL_STARTUP_LOG names a file."""
    if path := os.environ.get(LOG_VARIABLE):
        line = {"stage": stage, "seconds": round(_age(), 2)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:  # one short write: whole also when processes write at once
            file.write(json.dumps(line) + "\n")


def _age() -> float:
    """Seconds since this process was started."""
    if hasattr(time, "CLOCK_BOOTTIME"):  # Linux, where psutil knows the time of booting, and so all others, to a second only
        started = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    import psutil

    return time.time() - psutil.Process().create_time()


def log_modules() -> None:
    """Leave the names of the package's modules that were loaded, and of all other imported packages but Python's own, where
    `routevl record` started this process."""
    if path := os.environ.get(MODULES_VARIABLE):
        files = {name: Path(module.__file__) for name, module in list(sys.modules.items()) if getattr(module, "__file__", None)}
        own = sorted(file.relative_to(PACKAGE).as_posix() for file in set(files.values()) if PACKAGE in file.parents)
        others = sorted({name.partition(".")[0] for name in files} - sys.stdlib_module_names)
        Path(path).write_text(json.dumps({"own": own, "others": others}), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl startup-report`."""
    parser.add_argument("--log", required=True, metavar="FILE", help="what ROUTEVL_STARTUP_LOG named")
    parser.add_argument("--wall-seconds", required=True, type=float, help="how long the whole workflow took")
    parser.add_argument("--cores", required=True, type=int, help="how many of its jobs ran side by side")


def run(arguments: argparse.Namespace) -> None:
    """Print the share of the wall time that start-up and imports took, per stage and in all."""
    stages: dict[str, list[float]] = {}
    try:
        for line in map(json.loads, Path(arguments.log).read_text(encoding="utf-8").splitlines()):
            stages.setdefault(line["stage"], []).append(line["seconds"])
    except (ValueError, KeyError, TypeError):
        raise RoutevlError(f"{arguments.log}: not a log of start-ups") from None
    if not stages:
        raise RoutevlError(f"{arguments.log}: no start-up was logged")
    if arguments.wall_seconds <= 0 or arguments.cores <= 0:
        raise RoutevlError("--wall-seconds and --cores must be positive")
    for stage, seconds in sorted(stages.items(), key=lambda item: -sum(item[1])):
        print(f"{stage:20s} {len(seconds):4d} processes, {sum(seconds):7.1f} s")
    total, processes = sum(map(sum, stages.values())), sum(map(len, stages.values()))
    share = 100 * total / arguments.cores / arguments.wall_seconds
    print(
        f"start-up and imports: {total:.1f} s in {processes} processes over {arguments.cores} cores, "
        f"{share:.1f}% of {arguments.wall_seconds:.0f} s wall time"
    )
