"""The workflow on a real SLURM, by the literal command `snakemake --profile slurm --cores all`, and what may happen to a job."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from tiny_project import BIN, PROJECT, environment, make_project, row

from .conftest import MAX_MEM, MAX_TIME

EXPERIMENTS = [
    row("none", "vqa", epochs="2", feeds="T1"),
    row("mul", "vqa", "routing=mul", versus="none", epochs="2", seeds="1,2", feeds="T1"),
    row("several", "multitask", visual_tokens="grid", feeds="T3"),
]
CANCELLED, OUT_OF_TIME, OUT_OF_MEMORY = RUNS = ["none_seed1", "mul_seed1", "mul_seed2"]
SNAKEMAKE = str(BIN / "snakemake")
UNDISTURBED = "several_seed1"
GPUS = {"0", "1"}  # of the whole cluster

# Every shell of a rule reads this first. It notes the shell's SLURM job, GPUs and command. Where the file `hungry` stands, the
# shell of one run takes more memory than its job has asked for.
SHELL = f"""
if [[ $BASH_EXECUTION_STRING == *"routevl "* ]]; then
  echo "${{SLURM_JOB_ID:-local}} ${{CUDA_VISIBLE_DEVICES:-none}} ${{BASH_EXECUTION_STRING##*routevl }}" >> shells.txt
  if [[ $BASH_EXECUTION_STRING == *models/{OUT_OF_MEMORY}* && -e hungry ]]; then
    rm hungry
    head -c 2600M /dev/zero | tail -n 1 | sleep 60
  fi
fi
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm")]


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """What a failed test has started does not disturb the next one."""
    yield
    for process in psutil.Process().children():
        process.kill()
    slurm_command("scancel", "--me")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, with all results computed without SLURM."""
    project = make_project(tmp_path_factory.mktemp("reference"), EXPERIMENTS)
    shutil.copytree(PROJECT / "slurm", project / "slurm")
    limits = {"gpu_flag": "gpus", "max_runtime": MAX_TIME, "max_mem_mb": MAX_MEM}
    change(project / "slurm/profile.yaml", **{"slurm-init-seconds-before-status-checks": 1, "config": limits})
    config = yaml.safe_load((project / "config/config.yaml").read_text())
    assert {config[section]["runtime"] for section in ("training", "scoring")} == {MAX_TIME}
    small = {
        "features": config["features"] | {"shards": 1, "mem_mb": 2000},
        "training": config["training"] | {"mem_mb": 2000, "seeds_per_job": 1},
    }
    change(project / "config/config.yaml", **small)
    (project / "shell.sh").write_text(SHELL)
    command = [SNAKEMAKE, "--cores", "2", "--show-failed-logs"]
    local = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=500)
    assert local.returncode == 0, local.stdout + local.stderr
    return project


def change(path: Path, **values: object) -> None:
    """Set top-level keys of a YAML file."""
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def copy_of(reference: Path, project: Path, *results: str) -> Path:
    """The same project in another folder, with some of its results."""
    for name in ("Snakefile", "shell.sh"):
        shutil.copy(reference / name, project)
    for name in ("workflow", "config", "envs", "slurm", *(f"results/{result}" for result in results)):
        shutil.copytree(reference / name, project / name)
    return project


def start(project: Path, *options: str, **variables: str) -> subprocess.Popen:
    """Start Snakemake by the literal command; what it prints is appended to output.txt."""
    with open(project / "output.txt", "a") as output:
        return subprocess.Popen(
            [SNAKEMAKE, "--profile", "slurm", "--cores", "all", *options],
            cwd=project,
            env=environment() | {"BASH_ENV": str(project / "shell.sh")} | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def output(project: Path) -> str:
    return (project / "output.txt").read_text()


def wait_until(condition: Callable[[], object], process: subprocess.Popen, project: Path) -> None:
    """Wait until the condition is true, while the process lives."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, output(project)
        time.sleep(0.05)


def assert_ends(process: subprocess.Popen, project: Path, status: int = 0) -> None:
    assert process.wait(timeout=500) == status, output(project)


def slurm_command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def jobs(project: Path, run: str = "") -> list[dict[str, str]]:
    """SLURM's records of the project's jobs, or of those that trained one run, in the order of submission."""
    lines = slurm_command("scontrol", "--oneliner", "show", "job").splitlines()
    records = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
    return [job for job in records if job.get("WorkDir") == str(project) and job["Comment"].endswith(run and f"_wildcards_{run}")]


def states(project: Path, run: str = "") -> list[str]:
    return [job["JobState"] for job in jobs(project, run)]


def shells(project: Path) -> list[list[str]]:
    """SLURM job, GPUs, stage and options of each shell in which a rule ran."""
    return [line.split(maxsplit=3) for line in (project / "shells.txt").read_text().splitlines()]


def in_training(project: Path) -> set[str]:
    """The runs that have written a checkpoint and are not finished."""
    return {path.parent.name for path in (project / "results/checkpoints").glob("*/*.safetensors")}


def halt(project: Path, run: str) -> tuple[psutil.Process, str]:
    """Let a run's training process stand still, so that it is in mid-training for sure; returns it and its SLURM job."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[2:3] == ["train"] and f"results/models/{run}" in words and process.cwd() == str(project):
            process.suspend()
            return process, process.environ()["SLURM_JOB_ID"]
    raise AssertionError(f"{run} is not in training\n{output(project)}")


def take_long(process: psutil.Process) -> None:
    """Let a process that was told to stop take some seconds before it can do anything about it, as in a long training step."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(300):
            process.suspend()  # again and again: SLURM wakes what it stops
            time.sleep(0.01)
        process.resume()


def assert_resumed(project: Path, run: str) -> None:
    log = (project / "results/logs/train" / f"{run}.log").read_text()
    assert re.search(r"resuming from step [1-9]", log), log


def assert_same_run(first: Path, second: Path, run: str) -> None:
    command = [str(BIN / "routevl"), "compare", *(str(project / "results/models" / run) for project in (first, second))]
    compared = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert compared.returncode == 0 and "bit-equal" in compared.stdout, compared.stderr


# ------------------------------------------------------------------------------------------- the whole workflow


@pytest.fixture(scope="module")
def finished(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workflow, run to its tables and figures while a job was cancelled, one came to its time limit and one lacked memory."""
    project = copy_of(reference, tmp_path_factory.mktemp("cluster"), "world", "data", "backbones")
    (project / "hungry").touch()
    process = start(project)
    stops = {CANCELLED: ("scancel", "{}"), OUT_OF_TIME: ("scontrol", "update", "JobId={}", "EndTime=now")}
    while stops:
        wait_until(lambda: in_training(project) & set(stops), process, project)
        run = (in_training(project) & set(stops)).pop()
        training, job = halt(project, run)
        slurm_command(*(word.format(job) for word in stops.pop(run)))
        if run == CANCELLED:
            threading.Thread(target=take_long, args=[training]).start()  # the other run must not get away meanwhile
    assert_ends(process, project)
    return project


def test_results_are_those_of_a_run_without_slurm(reference: Path, finished: Path) -> None:
    made = [path.relative_to(reference) for name in ("tables", "figures") for path in (reference / "results" / name).iterdir()]
    assert len(made) == 3 * 4  # T1, T3 and F1 in four forms each
    assert [path for path in made if (reference / path).read_bytes() != (finished / path).read_bytes()] == []
    for run in (*RUNS, UNDISTURBED):
        assert_same_run(reference, finished, run)


def test_training_and_extraction_went_through_sbatch_with_a_gpu(finished: Path) -> None:
    on_gpus = [job for job in jobs(finished) if job["Comment"].startswith(("rule_train", "rule_extract"))]
    assert {job["Comment"] for job in on_gpus} >= {f"rule_train_wildcards_{run}" for run in (*RUNS, UNDISTURBED)}
    assert {(job["Partition"], job["TresPerJob"]) for job in on_gpus} == {("gpu", "gres:gpu:1")}
    seen = [(job, gpus) for job, gpus, stage, _ in shells(finished) if stage in ("train", "extract")]
    assert {job for job, _ in seen} == {job["JobId"] for job in on_gpus} and {gpus for _, gpus in seen} <= GPUS


def test_other_jobs_have_no_gpu_and_local_ones_are_not_submitted(finished: Path) -> None:
    assert {job["Comment"].split("_")[1] for job in jobs(finished)} == {"extract", "train", "score"}
    scores = [job for job in jobs(finished) if job["Comment"].startswith("rule_score")]
    assert len(scores) == 2 and all(score["Partition"] == "cpu" and "TresPerJob" not in score for score in scores)
    others = {(stage, job, gpus) for job, gpus, stage, _ in shells(finished) if stage not in ("train", "extract")}
    local = {(stage, "local", "none") for stage in ("index-features", "table", "figure", "provenance")}
    assert others == {("score", score["JobId"], "none") for score in scores} | local


def test_a_cancelled_job_writes_its_checkpoint_and_is_tried_again_from_there(finished: Path) -> None:
    assert states(finished, CANCELLED) == ["CANCELLED", "COMPLETED"]
    assert f"train {CANCELLED}: told to stop, checkpoint at step" in output(finished)
    assert_resumed(finished, CANCELLED)


def test_b08_a_job_at_its_time_limit_goes_on_where_the_partition_allows_no_more(reference: Path, finished: Path) -> None:
    """The partition gives no job more time than the first attempt had."""
    assert states(finished, OUT_OF_TIME) == ["TIMEOUT", "COMPLETED"]
    assert {job["TimeLimit"] for job in jobs(finished, OUT_OF_TIME)[1:]} == {"01:00:00"}
    assert_resumed(finished, OUT_OF_TIME)
    assert_same_run(reference, finished, OUT_OF_TIME)


def test_b08_a_job_out_of_memory_gets_more_up_to_what_the_partition_allows(finished: Path) -> None:
    first, second = jobs(finished, OUT_OF_MEMORY)
    assert first["JobState"] in ("FAILED", "OUT_OF_MEMORY") and second["JobState"] == "COMPLETED"
    assert "Exceeded job memory limit" in Path(first["StdOut"]).read_text()
    assert (first["MinMemoryNode"], second["MinMemoryNode"]) == ("2000M", f"{MAX_MEM}M")


# ------------------------------------------------------------------------------------------- other ways to go on


def test_snakemake_killed_and_started_again(reference: Path, tmp_path: Path) -> None:
    """Its jobs live on. Once they are cancelled by their run id, the next Snakemake goes on with them and does nothing twice."""
    project = copy_of(reference, tmp_path, "data", "backbones", "features")
    targets = [f"results/models/{run}" for run in RUNS]
    process = start(project, *targets)
    wait_until(lambda: in_training(project), process, project)
    halted = in_training(project).pop()
    halt(project, halted)  # on one GPU; on the other the second run ends, and the third begins
    wait_until(lambda: "COMPLETED" in states(project) and all(states(project, run) for run in RUNS), process, project)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [completed] = [run for run in RUNS if states(project, run) == ["COMPLETED"]]
    model = project / "results/models" / completed
    before = model.stat().st_mtime_ns

    assert_ends(start(project, *targets), project, status=1)
    assert "cannot be locked" in output(project)
    subprocess.run([SNAKEMAKE, "--profile", "slurm", "--unlock"], cwd=project, env=environment(), capture_output=True, check=True)
    assert_ends(start(project, *targets), project, status=1)
    [name] = set(re.findall(r"still in SLURM's queue: .* scancel --me --name=(\S+)", output(project)))
    slurm_command("scancel", "--me", f"--name={name}")
    while slurm_command("squeue", "--noheader", f"--name={name}"):
        time.sleep(0.1)

    assert_ends(start(project, *targets), project)
    assert model.stat().st_mtime_ns == before
    assert_resumed(project, halted)
    for run in RUNS:
        assert states(project, run) == (["COMPLETED"] if run == completed else ["CANCELLED", "COMPLETED"])
        assert_same_run(reference, project, run)


def test_runs_packed_into_one_allocation(reference: Path, tmp_path: Path) -> None:
    """They follow each other on one GPU. When their allocation is cancelled, finished ones are kept, and the others go on."""
    project = copy_of(reference, tmp_path, "data", "backbones", "features")
    change(project / "slurm/profile.yaml", config={"gpu_flag": "gres"})
    training = yaml.safe_load((project / "config/config.yaml").read_text())["training"]
    change(project / "config/config.yaml", training=training | {"runtime": MAX_TIME // 2})  # two fit into an allocation
    runs = RUNS[:2]
    options = ["--profile", "slurm/packing.yaml", *(f"results/models/{run}" for run in runs)]
    process = start(project, *options)
    wait_until(lambda: in_training(project), process, project)
    [first] = in_training(project)
    [second] = set(runs) - {first}
    wait_until(lambda: in_training(project) == {second}, process, project)
    model = project / "results/models" / first
    before = model.stat().st_mtime_ns
    _, allocation = halt(project, second)
    slurm_command("scancel", allocation)
    assert_ends(process, project, status=1)

    assert_ends(start(project, *options), project)
    assert model.stat().st_mtime_ns == before
    assert_resumed(project, second)
    asked_for = [(job["TimeLimit"], job["TresPerNode"], job["MinMemoryNode"]) for job in jobs(project)]
    assert asked_for == [("01:00:00", "gres:gpu:1", "2000M"), ("00:30:00", "gres:gpu:1", "2000M")]
    assert len(shells(project)) == 3 and {gpus for _, gpus, _, _ in shells(project)} <= GPUS
    for run in runs:
        assert_same_run(reference, project, run)


def test_a_slurm_that_does_not_answer_is_named(reference: Path, tmp_path: Path) -> None:
    project = copy_of(reference, tmp_path, "data", "backbones", "features")
    configuration = project / "slurm.conf"
    nobody = "SlurmctldPort=9\nMessageTimeout=2\n"  # listens there
    configuration.write_text(Path("/etc/slurm/slurm.conf").read_text() + nobody)
    target = f"results/models/{RUNS[0]}"
    assert_ends(start(project, "--retries", "0", target, SLURM_CONF=str(configuration)), project, status=1)
    assert "Unable to contact slurm controller" in output(project)
    assert not (project / target).exists()


@pytest.mark.parametrize("name", ["user's folder (1) é", "two \"kinds' of quotes", "5 $HOME"])
def test_b20_a_job_runs_in_such_a_folder_or_is_refused_before(reference: Path, tmp_path: Path, name: str) -> None:
    """The plugin quotes paths as Python does."""
    project = tmp_path / name
    project.mkdir()
    copy_of(reference, project, "world")
    process = start(project, "results/data", "--set-resources", "prepare:mem_mb=1000")
    if name.startswith("user"):
        assert_ends(process, project)
        [(job, _, stage, _)] = shells(project)
        assert (project / "results/data/answers.json").exists() and job.isdigit() and stage == "prepare"
    else:
        assert_ends(process, project, status=1)
        assert "do not reach SLURM's jobs" in output(project) and jobs(project) == []
