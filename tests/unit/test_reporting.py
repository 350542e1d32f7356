"""Statistics, tables and figures, on a small synthetic results folder."""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_results import CLAIMS, PUBLISHED, RUNS, experiment, make_figure, make_table, write, write_results, write_sheet

from routevl.errors import RoutevlError
from routevl.reporting import figures, results, statistics, tables
from routevl.reporting.claims import verdict
from routevl.reporting.published import read_claims, read_published


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    folder = write_results(tmp_path_factory.mktemp("results"), RUNS)
    write_sheet(folder / "experiments.tsv", RUNS)
    return folder


@pytest.fixture
def own_copy(scored, tmp_path) -> Path:
    return shutil.copytree(scored, tmp_path / "results")


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return {row["experiment"]: row for row in csv.DictReader(file)}


# Statistics ----------------------------------------------------------------------------------------


def test_mean_and_std_are_those_of_a_sample():
    mean, std = statistics.mean_and_std([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert std == pytest.approx(np.std([1.0, 2.0, 6.0], ddof=1))


def test_std_of_one_seed_is_unknown():
    mean, std = statistics.mean_and_std([0.5])
    assert mean == 0.5
    assert math.isnan(std)


def test_paired_bootstrap_agrees_with_a_direct_computation():
    generator = np.random.default_rng(0)
    baseline = generator.random(50)
    system = baseline + generator.normal(0.1, 0.2, 50)
    gain = statistics.paired_bootstrap(baseline, system, seed=3, resamples=400)
    drawn = np.random.default_rng(3).integers(0, 50, size=(400, 50), dtype=np.int32)
    differences = np.array([system[items].mean() - baseline[items].mean() for items in drawn])
    relative = np.array([100 * (system[items].mean() / baseline[items].mean() - 1) for items in drawn])
    assert gain.absolute.estimate == pytest.approx(system.mean() - baseline.mean())
    assert [gain.absolute.low, gain.absolute.high] == pytest.approx(np.quantile(differences, [0.025, 0.975]))
    assert gain.relative.estimate == pytest.approx(100 * (system.mean() / baseline.mean() - 1))
    assert [gain.relative.low, gain.relative.high] == pytest.approx(np.quantile(relative, [0.025, 0.975]))


def test_bootstrap_interval_has_its_nominal_coverage():
    """Over 300 synthetic experiments with a true gain of 0.2, about 95% of the intervals contain it."""
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        baseline = generator.normal(1.0, 0.5, 80)
        system = baseline + generator.normal(0.2, 0.4, 80)
        interval = statistics.paired_bootstrap(baseline, system, seed=trial, resamples=500).absolute
        covered += interval.low <= 0.2 <= interval.high
    assert 0.90 <= covered / 300 <= 0.985


def test_pairing_uses_the_same_items_for_both_systems():
    """A constant gain on very different items has an interval of no width."""
    baseline = np.random.default_rng(1).random(200) * 100 + 1
    interval = statistics.paired_bootstrap(baseline, baseline + 5, seed=1, resamples=200).absolute
    assert [interval.low, interval.high] == pytest.approx([5, 5])


def test_bootstrap_depends_on_its_seed_only():
    scores = np.random.default_rng(2).random(100)
    first = statistics.bootstrap_mean(scores, seed=1, resamples=300)
    assert statistics.bootstrap_mean(scores, seed=1, resamples=300) == first
    assert statistics.bootstrap_mean(scores, seed=2, resamples=300) != first


def test_relative_gain_over_nothing_is_unknown():
    gain = statistics.paired_bootstrap(np.zeros(10), np.ones(10), seed=1, resamples=50)
    assert math.isnan(gain.relative.estimate)
    assert gain.absolute.verdict == 1


# Collecting ----------------------------------------------------------------------------------------


def test_collect_gives_one_row_per_run(scored):
    runs = results.collect(scored / "experiments.tsv", scored, "T1")
    assert len(runs) == 6
    assert {"run", "seed", "trainable_params", "accuracy", "n"} <= set(runs.columns)
    assert runs["run"].iloc[0] == "vqa_lora_none_r4_e2_noprefix_seed1"


def test_nothing_feeds_an_unknown_table(scored):
    with pytest.raises(RoutevlError, match="no experiment names T9"):
        results.collect(scored / "experiments.tsv", scored, "T9")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("scores/{run}/metrics.json", None, "metrics.json: no such file"),
        ("scores/{run}/metrics.json", "[]", "expected a JSON object"),
        ("scores/{run}/metrics.json", '{"task": "caption"}', "the experiments sheet says 'vqa'"),
        (
            "scores/{run}/metrics.json",
            '{"task": "vqa", "n": 4, "metrics": {"accuracy": NaN}}',
            "finite number",
        ),
        ("scores/{run}/items.json", '{"ids": [1], "accuracy": []}', "equally long"),
        ("scores/{run}/items.json", '{"ids": [1], "accuracy": [5]}', "not the 160 items"),
        ("models/{run}/run.json", "{", "not a readable JSON file"),
        ("models/{run}/run.json", '{"trainable_params": "many"}', "wrong type"),
    ],
)
def test_a_missing_or_malformed_file_is_named(own_copy, tmp_path, file, content, message):
    path = own_copy / file.format(run="vqa_lora_mul_r4_e2_seed2")
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(RoutevlError, match=message) as error:
        make_table("T1_vqa", own_copy, tmp_path / "T1_vqa.csv")
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("T1_vqa.*"))


def test_a_malformed_line_of_the_training_log_is_named(own_copy, tmp_path):
    path = own_copy / "models" / "vqa_lora_mul_r4_e2_seed1" / "training.jsonl"
    path.write_text('{"step": 1, "epoch": 1, "loss": 1.0}\n{"step"', encoding="utf-8")
    with pytest.raises(RoutevlError, match="training.jsonl: line 2"):
        make_figure("F5_curves", own_copy, tmp_path / "F5.svg")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rank", "four", "rank of .* is 'four'"),
        ("task", "nlvr2", "task is 'nlvr2'"),
        ("seeds", "", "no seeds"),
    ],
)
def test_a_wrong_value_in_the_sheet_is_named(tmp_path, column, value, message):
    sheet = write_sheet(tmp_path / "sheet.tsv", [experiment(feeds="T1") | {column: value}])
    with pytest.raises(RoutevlError, match=message):
        results.read_experiments(sheet, "T1")


# Tables --------------------------------------------------------------------------------------------


def test_score_table_reports_means_gains_and_blanks(scored, tmp_path):
    rows = rows_of(make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv"))
    mul, add, plain = (rows[f"vqa_lora_{routing}_r4_e2"] for routing in ("mul", "add", "none"))
    runs = [json.loads((scored / "scores" / f"vqa_lora_mul_r4_e2_seed{seed}" / "metrics.json").read_text()) for seed in (1, 2)]
    accuracies = [run["metrics"]["accuracy"] for run in runs]
    assert float(mul["accuracy_mean"]) == pytest.approx(np.mean(accuracies), rel=1e-5)
    assert float(mul["accuracy_std"]) == pytest.approx(np.std(accuracies, ddof=1), rel=1e-4)
    expected_gain = float(mul["accuracy_mean"]) - float(plain["accuracy_mean"])
    assert float(mul["gain_vs_none"]) == pytest.approx(expected_gain, abs=1e-3)
    assert float(mul["gain_ci_low"]) < float(mul["gain_vs_none"]) < float(mul["gain_ci_high"])
    assert (add["n_seeds"], add["accuracy_std"]) == ("1", "")
    assert plain["gain_vs_none"] == ""
    assert rows["vqa_lora_none_r4_e2_noprefix"]["prefix"] == "no"
    assert {row["published"] for row in rows.values()} == {""}


def test_score_table_in_words(scored, tmp_path):
    text = make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv").with_suffix(".md").read_text(encoding="utf-8")
    assert "At rank 4 after 2 epochs routing (`mul`) improves LoRA by" in text
    assert "on VQA with roberta_demo + vit_demo (n=2 seeds)" in text
    assert "The paper claims over 20% improvement on VQAv2 (RoBERTa-large + ViT-L/16) (abstract)" in text


@pytest.mark.parametrize(
    ("shift", "words"),
    [(20.0, "improves LoRA by"), (-20.0, "harms LoRA by"), (0.0, "no significant difference")],
)
def test_sentences_follow_the_interval(own_copy, tmp_path, shift, words):
    """The routed run's items are the baseline's, shifted; noise keeps the undecided case undecided."""
    plain = json.loads((own_copy / "scores" / "vqa_lora_none_r4_e2_seed1" / "items.json").read_text())
    noise = np.random.default_rng(1).permutation([-8.0, 8.0] * (len(plain["ids"]) // 2))
    shifted = [score + shift + step for score, step in zip(plain["accuracy"], noise, strict=True)]
    write(own_copy / "scores" / "vqa_lora_none_r4_e2_seed2" / "items.json", plain)
    for seed in (1, 2):
        items = plain | {"accuracy": shifted}
        write(own_copy / "scores" / f"vqa_lora_mul_r4_e2_seed{seed}" / "items.json", items)
    text = make_table("T1_vqa", own_copy, tmp_path / "T1.csv").with_suffix(".md").read_text(encoding="utf-8")
    sentence = next(line for line in text.splitlines() if line.startswith("- ") and "`mul`" in line)
    assert words in sentence


def test_caption_table_keeps_fractions_and_shows_percent(scored, tmp_path):
    output = make_table("T2_caption", scored, tmp_path / "T2_caption.csv")
    row = rows_of(output)["caption_lora_mul_r4_e2"]
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert row["SPICE_mean"] == ""
    assert "SPICE (needs Stanford CoreNLP" in text
    assert f"{100 * float(row['CIDEr_mean']):.2f}" in text


def test_cost_table_reads_sizes_and_timings(scored, tmp_path):
    row = rows_of(make_table("T6_cost", scored, tmp_path / "T6_cost.csv"))["vqa_lora_mul_r4_e2"]
    adapter = scored / "models" / "vqa_lora_mul_r4_e2_seed1" / "adapter_model.safetensors"
    assert int(row["adapter_bytes"]) == adapter.stat().st_size
    assert int(row["bottleneck_params"]) == 2 * 4 * 2 * 128 * 4
    assert (row["device"], row["peak_memory_mb_mean"]) == ("cpu", "612")


def test_a_published_figure_is_shown_for_the_same_backbones_only(scored, tmp_path):
    lines = PUBLISHED.read_text(encoding="utf-8") + (
        "Paper,1,vqa,roberta_demo + vit_demo,lora mul,accuracy,71.5,,\nPaper,1,vqa,another + vit_demo,lora add,accuracy,70.5,,\n"
    )
    published = tmp_path / "published.csv"
    published.write_text(lines, encoding="utf-8")
    table = tables.score_table(
        scored / "experiments.tsv", scored, read_published(published), read_claims(CLAIMS), "vqa", "T1_vqa"
    )
    found = table.data.set_index("routing")["published"]
    assert found["mul"] == 71.5
    assert math.isnan(found["add"])


def test_published_figures_are_those_of_the_sources():
    published = read_published(PUBLISHED)
    found = published[(published["method"] == "VL-PET large") & (published["metric"] == "COCO CIDEr")]
    assert (found["value"].item(), found["std"].item()) == (122.03, 0.46)


def test_tex_escapes_what_latex_would_misread(scored, tmp_path):
    tex = make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv").with_suffix(".tex").read_text(encoding="utf-8")
    assert r"T1\_vqa: VQA accuracy (\%)" in tex
    assert "±" not in tex


def test_the_page_of_a_table_has_its_rows_and_loads_nothing(scored, tmp_path):
    page = make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv").with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("<table>") == 1 and page.count("<tr>") == 1 + 4
    assert "<td>none (blind: no image)</td>" in page and "<code>mul</code>" in page
    assert not any(text in page for text in ("<script", "src=", "href=", "url("))


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_are_the_same_bytes_each_time(scored, tmp_path, name):
    first = make_table(name, scored, tmp_path / "a" / f"{name}.csv")
    second = make_table(name, scored, tmp_path / "b" / f"{name}.csv")
    for suffix in (".csv", ".md", ".tex", ".html"):
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()


def test_unknown_names_are_refused(scored, tmp_path):
    with pytest.raises(RoutevlError, match="unknown table 'T9_other'"):
        make_table("T9_other", scored, tmp_path / "T9.csv")
    with pytest.raises(RoutevlError, match="unknown figure 'F0'"):
        make_figure("F0", scored, tmp_path / "F0.svg")


# Claims --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("supporting", "comparisons", "reaches_figure", "words"),
    [
        (4, 4, True, "holds"),
        (4, 4, False, "holds in part"),
        (3, 4, True, "holds in part"),
        (0, 4, True, "does not hold"),
        (0, 0, True, "not tested"),
    ],
)
def test_the_verdict_follows_the_rule(supporting, comparisons, reaches_figure, words):
    assert verdict(supporting, comparisons, reaches_figure) == words


def claims_of(folder: Path, output: Path, **options: Path) -> dict[tuple[str, str], dict[str, str]]:
    with open(make_table("T0_claims", folder, output, **options), encoding="utf-8", newline="") as file:
        return {(row["claim"], row["method"]): row for row in csv.DictReader(file)}


def test_claims_are_beside_what_was_measured(scored, tmp_path):
    rows = claims_of(scored, tmp_path / "T0_claims.csv")
    gains = rows_of(make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv"))
    smallest, largest = sorted(
        (gains[f"vqa_lora_{routing}_r4_e2"] for routing in ("mul", "add")), key=lambda gain: float(gain["gain_vs_none_relative"])
    )
    row = rows["vqa_gain", "lora"]
    assert (row["comparisons"], row["improve"], row["harm"], row["no_significant_difference"]) == ("2", "2", "0", "0")
    for name, gain in (("smallest", smallest), ("largest", largest)):
        assert row[f"{name}_gain_routing"] == gain["routing"]
        assert row[f"{name}_gain_relative"] == gain["gain_vs_none_relative"]
        assert row[f"{name}_gain_ci_low"] == gain["gain_relative_ci_low"]
        assert row[f"{name}_gain_ci_high"] == gain["gain_relative_ci_high"]
    assert (row["backbones"], row["scale"], row["published"]) == ("roberta_demo + vit_demo", "not the paper's", "20")
    assert rows["caption_gain", "lora"]["largest_gain_relative"] != row["largest_gain_relative"]
    assert rows["no_parameters", "lora"]["supporting"] == "4" and rows["no_parameters", "lora"]["verdict"] == "holds"
    for untested in (("multitask_gain", "lora"), ("vqa_gain", "adapter"), ("no_parameters", "adapter")):
        assert (rows[untested]["comparisons"], rows[untested]["verdict"]) == ("0", "not tested")


def set_items(folder: Path, run: str, scores: list[float]) -> None:
    path = folder / "scores" / run / "items.json"
    write(path, json.loads(path.read_text()) | {"accuracy": scores})


@pytest.mark.parametrize(
    ("mul", "add", "words"),
    [(80.0, 60.0, "holds"), (55.0, 55.0, "holds in part"), (80.0, 50.0, "holds in part"), (40.0, 50.0, "does not hold")],
)
def test_a_gain_must_be_everywhere_and_as_large_as_published(own_copy, tmp_path, mul, add, words):
    for routing, score in (("none", 50.0), ("mul", mul), ("add", add)):
        for run in (own_copy / "scores").glob(f"vqa_lora_{routing}_r4_e2_seed*"):
            set_items(own_copy, run.name, [score] * 160)
    assert claims_of(own_copy, tmp_path / "T0.csv")["vqa_gain", "lora"]["verdict"] == words


def test_more_parameters_with_routing_are_found(own_copy, tmp_path):
    for seed in (1, 2):
        path = own_copy / "models" / f"vqa_lora_mul_r4_e2_seed{seed}" / "run.json"
        run = json.loads(path.read_text())
        write(path, run | {"trainable_params": run["trainable_params"] + 1})
    row = claims_of(own_copy, tmp_path / "T0.csv")["no_parameters", "lora"]
    assert (row["supporting"], row["comparisons"], row["verdict"]) == ("3", "4", "holds in part")


def test_a_baseline_that_scores_nothing_has_no_relative_gain(own_copy, tmp_path):
    for seed in (1, 2):
        set_items(own_copy, f"vqa_lora_none_r4_e2_seed{seed}", [0.0] * 160)
    row = claims_of(own_copy, tmp_path / "T0.csv")["vqa_gain", "lora"]
    assert (row["improve"], row["largest_gain_relative"], row["verdict"]) == ("2", "", "holds in part")


def test_the_paper_s_backbones_are_recognised(scored, tmp_path):
    claims = tmp_path / "claims.tsv"
    claims.write_text(CLAIMS.read_text(encoding="utf-8").replace("roberta-large + vit-large", "roberta_demo + vit_demo"))
    rows = claims_of(scored, tmp_path / "T0.csv", claims=claims)
    assert rows["vqa_gain", "lora"]["scale"] == "the paper's backbones"
    assert rows["caption_gain", "lora"]["scale"] == "not the paper's"


def test_the_rule_stands_below_the_claims(scored, tmp_path):
    text = make_table("T0_claims", scored, tmp_path / "T0.csv").with_suffix(".md").read_text(encoding="utf-8")
    assert "The verdicts follow a fixed rule." in text and "neither confirms nor refutes the paper's figure" in text
    assert "`multitask_gain` (abstract): smaller but consistent improvements" in text


def test_claims_are_not_tested_against_a_baseline_without_the_image(own_copy, tmp_path):
    write_sheet(own_copy / "experiments.tsv", [row | {"feeds": "T0"} for row in RUNS])
    with pytest.raises(RoutevlError, match="vqa_lora_none_r4_e2_noprefix feeds T0 with prefix no"):
        make_table("T0_claims", own_copy, tmp_path / "T0.csv")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [("untested", "unknown", "kind of multitask_gain is 'unknown'"), ("\t20\t", "\t\t", "vqa_gain .* needs its figure")],
)
def test_a_malformed_claim_is_named(tmp_path, before, after, message):
    claims = tmp_path / "claims.tsv"
    claims.write_text(CLAIMS.read_text(encoding="utf-8").replace(before, after))
    with pytest.raises(RoutevlError, match=message):
        read_claims(claims)


def test_runs_that_feed_the_claims_have_the_prefix_and_a_baseline():
    """In every run sheet of the project: else a claim would be judged by runs that do not bear on it."""
    for sheet in (CLAIMS.parent / "experiments").glob("*.tsv"):
        rows = results.read_experiments(sheet, "T0")
        assert rows["prefix"].all(), sheet
        assert set(rows[rows["routing"] == "none"]["setting"]) == set(rows["setting"]), sheet


# Figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_the_same_bytes_each_time(scored, tmp_path, name):
    first = make_figure(name, scored, tmp_path / "a" / f"{name}.svg")
    second = make_figure(name, scored, tmp_path / "b" / f"{name}.svg")
    for suffix in (".svg", ".pdf", ".png", ".csv"):
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name != "F1_method"])
def test_figures_work_with_a_single_routed_run(tmp_path, name):
    runs = [experiment(routing="mul", feeds="F2,F3,F5,F6,F8")]
    folder = write_results(tmp_path / "results", runs, images=6)
    write_sheet(folder / "experiments.tsv", runs)
    assert make_figure(name, folder, tmp_path / f"{name}.svg").stat().st_size > 0


def test_a_figure_says_which_option_it_needs(tmp_path):
    nothing = {"experiments": None, "results": None, "data": None}
    with pytest.raises(RoutevlError, match="figure F2_main needs --experiments"):
        figures.run(argparse.Namespace(name="F2_main", output=tmp_path / "F2_main.svg", **nothing))
    figures.run(argparse.Namespace(name="F1_method", output=tmp_path / "F1_method.svg", **nothing))


def test_examples_name_a_broken_image(own_copy, tmp_path):
    for path in (own_copy / "data" / "test" / "images").iterdir():
        path.write_bytes(b"no image")
    entries = json.loads((own_copy / "data" / "test" / "images.json").read_text())
    for entry in entries:
        entry["file_name"] = str(own_copy / "data" / "test" / "images" / Path(entry["file_name"]).name)
    write(own_copy / "data" / "test" / "images.json", entries)
    with pytest.raises(RoutevlError, match="not a readable image"):
        make_figure("F8_examples", own_copy, tmp_path / "F8_examples.svg")


def test_the_command_line_imports_no_heavy_library():
    command = (
        "import sys, routevl.reporting.tables, routevl.reporting.figures;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'pandas', 'matplotlib', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
