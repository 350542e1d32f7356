"""Tables and figures of multi-task runs, alone and beside those of other tasks, on synthetic results."""

from __future__ import annotations

import csv
import json
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
from synthetic_results import CLAIMS, PUBLISHED, RUNS, experiment, make_figure, make_table, write, write_results, write_sheet

from routevl.errors import RoutevlError
from routevl.reporting import style
from routevl.reporting.figures import f2_main, f4_methods, f5_curves, f10_multitask
from routevl.reporting.figures.inputs import FigureInputs
from routevl.reporting.headline import headline
from routevl.reporting.results import read_scores

PLAIN, MUL, ADD = (f"multitask_lora_{routing}_r4_e2" for routing in ("none", "mul", "add"))
DATA_SETS, HEADINGS = ("vqa", "gqa", "nlvr2", "caption"), ["Average", "VQA", "GQA", "NLVR2", "CIDEr"]
ALL = "T0,T3,T4,T6,T7,F2,F4,F5,F10"
BITFIT = experiment("multitask", "bitfit", seeds="1,2,3", feeds="T7,F4,F10", versus=PLAIN)
MULTITASK = [
    experiment("multitask", seeds="1,2,3", feeds=ALL),
    *(experiment("multitask", routing=routing, seeds="1,2,3", feeds=ALL, versus=PLAIN) for routing in ("mul", "add")),
    BITFIT,
]


def results_of(folder: Path, runs: list[dict], **options) -> Path:
    write_results(folder, runs, **options)
    write_sheet(folder / "experiments.tsv", runs)
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    return results_of(tmp_path_factory.mktemp("multitask"), MULTITASK)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def inputs(folder: Path, name: str) -> FigureInputs:
    return FigureInputs(name, folder / "experiments.tsv", folder, folder / "data" / "test")


def shift(folder: Path, experiment_name: str, of: str, points: float) -> None:
    """Add points to a data set's scores of an experiment's items, and to what these have in the average."""
    for path in folder.glob(f"scores/{experiment_name}_seed*/items.json"):
        items = json.loads(path.read_text())
        own = [score is not None for score in items[of]]
        items[of] = [score + points if here else None for score, here in zip(items[of], own, strict=True)]
        weight = len(own) / (4 * sum(own))
        items["average"] = [score + (weight * points if here else 0.0) for score, here in zip(items["average"], own, strict=True)]
        write(path, items)


def mean_score(folder: Path, experiment_name: str, metric: str) -> float:
    """Over the items and the three seeds."""
    return np.mean([read_scores(folder / "scores" / f"{experiment_name}_seed{seed}", metric).mean() for seed in (1, 2, 3)])


def test_items_of_one_data_set_are_read_without_the_others(scored):
    folder = scored / "scores" / f"{PLAIN}_seed1"
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    scores = {metric: read_scores(folder, metric) for metric in ("average", *DATA_SETS)}
    for metric, of_items in scores.items():
        assert of_items.mean() == pytest.approx(metrics[metric])
    for name in DATA_SETS:
        assert {item.partition("/")[0] for item, _ in scores[name].index} == {name}
    assert sum(len(scores[name]) for name in DATA_SETS) == len(scores["average"])


def test_the_table_has_the_average_its_gain_and_each_data_set(scored, tmp_path):
    rows = {row["experiment"]: row for row in rows_of(make_table("T3_multitask", scored, tmp_path / "T3_multitask.csv"))}
    assert list(rows) == [PLAIN, MUL, ADD]
    means = {name: mean_score(scored, name, "average") for name in rows}
    for name, row in rows.items():
        assert float(row["average_mean"]) == pytest.approx(means[name], rel=1e-5)
        four = [float(row[f"{metric}_mean"]) for metric in DATA_SETS]
        assert np.mean(four) == pytest.approx(means[name], rel=1e-5)
    assert float(rows[MUL]["gain"]) == pytest.approx(means[MUL] - means[PLAIN], rel=1e-4)
    assert rows[MUL]["nlvr2_consistency_mean"] and rows[MUL]["vqa_number_mean"]
    text = (tmp_path / "T3_multitask.md").read_text(encoding="utf-8")
    header = next(line for line in text.splitlines() if line.startswith("|"))
    shown = [cell.strip() for cell in header.strip("|").split("|")]
    assert [name for name in shown if name in HEADINGS] == HEADINGS
    assert "The paper claims smaller but consistent improvements" in text
    assert "routing (`mul`) improves LoRA by" in text and "on multi-task learning with bart_demo + vit_demo (n=3 seeds)" in text
    assert "- VL-Adapter (VL-PET (ICCV 2023); bart-base + clip-rn101): " in text and "average 76.93" in text
    assert "csv holds fractions" not in text


def test_the_published_average_stands_beside_the_same_method_on_the_same_backbones(tmp_path):
    backbones = {"text_backbone": "bart-base", "vision_backbone": "clip-rn101"}
    runs = [experiment("multitask", routing=routing, feeds="T3", **backbones) for routing in ("none", "mul")]
    options = {"vl_adapter": "r=4", "vl_pet_large": "r=4", "dora": ""}
    runs += [experiment("multitask", method, feeds="T3", options=of, **backbones) for method, of in options.items()]
    runs += [experiment("multitask", "bitfit", feeds="T3", text_backbone="bart-base", vision_backbone="clip-rn50")]
    rows = rows_of(make_table("T3_multitask", results_of(tmp_path / "results", runs, images=4), tmp_path / "T3_multitask.csv"))
    found = {(row["method"], row["routing"]): row["published"] for row in rows}
    assert found == {
        ("lora", "none"): "76.6", ("lora", "mul"): "", ("vl_adapter", "none"): "76.93", ("vl_pet_large", "none"): "79.18",
        ("dora", "none"): "", ("bitfit", "none"): "",
    }  # fmt: skip
    assert PUBLISHED.read_text(encoding="utf-8").count("bart-base + clip-rn101,VL-PET middle-") == 12


@pytest.mark.parametrize(
    ("shifted", "words"),
    [
        ({}, "holds"),
        ({"gqa": -60.0, "vqa": 60.0}, "holds in part"),
        (dict.fromkeys(("vqa", "gqa", "caption"), -60.0), "holds in part"),
    ],
)
def test_gains_must_be_in_the_average_and_in_each_data_set(tmp_path, shifted, words):
    """`add` loses what it is shifted by, `mul` gains everywhere."""
    folder = results_of(tmp_path / "results", MULTITASK[:3])
    for of, points in shifted.items():
        shift(folder, ADD, of, points)
    [row] = [r for r in rows_of(make_table("T0_claims", folder, tmp_path / "T0.csv")) if r["claim"] == "multitask_gain"]
    assert (row["kind"], row["scale"], row["comparisons"], row["verdict"]) == ("gains", "not the paper's", "2", words)
    assert row["supporting"] == ("1" if shifted else "2")
    assert row["improve"] == ("2" if len(shifted) < 3 else "1")  # in the average alone
    shift(folder, MUL, "nlvr2", -60.0)
    shift(folder, MUL, "caption", 90.0)
    shift(folder, ADD, "nlvr2", -60.0)
    [row] = [r for r in rows_of(make_table("T0_claims", folder, tmp_path / "T0.csv")) if r["claim"] == "multitask_gain"]
    assert (row["supporting"], row["verdict"]) == ("0", "does not hold")


def test_the_claim_of_gains_is_not_tested_by_other_tasks(tmp_path):
    runs = [row for row in RUNS if "T0" in row["feeds"]]
    folder = results_of(tmp_path / "results", runs, images=4)
    [row] = [r for r in rows_of(make_table("T0_claims", folder, tmp_path / "T0.csv")) if r["claim"] == "multitask_gain"]
    assert (row["comparisons"], row["left_out"], row["improve"], row["verdict"]) == ("0", "0", "", "not tested")
    assert "\tgains\t" in CLAIMS.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["T4_ablations", "T6_cost", "T7_methods"])
def test_tables_of_all_tasks_have_multitask_runs(tmp_path, name):
    runs = [row | {"feeds": "T4,T6,T7"} for row in (*RUNS[:2], *MULTITASK)]
    rows = rows_of(make_table(name, results_of(tmp_path / "results", runs, images=6), tmp_path / f"{name}.csv"))
    assert [row["experiment"] for row in rows if row["task"] == "multitask"] == [PLAIN, MUL, ADD, BITFIT["experiment"]]
    assert name == "T6_cost" or all(bool(row["average_mean"]) == (row["task"] == "multitask") for row in rows)


def test_the_headline_has_multitask_runs(scored, tmp_path):
    make_table("T3_multitask", scored, tmp_path / "tables" / "T3_multitask.csv")
    lines = headline(tmp_path)
    assert lines[0].startswith("Average of four tasks") and any(line.startswith("LoRA") and "improves" in line for line in lines)


# Figures -------------------------------------------------------------------------------------------


def test_gains_of_each_data_set_are_drawn_where_the_data_say(scored, tmp_path):
    with style.house_style():
        figure, data = f10_multitask.draw(inputs(scored, "F10_multitask"))
    assert [axes.get_title("left") for axes in figure.axes] == HEADINGS
    for axes, metric in zip(figure.axes, ("average", *DATA_SETS), strict=True):
        chosen = data[data["metric"] == metric]
        assert list(chosen["experiment"]) == [MUL, ADD, BITFIT["experiment"]]
        points = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() in ("o", "^", "<")]
        assert points == [(pytest.approx(gain), place) for place, gain in enumerate(chosen["gain"])]
        assert chosen["gain"].iloc[0] == pytest.approx(mean_score(scored, MUL, metric) - mean_score(scored, PLAIN, metric))
        assert (chosen["ci_low"] < chosen["gain"]).all() and (chosen["gain"] < chosen["ci_high"]).all()
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["LoRA mul", "LoRA add", f"BitFit\nover {PLAIN}"]
    average = data[data["metric"] == "average"].set_index("experiment")
    rows = {row["experiment"]: row for row in rows_of(make_table("T3_multitask", scored, tmp_path / "T3_multitask.csv"))}
    assert float(rows[MUL]["gain_ci_low"]) == pytest.approx(average.loc[MUL, "ci_low"], rel=1e-4)


@pytest.mark.parametrize(("count", "rate"), [(1, 0.001), (6, 0.001), (12, 0.001), (12, 0.00015)])
def test_f10_is_as_wide_as_the_text_and_its_names_do_not_overlap(tmp_path, count, rate):
    """With names of one line each; and where learning rates differ of several."""
    runs, others = [], product((4, 8), ("lora", "adapter"), ("mul", "add", "attn"))
    for rank, method, routing in islice(others, count):
        plain = experiment("multitask", method, rank=rank, feeds="F10")
        runs += [] if plain in runs else [plain]
        of_run = f"learning_rate={rate if routing == 'add' else 0.001}"
        runs.append(experiment("multitask", method, routing, rank, feeds="F10", versus=plain["experiment"], options=of_run))
    with style.house_style():
        figure, _ = f10_multitask.draw(inputs(results_of(tmp_path, runs, images=6), "F10_multitask"))
        figure.draw_without_rendering()
    assert figure.get_figwidth() == style.TEXT_WIDTH
    names = figure.axes[0].get_yticklabels()
    assert len({name.get_text() for name in names}) == count
    texts = [*names, figure.axes[2].xaxis.label, *(text for legend in figure.legends for text in legend.get_texts())]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(box.count_overlaps(boxes[number + 1 :]) for number, box in enumerate(boxes))
    assert min(axes.get_window_extent().width for axes in figure.axes) > 0.7 * figure.dpi  # inches


@pytest.mark.parametrize("run", [f"{PLAIN}_seed2", f"{MUL}_seed2"])
def test_what_learned_nothing_has_no_point_and_a_dagger(tmp_path, run):
    folder = results_of(tmp_path / "results", MULTITASK, images=8, collapsed=[run])
    with style.house_style():
        figure, data = f10_multitask.draw(inputs(folder, "F10_multitask"))
    names = [label.get_text().split("\n") for label in figure.axes[0].get_yticklabels()]
    failed = [name for name, *below in names if "† a run of either side learned nothing" in below]
    assert failed == (["LoRA mul", "LoRA add", "BitFit"] if "none" in run else ["LoRA mul"])
    assert [sum(line.get_marker() in ("o", "^", "<") for line in axes.lines) for axes in figure.axes] == [3 - len(failed)] * 5
    assert data.loc[data["gain"].isna(), "experiment"].nunique() == (3 if "none" in run else 1)
    text = make_table("T3_multitask", folder, tmp_path / "T3_multitask.csv").with_suffix(".md").read_text(encoding="utf-8")
    assert f"† Learned nothing: `{run.rpartition('_')[0]}` (1 of 3 runs)." in text


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "F6_question_types",
            MULTITASK[0] | {"feeds": "F6"},
            "multitask_lora_none_r4_e2 feeds F6, which is about the task vqa alone",
        ),
        ("F8_examples", MULTITASK[0] | {"feeds": "F8"}, "feeds F8, which shows the tasks vqa and caption alone"),
        ("F10_multitask", experiment(feeds="F10"), "vqa_lora_none_r4_e2 feeds F10, which is about the task multitask alone"),
        ("F10_multitask", MULTITASK[0], "no experiment that feeds F10 has a `versus`"),
    ],
)
def test_a_figure_that_cannot_show_a_run_says_so(tmp_path, name, row, message):
    with pytest.raises(RoutevlError, match=message):
        make_figure(name, results_of(tmp_path / "results", [row], images=2), tmp_path / f"{name}.svg")


def test_three_tasks_are_in_two_columns_of_panels_or_below_each_other(tmp_path):
    runs = [row | {"feeds": "F2,F4,F5"} for row in (*RUNS[:2], RUNS[3], *MULTITASK[:2])]
    folder = results_of(tmp_path, runs, images=8)
    with style.house_style():
        for module, name in ((f2_main, "F2_main"), (f4_methods, "F4_methods")):
            figure, _ = module.draw(inputs(folder, name))
            figure.draw_without_rendering()
            panels = figure.axes[:3]  # F4 has its key below them
            assert [axes.get_title("left") for axes in panels] == ["VQA", "Captioning", "Multi-task"]
            first, second, third = (axes.get_window_extent() for axes in panels)
            if name == "F2_main":
                assert first.x1 < second.x0 and first.y0 == pytest.approx(second.y0)
            else:
                assert second.y1 < first.y0 and second.x0 == pytest.approx(first.x0, abs=20)
            assert third.y1 < second.y0 + 1 and third.x0 == pytest.approx(first.x0, abs=20)


def test_curves_of_multitask_runs_are_of_their_validation_score(scored):
    curves = f5_curves.curves(inputs(scored, "F5_curves"))
    assert set(curves["quantity"]) == {"val_score", "loss"}
    of_score = curves[(curves["quantity"] == "val_score") & (curves["experiment"] == PLAIN)]
    logged = [json.loads(line) for line in (scored / "models" / f"{PLAIN}_seed1" / "training.jsonl").read_text().splitlines()]
    assert list(of_score["mean"]) == pytest.approx([line["val_score"] for line in logged if "val_score" in line])
    with style.house_style():
        figure, _ = f5_curves.draw(inputs(scored, "F5_curves"))
    assert [axes.get_ylabel() for axes in figure.axes] == ["validation score (%)", "training loss"]
