"""What `make demo` says while it runs and in the end, with a stand-in for Snakemake."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "workflow"))

from snakemake_log import SnakemakeLog  # noqa: E402

STATS = ["Job stats:", "job      count", "-----  -------", "world        1", "train        4", "score_a      1", "total        6"]


def job(rule: str, number: int, wildcards: str = "") -> list[str]:
    """What Snakemake's log says when a job starts."""
    lines = [f"rule {rule}:", "    input: a, b", f"    jobid: {number}", "    reason: Missing output files: c"]
    return lines + ([f"    wildcards: {wildcards}"] if wildcards else [])


def finished(rule: str, number: int) -> list[str]:
    return [f"Finished jobid: {number} (Rule: {rule})"]


def failed(rule: str, number: int, log: list[str]) -> list[str]:
    lines = [
        "RuleException:",
        f"Error in rule {rule}:",
        "    message: None",
        f"    jobid: {number}",
        "    shell:",
        "        routevl",
    ]
    return [*lines, "Logfile a.log:", "=" * 20, *log, "=" * 20, "Shutting down, this might take some time."]


def read(*events: tuple[float, list[str]]) -> SnakemakeLog:
    log = SnakemakeLog()
    for now, lines in events:
        for line in lines:
            log.read(line, now)
    return log


def test_progress_names_the_newest_job_and_says_nothing_before_there_is_an_estimate() -> None:
    log = read((0, STATS))
    assert log.progress(0) == ""
    log = read((0, STATS), (0, job("world", 1)), (5, finished("world", 1) + job("train", 2, "run=vqa_mul_seed1")))
    assert log.progress(6) == "[1/6] train vqa_mul_seed1"


def test_time_that_is_left_is_that_of_jobs_of_the_same_kind_side_by_side() -> None:
    """Three of four trainings to come, of 60 s each and two at a time, and one scoring, which counts as the mean of the kinds."""
    events = [(0, STATS), (0, job("world", 1)), (10, finished("world", 1) + job("train", 2) + job("train", 3))]
    log = read(*events, (70, finished("train", 2) + job("train", 4)))
    work = 3 * 60 + (10 + 60) / 2 - 60  # of the second training, which is about to end
    assert log.seconds_left(70) == pytest.approx(work * 70 / (10 + 60 + 60))
    assert log.progress(70) == "[2/6] train ... about 1 min left"
    late = read(*events, (70, finished("train", 2) + finished("train", 3) + job("train", 4) + job("train", 5)))
    late.read("Finished jobid: 4 (Rule: train)", 130)
    late.read("Finished jobid: 5 (Rule: train)", 130)
    assert 0 < late.seconds_left(130) < 60


def test_a_job_that_takes_longer_than_expected_does_not_make_time_run_backwards() -> None:
    log = read((0, STATS), (0, job("train", 1)), (10, finished("train", 1) + job("train", 2)))
    assert log.seconds_left(500) > 0


def test_jobs_that_took_no_time_say_nothing_about_those_to_come() -> None:
    log = read((5, STATS), (5, job("train", 1)), (5, finished("train", 1) + job("train", 2)))
    assert log.seconds_left(5) is None


def test_of_a_failed_job_its_name_and_the_end_of_its_log_are_kept() -> None:
    text = [f"line {number}" for number in range(100)] + ["    indented"]
    log = read((0, STATS), (0, job("train", 2)), (1, failed("train", 2, text)), (2, job("train", 2)))
    [failure] = log.failures
    assert failure[:3] == ["Error in rule train:", "Logfile a.log:", "=" * 20]
    assert failure[3:] == [*text[-30:], "=" * 20]
    assert log.progress(2) == "[0/6] train"  # tried again


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a Snakemake that prints said.txt, makes results/provenance.html unless it says that there is nothing to be
    done, and ends with the status in status.txt."""
    specification = importlib.util.spec_from_file_location("run_script", PROJECT / "workflow/run.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)
    Path("snakemake.py").write_text(
        "import sys, pathlib\n"
        "said, status = (pathlib.Path(name).read_text() for name in ('said.txt', 'status.txt'))\n"
        "with open('called.txt', 'a') as file: print(*sys.argv[1:], file=file)\n"
        "if '--report' in sys.argv:\n"
        "    pathlib.Path(sys.argv[sys.argv.index('--report') + 1]).write_text('report')\n"
        "else:\n"
        "    print(said)\n"
        "    if 'Nothing' not in said: pathlib.Path('results/provenance.html').write_text('page')\n"
        "sys.exit(int(status))\n"
    )
    monkeypatch.setattr(script, "SNAKEMAKE", [sys.executable, "snakemake.py"])
    monkeypatch.setattr(sys, "argv", ["run.py", "results", "--cores", "2"])
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    return script


def say(lines: list[str], status: int = 0) -> None:
    Path("said.txt").write_text("\n".join(lines))
    Path("status.txt").write_text(str(status))


def test_after_success_the_report_is_made_and_what_came_out_is_said(run: ModuleType, capfd: pytest.CaptureFixture) -> None:
    say([*STATS, *job("world", 1), *finished("world", 1)])
    assert run.main() == 0
    out, _ = capfd.readouterr()
    assert "tables:  results/tables" in out and "all of it in one page: results/report.html" in out
    assert Path("results/report.html").read_text() == "report" and not list(Path("results").glob("*.tmp*"))
    assert "Job stats:" in Path("results/logs/snakemake.log").read_text()


def test_the_report_is_made_again_only_when_something_was(run: ModuleType, capfd: pytest.CaptureFixture) -> None:
    say(STATS)
    assert run.main() == 0
    say(["Nothing to be done (all requested files are present and up to date)."])
    assert run.main() == 0
    assert "Nothing to be done: all is up to date." in capfd.readouterr().out
    assert Path("called.txt").read_text().count("--report") == 1
    os.utime("results/report.html", (1, 1))  # older than what is in it
    assert run.main() == 0
    assert Path("called.txt").read_text().count("--report") == 2


def test_what_is_asked_for_alone_has_no_report(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    say(STATS)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "results/backbones/vit", "--config", "a=1", "b=2"])
    assert run.main() == 0
    assert Path("called.txt").read_text() == "--cores 2 results/backbones/vit --config a=1 b=2\n"
    assert "tables" not in capfd.readouterr().out


def test_a_failed_job_is_shown_and_not_all_that_snakemake_says(run: ModuleType, capfd: pytest.CaptureFixture) -> None:
    say([*STATS, *job("train", 2, "run=a"), *failed("train", 2, ["routevl: error: no space"])], status=1)
    assert run.main() == 1
    out, err = capfd.readouterr()
    assert "Error in rule train:\nLogfile a.log:\n" in err and "routevl: error: no space" in err
    assert "Job stats" not in err and "    shell:" not in err and "results/logs/snakemake.log" in err
    assert out == "" and not Path("results/report.html").exists()


def test_an_error_before_any_job_is_shown_in_one_piece(run: ModuleType, capfd: pytest.CaptureFixture) -> None:
    lines = ["WorkflowError in file x, line 1:", *(f"line {number}" for number in range(40))]
    say(lines, status=1)
    assert run.main() == 1
    assert "\n".join(lines) in capfd.readouterr().err


def test_lines_without_a_terminal_are_few_and_on_one_are_rewritten(monkeypatch: pytest.MonkeyPatch, run, capsys) -> None:
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    line = run.ProgressLine()
    for text in ("", "a", "b", "c", "c", "d"):
        line.show(text)
    line.clear()
    assert capsys.readouterr().err == "a\nc\nd\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = run.ProgressLine()
    for text in ("a", "a", "b"):
        line.show(text)
    line.clear()
    assert capsys.readouterr().err == "\ra\033[K\rb\033[K\r\033[K"
