"""What Snakemake's log tells of jobs that SLURM refused or killed; on a real SLURM, tests/slurm/test_faults.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from routevl.slurm import faults

REFUSED = """\
[Sat Nov 28 00:44:21 2026]
Error in rule {rule}:
    message: SLURM sbatch failed. The error message was 'sbatch: error: {reason}
sbatch: error: Batch job submission failed: something'.
    sbatch call:
        sbatch --parsable --comment rule_{rule}   -p gpu -t 90 --mem 2000 -D /home/me --wrap="snakemake"
For further error details see the cluster/cloud log and the log files of the involved rule(s).
    jobid: 0
    log: results/logs/{rule}.log (check log file(s) for error details)
Logfile results/logs/{rule}.log not found.
"""
ENDED = """\
[Sat Nov 28 00:45:07 2026]
Error in rule {rule}:
    message: SLURM-job '2' failed, SLURM status is: '{status}'. For further error details see the cluster/cloud log.
    jobid: 0
    log: results/logs/{rule}.log, {folder}/slurm_logs/rule_{rule}/2.log (check log file(s) for error details)
    external_jobid: 2
Trying to restart job 0.
"""
PARTITION, TIME = "invalid partition specified: nope", "Requested time limit is invalid (missing or exceeds some limit)"


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (REFUSED.format(rule="train", reason=PARTITION), "rule train: SLURM has no partition 'nope': name yours, as sinfo does"),
        (REFUSED.format(rule="train", reason=TIME), "the partition gpu allows no job of 90 minutes: lower training.runtime, or "),
        (REFUSED.format(rule="world", reason=TIME), "90 minutes: lower --set-resources world:runtime, or give the partition"),
        (ENDED.format(rule="extract", status="OUT_OF_MEMORY", folder="no"), "rule extract: killed for more memory than it asked "
         "for: raise features.mem_mb"),
        (ENDED.format(rule="score_mul_seed1", status="OUT_OF_MEMORY", folder="no"), "raise scoring.mem_mb"),
        (ENDED.format(rule="probe", status="TIMEOUT", folder="no"), "rule probe: stopped at its time limit: raise training."),
    ],
    ids=["partition", "time", "time of a rule without a key", "memory", "memory of scoring", "time limit"],
)  # fmt: skip
def test_each_fault_names_the_rule_and_the_key_once(log: str, line: str) -> None:
    [found] = faults(f"Building DAG of jobs...\n{log}{log}Exiting because a job execution failed.\n")
    assert line in found


@pytest.mark.parametrize("said", ["slurmstepd: error: Detected 1 oom_kill event in StepId=2.0.", "Exceeded job memory limit"])
def test_a_cluster_that_calls_a_killed_job_failed_says_why_in_the_jobs_own_log(tmp_path: Path, said: str) -> None:
    log = tmp_path / "slurm_logs/rule_train/2.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"host: x\n{said}\n")
    assert faults(ENDED.format(rule="train", status="FAILED", folder=tmp_path)) == [
        "rule train: killed for more memory than it asked for: raise training.mem_mb"
    ]


def test_a_job_that_failed_by_itself_is_left_to_its_own_log(tmp_path: Path) -> None:
    assert faults(ENDED.format(rule="train", status="FAILED", folder=tmp_path)) == []
    assert faults("Error in rule train:\n    jobid: 3\n    log: results/logs/train.log\n") == []
