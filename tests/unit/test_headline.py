"""What `make demo` says in the end."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from synthetic_results import RUNS, experiment, make_table, write_results, write_sheet

from routevl.errors import RoutevlError
from routevl.reporting.headline import LINES, WIDTH, headline


def tables_of(folder: Path, runs: list[dict], collapsed: tuple[str, ...] = ()) -> Path:
    write_results(folder, runs, images=20, collapsed=collapsed)
    write_sheet(folder / "experiments.tsv", runs)
    for name in ("T1_vqa", "T2_caption"):
        if any(name.startswith(feed + "_") for row in runs for feed in row["feeds"].split(",")):
            make_table(name, folder, folder / "tables" / f"{name}.csv")
    return folder


def test_scores_gains_and_verdicts_are_those_of_the_tables(tmp_path):
    lines = headline(tables_of(tmp_path, RUNS))
    with open(tmp_path / "tables/T1_vqa.csv", encoding="utf-8", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["experiment"] == "vqa_lora_mul_r4_e2")
    gain, low, high = (f"{float(row[name]):+.1f}" for name in ("gain", "gain_ci_low", "gain_ci_high"))
    score = f"{float(row['accuracy_mean']):.1f} ± {float(row['accuracy_std']):.1f}"
    [mul, *_] = [line for line in lines if line.split()[:3] == ["LoRA", "mul", "yes"]]
    assert score in mul and f"{gain} [{low}, {high}]" in mul
    assert mul.endswith("improves" if float(row["p_holm"]) < 0.05 and float(row["gain"]) > 0 else "no difference")
    assert [line.split()[0] for line in lines if "gain [95% CI]" in line] == ["VQA", "CIDEr"]
    assert "no verdict: fewer than three seeds (2)" in lines
    assert not any("report.html" in line for line in lines)
    (tmp_path / "report.html").touch()
    assert headline(tmp_path)[-1] == f"all of it in one page: {tmp_path}/report.html"


def test_it_fits_a_screen_and_shows_first_what_has_a_verdict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [
        experiment(
            task, method, routing, rank, feeds=feeds, versus="" if routing == "none" else f"{task}_{method}_none_r{rank}_e2"
        )
        for task, feeds in (("vqa", "T1"), ("caption", "T2"))
        for method in ("lora", "adapter")
        for rank in (4, 8)
        for routing in ("none", "mul", "add", "attn", "expand")
    ]
    runs = [row | {"seeds": "1,2,3"} if "adapter" in row["experiment"] and "r8" in row["experiment"] else row for row in runs]
    lines = headline(tables_of(Path("results"), runs))
    assert LINES - 3 <= len(lines) <= LINES and max(map(len, lines)) <= WIDTH
    shown = [line.split()[:3] for line in lines]
    assert all(shown.count(["Adapter", routing, "8"]) == 2 for routing in ("none", "mul", "add", "attn", "expand"))
    assert any(line.endswith("more experiments in the tables") for line in lines)


def test_a_run_that_learned_nothing_is_said_to_have_done_so(tmp_path):
    lines = headline(tables_of(tmp_path, RUNS, collapsed=("vqa_lora_none_r4_e2_seed2",)))
    assert sum("LoRA (learned nothing)" in line for line in lines) == 1
    assert any(line.startswith("no verdict: a run of either side learned nothing (2)") for line in lines)


def test_without_these_tables_it_says_where_the_others_are(tmp_path):
    assert [line.split(":")[0] for line in headline(tmp_path)] == ["tables", "figures"]


def test_a_table_of_another_version_is_named(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/T1_vqa.csv").write_text("experiment,method\na,lora\n")
    with pytest.raises(RoutevlError, match=r"T1_vqa.csv: not a table of this version \(KeyError\('p_holm'\)\): remove it"):
        headline(tmp_path)
