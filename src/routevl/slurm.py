"""What SLURM has refused or killed, and the key that mends it, out of Snakemake's log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# kind of rule -> section of the configuration that has its memory and time
SECTIONS = {"prepare": "data", "extract": "features", **dict.fromkeys(("probe", "tune", "train"), "training"), "score": "scoring"}
PARTITIONS = "the profile's partitions.yaml"
ERROR = re.compile(r"^Error in rule (\S+):\n((?: .*\n|sbatch: .*\n|For further .*\n)*)", re.MULTILINE)
SLURM_LOG = re.compile(r"[^\s,]*/slurm_logs/\S+\.log")
KILLED_FOR_MEMORY = re.compile(r"oom.kill|out.of.memory|exceeded job memory limit", re.IGNORECASE)


def kind_of(rule: str) -> str:
    """What kind a rule is of: each scoring job is a rule of its own, and what runs share has one for each set of seeds."""
    return next((kind for kind in ("score", "probe", "train", "inside") if rule.startswith(f"{kind}_")), rule)


def faults(log: str) -> list[str]:
    """One line for each rule whose jobs lacked memory or time, or were refused for their partition; the log of jobs that failed
    otherwise tells of itself.

    Args:
        log: what Snakemake has logged.
    """
    return list(dict.fromkeys(line for rule, details in ERROR.findall(log) for line in _faults_of(rule, details)))


def _faults_of(rule: str, details: str) -> Iterator[str]:
    section = SECTIONS.get(kind_of(rule))
    memory, runtime = (f"{section}.{key}" if section else f"--set-resources {rule}:{key}" for key in ("mem_mb", "runtime"))
    if refused := re.search(r"invalid partition specified: (\S+)", details):
        yield f"rule {rule}: SLURM has no partition {refused[1]!r}: name yours, as sinfo does, in {PARTITIONS}"
    elif "Requested time limit is invalid" in details:
        partition, minutes = re.search(r" -p (\S+) -t (\d+)", details).groups()
        yield (
            f"rule {rule}: the partition {partition} allows no job of {minutes} minutes: lower {runtime}, or give the partition "
            f"its max_runtime in {PARTITIONS}, so that a longer one is taken"
        )
    elif "'TIMEOUT'" in details:
        yield f"rule {rule}: stopped at its time limit: raise {runtime}"
    elif KILLED_FOR_MEMORY.search(details + _slurm_log(details)):
        yield f"rule {rule}: killed for more memory than it asked for: raise {memory}"


def _slurm_log(details: str) -> str:
    """What SLURM itself has said of the job; some clusters call one that they killed merely failed."""
    path = SLURM_LOG.search(details)
    return Path(path[0]).read_text(errors="replace") if path and Path(path[0]).is_file() else ""
