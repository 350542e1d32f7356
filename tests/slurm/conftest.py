"""A real SLURM of one node on this machine: partitions cpu and gpu with limits, two GPUs that are only device files, no
accounting."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from routevl.files import lock

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge", "mungekey": "munge"}
FOLDER = Path("/run/routevl-tests")  # keys, states, logs and process ids of the daemons
CONFIGURATION = Path("/etc/slurm")  # SLURM_CONF does not reach the steps of a job: Snakemake's plugin takes it away
MARK = "# Written by the tests of routevl, removed at their end."

MAX_TIME = 60  # minutes of a job, as much as the tests' configuration gives to training
MAX_MEM = 3000  # MB
# EnforcePartLimits: what asks for more than a partition allows is refused, and not left in the queue. MinJobAge: finished jobs
# can be looked at. OverMemoryKill: stands in for the memory limits that cgroups set on a cluster.
SLURM_CONF = f"""{MARK}
ClusterName=routevl
SlurmctldHost={{host}}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={FOLDER}/munge.socket
CredType=cred/munge
StateSaveLocation={FOLDER}/slurmctld
SlurmdSpoolDir={FOLDER}/slurmd
SlurmctldPidFile={FOLDER}/slurmctld.pid
SlurmdPidFile={FOLDER}/slurmd.pid
SlurmctldLogFile={FOLDER}/slurmctld.log
SlurmdLogFile={FOLDER}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
MailProg=/bin/true
GresTypes=gpu
NodeName={{host}} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
EnforcePartLimits=ALL
PartitionName=cpu Nodes={{host}} Default=YES MaxTime={MAX_TIME} MaxMemPerNode={MAX_MEM} State=UP
PartitionName=gpu Nodes={{host}} MaxTime={MAX_TIME} MaxMemPerNode={MAX_MEM} State=UP
"""
# With files, jobs are given CUDA_VISIBLE_DEVICES; which files does not matter.
GRES_CONF = f"""{MARK}
Name=gpu Count=1 File=/dev/null
Name=gpu Count=1 File=/dev/zero
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """Install what is missing, start the daemons, wait until the node is idle; stop them and remove their files at the end."""
    _skip_where_impossible()
    with lock(FOLDER.with_suffix(".lock")):  # tests in another checkout wait for these
        _remove()  # what tests that were killed have left
        try:
            _start()
            yield
        finally:
            _remove()


def _skip_where_impossible() -> None:
    """Skip where this machine cannot have the cluster; with ROUTEVL_REQUIRE_SLURM, a configured cluster is an error instead."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM cluster can only be started by root")
    for name in ("slurm.conf", "gres.conf"):
        path = CONFIGURATION / name
        if path.exists() and not path.read_text().startswith(MARK):
            reason = f"{path} is there: this machine belongs to a cluster, whose configuration is left alone"
            pytest.fail(reason) if os.environ.get("ROUTEVL_REQUIRE_SLURM") else pytest.skip(reason)
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program)})
    if missing and not shutil.which("apt-get"):
        pytest.skip(f"SLURM is not installed, and there is no apt-get to install {' '.join(missing)}")
    if missing and not _install(missing):
        pytest.skip(f"apt-get could not install {' '.join(missing)}")


def _install(packages: list[str]) -> bool:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        result = subprocess.run(["apt-get", "--quiet", *words], env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            print(result.stdout + result.stderr)
            return False
    return True


def _start() -> None:
    for folder in (FOLDER / "slurmctld", FOLDER / "slurmd", CONFIGURATION):
        folder.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname().split(".")[0]
    (CONFIGURATION / "slurm.conf").write_text(SLURM_CONF.format(host=host))
    (CONFIGURATION / "gres.conf").write_text(GRES_CONF)
    key = f"--key-file={FOLDER}/munge.key"
    files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
    _run("mungekey", "--create", f"--keyfile={FOLDER}/munge.key")
    _run("munged", "--force", key, *(f"--{option}={FOLDER}/{name}" for option, name in files.items()))
    _run("slurmctld")
    _run("slurmd")
    idle = _becomes_true(lambda: set(_output("sinfo", "--noheader", "--format=%T").split()) == {"idle"})
    assert idle, "the node does not become idle\n" + "\n".join(path.read_text() for path in FOLDER.glob("*.log"))


def _remove() -> None:
    if (FOLDER / "slurmctld.pid").exists():
        _output("scancel", "--user=root")
        _becomes_true(lambda: not _output("squeue", "--noheader"))
    for daemon in ("slurmd", "slurmctld", "munged"):
        _stop(daemon)
    for name in ("slurm.conf", "gres.conf"):
        (CONFIGURATION / name).unlink(missing_ok=True)
    shutil.rmtree(FOLDER, ignore_errors=True)


def _stop(daemon: str) -> None:
    """End the process of that daemon's pid file, unless the number is another program's by now."""
    file = FOLDER / f"{daemon}.pid"
    process = Path("/proc") / (file.read_text().strip() if file.exists() else "none")
    if (process / "comm").exists() and (process / "comm").read_text().strip() == daemon:
        os.kill(int(process.name), signal.SIGTERM)
        assert _becomes_true(lambda: not process.exists()), f"{daemon} does not end"


def _run(*command: str) -> None:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def _becomes_true(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
