"""Tables and figures, on a small synthetic results folder."""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from synthetic_results import (
    CLAIMS,
    PUBLISHED,
    RUNS,
    SETTINGS,
    experiment,
    make_figure,
    make_table,
    write,
    write_results,
    write_sheet,
)

from routevl.errors import RoutevlError
from routevl.methods.table import FAMILIES, METHODS, MethodRow
from routevl.reporting import FIGURES, TABLES, figures, formats, names, results, style
from routevl.reporting.claims import verdict
from routevl.reporting.figures import f1_method, f2_main, f3_rank_budget, f4_methods, f5_curves, f6_question_types, f7_inside
from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.published import read_claims, read_published
from routevl.reporting.statistics import paired_gain
from routevl.reporting.style import BLIND_LABEL
from routevl.routing import ROUTING, Routing
from routevl.sheet import read_sheet


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


# Collecting ----------------------------------------------------------------------------------------


def collected(folder: Path, feeds: str) -> dict[str, dict]:
    return {row["experiment"]: row for row in results.collect(folder / "experiments.tsv", folder, feeds).to_dict("records")}


def results_of(folder: Path, *runs: dict) -> Path:
    """A folder with results of those runs alone."""
    write_results(folder, list(runs), images=8)
    write_sheet(folder / "experiments.tsv", list(runs))
    return folder


def test_collect_gives_one_row_per_run(scored):
    runs = results.collect(scored / "experiments.tsv", scored, "T1")
    assert len(runs) == 8
    assert {"run", "seed", "trainable_params", "accuracy", "n"} <= set(runs.columns)
    assert runs["run"].iloc[0] == "vqa_lora_none_r4_e2_noprefix_seed1"


def test_nothing_feeds_an_unknown_table(scored):
    with pytest.raises(RoutevlError, match="no experiment names T9"):
        results.collect(scored / "experiments.tsv", scored, "T9")


def test_options_come_from_the_run_and_not_every_method_has_a_rank(own_copy):
    path = own_copy / "models" / "vqa_lora_mul_r4_e2_seed1" / "run.json"
    record = json.loads(path.read_text())
    record["settings"]["options"] |= {"r": 7, "visual_scale": "tanh"}
    write(path, record)
    row = collected(own_copy, "T1")["vqa_lora_mul_r4_e2"]
    assert row["routing"] == "mul"
    assert [run["rank"] for run in results.collect(own_copy / "experiments.tsv", own_copy, "T1").to_dict("records")].count(7) == 1
    options = collected(own_copy, "T6")["vqa_lora_mul_r4_e2"]["options"]
    assert options.startswith("r=4 routing=mul visual_scale=none bottleneck=shared")
    ia3 = make_table("T6_cost", own_copy, own_copy / "T6_cost.csv")
    assert (rows_of(ia3)["vqa_ia3_e2"]["rank"], rows_of(ia3)["vqa_ia3_e2"]["routing"]) == ("", "none")


def test_a_setting_of_the_sheet_is_among_the_options(tmp_path):
    folder = results_of(tmp_path, experiment(feeds="T1", options="learning_rate=0.005"))
    options = collected(folder, "T1")["vqa_lora_none_r4_e2"]["options"]
    assert options.endswith("lora_dropout=0 bias=none places=attention learning_rate=0.005")


def test_blind_is_what_reads_no_image(tmp_path):
    runs = [
        experiment(prefix="no", feeds="T1"),
        experiment(routing="mul", prefix="no", feeds="T1"),
        experiment(method="ia3", prefix="no", feeds="T1", experiment="blind_ia3"),
        experiment(method="ia3", feeds="T1"),
        experiment(feeds="T1", options="control=noise"),
    ]
    blind = {name for name, row in collected(results_of(tmp_path, *runs), "T1").items() if row["blind"]}
    assert blind == {"vqa_lora_none_r4_e2_noprefix", "blind_ia3"}


def test_rows_stand_with_what_they_are_compared_with(tmp_path):
    """And groups in the order of the list of methods, each with its baseline first."""
    runs = [
        experiment(method="bitfit", feeds="T1", versus="vqa_adapter_none_r4_e2"),
        experiment(method="ia3", feeds="T1", versus="vqa_bitfit_e2"),
        experiment(method="adapter", feeds="T1"),
        experiment(routing="mul", feeds="T1", versus="vqa_lora_none_r4_e2"),
        experiment(routing="none"),
    ]
    rows = collected(results_of(tmp_path, *runs), "T1")
    order = ["vqa_lora_mul_r4_e2", "vqa_adapter_none_r4_e2", "vqa_ia3_e2", "vqa_bitfit_e2"]
    assert list(rows) == order
    assert [rows[name]["root"] for name in order] == ["vqa_lora_none_r4_e2", *["vqa_adapter_none_r4_e2"] * 3]


def test_what_is_compared_with_the_blind_baseline_stands_in_a_group_of_its_own(tmp_path):
    runs = [
        experiment(prefix="no", feeds="F2"),
        experiment(feeds="F2", versus="vqa_lora_none_r4_e2_noprefix"),
        experiment(routing="mul", feeds="F2", versus="vqa_lora_none_r4_e2"),
        experiment(method="adapter", feeds="F2", versus="vqa_lora_none_r4_e2_noprefix"),
    ]
    rows = collected(results_of(tmp_path, *runs), "F2").values()
    assert [row["root"] for row in rows][1:] == [*["vqa_lora_none_r4_e2"] * 2, "vqa_adapter_none_r4_e2"]
    assert {row["variant"] for row in rows} == {""}


def test_names_say_what_tells_rows_apart(tmp_path):
    runs = [
        experiment(feeds="F2"),
        experiment(routing="mul", feeds="F2", versus="vqa_lora_none_r4_e2"),
        experiment(routing="mul", feeds="F2", versus="vqa_lora_none_r4_e2", options="control=ones", experiment="ones"),
        experiment(rank=8, feeds="F2"),
        experiment(method="ia3", feeds="F2"),
    ]
    rows = collected(results_of(tmp_path, *runs), "F2")
    groups = [row for row in rows.values() if row["root"] == row["experiment"]]
    labels = [style.setting_label(group, groups) for group in groups]
    assert labels == ["LoRA, rank 4, 2 epochs", "LoRA, rank 8, 2 epochs", "(IA)³, 2 epochs"]  # alpha follows from the rank
    assert [row["variant"] for row in rows.values()] == ["", "", "control ones", "", ""]
    assert names.full_name(rows["ones"], rows.values()) == "LoRA mul, control ones, rank 4"
    cells = names.setting_cells(list(rows.values()))
    assert [row["Rank"] for row in cells] == ["4", "4", "4", "8", ""]
    assert [row["Control"] for row in cells] == ["none", "none", "ones", "none", "none"]


def set_tried(folder: Path, run: str, rates: list[float]) -> None:
    """The run's learning rate was chosen among those."""
    path = folder / "models" / run / "run.json"
    write(path, json.loads(path.read_text()) | {"tuned": {"trials": [{"learning_rate": rate} for rate in rates]}})


def test_a_backbone_that_most_rows_have_goes_without_saying(tmp_path):
    """And what another backbone or a routing function implies, here how many visual tokens there are and which are routed."""
    other = {"text_backbone": "meter_demo", "visual_tokens": "all", "feeds": "F4"}
    routed = {"routing": "mul", "options": "routed_tokens=mean"}
    runs = [
        *(experiment(method=method, feeds="F4") for method in ("lora", "ia3", "bitfit")),
        experiment(routing="mul", feeds="F4"),
        experiment(**other, experiment="other"),
        experiment(**other, **routed, experiment="other_routed"),
        experiment("caption", feeds="F4"),
        experiment("caption", text_backbone="another_demo", feeds="F4", experiment="half"),
    ]
    rows = collected(results_of(tmp_path, *runs), "F4").values()
    found = {row["experiment"]: names.full_name(row, rows) for row in rows}
    assert found == {
        "vqa_lora_none_r4_e2": "LoRA", "vqa_lora_mul_r4_e2": "LoRA mul", "vqa_ia3_e2": "(IA)³", "vqa_bitfit_e2": "BitFit",
        "other": "LoRA, meter_demo", "other_routed": "LoRA mul, meter_demo",
        "caption_lora_none_r4_e2": "LoRA, gpt2_demo", "half": "LoRA, another_demo",
    }  # fmt: skip


def test_a_tuned_learning_rate_is_no_part_of_a_name(tmp_path):
    """One that the sheet says is: also beside the same method with a tuned one, in the column `differs` too."""
    runs = [
        experiment(feeds="F4,T4,T7", options="learning_rate=0.006", experiment="tuned"),
        experiment(routing="mul", feeds="F4,T4,T7", options="learning_rate=0.002", versus="tuned"),
        experiment(feeds="F4,T4,T7", options="learning_rate=0.004", experiment="chosen", versus="tuned"),
    ]
    folder = results_of(tmp_path, *runs)
    for run in ("tuned_seed1", "vqa_lora_mul_r4_e2_seed1"):
        set_tried(folder, run, [0.002, 0.006])
    rows = collected(folder, "F4")
    found = {name: names.full_name(row, rows.values()) for name, row in rows.items()}
    assert found == {"tuned": "LoRA", "vqa_lora_mul_r4_e2": "LoRA mul", "chosen": "LoRA, learning rate 0.004"}
    assert {name: row["variant"] for name, row in rows.items() if row["variant"]} == {"chosen": "learning rate 0.004"}
    for table in ("T4_ablations", "T7_methods"):
        written = rows_of(make_table(table, folder, tmp_path / f"{table}.csv"))
        assert {name: row["differs"] for name, row in written.items() if row["differs"]} == {"chosen": "learning rate 0.004"}
        assert [written[name]["learning_rate"] for name in ("tuned", "chosen")] == ["0.006", "0.004"]


WITHOUT_LEARNED = json.dumps({"settings": SETTINGS | {"task": "vqa", "method": "ia3", "seed": 1, "epochs": 1, "prefix": True,
                                                      "visual_tokens": "pooled", "options": {}}})  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("scores/{run}/metrics.json", None, "metrics.json: no such file"),
        ("scores/{run}/metrics.json", '{"n": 4, "metrics": {"accuracy": NaN}}', "finite number"),
        ("scores/{run}/items.json", '{"ids": [1], "images": [1], "accuracy": [5]}', "not the 160 items"),
        ("scores/{run}/items.json", '{"ids": [1], "accuracy": [5]}', "an earlier version wrote it"),
        ("models/{run}/run.json", "{", "not a readable JSON file"),
        (
            "models/{run}/run.json",
            WITHOUT_LEARNED,
            "an earlier version wrote it, without whether it learned: remove .* train again",
        ),
        ("models/{run}/run.json", '{"settings": {"task": "vqa"}}', "run.json: settings: options is None"),
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


def test_a_malformed_training_log_is_named(own_copy, tmp_path):
    path = own_copy / "models" / "vqa_lora_mul_r4_e2_seed1" / "training.jsonl"
    path.write_text('{"step": 1, "epoch": 1, "loss": 1.0}\n{"step"', encoding="utf-8")
    with pytest.raises(RoutevlError, match="training.jsonl: not a readable training log"):
        make_figure("F5_curves", own_copy, tmp_path / "F5.svg")


# Tables --------------------------------------------------------------------------------------------


def test_score_table_reports_means_gains_and_blanks(scored, tmp_path):
    rows = rows_of(make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv"))
    mul, add, plain = (rows[f"vqa_lora_{routing}_r4_e2"] for routing in ("mul", "add", "none"))
    runs = [json.loads((scored / "scores" / f"vqa_lora_mul_r4_e2_seed{seed}" / "metrics.json").read_text()) for seed in (1, 2, 3)]
    accuracies = [run["metrics"]["accuracy"] for run in runs]
    assert float(mul["accuracy_mean"]) == pytest.approx(np.mean(accuracies), rel=1e-5)
    assert float(mul["accuracy_std"]) == pytest.approx(np.std(accuracies, ddof=1), rel=1e-4)
    expected_gain = float(mul["accuracy_mean"]) - float(plain["accuracy_mean"])
    assert float(mul["gain"]) == pytest.approx(expected_gain, abs=1e-3)
    assert float(mul["gain_ci_low"]) < float(mul["gain"]) < float(mul["gain_ci_high"])
    assert (mul["n_seeds"], mul["versus_seeds"], mul["ci_over"], mul["no_verdict"]) == ("3", "3", "images and seeds", "")
    assert (add["n_seeds"], add["versus_seeds"], add["ci_over"], add["accuracy_std"]) == ("1", "3", "images", "")
    assert (add["no_verdict"], add["p_holm"], mul["p_holm"]) == ("fewer than three seeds", "", mul["p"])
    assert plain["gain"] == ""
    assert (mul["versus"], plain["versus"]) == ("vqa_lora_none_r4_e2", "")
    assert rows["vqa_lora_none_r4_e2_noprefix"]["prefix"] == "no"
    assert {row["published"] for row in rows.values()} == {""}


def test_a_gain_is_over_the_experiment_that_versus_names_and_over_no_other(own_copy, tmp_path):
    """Which need not feed the table. Rows with equal columns are not compared unless the sheet says so."""
    plain, mul, other = experiment(seeds="1,2"), experiment(routing="mul", seeds="1,2"), experiment(method="ia3")
    write_sheet(own_copy / "experiments.tsv", [plain | {"feeds": "T1"}, mul | {"feeds": "T1"}])
    assert {row["gain"] for row in rows_of(make_table("T1_vqa", own_copy, tmp_path / "T1.csv")).values()} == {""}
    feeding = [row | {"feeds": "T1", "versus": "vqa_lora_none_r4_e2"} for row in (mul, other)]
    write_sheet(own_copy / "experiments.tsv", [plain, *feeding])
    output = make_table("T1_vqa", own_copy, tmp_path / "T1.csv")
    rows = rows_of(output)
    assert list(rows) == ["vqa_lora_mul_r4_e2", "vqa_ia3_e2"] and all(row["gain"] for row in rows.values())
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "Of 2 comparisons with the baseline that the run sheet names: an improvement in 0, harm in 0, " in text
    assert "no verdict in 2 (fewer than three seeds)." in text
    assert "- After 2 epochs (IA)³ against `vqa_lora_none_r4_e2`: " in text


def table_of(path: Path) -> tuple[str, list[dict[str, str]]]:
    """What readers see of a table: the sentence above it, and its rows by heading."""
    lines = path.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return lines[2], [dict(zip(header, row, strict=True)) for row in rows]


def test_a_table_shows_what_differs_and_says_above_it_what_all_rows_share(tmp_path):
    """Also what differs between rows of two methods; an option that one method has is no difference to another method."""
    runs = [
        experiment(routing="mul", feeds="T1"),
        experiment(routing="mul", feeds="T1", options="control=ones", experiment="ones"),
        experiment(method="ia3", feeds="T1", options="learning_rate=0.005"),
    ]
    shared, rows = table_of(make_table("T1_vqa", results_of(tmp_path / "all", *runs), tmp_path / "T1.csv"))
    assert shared.startswith("All rows: backbones roberta_demo + vit_demo, ") and "epochs 2, batch size 8, " in shared
    assert "max grad norm 1, " in shared and shared.endswith("lora dropout 0, bias none, places attention.")
    assert ". All rows, where there is one: rank 4, visual scale none, bottleneck shared, " in shared
    assert [row["Control"] for row in rows] == ["none", "ones", "none"]
    assert [row["Learning rate"] for row in rows] == ["0.001", "0.001", "0.005"]
    assert list(rows[0])[:6] == ["Method", "Routing", "Control", "Learning rate", "Accuracy", "Gain [95% CI]"]
    assert "control" not in shared and "learning rate" not in shared
    shared, rows = table_of(make_table("T1_vqa", results_of(tmp_path / "one", *runs[:1]), tmp_path / "T1.csv"))
    assert "control none" in shared and list(rows[0])[:3] == ["Method", "Routing", "Accuracy"]


def test_an_option_that_one_row_of_a_method_sets_is_seen_in_all_of_them(tmp_path):
    """Where an option is none, run.json does not have it."""
    runs = [experiment(feeds="T1"), experiment(feeds="T1", options="max_train_examples=50", experiment="few")]
    _, rows = table_of(make_table("T1_vqa", results_of(tmp_path, *runs), tmp_path / "T1.csv"))
    assert [row["Max train examples"] for row in rows] == ["none", "50"]


def test_a_table_of_two_tasks_says_what_the_rows_of_each_share(scored, tmp_path):
    shared, rows = table_of(make_table("T6_cost", scored, tmp_path / "T6_cost.csv"))
    assert re.search(r"All rows: .*\. VQA: backbones roberta_demo .*\. Captioning: backbones gpt2_demo ", shared)
    assert list(rows[0])[:5] == ["Task", "Method", "Routing", "Params (M)", "%"]


def test_what_is_shared_is_said_of_all_rows_else_of_each_task_and_what_is_blank_is_dropped():
    columns = ["Task", "Score", "Rank", "Alpha", "Epochs", "Seeds", "Published"]
    cells = [
        ["VQA", "1", "4", "8", "3", "1", ""],
        ["VQA", "1", "4", "", "3", "2", ""],
        ["Captioning", "1", "4", "9", "1", "1", ""],
    ]
    sentence, shown = formats.without_shared(pd.DataFrame(cells, columns=columns), columns[2:])
    assert sentence == "All rows: rank 4. VQA: epochs 3. VQA, where there is one: alpha 8. Captioning: alpha 9, epochs 1."
    assert list(shown) == ["Task", "Score", "Seeds"]  # the score is the same by chance


@pytest.mark.parametrize("name", ["T1_vqa", "T2_caption"])
def test_the_gain_is_within_the_first_hundred_characters(scored, tmp_path, name):
    path = make_table(name, scored, tmp_path / f"{name}.csv").with_suffix(".md")
    header = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|"))
    assert header.index("Gain [95% CI] |") + len("Gain [95% CI]") <= 100


def test_score_table_in_words(scored, tmp_path):
    text = make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv").with_suffix(".md").read_text(encoding="utf-8")
    assert "At rank 4 after 2 epochs routing (`mul`) improves LoRA by" in text
    assert "on VQA with roberta_demo + vit_demo (n=3 seeds)" in text
    assert "The paper claims over 20% improvement on VQAv2 (RoBERTa-large + ViT-L/16) (abstract)" in text


def set_items(folder: Path, run: str, scores: list[float]) -> None:
    path = folder / "scores" / run / "items.json"
    write(path, json.loads(path.read_text()) | {"accuracy": scores})


def sentence_of_mul(folder: Path, output: Path, shift: float) -> str:
    """What T1 says of a routed run whose items are the baseline's, all seeds alike, shifted and with noise."""
    plain = json.loads((folder / "scores" / "vqa_lora_none_r4_e2_seed1" / "items.json").read_text())["accuracy"]
    noise = np.random.default_rng(1).permutation([-8.0, 8.0] * (len(plain) // 2))
    for seed in (1, 2, 3):
        set_items(folder, f"vqa_lora_none_r4_e2_seed{seed}", plain)
        set_items(folder, f"vqa_lora_mul_r4_e2_seed{seed}", list(np.add(plain, shift + noise)))
    text = make_table("T1_vqa", folder, output).with_suffix(".md").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith("- ") and "`mul`" in line)


@pytest.mark.parametrize(
    ("shift", "words"),
    [(20.0, "improves LoRA by"), (-20.0, "harms LoRA by"), (0.0, "no significant difference")],
)
def test_sentences_follow_the_interval(own_copy, tmp_path, shift, words):
    """A number and its interval have one sign: a harm by 40% is one of 30% to 50%."""
    sentence = sentence_of_mul(own_copy, tmp_path / "T1.csv", shift)
    assert words in sentence and "after Holm's correction" in sentence and "over images and seeds" in sentence
    size, low, high = map(float, re.search(r"([+-]?[\d.]+)% \[(\S+), (\S+)\]", sentence).groups())
    assert low < size < high
    assert low > 0 if shift else low < 0 < high
    assert ("[+" in sentence or "[-" in sentence) == (shift == 0)


def test_b13_fewer_than_three_seeds_carry_no_verdict(own_copy, tmp_path):
    """On either side, however large the gain."""
    rows = {row["experiment"]: row for row in RUNS}
    for seeds in ({"vqa_lora_mul_r4_e2": "1,2"}, {"vqa_lora_none_r4_e2": "1,2"}):
        few = [row | {"seeds": seeds.get(name, row["seeds"])} for name, row in rows.items()]
        write_sheet(own_copy / "experiments.tsv", few)
        sentence = sentence_of_mul(own_copy, tmp_path / "T1.csv", 20.0)
        assert "routing (`mul`) against plain LoRA: +" in sentence and "no verdict (fewer than three seeds)." in sentence
        assert " over images on VQA" in sentence and "improves" not in sentence
        row = claims_of(own_copy, tmp_path / "T0.csv")["vqa_gain", "lora"]
        assert (row["comparisons"], row["left_out"], row["verdict"]) == ("0", "2", "not tested")


def test_b13_nothing_is_measured_against_a_baseline_next_to_zero(own_copy, tmp_path):
    """CIDEr 0.00 -> 0.17 was a gain of 3,791,855% with which the paper's claim held."""
    for routing, score in (("none", 1e-8), ("mul", 0.0017)):
        for path in own_copy.glob(f"scores/caption_lora_{routing}_r4_e2_seed*/items.json"):
            write(path, json.loads(path.read_text()) | {"CIDEr": [score] * 40})
    output = make_table("T2_caption", own_copy, tmp_path / "T2.csv")
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "routing (`mul`) against plain LoRA: +0.2 [+0.2, +0.2] over images and seeds" in text
    assert "no verdict (the baseline scores next to nothing)" in text and "improves" not in text
    assert rows_of(output)["caption_lora_mul_r4_e2"]["gain_relative"] == ""
    row = claims_of(own_copy, tmp_path / "T0.csv")["caption_gain", "lora"]
    assert (row["improve"], row["left_out"], row["largest_gain_relative"], row["verdict"]) == ("0", "2", "", "not tested")


def collapsed_results(folder: Path, *runs: str) -> Path:
    """RUNS, but the results of these, which learned nothing."""
    write_results(folder, RUNS, collapsed=runs)
    write_sheet(folder / "experiments.tsv", RUNS)
    return folder


@pytest.mark.parametrize("run", ["vqa_lora_mul_r4_e2_seed2", "vqa_lora_none_r4_e2_seed3"])
def test_a_run_that_learned_nothing_leaves_its_whole_row_out(tmp_path, run):
    """As a system and as a baseline, in the table and in what is said of the claims."""
    folder, experiment = collapsed_results(tmp_path / "results", run), run.rpartition("_")[0]
    path = make_table("T1_vqa", folder, tmp_path / "T1.csv")
    rows, text = rows_of(path), path.with_suffix(".md").read_text(encoding="utf-8")
    assert {name: row["n_not_learned"] for name, row in rows.items() if row["n_not_learned"] != "0"} == {experiment: "1"}
    numbers = "gain gain_ci_low gain_ci_high gain_relative ci_over p p_holm".split()
    assert [rows["vqa_lora_mul_r4_e2"][name] for name in numbers] == [""] * len(numbers)
    assert rows["vqa_lora_mul_r4_e2"]["no_verdict"] == "a run of either side learned nothing"
    assert (rows["vqa_lora_add_r4_e2"]["gain"] == "") == ("none" in run)
    assert f"† Learned nothing: `{experiment}` (1 of 3 runs)." in text
    assert "routing (`mul`) against plain LoRA on VQA with roberta_demo + vit_demo: no gain (a run of either side" in text
    _, shown = table_of(path)
    assert [row["Method"] for row in shown].count("LoRA †") == 1
    tex = path.with_suffix(".tex").read_text(encoding="utf-8")
    assert "†" not in tex and r"$\dagger$ Learned nothing: " + experiment.replace("_", r"\_") in tex
    claim = claims_of(folder, tmp_path / "T0.csv")["vqa_gain", "lora"]
    judged = [claim[name] for name in ("comparisons", "left_out", "not_learned", "largest_gain_relative", "verdict")]
    assert judged == ["0", "2", "2" if "none" in run else "1", "", "not tested"]
    _, shown = table_of(tmp_path / "T0.csv")
    assert shown[0]["Left out"] == "2 †" and f"`{experiment}`" in (tmp_path / "T0.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["T6_cost", "T7_methods"])
def test_other_tables_mark_what_learned_nothing(tmp_path, name):
    path = make_table(name, collapsed_results(tmp_path / "results", "vqa_ia3_e2_seed1"), tmp_path / f"{name}.csv")
    assert [row["Method"] for row in table_of(path)[1] if "†" in row["Method"]] == ["(IA)³ †"]
    assert "`vqa_ia3_e2` (1 of 1 run)" in path.with_suffix(".md").read_text(encoding="utf-8")
    assert rows_of(path)["vqa_ia3_e2"].get("gain", "") == ""


def test_caption_table_keeps_fractions_and_shows_percent(scored, tmp_path):
    output = make_table("T2_caption", scored, tmp_path / "T2_caption.csv")
    row = rows_of(output)["caption_lora_mul_r4_e2"]
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert row["SPICE_mean"] == ""
    assert "SPICE (needs Stanford CoreNLP" in text
    assert f"{100 * float(row['CIDEr_mean']):.2f}" in text


def test_cost_table_reads_sizes_and_timings(scored, tmp_path):
    rows = rows_of(make_table("T6_cost", scored, tmp_path / "T6_cost.csv"))
    row = rows["vqa_lora_mul_r4_e2"]
    for name, file in (("vqa_lora_mul_r4_e2", "adapter_model.safetensors"), ("vqa_full_e2", "method.safetensors")):
        assert int(rows[name]["saved_bytes"]) == (scored / "models" / f"{name}_seed1" / file).stat().st_size
    assert int(row["method_params"]) == 2 * 4 * 2 * 128 * 4
    assert (row["device"], row["peak_memory_mb_mean"]) == ("cpu", "612")


def test_cost_tables_show_flops_and_leave_blank_what_was_not_counted(tmp_path):
    """By an earlier version. Of runs that leave out other layers, the mean."""
    plain, ia3 = experiment(seeds="1,2", feeds="T6,T7"), experiment(method="ia3", feeds="T6,T7")
    folder = results_of(tmp_path / "results", plain, ia3)
    for run, value in ((f"{plain['experiment']}_seed2", {"forward_flops": 5_000_000}), (f"{ia3['experiment']}_seed1", {})):
        path = folder / "models" / run / "run.json"
        record = json.loads(path.read_text())
        del record["forward_flops"]
        write(path, record | value)
    first = json.loads((folder / "models" / f"{plain['experiment']}_seed1" / "run.json").read_text())["forward_flops"]
    for name in ("T6_cost", "T7_methods"):
        output = make_table(name, folder, tmp_path / f"{name}.csv")
        rows = rows_of(output)
        assert rows["vqa_ia3_e2"]["forward_flops"] == ""
        assert float(rows[plain["experiment"]]["forward_flops"]) == pytest.approx((first + 5_000_000) / 2, rel=1e-5)
        _, shown = table_of(output)
        assert [row["Forward (MFLOPs)"] for row in shown] == [f"{(first + 5_000_000) / 2e6:.1f}", ""]


def test_cost_table_shows_every_part_that_some_run_has(own_copy, tmp_path):
    path = own_copy / "models" / "vqa_ia3_e2_seed1" / "run.json"
    record = json.loads(path.read_text())
    record["trainable_params_by_part"]["vision_model"] = 5_000
    write(path, record)
    output = make_table("T6_cost", own_copy, tmp_path / "T6_cost.csv")
    rows = rows_of(output)
    assert (rows["vqa_ia3_e2"]["vision_model_params"], rows["vqa_full_e2"]["vision_model_params"]) == ("5000", "0")
    assert "Vision model (M)" in output.with_suffix(".md").read_text(encoding="utf-8")


def test_a_run_without_saved_tensors_is_named(own_copy, tmp_path):
    (own_copy / "models" / "vqa_full_e2_seed1" / "method.safetensors").unlink()
    with pytest.raises(RoutevlError, match="vqa_full_e2_seed1: holds neither"):
        make_table("T6_cost", own_copy, tmp_path / "T6_cost.csv")


def test_methods_table_has_a_row_per_experiment_in_the_order_of_the_list(scored, tmp_path):
    with open(make_table("T7_methods", scored, tmp_path / "T7_methods.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = """
        n_seeds n_not_learned trainable_params trainable_params_percent label family differs learning_rates_tried at_edge
        learning_rate accuracy_mean accuracy_std CIDEr_mean CIDEr_std gain_vs_lora gain_ci_low gain_ci_high ci_over p p_holm
        no_verdict gain_vs_blind blind_ci_low blind_ci_high blind_ci_over blind_p blind_p_holm blind_no_verdict versus_blind
        forward_flops step_ms peak_memory_mb saved_bytes
    """
    assert list(rows[0])[:3] == ["experiment", "task", "method"] and list(rows[0])[-33:] == columns.split()
    assert [row["method"] for row in rows] == ["ia3", "bitfit", "full", "prompt_tuning"]
    assert [row["family"] for row in rows] == [METHODS[row["method"]].family for row in rows]
    assert [bool(row["gain_vs_lora"]) for row in rows] == [True, False, False, False]
    assert [(bool(row["accuracy_mean"]), bool(row["CIDEr_mean"])) for row in rows] == [(True, False)] * 3 + [(False, True)]
    text = (tmp_path / "T7_methods.md").read_text(encoding="utf-8")
    assert all(f"| {METHODS[row['method']].label} " in text for row in rows)


BLIND = experiment(prefix="no", seeds="1,2,3", feeds="T7")
PLAIN = experiment(seeds="1,2,3", feeds="T7")
IA3 = experiment(method="ia3", seeds="1,2,3", feeds="T7", versus=PLAIN["experiment"])
CAPTIONS = [
    experiment("caption", prefix="no", seeds="1,2,3", feeds="T7"),
    experiment("caption", routing="mul", seeds="1,2,3", feeds="T7"),
]
OTHERS = [row | {"experiment": f"other_{row['experiment']}", "text_backbone": "other"} for row in (BLIND, PLAIN)]


def test_gains_over_the_blind_baseline_are_paired_and_judged_by_themselves(tmp_path):
    """The row itself stands first. Holm's correction is for the blind comparisons of the task, and for no others."""
    folder = results_of(tmp_path / "results", PLAIN, IA3, BLIND, *CAPTIONS)
    output = make_table("T7_methods", folder, tmp_path / "T7.csv")
    rows, (_, shown) = rows_of(output), table_of(output)
    assert [*rows][0] == BLIND["experiment"] and shown[0]["Routing"] == "none (blind)" and shown[0]["Accuracy"]
    assert shown[0]["Over blind [95% CI]"] == rows[BLIND["experiment"]]["gain_vs_blind"] == ""
    direct = {}
    for row, blind, metric, least in (
        (PLAIN, BLIND, "accuracy", 1),
        (IA3, BLIND, "accuracy", 1),
        (*CAPTIONS[::-1], "CIDEr", 0.01),
    ):
        runs = [[f"{of['experiment']}_seed{seed}" for seed in (1, 2, 3)] for of in (blind, row)]
        items = results.read_items(folder, [*runs[0], *runs[1]], metric)
        systems = (items[of].to_numpy().T for of in runs)
        gain = direct[row["experiment"]] = paired_gain(*systems, items.index.get_level_values("image"), least)
        found, names = rows[row["experiment"]], ("gain_vs_blind", "blind_ci_low", "blind_ci_high", "blind_p")
        expected = (gain.absolute.estimate, gain.absolute.low, gain.absolute.high, gain.p)
        assert [float(found[name]) for name in names] == pytest.approx(expected, rel=1e-5)
        assert (found["versus_blind"], found["blind_ci_over"]) == (blind["experiment"], "images and seeds")
    for of_task in ([PLAIN, IA3], CAPTIONS[1:]):
        ps = sorted((direct[row["experiment"]].p, row["experiment"]) for row in of_task)
        corrected = [min(1, p * (len(ps) - place)) for place, (p, _) in enumerate(ps)]
        expected = np.maximum.accumulate(corrected)
        assert [float(rows[name]["blind_p_holm"]) for _, name in ps] == pytest.approx(expected, rel=1e-5)
    assert rows[IA3["experiment"]]["p_holm"] == rows[IA3["experiment"]]["p"]  # one comparison with LoRA, though two with blind
    judged = {row["Method"]: row["Over blind: verdict"] for row in shown if row["Routing"] == "none"}
    assert judged == {"LoRA": "better", "(IA)³": "better"}


def test_a_backbone_is_named_and_has_its_own_blind_baseline_where_there_is_one(tmp_path):
    pruned = PLAIN | {"experiment": "pruned", "text_backbone": "pruned"}
    vision = PLAIN | {"experiment": "vision", "vision_backbone": "vit_small"}
    longer = experiment(epochs=3, seeds="1,2,3", feeds="T7")
    output = make_table(
        "T7_methods", results_of(tmp_path / "r", PLAIN, BLIND, pruned, vision, longer, *OTHERS), tmp_path / "T7.csv"
    )
    own = {name: row["versus_blind"] for name, row in rows_of(output).items()}
    assert own == {
        BLIND["experiment"]: "",
        OTHERS[0]["experiment"]: "",
        PLAIN["experiment"]: BLIND["experiment"],
        "pruned": BLIND["experiment"],
        "vision": BLIND["experiment"],
        longer["experiment"]: "",
        OTHERS[1]["experiment"]: OTHERS[0]["experiment"],
    }
    assert [*own][:2] == [BLIND["experiment"], OTHERS[0]["experiment"]]
    shown = {name: row["Method"] for name, row in zip(own, table_of(output)[1], strict=True)}
    for name, backbone in (("pruned", "pruned"), ("vision", "vit_small"), (OTHERS[1]["experiment"], "other")):
        assert backbone in shown[name].split(", ")[1:], shown


def test_without_a_blind_baseline_its_columns_are_empty(tmp_path):
    shorter = experiment(prefix="no", epochs=1, seeds="1,2,3", feeds="T7")
    output = make_table("T7_methods", results_of(tmp_path / "results", PLAIN, IA3, shorter), tmp_path / "T7.csv")
    names = "gain_vs_blind blind_ci_low blind_ci_high blind_ci_over blind_p blind_p_holm blind_no_verdict versus_blind".split()
    assert {row[name] for row in rows_of(output).values() for name in names} == {""}
    assert {row[name] for row in table_of(output)[1] for name in ("Over blind [95% CI]", "Over blind: verdict")} == {""}
    assert "Over blind: empty, as no blind row" in output.with_suffix(".md").read_text(encoding="utf-8")


def test_of_two_blind_baselines_the_first_counts(tmp_path):
    another = BLIND | {"experiment": "another", "options": "r=8 lora_alpha=8"}
    output = make_table("T7_methods", results_of(tmp_path / "results", PLAIN, BLIND, another), tmp_path / "T7.csv")
    baselines = {name: row["versus_blind"] for name, row in rows_of(output).items()}
    first = BLIND["experiment"]
    assert baselines == {PLAIN["experiment"]: first, first: "", "another": first}


def test_tables_of_a_task_have_the_gain_over_blind_of_t7(tmp_path):
    rows = [row | {"feeds": "T1,T7"} for row in (PLAIN, BLIND)]
    results = results_of(tmp_path / "results", *rows)
    t1, t7 = (make_table(name, results, tmp_path / f"{name}.csv") for name in ("T1_vqa", "T7_methods"))
    names = ["gain_vs_blind", "blind_ci_low", "blind_ci_high", "blind_p", "versus_blind"]
    of_t1, of_t7 = ([rows_of(table)[PLAIN["experiment"]][name] for name in names] for table in (t1, t7))
    assert of_t1 == of_t7 and float(of_t1[0]) > 0
    cells = {row["Routing"]: row["Over blind [95% CI]"] for row in table_of(t1)[1]}
    assert cells["none (blind)"] == "" and cells["none"].startswith("+")


def test_rows_that_do_not_lie_above_the_blind_baseline_are_named(tmp_path):
    """Also one whose gain is positive, but not surely; what learned nothing is named apart."""
    low, failed = IA3 | {"experiment": "low"}, IA3 | {"experiment": "failed"}
    folder = write_results(tmp_path / "results", [PLAIN, BLIND, IA3, low, failed], images=20, collapsed=("failed_seed2",))
    write_sheet(folder / "experiments.tsv", [PLAIN, BLIND, IA3, low, failed])
    for seed, step in ((1, 0.0), (2, 0.0), (3, 100.0)):  # two of its seeds are the blind one's
        blind = json.loads((folder / "scores" / f"{BLIND['experiment']}_seed{seed}" / "items.json").read_text())
        blind["accuracy"][:3] = [min(100.0, score + step) for score in blind["accuracy"][:3]]
        write(folder / "scores" / f"low_seed{seed}" / "items.json", blind)
    output = make_table("T7_methods", folder, tmp_path / "T7.csv")
    found = rows_of(output)["low"]
    assert float(found["blind_ci_low"]) <= 0 <= float(found["gain_vs_blind"])
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "Not above it, the interval not wholly above zero, 1 of 3 rows with such a gain: `low`. Without one" in text
    assert "Without one, as a run of either side learned nothing: `failed`." in text
    assert table_of(output)[1][-1]["Over blind: verdict"] == ""


def test_gains_over_anything_but_plain_lora_do_not_feed_the_methods_table(tmp_path):
    runs = [experiment(), experiment(routing="mul", versus="vqa_lora_none_r4_e2")]
    runs.append(experiment(method="bitfit", versus="vqa_lora_mul_r4_e2", feeds="T7"))
    with pytest.raises(RoutevlError, match="vqa_bitfit_e2 feeds T7, whose gains are over plain LoRA: vqa_lora_mul_r4_e2 is not"):
        make_table("T7_methods", results_of(tmp_path / "results", *runs), tmp_path / "T7.csv")


def test_a_learning_rate_at_the_end_of_those_tried_is_said(own_copy, tmp_path):
    for name, rates in (("vqa_ia3_e2_seed1", [0.001, 0.01]), ("vqa_bitfit_e2_seed1", [0.0001, 0.001, 0.01])):
        set_tried(own_copy, name, rates)
    rows = rows_of(make_table("T7_methods", own_copy, tmp_path / "T7.csv"))
    assert [rows[name]["learning_rates_tried"] for name in ("vqa_full_e2", "vqa_ia3_e2", "vqa_bitfit_e2")] == ["1", "2", "3"]
    assert [rows[name]["at_edge"] for name in ("vqa_full_e2", "vqa_ia3_e2", "vqa_bitfit_e2")] == ["False", "True", "False"]
    text = (tmp_path / "T7.md").read_text()
    assert "of 2 rows was chosen among 2 or 3 on" in text and "may lie beyond, in `vqa_ia3_e2`." in text


def test_an_ablation_is_named_by_what_differs_from_what_it_is_compared_with(tmp_path):
    plain = experiment(seeds="1,2,3", feeds="T4")
    routed = experiment(routing="mul", versus=plain["experiment"], seeds="1,2,3", feeds="T4")
    more = "lora_dropout=0.1 bias=all"  # of which each implies the other here
    changed = experiment(routing="mul", versus=routed["experiment"], seeds="1,2,3", feeds="T4", options=more)
    changed["experiment"] = "dropout"
    folder = results_of(tmp_path / "results", plain, routed, changed)
    rows = rows_of(make_table("T4_ablations", folder, tmp_path / "T4.csv"))
    assert [row["differs"] for row in rows.values()] == ["", "", "lora dropout 0.1, bias all"]
    header, _, *lines = [line for line in (tmp_path / "T4.md").read_text().splitlines() if line.startswith("|")]
    assert "Differs in" in header and "Lora dropout" not in header
    assert "lora dropout 0.1" in lines[2] and routed["experiment"] in lines[2]


def test_a_published_figure_is_shown_for_the_same_backbones_only(scored, tmp_path):
    lines = PUBLISHED.read_text(encoding="utf-8") + (
        "Paper,1,vqa,roberta_demo + vit_demo,LoRA mul,accuracy,71.5,,\nPaper,1,vqa,another + vit_demo,LoRA add,accuracy,70.5,,\n"
    )
    published = tmp_path / "published.csv"
    published.write_text(lines, encoding="utf-8")
    rows = rows_of(make_table("T1_vqa", scored, tmp_path / "T1.csv", published=published))
    assert (rows["vqa_lora_mul_r4_e2"]["published"], rows["vqa_lora_add_r4_e2"]["published"]) == ("71.5", "")


def test_published_figures_are_those_of_the_sources():
    published = read_published(PUBLISHED)
    found = published[(published["method"] == "VL-PET large") & (published["metric"] == "COCO CIDEr")]
    assert (found["value"].item(), found["std"].item()) == (122.03, 0.46)


def test_tex_escapes_what_latex_would_misread(scored, tmp_path):
    tex = make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv").with_suffix(".tex").read_text(encoding="utf-8")
    assert r"T1\_vqa: VQA accuracy (\%)" in tex
    assert "±" not in tex and r" \& " not in tex
    assert r"$\pm$" in tex and r"Gain [95\% CI]" in tex and "\\midrule" in tex


def test_the_page_of_a_table_has_its_rows_and_loads_nothing(scored, tmp_path):
    page = make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv").with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("<table>") == 1 and page.count("<tr>") == 1 + 4
    assert ">none (blind)</td>" in page and "<code>mul</code>" in page
    assert not any(text in page for text in ("<script", "src=", "href=", "url("))


@pytest.mark.parametrize("name", TABLES)
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


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    """Results in which all that feeds T0 has three seeds."""
    runs = [row | {"seeds": "1,2,3"} for row in RUNS if "T0" in row["feeds"]]
    folder = write_results(tmp_path_factory.mktemp("judged"), runs)
    write_sheet(folder / "experiments.tsv", runs)
    return folder


def test_claims_are_beside_what_was_measured(judged, tmp_path):
    rows = claims_of(judged, tmp_path / "T0_claims.csv")
    gains = rows_of(make_table("T1_vqa", judged, tmp_path / "T1_vqa.csv"))
    compared = [gains[f"vqa_lora_{routing}_r4_e2"] for routing in ("mul", "add")]
    smallest, largest = (choose(compared, key=lambda gain: float(gain["gain_relative"])) for choose in (min, max))
    row = rows["vqa_gain", "lora"]
    assert [row[name] for name in ("comparisons", "left_out", "improve", "harm", "no_significant_difference")] == list("20200")
    for name, gain in (("smallest", smallest), ("largest", largest)):
        assert row[f"{name}_gain_routing"] == gain["routing"]
        assert row[f"{name}_gain_relative"] == gain["gain_relative"]
        assert row[f"{name}_gain_ci_low"] == gain["gain_relative_ci_low"]
        assert row[f"{name}_gain_ci_high"] == gain["gain_relative_ci_high"]
    assert (row["backbones"], row["scale"], row["published"]) == ("roberta_demo + vit_demo", "not the paper's", "20")
    assert rows["caption_gain", "lora"]["largest_gain_relative"] != row["largest_gain_relative"]
    assert rows["no_parameters", "lora"]["supporting"] == "4" and rows["no_parameters", "lora"]["verdict"] == "holds"
    assert (rows["multitask_gain", "lora"]["comparisons"], rows["multitask_gain", "lora"]["verdict"]) == ("0", "not tested")
    assert {method for _, method in rows} == {"lora"}  # no other method's routing is compared


def test_claims_need_a_comparison(own_copy, tmp_path):
    write_sheet(own_copy / "experiments.tsv", [row | {"versus": ""} for row in RUNS])
    with pytest.raises(RoutevlError, match="no experiment that feeds T0 has a routing function and a `versus`"):
        make_table("T0_claims", own_copy, tmp_path / "T0.csv")


@pytest.mark.parametrize(
    ("mul", "add", "words"),
    [(80.0, 60.0, "holds"), (55.0, 55.0, "holds in part"), (80.0, 50.0, "holds in part"), (40.0, 50.0, "does not hold")],
)
def test_a_gain_must_be_everywhere_and_as_large_as_published(judged, tmp_path, mul, add, words):
    folder = shutil.copytree(judged, tmp_path / "results")
    for routing, score in (("none", 50.0), ("mul", mul), ("add", add)):
        for run in (folder / "scores").glob(f"vqa_lora_{routing}_r4_e2_seed*"):
            set_items(folder, run.name, [score] * 160)
    assert claims_of(folder, tmp_path / "T0.csv")["vqa_gain", "lora"]["verdict"] == words


@pytest.mark.parametrize(("ablated", "words"), [(50.0, "holds"), (80.0, "does not hold")])
def test_an_ablation_is_judged_by_its_own_claim_and_by_no_other(judged, tmp_path, ablated, words):
    folder = shutil.copytree(judged, tmp_path / "results")
    plain = "vqa_lora_none_r4_e2"
    own = experiment(routing="self_attn", versus=plain, seeds="1,2,3", feeds="T0")
    for name in ("models", "predictions", "scores"):
        for seed in (1, 2, 3):
            shutil.copytree(folder / name / f"vqa_lora_mul_r4_e2_seed{seed}", folder / name / f"{own['experiment']}_seed{seed}")
    runs = [row | {"seeds": "1,2,3"} for row in RUNS if "T0" in row["feeds"]]
    before = claims_of(folder, tmp_path / "before.csv")
    assert before["self_attn_fails", "lora"]["verdict"] == before["after_up_fails", "lora"]["verdict"] == "not tested"
    write_sheet(folder / "experiments.tsv", [*runs, own])
    for seed in (1, 2, 3):
        path = folder / "models" / f"{own['experiment']}_seed{seed}" / "run.json"
        record = json.loads(path.read_text())
        write(
            path,
            record | {"settings": record["settings"] | {"options": record["settings"]["options"] | {"routing": "self_attn"}}},
        )
        set_items(folder, f"{own['experiment']}_seed{seed}", [ablated] * 160)
        set_items(folder, f"{plain}_seed{seed}", [50.0] * 160)
    after = claims_of(folder, tmp_path / "after.csv")
    row = after["self_attn_fails", "lora"]
    assert (row["comparisons"], row["verdict"]) == ("1", words)
    assert after["vqa_gain", "lora"]["comparisons"] == before["vqa_gain", "lora"]["comparisons"]
    assert after["no_parameters", "lora"]["comparisons"] == before["no_parameters", "lora"]["comparisons"]


def test_more_parameters_with_routing_are_found(own_copy, tmp_path):
    for seed in (1, 2, 3):
        path = own_copy / "models" / f"vqa_lora_mul_r4_e2_seed{seed}" / "run.json"
        run = json.loads(path.read_text())
        write(path, run | {"trainable_params": run["trainable_params"] + 1})
    row = claims_of(own_copy, tmp_path / "T0.csv")["no_parameters", "lora"]
    assert (row["supporting"], row["comparisons"], row["verdict"]) == ("3", "4", "holds in part")


def test_the_paper_s_backbones_are_recognised(scored, tmp_path):
    claims = tmp_path / "claims.tsv"
    claims.write_text(CLAIMS.read_text(encoding="utf-8").replace("roberta-large + vit-large", "roberta_demo + vit_demo"))
    rows = claims_of(scored, tmp_path / "T0.csv", claims=claims)
    assert rows["vqa_gain", "lora"]["scale"] == "the paper's backbones"
    assert rows["caption_gain", "lora"]["scale"] == "not the paper's"


def test_the_rule_stands_below_the_claims(scored, tmp_path):
    text = make_table("T0_claims", scored, tmp_path / "T0.csv").with_suffix(".md").read_text(encoding="utf-8")
    assert "by the comparisons with three seeds or more on both sides" in text
    assert "The verdicts follow a fixed rule." in text and "neither confirms nor refutes the paper's figure" in text
    assert "`multitask_gain` (abstract): smaller but consistent improvements" in text


def test_claims_are_not_tested_against_a_baseline_without_the_image(own_copy, tmp_path):
    write_sheet(own_copy / "experiments.tsv", [row | {"feeds": "T0"} for row in RUNS])
    with pytest.raises(RoutevlError, match="vqa_lora_none_r4_e2_noprefix feeds T0 with prefix no"):
        make_table("T0_claims", own_copy, tmp_path / "T0.csv")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("\tgains\t", "\tunknown\t", "kind of multitask_gain is 'unknown'"),
        ("\t20\t", "\t\t", "vqa_gain .* needs its figure"),
        ("\tmultitask\t", "\tvqa\t", "multitask_gain is the claim of gains, which is about the task multitask, not vqa"),
    ],
)
def test_a_malformed_claim_is_named(tmp_path, before, after, message):
    claims = tmp_path / "claims.tsv"
    claims.write_text(CLAIMS.read_text(encoding="utf-8").replace(before, after))
    with pytest.raises(RoutevlError, match=message):
        read_claims(claims)


def test_runs_that_feed_the_claims_have_the_prefix_and_a_baseline():
    """In every run sheet of the project: else a claim would be judged by runs that do not bear on it."""
    for sheet in (CLAIMS.parent / "experiments").glob("*.tsv"):
        rows = [row for row in read_sheet(sheet) if "T0" in row.feeds]
        assert all(row.prefix and bool(row.versus) == ("routing" in row.options) for row in rows), sheet


# Figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_the_same_bytes_each_time(scored, tmp_path, name):
    first = make_figure(name, scored, tmp_path / "a" / f"{name}.svg")
    second = make_figure(name, scored, tmp_path / "b" / f"{name}.svg")
    for suffix in (".svg", ".pdf", ".png", ".csv"):
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in ("F1_method", "F10_multitask")])
def test_figures_work_with_a_single_routed_run(tmp_path, name):
    folder = results_of(tmp_path / "results", experiment(routing="mul", feeds="F2,F3,F4,F5,F6,F7,F8,F9"))
    assert make_figure(name, folder, tmp_path / f"{name}.svg").stat().st_size > 0


def inputs(folder: Path, name: str) -> FigureInputs:
    return FigureInputs(name, folder / "experiments.tsv", folder, folder / "data" / "test")


def test_bars_are_as_high_as_the_data_say(scored, tmp_path):
    figure, _ = f2_main.draw(inputs(scored, "F2_main"))
    rows = rows_of(make_figure("F2_main", scored, tmp_path / "F2_main.svg").with_suffix(".csv"))
    blind = rows.pop("vqa_lora_none_r4_e2_noprefix")
    bars = [bar for axes in figure.axes for bar in axes.patches]
    assert [bar.get_height() for bar in bars] == pytest.approx([float(row["score"]) for row in rows.values()], rel=1e-5)
    looks = [style.look(SimpleNamespace(**row, variant="")) for row in rows.values()]
    assert [bar.get_facecolor()[:3] for bar in bars] == [to_rgb(look.color) for look in looks]
    assert [bar.get_hatch() or "" for bar in bars] == [look.hatch for look in looks]
    [line] = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    assert line.get_ydata()[0] == pytest.approx(float(blind["score"]), rel=1e-5)


def grid(*tasks: str, feeds: str, routings: tuple[str, ...] = ("none",)) -> list[dict]:
    """LoRA and Adapter with two ranks and two text backbones."""
    runs = []
    for task, text, method, rank, routing in product(tasks, ("small", "roberta-large"), ("lora", "adapter"), (4, 16), routings):
        row = experiment(task, method, routing, rank, text_backbone=text, feeds=feeds)
        name = row["experiment"].replace(routing, "none")
        runs.append(row | {"experiment": f"{row['experiment']}_{text}", "versus": "" if routing == "none" else f"{name}_{text}"})
    return runs


def assert_apart(texts) -> None:
    texts = [text for text in texts if text.get_text()]
    texts[0].figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    assert not any(box.count_overlaps(boxes[index + 1 :]) for index, box in enumerate(boxes))
    width, height = texts[0].figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


@pytest.mark.parametrize("shape", ["2", "12", "grid", "paper"])
def test_labels_of_groups_do_not_overlap(tmp_path, shape):
    """Of ranks in a single panel, of a grid of settings in two, and of the paper's own sheet."""
    runs = [experiment(rank=2**number, feeds="F2") for number in range(int(shape))] if shape.isdecimal() else []
    if shape == "grid":
        runs = grid("vqa", "caption", feeds="F2", routings=("none", "mul", "attn"))
    if shape == "paper":
        with open(CLAIMS.parent / "experiments/paper.tsv", encoding="utf-8", newline="") as file:
            runs = [row | {"seeds": "1"} for row in csv.DictReader(file, delimiter="\t") if "F2" in row["feeds"].split(",")]
    with style.house_style():
        figure, _ = f2_main.draw(inputs(results_of(tmp_path, *runs), "F2_main"))
        for axes in figure.axes:
            assert_apart(axes.get_xticklabels())


@pytest.mark.parametrize("name", ["F5_curves", "F6_question_types"])
def test_titles_of_many_panels_do_not_overlap(tmp_path, name):
    folder = results_of(tmp_path, *grid("vqa", feeds="F5,F6", routings=("none", "mul")))
    with style.house_style():
        figure, _ = {"F5_curves": f5_curves, "F6_question_types": f6_question_types}[name].draw(inputs(folder, name))
        assert_apart([axes.title if axes.get_title() else axes._left_title for axes in figure.axes])


@pytest.mark.parametrize("name", ["F2_main", "F3_rank_budget", "F4_methods", "F5_curves", "F6_question_types"])
def test_what_learned_nothing_is_marked_and_stretches_no_axis(tmp_path, name):
    """Its mean is drawn, and no interval: one collapsed seed of three makes that of Student's t wider than all scores."""
    runs = [
        row | {"seeds": "1,2,3", "feeds": "F2,F3,F4,F5,F6"} for row in RUNS if row["method"] == "lora" and row["task"] == "vqa"
    ]
    run = "vqa_lora_mul_r4_e2_seed2"
    write_results(tmp_path, runs, images=20, collapsed=[run])
    write_sheet(tmp_path / "experiments.tsv", runs)
    module = importlib.import_module(f"routevl.reporting.figures.{name.lower()}")
    with style.house_style():
        figure, data = module.draw(inputs(tmp_path, name))
    marks = [text for axes in figure.axes for text in axes.texts if "†" in text.get_text()]
    assert len(marks) == {"F5_curves": 2, "F6_question_types": 7}.get(name, 1)
    assert set(data.loc[data["n_not_learned"] > 0, "experiment"]) == {"vqa_lora_mul_r4_e2"}
    said = " ".join(legend.get_title().get_text() for legend in figure.legends)
    assert "vqa_lora_mul_r4_e2 (1 of 3 runs)" in " ".join(said.split())
    if name in ("F2_main", "F3_rank_budget", "F4_methods"):
        low, high = figure.axes[0].get_ylim()
        assert low >= 0 and high <= 100 and data["ci_high"].max() > 100


def test_ranks_of_the_blind_baseline_are_no_ticks(tmp_path):
    runs = [experiment(rank=rank, feeds="F3") for rank in (2, 8)] + [experiment(rank=4, prefix="no", feeds="F3")]
    figure, _ = f3_rank_budget.draw(inputs(results_of(tmp_path, *runs), "F3_rank_budget"))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["2", "8"]


def key_of(figure) -> list[str]:
    """The entries of F4's key, by number."""
    texts = [text.get_text().split("  ") for text in figure.axes[-1].get_legend().get_texts()]
    assert [int(number) for number, _ in texts] == list(range(1, len(texts) + 1))
    return [name for _, name in texts]


def test_every_method_has_one_number_and_one_entry_in_the_key(tmp_path):
    """The same in both panels, in the order of the list of methods; the data have both."""
    of_vqa = [experiment(method=method, feeds="F4") for method in ("full", "ia3", "lora", "dora")]
    of_captions = [experiment("caption", method=method, feeds="F4") for method in ("bitfit", "dora", "full")]
    other = experiment(method="full", text_backbone="meter_demo", feeds="F4", experiment="other")
    blind = experiment(prefix="no", feeds="F4")
    figure, data = f4_methods.draw(inputs(results_of(tmp_path, *of_vqa, *of_captions, other, blind), "F4_methods"))
    key = ["LoRA", "DoRA", "(IA)³", "BitFit", "Full fine-tuning", "Full fine-tuning, meter_demo"]
    assert key_of(figure) == key
    assert list(data.columns[:2]) == ["number", "name"]
    numbers = {row.experiment: row.number for row in data.itertuples() if not pd.isna(row.number)}
    assert numbers == {
        "vqa_lora_none_r4_e2": 1, "vqa_dora_e2": 2, "vqa_ia3_e2": 3, "vqa_full_e2": 5, "other": 6,
        "caption_dora_e2": 2, "caption_bitfit_e2": 4, "caption_full_e2": 5,
    }  # fmt: skip
    assert all(row.name == (BLIND_LABEL if pd.isna(row.number) else key[row.number - 1]) for row in data.itertuples(name="Row"))
    drawn = [[text.get_text() for text in axes.texts] for axes in figure.axes[:2]]
    assert sorted(drawn[0]) == ["1", "2", "3", "5", "6", "no image\n(blind)"] and sorted(drawn[1]) == ["2", "4", "5"]


def test_numbers_of_many_methods_do_not_overlap(tmp_path):
    """Each stands apart from the others and from all points; blind lines of two backbones say whose they are."""
    of_meter = {"text_backbone": "meter_demo", "vision_backbone": "vit_demo", "feeds": "F4"}
    methods = [method for method in METHODS if method not in ("lora", "adapter", "full_both", "genft_vision")]
    runs = [experiment(method=method, feeds="F4", seeds="1,2,3") for method in ("lora", "adapter", *methods)]
    runs += [experiment(method=method, routing="mul", feeds="F4") for method in ("lora", "adapter")]
    runs += [experiment(method=method, **of_meter, experiment=f"meter_{method}") for method in ("lora", "das", "full")]
    runs += [experiment(prefix="no", feeds="F4"), experiment(prefix="no", **of_meter, experiment="meter_blind")]
    folder = write_results(tmp_path, runs, images=20, collapsed=["vqa_ia3_e2_seed1"])
    write_sheet(folder / "experiments.tsv", runs)
    for number, path in enumerate(folder.glob("models/*/run.json")):  # most of them crowded at one end
        record = json.loads(path.read_text())
        write(path, record | {"trainable_params": 300_000 if "full" in path.parent.name else 36_000 + 150 * number})
    with style.house_style():
        figure, data = f4_methods.draw(inputs(folder, "F4_methods"))
        figure.draw_without_rendering()
    axes, _ = figure.axes
    numbers = [text for text in axes.texts if "no image" not in text.get_text()]
    assert len(numbers) == len(key_of(figure)) == len(runs) - 2 >= 40
    ia3 = key_of(figure).index(METHODS["ia3"].label) + 1
    assert [text.get_text() for text in numbers if "†" in text.get_text()] == [f"{ia3}†"]
    boxes = [super(type(text), text).get_window_extent() for text in numbers]  # without the lines to their points
    assert not any(box.count_overlaps(boxes[index + 1 :]) for index, box in enumerate(boxes))
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert sorted(points) == sorted(zip(*(data.dropna(subset="number")[of] for of in ("trainable_params", "score")), strict=True))
    assert not any(box.contains(*axes.transData.transform(point)) for box, point in product(boxes, points))
    lines = {text.get_text() for text in axes.texts} - {text.get_text() for text in numbers}
    assert lines == {"no image\n(blind)\nroberta_demo", "no image\n(blind)\nmeter_demo"}
    width, height = figure.canvas.get_width_height()
    legend = figure.axes[-1].get_legend().get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= width and legend.y0 >= 0


def test_what_is_inside_is_averaged_over_seeds_and_the_bottlenecks_of_a_layer(scored):
    figure, data = f7_inside.draw(inputs(scored, "F7_inside"))
    for row in data.itertuples():
        paths = [scored / "inside" / f"{row.experiment}_seed{seed}.json" for seed in range(1, row.n_seeds + 1)]
        found = [b for path in paths for b in json.loads(path.read_text())["bottlenecks"] if b["layer"] == row.layer]
        assert len(found) == 2 * row.n_seeds
        assert row.cka_after == pytest.approx(sum(b["cka_after"] for b in found) / len(found))
    assert len(figure.axes) == 2 * 4 and not data["along_image"].isna().any()
    chosen = data[data["experiment"] == "vqa_lora_mul_r4_e2"]
    drawn = [line for line in figure.axes[0].lines if line.get_color() == style.look(next(chosen.itertuples())).color]
    assert [list(line.get_ydata()) for line in drawn] == [list(chosen["cosine_after"]), list(chosen["cosine_before"])]


def test_inside_of_what_learned_nothing_is_marked(tmp_path):
    runs = [experiment(routing=routing, feeds="F7") for routing in ("mul", "attn")]
    write_results(tmp_path, runs, images=8, collapsed=["vqa_lora_mul_r4_e2_seed1"])
    write_sheet(tmp_path / "experiments.tsv", runs)
    figure, _ = f7_inside.draw(inputs(tmp_path, "F7_inside"))
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["†"]] * 4 + [[]] * 4


def test_inside_of_patches_no_share_lies_along_the_image(tmp_path):
    folder = results_of(tmp_path, experiment(routing="mul", feeds="F7"))
    [path] = (folder / "inside").iterdir()
    record = json.loads(path.read_text())
    for bottleneck in record["bottlenecks"]:
        bottleneck["along_image"] = None
    path.write_text(json.dumps(record))
    figure, _ = f7_inside.draw(inputs(folder, "F7_inside"))
    assert len(figure.axes) == 3


def test_what_cannot_be_looked_into_is_named(tmp_path):
    folder = results_of(tmp_path, experiment(feeds="F7"))
    with pytest.raises(RoutevlError, match="experiment vqa_lora_none_r4_e2 feeds F7, and it has no routing function"):
        f7_inside.draw(inputs(folder, "F7_inside"))
    folder = results_of(tmp_path, experiment(routing="mul", feeds="F7"))
    path = folder / "inside" / "vqa_lora_mul_r4_e2_seed1.json"
    path.write_text("{}")
    with pytest.raises(RoutevlError, match=f"{path.name}: not what `routevl inside` writes"):
        f7_inside.draw(inputs(folder, "F7_inside"))


def test_colours_labels_and_formulas_come_from_the_lists(monkeypatch):
    """A new method or routing function needs no edit here."""
    new = Routing(None, "my routing", "$x_t$", "a note", "8", "//", "-", 0.5)
    monkeypatch.setitem(ROUTING, "new", new)
    monkeypatch.setitem(FAMILIES, "my family", "#204060")
    monkeypatch.setitem(METHODS, "routed", MethodRow("Routed", "my family", "", METHODS["lora"].implementation))
    monkeypatch.setitem(METHODS, "plain", MethodRow("Plain", "my family", "", METHODS["ia3"].implementation))
    look = style.look(SimpleNamespace(method="routed", routing="new", variant=""))
    assert (look.label, look.color, look.marker, look.hatch, look.line) == ("my routing", "#90a0b0", "8", "//", "-")
    look = style.look(SimpleNamespace(method="plain", routing="none", variant=""))
    assert (look.label, look.color, look.marker) == ("Plain", "#204060", style.MARKERS[1])
    variant = style.look(SimpleNamespace(method="routed", routing="new", variant="control ones", variant_number=1))
    assert variant.label == "my routing, control ones" and variant.bar()["facecolor"] == "white"
    _, data = f1_method.draw(FigureInputs("F1_method"))
    assert list(data.iloc[-1]) == ["new", new.formula, new.note]


def test_routing_functions_of_a_family_can_be_told_apart_in_grey():
    looks = [style.look(SimpleNamespace(method="lora", routing=routing, variant="")) for routing in ROUTING]
    assert len({look.marker for look in looks}) == len(looks)
    assert len({(look.hatch, look.line) for look in looks if look.hatch}) == len([look for look in looks if look.hatch])
    plain = sorted(np.dot(to_rgb(look.color), [0.299, 0.587, 0.114]) for look in looks if not look.hatch)
    assert min(np.diff(plain)) > 0.3  # of those without a hatch


def test_a_figure_says_which_option_it_needs(tmp_path):
    nothing = {"experiments": None, "results": None, "data": None}
    with pytest.raises(RoutevlError, match="figure F2_main needs --experiments"):
        figures.run(argparse.Namespace(name="F2_main", output=tmp_path / "F2_main.svg", **nothing))
    figures.run(argparse.Namespace(name="F1_method", output=tmp_path / "F1_method.svg", **nothing))


def test_ranks_are_drawn_of_methods_that_have_one(tmp_path):
    folder = results_of(tmp_path, experiment(method="ia3", feeds="F3"))
    with pytest.raises(RoutevlError, match="experiment vqa_ia3_e2 feeds F3, and its method has no rank"):
        make_figure("F3_rank_budget", folder, tmp_path / "F3.svg")


@pytest.mark.parametrize(
    ("prepared", "message"),
    [(True, "is not the image that was prepared"), (False, "cannot be decoded: it is damaged")],
)
def test_b11_examples_name_an_image_that_is_another_one_or_broken(own_copy, tmp_path, prepared, message):
    entries = json.loads((own_copy / "data" / "test" / "images.json").read_text())
    for entry in entries:
        path = own_copy / "data" / "test" / "images" / Path(entry["file_name"]).name
        entry["file_name"] = str(path)
        entry |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if prepared else {}
        path.write_bytes(b"no image")
    write(own_copy / "data" / "test" / "images.json", entries)
    with pytest.raises(RoutevlError, match=rf"^image \d+: .*\.png {message}"):
        make_figure("F8_examples", own_copy, tmp_path / "F8_examples.svg")


@pytest.mark.parametrize(
    ("imported", "heavy"),
    [
        ("routevl.reporting", ("torch", "transformers", "matplotlib", "pandas", "numpy")),
        ("routevl.reporting.figures", ("torch", "transformers", "matplotlib", "pandas")),
        ("routevl.reporting.tables, routevl.reporting.figures.f8_examples", ("torch", "transformers")),
    ],
)
def test_nothing_heavier_is_imported_than_needed(imported, heavy):
    command = f"import sys, {imported}; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


# Relatives of VQAv2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", [("question_type",), ("answer_type",), ("question_type", "answer_type")])
def test_h09_f6_shows_the_types_that_there_are(own_copy, tmp_path, lacking):
    for path in own_copy.glob("scores/vqa_*/metrics.json"):
        content = json.loads(path.read_text())
        if "question_type" in lacking:
            content["metrics"]["by_question_type"] = {}
        if "answer_type" in lacking:
            content["metrics"] |= dict.fromkeys(("yes_no", "number", "other"))
        path.write_text(json.dumps(content))
    if len(lacking) == 2:
        with pytest.raises(RoutevlError, match="F6 is about types of questions and answers, but the test split's have none"):
            make_figure("F6_question_types", own_copy, tmp_path / "F6.svg")
        return
    with open(make_figure("F6_question_types", own_copy, tmp_path / "F6.svg").with_suffix(".csv"), encoding="utf-8") as file:
        assert {row["by"] for row in csv.DictReader(file)} == {"question type", "answer type"} - {lacking[0].replace("_", " ")}


def test_h09_f8_shows_the_usual_answer_where_the_annotations_have_no_field_for_it(own_copy, tmp_path):
    path = own_copy / "data/test/annotations.json"
    before = make_figure("F8_examples", own_copy, tmp_path / "before.svg")
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["multiple_choice_answer"]
    path.write_text(json.dumps(content))
    after = make_figure("F8_examples", own_copy, tmp_path / "after.svg")
    assert after.with_suffix(".csv").read_text() == before.with_suffix(".csv").read_text()
