"""The real workflow on a tiny configuration: the same Snakefile, rules and code as the demo, in a copy of the project."""

from __future__ import annotations

import csv
import filecmp
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tampering
import yaml
from tampering import Tampering
from tiny_project import BIN, PROJECT, environment, make_project, row

from routevl.provenance import record
from routevl.provenance.audit import Audit, lost_jobs
from routevl.provenance.records import Records, read_plan
from routevl.provenance.rerun import rerun
from routevl.reporting import FIGURES, TABLES

EXPERIMENTS = [
    row("vqa_none", "vqa", feeds="T0,T1,T4,T5,T6,T7,F2,F3,F4,F5,F6,F8,F9"),
    row("vqa_mul", "vqa", "routing=mul", versus="vqa_none", seeds="1,2", feeds="T0,T1,T4,T5,T6,T7,F2,F3,F4,F5,F6,F8,F9"),
    row("vqa_chosen", "vqa", "share=0.1 batches=2 learning_rate=tuned", method="gradient_norm", versus="vqa_none",
        feeds="T6,T7,F4"),
    row("vqa_pruned", "vqa", method="ia3", text_backbone="pruned", versus="vqa_none", feeds="T7,F4"),
    row("caption_none", "caption", method="adapter", feeds="T0,T2,T6,F2,F5,F8"),
    row("caption_attn", "caption", "routing=attn", method="adapter", versus="caption_none", prefix="no", visual_tokens="patches",
        feeds="T2,T6,F2,F5,F8"),
    row("several_none", "multitask", visual_tokens="grid", feeds="T0,T3,T6,F2,F5,F10"),
    row("several_mul", "multitask", "routing=mul learning_rate=tuned", versus="several_none", visual_tokens="grid",
        feeds="T0,T3,T6,F2,F5,F10"),
]  # fmt: skip
FED = {"F1", *(name for line in EXPERIMENTS for name in line.split("\t")[-1].split(","))}  # by `feeds`, the last column
MADE = [name for name in (*TABLES, *FIGURES) if name.split("_")[0] in FED]
TARGETS = len(MADE) * 4  # each in four forms

NOTHING = Tampering(None)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the workflow consists of, with a tiny configuration as its default."""
    return make_project(tmp_path_factory.mktemp("project"), EXPERIMENTS)


def snakemake(project: Path, *options: str) -> str:
    """Run Snakemake in the project, to success; returns what it printed."""
    command = [str(BIN / "snakemake"), "--cores", "2", "--show-failed-logs", *options]
    result = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def make_demo(project: Path) -> subprocess.Popen:
    """What `make demo` runs, in a process group of its own."""
    command = [sys.executable, "workflow/run.py", "results", "--cores", "2"]
    output = open(project / "output.log", "a")  # noqa: SIM115  (the process outlives this function)
    return subprocess.Popen(
        command, cwd=project, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def finished(project: Path) -> dict[str, int]:
    """The outputs whose job is complete, with their time stamps: a scored run's model is."""
    models = (project / "results/models").glob("*_seed*")
    backbones = (project / "results/backbones").glob("*/config.json")
    return {str(path): path.stat().st_mtime_ns for path in [*models, *backbones]}


@pytest.fixture(scope="module")
def results(project: Path) -> Path:
    """The whole DAG; killed without warning in the middle, all its processes at once, and started again."""
    process = make_demo(project)
    deadline = time.monotonic() + 400
    checkpoints = project / "results/checkpoints"
    while not (len(list((project / "results/predictions").glob("*_seed*"))) >= 2 and any(checkpoints.glob("*/*.safetensors"))):
        assert process.poll() is None and time.monotonic() < deadline, (project / "output.log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(project)
    again = make_demo(project)
    assert again.wait(timeout=500) == 0, (project / "output.log").read_text()
    after = finished(project)
    redone = [path for path, stamp in before.items() if after[path] != stamp]
    assert len(redone) <= 2, redone  # at most the two jobs that were running: their outputs were there, they had not ended
    assert not any(checkpoints.glob("*/*")), "checkpoints of finished runs are left"
    return project / "results"


def test_every_table_and_figure_is_there_and_tells_of_every_run(results: Path) -> None:
    files = sorted(path.name for folder in ("tables", "figures") for path in (results / folder).iterdir())
    assert len(files) == TARGETS, files
    with open(results / "tables/T1_vqa.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["routing"]: row["n_seeds"] for row in rows} == {"none": "1", "mul": "2"}
    wanted = "method routing rank n_seeds trainable_params accuracy_mean accuracy_std gain gain_ci_low gain_ci_high"
    assert set(wanted.split()) <= set(rows[0])
    assert len({row["trainable_params"] for row in rows}) == 1
    with open(results / "tables/T2_caption.csv") as file:
        assert {row["routing"] for row in csv.DictReader(file)} == {"none", "attn"}
    with open(results / "tables/T3_multitask.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["routing"]: row["n_seeds"] for row in rows if row["n_seeds"]} == {"none": "1", "mul": "1"}
    with open(results / "figures/F10_multitask.csv") as file:
        assert {row["metric"] for row in csv.DictReader(file)} == {"average", "vqa", "gqa", "nlvr2", "caption"}
    with open(results / "tables/T7_methods.csv") as file:
        rows = {(row["method"], row["text_backbone"]): row for row in csv.DictReader(file)}
    assert set(rows) == {("lora", "roberta"), ("gradient_norm", "roberta"), ("ia3", "pruned")}
    chosen = json.loads((results / "models/vqa_chosen_seed1/run.json").read_text())
    assert chosen["settings"]["options"]["share"] == 0.1
    tuned = json.loads((results / "tuning/vqa_chosen_seed0.json").read_text())
    assert chosen["settings"]["learning_rate"] == tuned["learning_rate"]
    assert {row["learning_rates_tried"] for key, row in rows.items() if key[0] == "gradient_norm"} == {"3"}
    questions = json.loads((results / "data/test/questions.json").read_text())["questions"]
    answers = json.loads((results / "predictions/vqa_mul_seed2/results.json").read_text())
    assert {a["question_id"] for a in answers} == {q["question_id"] for q in questions}
    assert set(answers[0]) == {"question_id", "answer"}
    several = json.loads((results / "models/several_mul_seed1/run.json").read_text())
    assert several["settings"]["learning_rate"] == several["tuned"]["learning_rate"]
    captions = json.loads((results / "predictions/caption_attn_seed1/results.json").read_text())
    assert len(captions) == 16 and set(captions[0]) == {"image_id", "caption"}
    assert "start-up and imports:" in (results / "logs/startup.txt").read_text()


def test_make_demo_says_how_far_it_is_and_ends_with_the_results_and_the_report(results: Path) -> None:
    said = (results.parent / "output.log").read_text()
    assert re.search(r"^\[\d+/\d+\] \w+", said, re.MULTILINE) and "Select jobs to execute" not in said
    *_, summary = said.partition("VQA accuracy (%)")
    assert len(summary.splitlines()) <= 24 and f"all of it in one page: {results.name}/report.html" in summary
    assert "Select jobs to execute" in (results / "logs/snakemake.log").read_text()


def test_nothing_is_left_to_be_done(project: Path, results: Path) -> None:
    assert "Nothing to be done" in snakemake(project)
    report = (results / "report.html").stat().st_mtime_ns
    assert make_demo(project).wait(timeout=100) == 0
    assert "Nothing to be done: all is up to date." in (project / "output.log").read_text()
    assert (results / "report.html").stat().st_mtime_ns == report


def test_a_rehearsal_runs_every_rule_and_leaves_the_results_alone(project: Path, results: Path) -> None:
    """With a pretrained, a derived backbone and a probe; two seeds are one."""
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in results.rglob("*") if path.is_file()}
    output = snakemake(project, "--verbose", "--config", "rehearsal=yes")
    looks, jobs = output.count("Ready jobs: "), output.count("Finished jobid: ")
    assert 0 < looks <= 2 * jobs, f"{looks} looks at the jobs for {jobs} of them: also where none had ended"
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    rehearsal = results / "rehearsal"
    made = {path.name for path in results.iterdir()} - {rehearsal.name, "report.html"}  # the report is asked for
    assert {path.name for path in rehearsal.iterdir()} == made | {"experiments.tsv"}
    assert len([path for folder in ("tables", "figures") for path in (rehearsal / folder).iterdir()]) == TARGETS
    assert {path.name for path in (rehearsal / "models").iterdir()} == {f"{line.split()[0]}_seed1" for line in EXPERIMENTS}
    assert (rehearsal / "probes/vqa_chosen_seed1/prepared.safetensors").exists() and "rule derive_backbone:" in output
    assert "everything stands" in routevl(project, "audit", "results/rehearsal").stdout
    assert "everything stands" in routevl(project, "audit", "results").stdout
    shutil.rmtree(rehearsal)


def test_codecheck_lists_every_table_and_figure(project: Path, results: Path) -> None:
    shutil.copy(PROJECT / "CITATION.cff", project)
    command = [sys.executable, "workflow/codecheck.py", "results"]
    written = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    listed = {entry["file"] for entry in yaml.safe_load((project / "codecheck.yml").read_text())["manifest"]}
    made = [*(results / "tables").glob("*.csv"), *(results / "figures").glob("*.pdf")]
    assert listed == {str(path.relative_to(project)) for path in made} and len(made) == len(MADE)


def test_figures_and_tables_are_redrawn_without_training(project: Path, results: Path) -> None:
    before = {path: path.read_bytes() for path in (results / "figures").iterdir() if path.suffix != ".pdf"}
    (results / "figures/F2_main.svg").unlink()
    (results / "tables/T1_vqa.md").unlink()
    shutil.move(results / "world", project / "world")  # what they were made from may be gone
    plan = snakemake(project, "--dry-run", "figures", "tables")
    assert "rule figure:" in plan and "rule table:" in plan
    assert not any(f"rule {name}:" in plan for name in ("train", "world", "prepare", "extract", "pretrain_text"))
    snakemake(project, "figures", "tables")
    shutil.move(project / "world", results / "world")
    assert {path: path.read_bytes() for path in before} == before


def test_a_new_line_in_the_sheet_runs_that_experiment_alone(project: Path, results: Path) -> None:
    sheet = project / "config/experiments/tiny.tsv"
    text = sheet.read_text()
    sheet.write_text(text + row("vqa_add", "vqa", "routing=add", versus="vqa_none", seeds="7", feeds="T1") + "\n")
    try:
        plan = snakemake(project, "--dry-run")
    finally:
        sheet.write_text(text)
    trained = [line for line in plan.splitlines() if "output: results/models/" in line]
    assert len(trained) == 1 and "vqa_add_seed7" in trained[0], plan


def test_the_plan_of_every_configuration_is_complete() -> None:
    """Every rule's command of the demo prints; none has an unresolved placeholder."""
    plan = subprocess.run(
        [str(BIN / "snakemake"), "--dry-run", "--printshellcmds", "--forceall", "--cores", "2", "--directory", str(PROJECT)],
        cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    commands = [line for line in plan.stdout.splitlines() + plan.stderr.splitlines() if "routevl " in line and "&>" in line]
    assert plan.returncode == 0 and sum("routevl train" in command for command in commands) >= 25
    assert not any("{" in command.replace('{"', "") for command in commands if "prepare" not in command)


# ----------------------------------------------------------------------------------------------- the audit


def problems_of(project: Path, monkeypatch: pytest.MonkeyPatch, done: Tampering = NOTHING) -> dict[str, list[str]]:
    """What an audit finds wrong, by manifest: of all outputs, or of the path that is asked for."""
    monkeypatch.chdir(project)
    plan = read_plan(Path("results")) if done.plan is None else done.plan
    records = Records(Path("results"), plan)
    jobs = [records.job_of(Path(done.spelling))] if done.spelling else [*records.jobs, *lost_jobs(records, plan)]
    found = Audit(records, plan)
    found._environment = found._environment | {"packages": found._environment["packages"] | (done.packages or {})}
    for job in jobs:
        found.check(job)
    return {str(path): problems for path, problems in found.problems.items() if problems}


@pytest.fixture
def copy(project: Path, results: Path, tmp_path: Path) -> Path:
    """The project with its results, as copied to another place: without .snakemake."""
    snakemake(project)
    folder = tmp_path / "copy"
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns(".snakemake"))
    return folder


def routevl(project: Path, *options: str) -> subprocess.CompletedProcess:
    command = [str(BIN / "routevl"), *options]
    return subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)


def test_a_copy_of_the_results_is_audited_the_same_and_needs_nothing_done(copy: Path) -> None:
    lineage = routevl(copy, "audit", "results/tables/T1_vqa.csv")
    assert lineage.returncode == 0 and "everything stands" in lineage.stdout, lineage.stdout + lineage.stderr
    stands = [f"{job}: stands" for job in ("table T1_vqa", "score vqa_none_seed1", "train vqa_mul_seed1")]
    for job in (*stands, "prepare prepare", "world world"):
        assert job in lineage.stdout
    snakemake(copy, "--touch")
    assert "Nothing to be done" in snakemake(copy, "--dry-run")


def test_outputs_made_again_alone_are_bit_equal(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also says that the runs that were killed and resumed above ended as uninterrupted ones do."""
    again = routevl(copy, "audit", "--rerun", "--json", "results/tables/T1_vqa.csv")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [found["verdict"] for found in json.loads(again.stdout)["reruns"]] == ["bit-equal"]
    monkeypatch.chdir(copy)
    results = Path("results")
    records = Records(results)
    runs = [f"models/{run}_seed1" for run in ("vqa_none", "vqa_mul", "vqa_chosen", "caption_none", "several_none")]
    before = ("probes/vqa_chosen_seed1/prepared.safetensors", "backbones/pruned/config.json")
    for path in (*runs, *before, "scores/vqa_mul_seed1/metrics.json", "figures/F2_main.svg", "features/vit/index.json"):
        found = rerun(records.job_of(results / path).manifest, results)
        assert (path, found["verdict"]) == (path, "bit-equal"), found


def test_an_audit_names_what_the_configuration_and_the_code_have_changed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy / "config/config.yaml"
    text = config.read_text()
    config.write_text(text.replace("\n    learning_rate: 0.004\n", "\n    learning_rate: 0.005\n"))
    changed = routevl(copy, "audit", "results/models/caption_attn_seed1")
    assert changed.returncode == 1
    assert "stale: --learning-rate 0.004 then, 0.005 now" in changed.stdout
    config.write_text(text.replace("sparsity: 0.5", "sparsity: 0.6"))
    sheet = copy / "config/experiments/tiny.tsv"
    text = sheet.read_text().replace("r=2 lora_alpha=2 routing=mul", "r=3 lora_alpha=2 routing=mul")
    sheet.write_text(text.replace("share=0.1 batches=2", "share=0.1 batches=3"))
    found = problems_of(copy, monkeypatch)
    [stale] = [problem for problem in found["results/manifests/train/vqa_mul_seed1.json"] if problem.startswith("stale")]
    assert stale.startswith("stale: --options r=2 routing=mul ") and " then, r=3 routing=mul " in stale
    for job in ("probe/vqa_chosen_seed1", "train/vqa_chosen_seed1"):
        assert "stale: --options share=0.1 batches=2 then, share=0.1 batches=3 now" in found[f"results/manifests/{job}.json"]
    pruned = found["results/manifests/derive_backbone/pruned.json"]
    assert "stale: --options sparsity=0.5 then, sparsity=0.6 now" in pruned
    assert "config/experiments/tiny.tsv: changed" in found["results/manifests/table/T1_vqa.json"]
    code = copy / "code"
    shutil.copytree(record.PACKAGE, code, ignore=shutil.ignore_patterns("__pycache__"))
    with open(code / "tasks/vqa.py", "a") as file:
        file.write("# changed\n")
    monkeypatch.setattr(record, "PACKAGE", code)
    found = problems_of(copy, monkeypatch)
    assert (
        "stale: the code of routevl/tasks/vqa.py is not what the job ran" in found["results/manifests/train/vqa_none_seed1.json"]
    )
    assert "results/manifests/world/world.json" not in found


def test_a_changed_file_of_gqa_makes_stale_what_was_learned_from_it(copy: Path) -> None:
    file = copy / "results/world/train/gqa_questions.json"
    questions = json.loads(file.read_text())
    questions.popitem()
    file.write_text(json.dumps(questions))
    table = "results/tables/T3_multitask.csv"
    changed = routevl(copy, "audit", table)
    assert changed.returncode == 1 and f"{file.relative_to(copy)}: changed" in changed.stdout
    snakemake(copy, "--touch")
    snakemake(copy, "results/data", "--forcerun", "prepare")
    _, stands, stale = routevl(copy, "audit", table).stdout.partition("train several_none_seed1: DOES NOT STAND")
    assert stands and stale.split("!")[1].startswith(" stale: results/data was read before prepare prepare made it as it is now")
    trained = [line for line in snakemake(copy, "--dry-run", table).splitlines() if "output: results/models/" in line]
    assert [any(f"several_{routing}_seed1" in line for line in trained) for routing in ("none", "mul")] == [True, True]


def test_every_tampering_is_found_and_named(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is none, such as an extra package, another spelling of a path or another node's cache, is no alarm."""
    monkeypatch.chdir(copy)
    plan = read_plan(Path("results"))
    for module in (sys.modules[__name__], tampering):
        monkeypatch.setattr(module, "read_plan", lambda results: plan)
    assert problems_of(copy, monkeypatch) == {}
    whole = tmp_path / "whole"
    for name in ("results", "envs"):
        shutil.copytree(copy / name, whole / name)
    rng = random.Random(20)
    kinds = list(tampering.TAMPERINGS)
    for number in range(500):
        kind = kinds[number % len(kinds)]
        done = tampering.TAMPERINGS[kind](rng, Path("results"))
        found = problems_of(copy, monkeypatch, done)
        if done.manifest is None:
            assert found == {}, (number, kind, done, found)
        else:
            problems = found.get(done.manifest, [])
            assert any(all(word in problem for word in done.words) for problem in problems), (number, kind, done, found)
        restore(copy, whole)
    assert problems_of(copy, monkeypatch) == {}


def restore(project: Path, whole: Path) -> None:
    """Put back what differs from the whole copy, byte for byte: some keep size and time of change."""
    for name in ("results", "envs"):
        for file in (path for path in (project / name).rglob("*") if path.is_file()):
            if not (whole / file.relative_to(project)).exists():
                file.unlink()
        for file in (path for path in (whole / name).rglob("*") if path.is_file()):
            target = project / file.relative_to(whole)
            if not target.exists() or not filecmp.cmp(target, file, shallow=False):
                shutil.copy2(file, target)
