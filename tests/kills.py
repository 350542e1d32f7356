"""The kill matrix: every stage of a tiny DAG is killed at random moments, and must end as if nothing had happened.

    make test-kills N=1000 SEED=1         so many kills
    make test-kills N=1000 FOLDER=/tmp/k  keep the undisturbed results there, and use them the next time
    make test-kills ONLY=37 SEED=1        series 37 of that seed alone

The real workflow makes all results once, undisturbed. Its manifests say what each job ran. A *series* is one of these jobs,
alone, in a copy of all results from which its outputs are taken away: it is started and killed again and again, at moments drawn
uniformly over its undisturbed length, and then let end. Its processes are forked from one that has imported everything. After
each kill an output is whole or not there, and nothing says "Traceback". In the end

* every output is sha256-equal to the undisturbed one (timing.json, which holds measurements, excepted);
* nothing else is there, and no other file was touched (inode and time of change);
* nothing was done twice: with stop signals a run makes each of its optimiser steps once, with SIGKILL and a full disk it
  repeats at most `checkpoint_every` of them for each kill; a model that is there is left alone;
* a resumed training has made its first step within 5 s of its start: of the call of the command line, all modules imported;
  counted are seconds of the processor, since other processes may have it, and shown those of the clock too.

Beside the signals: a full disk (a tmpfs with less space than the job needs, or where none can be mounted a limit on the size of
files), a torn checkpoint, the whole workflow killed with its Snakemake, and a job that SLURM preempts, where a SLURM is running.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # before torch is imported

from kill_jobs import Job, import_everything, jobs_of, make_reference  # noqa: E402
from kill_series import Outcome, run_series  # noqa: E402
from kill_workflows import kill_slurm_jobs, kill_snakemake, slurm_is_running  # noqa: E402

KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "full disk", "torn checkpoint")  # of death of a single job
PER_WORKFLOW_KILL = 100  # kills of single jobs


def cells(jobs: list[Job]) -> list[tuple[Job, str]]:
    """(job, kind of death), the stages and the kinds in turn; only a training has a checkpoint to tear."""
    found = [(job, KINDS[(place + turn) % len(KINDS)]) for turn in range(len(KINDS)) for place, job in enumerate(jobs)]
    return [(job, kind) for job, kind in found if job.training or kind != "torn checkpoint"]


def kill_single_jobs(count: int, seed: int, only: int | None, reference: Path, folder: Path, cores: int) -> list[Outcome]:
    """So many kills of single jobs, side by side on the cores."""
    jobs = jobs_of(reference)
    table = cells(jobs)
    outcomes: list[Outcome] = []
    numbers = iter(range(10**9) if only is None else [only])
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork")) as pool:
        running: set[Any] = set()
        while True:
            while len(running) < cores and sum(sum(outcome.kills.values()) for outcome in outcomes) < count:
                if (number := next(numbers, None)) is None:
                    break
                job, kind = table[number % len(table)]
                running.add(pool.submit(run_series, number, job, kind, seed, reference, folder / f"series-{number}"))
            if not running:
                return outcomes
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                outcomes.append(outcome := future.result())
                for words in outcome.wrong:
                    print(f"WRONG: seed {seed} number {outcome.number} ({outcome.stage}): {words}", flush=True)


def kill_workflow(name: str, work: Callable[..., None], count: int, seed: int, reference: Path, folder: Path) -> Outcome:
    """One of the parts that kill more than one job; done anew where it ends before it was killed so many times."""
    outcome = Outcome(-1, name)
    for turn in range(count):
        if (left := count - outcome.kills.total()) <= 0 or outcome.wrong:
            break
        try:
            work(outcome, left, f"{seed}.{turn}", reference, folder / name)
        except Exception as error:
            outcome.wrong.append(f"it fails: {type(error).__name__}: {error}")
        shutil.rmtree(folder / name, ignore_errors=True)
    for words in outcome.wrong:
        print(f"WRONG: seed {seed} ({name}): {words}", flush=True)
    return outcome


def report(outcomes: list[Outcome], seconds: float) -> bool:
    """Print the table of kills, the checks and the times; whether everything was right."""
    kinds = list(dict.fromkeys(kind for kind in (*KINDS, *(kind for outcome in outcomes for kind in outcome.kills))))
    stages = sorted({outcome.stage for outcome in outcomes})
    wide = max(map(len, stages))
    print(f"\n{'stage':{wide}} " + " ".join(f"{kind:>{max(len(kind), 5)}}" for kind in [*kinds, "all"]))
    for stage in [*stages, "all"]:
        found = sum((outcome.kills for outcome in outcomes if stage in (outcome.stage, "all")), Counter())
        values = [*(found[kind] for kind in kinds), found.total()]
        print(f"{stage:{wide}} " + " ".join(f"{n:>{max(len(kind), 5)}}" for kind, n in zip([*kinds, "all"], values, strict=True)))
    print(f"\n{len(outcomes)} series, {seconds:.0f} s. Checks, each so often:")
    for name, count in sorted(sum((outcome.checks for outcome in outcomes), Counter()).items()):
        wrong = sum(words.startswith(f"{name}: ") for outcome in outcomes for words in outcome.wrong)
        print(f"  {name}: {count}, {wrong} of them wrong")
    if resumed := [seconds for outcome in outcomes for seconds in outcome.resumed]:
        print(f"{len(resumed)} resumed trainings made their first step after")
        for name, seconds in zip(("of the processor", "by the clock"), map(sorted, zip(*resumed, strict=True)), strict=True):
            print(f"  {seconds[len(seconds) // 2]:.2f} s (median), {seconds[-1]:.2f} s (longest) {name}")
    return not any(outcome.wrong for outcome in outcomes)


def main() -> int:
    """Returns 1 where anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=1000, help="how many kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="do this series alone")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where it works; kept, and what is there is used again")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="routevl-kills-") as temporary:
        folder = arguments.folder or Path(temporary)
        reference = folder / "reference"
        if not reference.exists():
            make_reference(folder / "making")
            (folder / "making").rename(reference)
        print(f"the undisturbed workflow: {time.monotonic() - begun:.0f} s", flush=True)
        import_everything()
        outcomes = kill_single_jobs(arguments.count, arguments.seed, arguments.only, reference, folder / "work", arguments.cores)
        if arguments.only is None and (kills := arguments.count // PER_WORKFLOW_KILL):
            where = (kills, arguments.seed, reference, folder / "work")
            outcomes.append(kill_workflow("the workflow", kill_snakemake, *where))
            if slurm_is_running():
                outcomes.append(kill_workflow("a job of SLURM", kill_slurm_jobs, *where))
            else:
                print("no SLURM is running: no job was preempted")
        fine = report(outcomes, time.monotonic() - begun)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
