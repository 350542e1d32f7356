"""What Snakemake's log says as it grows: how far the workflow is, how long it will still take, and what failed."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import fmean

_TAIL = 30  # lines that are shown of the log of a failed job


@dataclass
class _Job:
    kind: str
    label: str
    started: float  # seconds


class SnakemakeLog:
    """The state of one workflow, from the lines of its log, which `read` is given one by one.

    Attributes:
        total, done: jobs in all, 0 before they are known, and those that are finished.
        lines: all that was read, without line ends.
        failures: for each failed job which it was, and the end of its log.
    """

    def __init__(self) -> None:
        self.total = self.done = 0
        self.lines: list[str] = []
        self.failures: list[list[str]] = []
        self._planned: Counter[str] = Counter()  # jobs by kind
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)  # that finished ones took
        self._running: dict[str, _Job] = {}  # by the job's id
        self._rule = self._job = ""  # whose description is being read
        self._reading = ""  # "stats", "job", "failure" or "log" of a failed job
        self._begun = math.inf

    @property
    def nothing_to_do(self) -> bool:
        """Whether Snakemake found all up to date."""
        return any(line.startswith("Nothing to be done") for line in self.lines)

    def read(self, line: str, now: float) -> None:
        """Take in a line of the log, `now` in seconds of any clock."""
        self.lines.append(line)
        if self._reading == "log":
            self.failures[-1].append(line)
            if set(line) == {"="} and len(self.failures[-1]) > 3:  # the end of it; the first such line stands below its name
                head, log, end = self.failures[-1][:3], self.failures[-1][3:-1], line
                self.failures[-1][:] = [*head, *log[-_TAIL:], end]
                self._reading = ""
        elif line == "Job stats:":
            self._reading = "stats"
        elif self._reading == "stats" and (row := re.fullmatch(r"(\S+) +(\d+)", line)):
            if row[1] == "total":
                self.total, self._reading = int(row[2]), ""
            else:
                self._planned[_kind(row[1])] += int(row[2])
        elif row := re.fullmatch(r"(?:local)?rule (.+):", line):
            self._rule, self._reading = row[1], "job"
        elif row := re.fullmatch(r"Error in rule (.+):", line):
            self.failures.append([line])
            self._reading = "failure"
        elif self._reading == "failure" and line.startswith("Logfile "):
            self.failures[-1].append(line)
            self._reading = "log" if line.endswith(":") else ""
        elif row := re.fullmatch(r"    jobid: (\d+)", line):
            self._job = row[1]
            if self._reading == "job":
                self._begun = min(self._begun, now)
                self._running[self._job] = _Job(_kind(self._rule), self._rule, now)
            else:
                self._running.pop(self._job, None)
        elif self._reading == "job" and (row := re.fullmatch(r"    wildcards: (.+)", line)):
            self._running[self._job].label += "".join(f" {pair.partition('=')[2]}" for pair in row[1].split(", "))
        elif row := re.match(r"Finished jobid: (\d+) ", line):
            self.done += 1
            if job := self._running.pop(row[1], None):
                self._seconds[job.kind].append(now - job.started)

    def seconds_left(self, now: float) -> float | None:
        """How long it will still take: each job as long as finished ones of its kind did, as many side by side as so far.

        None until jobs have finished of the kinds that half of all jobs are of. The others are taken to be as long as these.
        """
        to_come = self._planned - Counter({kind: len(took) for kind, took in self._seconds.items()})
        known = {kind: fmean(took) for kind, took in self._seconds.items()}
        if not any(known.values()) or 2 * sum(self._planned[kind] for kind in known) < self.total:
            return None
        mean = fmean(known.values())
        done_of_running = [(now - job.started, known.get(job.kind, mean)) for job in self._running.values()]
        work = sum(count * known.get(kind, mean) for kind, count in to_come.items()) - sum(map(min, done_of_running))
        busy = sum(map(sum, self._seconds.values())) + sum(elapsed for elapsed, _ in done_of_running)
        return work * (now - self._begun) / busy

    def progress(self, now: float) -> str:
        """How far it is, in a line; "" before it is known."""
        if not self._running:
            return ""
        *_, newest = self._running.values()
        left = self.seconds_left(now)
        return f"[{self.done}/{self.total}] {newest.label}" + ("" if left is None else f" ... {_in_words(left)} left")


def _kind(rule: str) -> str:
    """What rules of alike jobs have in common: scoring has one for each batch of runs."""
    return rule.partition("_")[0]


def _in_words(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes} min" if minutes < 60 else f"about {minutes // 60} h {minutes % 60} min"
