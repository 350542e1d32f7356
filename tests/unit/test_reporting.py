"""Statistics, tables and figures, on a small synthetic results folder."""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from routevl.errors import RoutevlError
from routevl.reporting import figures, results, statistics, tables
from routevl.reporting.published import read_published

PUBLISHED = Path(__file__).parents[2] / "config" / "published.csv"
COLUMNS = [
    "experiment", "task", "method", "routing", "rank", "epochs", "prefix", "seeds", "feeds",
    "text_backbone", "vision_backbone", "visual_tokens",
]  # fmt: skip
SKILL = {"none": 0.0, "mul": 0.10, "add": 0.08, "attn": 0.12, "expand": 0.03}
COLORS, SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "triangle")
CAPTION_METRICS = {
    "Bleu_1": 0.7,
    "Bleu_2": 0.55,
    "Bleu_3": 0.4,
    "Bleu_4": 0.3,
    "METEOR": 0.27,
    "ROUGE_L": 0.52,
}


# A synthetic results folder ------------------------------------------------------------------------


def experiment(task="vqa", method="lora", routing="none", rank=4, epochs=2, prefix="yes", seeds="1", feeds="") -> dict:
    name = f"{task}_{method}_{routing}_r{rank}_e{epochs}" + ("" if prefix == "yes" else "_noprefix")
    backbone = "roberta_demo" if task == "vqa" else "gpt2_demo"
    values = (name, task, method, routing, rank, epochs, prefix, seeds, feeds, backbone, "vit_demo", "pooled")
    return dict(zip(COLUMNS, map(str, values), strict=True))


def write_sheet(path: Path, experiments: list[dict]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(experiments)
    return path


def write_results(folder: Path, experiments: list[dict], images: int = 40, photographs: tuple[Path, ...] = ()) -> Path:
    """The files that scored runs leave, routed runs better than plain ones; returns the folder."""
    test = write_test_split(folder / "data" / "test", images, photographs)
    for row in experiments:
        for seed in row["seeds"].split(","):
            write_run(folder, row, f"{row['experiment']}_seed{seed}", test)
    return folder


def write_test_split(folder: Path, images: int, photographs: tuple[Path, ...]) -> dict:
    from PIL import Image, ImageDraw

    generator = np.random.default_rng(1)
    entries, questions, annotations, captions = [], [], [], []
    for image_id in range(1, images + 1):
        color, shape = generator.choice(COLORS), generator.choice(SHAPES)
        if photographs:
            path = photographs[image_id % len(photographs)]
        else:
            path = folder / "images" / f"{image_id:012d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (48, 48), "#eeeeee")
            x, y = generator.integers(4, 24, 2)
            box = (x, y, x + 18, y + 18)
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=str(color))
            picture.save(path)
        entries.append({"id": image_id, "file_name": str(path)})
        captions.append({"id": image_id, "image_id": image_id, "caption": f"there is a {color} {shape} in the corner."})
        asked = [
            (f"what color is the {shape}?", str(color), "other", "what color is the"),
            (f"is there a {color} {shape}?", "yes", "yes/no", "is there a"),
            (f"how many {shape}s are there?", str(generator.integers(1, 4)), "number", "how many"),
            (f"what is left of the {shape}?", "nothing", "other", "what is"),
        ]
        for offset, (question, answer, answer_type, question_type) in enumerate(asked):
            question_id = image_id * 10 + offset
            questions.append({"image_id": image_id, "question": question, "question_id": question_id})
            answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
            annotations.append(
                {"image_id": image_id, "question_id": question_id, "question_type": question_type,
                 "answer_type": answer_type, "multiple_choice_answer": answer, "answers": answers}
            )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "images.json": entries,
        "questions.json": {"questions": questions},
        "annotations.json": {"annotations": annotations},
        "captions.json": {"images": entries, "annotations": captions},
    }
    for name, content in contents.items():
        write(folder / name, content)
    return {"annotations": annotations, "captions": captions}


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_run(folder: Path, row: dict, run: str, test: dict) -> None:
    rank, epochs = int(row["rank"]), int(row["epochs"])
    generator = np.random.default_rng(zlib.crc32(run.encode()))
    blind = row["routing"] == "none" and row["prefix"] == "no"
    room = 1.0 if rank == 4 and epochs == 2 else 0.35
    skill = 0.52 + 0.03 * math.log2(rank / 4) + 0.02 * (epochs - 2) + SKILL[row["routing"]] * room - 0.2 * blind
    bottleneck = 2 * 4 * 2 * 128 * rank
    write_model(folder / "models" / run, row, run, bottleneck, skill, generator)
    metrics, items, predictions = (vqa_scores if row["task"] == "vqa" else caption_scores)(test, skill, generator)
    missing = {} if row["task"] == "vqa" else {"SPICE": "needs Stanford CoreNLP files, which are not installed"}
    content = {
        "run": run,
        "task": row["task"],
        "n": len(items["ids"]),
        "metrics": metrics,
        "missing": missing,
    }
    write(folder / "scores" / run / "metrics.json", content)
    write(folder / "scores" / run / "items.json", items)
    write(folder / "predictions" / run / "results.json", predictions)


def write_model(folder: Path, row: dict, run: str, bottleneck: int, skill: float, generator) -> None:
    parts = {"bottleneck": bottleneck, "layer_norm": 2304, "head": 45_000, "visual_projection": 0}
    if row["task"] == "caption":
        parts["head"] = 0
    trainable = sum(parts.values())
    write(
        folder / "run.json",
        {"run": run, "settings": row, "trainable_params": trainable, "trainable_params_by_part": parts,
         "total_params": 900_000 + trainable, "text_model_params": 900_000},
    )  # fmt: skip
    write(
        folder / "timing.json",
        {"train_seconds": 15.0 + generator.random(), "steps": 200, "step_ms_median": 31 + generator.random(),
         "samples_per_second": 2000.0, "peak_memory_mb": 612.0, "device": "cpu"},
    )  # fmt: skip
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * (4 * bottleneck + 512))
    metric = "val_accuracy" if row["task"] == "vqa" else "val_CIDEr"
    lines, step = [], 0
    for epoch in range(1, int(row["epochs"]) + 1):
        for _ in range(10):
            step += 10
            loss = 0.2 + 0.6 * math.exp(-step / 120) + 0.03 * generator.random()
            lines.append({"step": step, "epoch": epoch, "loss": loss, "learning_rate": 1e-3})
        score = skill * (1 - 0.5 * math.exp(-epoch)) * (100 if row["task"] == "vqa" else 2)
        lines.append({"epoch": epoch, "step": step, "val_loss": loss, metric: score})
    folder.joinpath("training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def vqa_scores(test: dict, skill: float, generator) -> tuple[dict, dict, list]:
    annotations = test["annotations"]
    difficulty = np.random.default_rng(7).normal(0, 0.25, len(annotations))
    right = difficulty + generator.normal(0, 0.15, len(annotations)) < (skill - 0.5)
    scores = np.where(right, 100.0, 0.0)

    def average(key: str, value: str) -> float:
        return float(np.mean([s for s, a in zip(scores, annotations, strict=True) if a[key] == value]))

    kinds = {"yes_no": "yes/no", "number": "number", "other": "other"}
    question_types = sorted({a["question_type"] for a in annotations})
    metrics = {"accuracy": float(scores.mean())} | {k: average("answer_type", v) for k, v in kinds.items()}
    metrics["by_question_type"] = {
        kind: {
            "accuracy": average("question_type", kind),
            "n": sum(a["question_type"] == kind for a in annotations),
        }
        for kind in question_types
    }
    wrong = {"yes/no": "no", "number": "7", "other": "purple"}
    predictions = [
        {"question_id": a["question_id"],
         "answer": a["multiple_choice_answer"] if ok else wrong[a["answer_type"]]}
        for ok, a in zip(right, annotations, strict=True)
    ]  # fmt: skip
    ids = [a["question_id"] for a in annotations]
    return metrics, {"ids": ids, "accuracy": scores.tolist()}, predictions


def caption_scores(test: dict, skill: float, generator) -> tuple[dict, dict, list]:
    captions = test["captions"]
    difficulty = np.random.default_rng(8).gamma(4, 0.25, len(captions))
    scores = np.maximum(0, difficulty * 2 * skill + generator.normal(0, 0.1, len(captions)))
    metrics = {name: value * (0.7 + skill / 2) for name, value in CAPTION_METRICS.items()}
    predictions = [
        {"image_id": c["image_id"], "caption": c["caption"].replace("red", "blue") if s < 1 else c["caption"]}
        for c, s in zip(captions, scores, strict=True)
    ]
    items = {"ids": [c["image_id"] for c in captions], "CIDEr": scores.tolist()}
    return metrics | {"CIDEr": float(scores.mean()), "SPICE": None}, items, predictions


RUNS = [
    experiment(task, "lora", routing, seeds="1,2" if routing != "add" else "1", feeds=feeds)
    for task, feeds in (("vqa", "T1,T6,F2,F3,F5,F6,F8"), ("caption", "T2,T6,F2,F5,F8"))
    for routing in ("none", "mul", "add")
] + [experiment("vqa", "lora", "none", prefix="no", feeds="T1,F2,F5,F6")]


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    folder = write_results(tmp_path_factory.mktemp("results"), RUNS)
    write_sheet(folder / "experiments.tsv", RUNS)
    return folder


@pytest.fixture
def own_copy(scored, tmp_path) -> Path:
    return shutil.copytree(scored, tmp_path / "results")


def make_table(name: str, folder: Path, output: Path) -> Path:
    tables.run(
        argparse.Namespace(
            name=name,
            experiments=folder / "experiments.tsv",
            results=folder,
            published=PUBLISHED,
            output=output,
        )
    )
    return output


def make_figure(name: str, folder: Path, output: Path) -> Path:
    figures.run(
        argparse.Namespace(
            name=name,
            experiments=folder / "experiments.tsv",
            results=folder,
            data=folder / "data" / "test",
            output=output,
        )
    )
    return output


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
    assert "over 20% on VQAv2 (RoBERTa-large + ViT-L/16)" in text


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
    table = tables.score_table(scored / "experiments.tsv", scored, read_published(published), "vqa", "T1_vqa")
    found = table.data.set_index("routing")["published"]
    assert found["mul"] == 71.5
    assert math.isnan(found["add"])


def test_published_figures_are_those_of_the_sources():
    published = read_published(PUBLISHED)
    found = published[(published["method"] == "VL-PET large") & (published["metric"] == "COCO CIDEr")]
    assert (found["value"].item(), found["std"].item()) == (122.03, 0.46)
    routing = published[published["source"].str.startswith("Routing functions")]
    assert set(routing["metric"]) == {"relative_gain_percent"}


def test_tex_escapes_what_latex_would_misread(scored, tmp_path):
    tex = make_table("T1_vqa", scored, tmp_path / "T1_vqa.csv").with_suffix(".tex").read_text(encoding="utf-8")
    assert r"T1\_vqa: VQA accuracy (\%)" in tex
    assert "±" not in tex


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_are_the_same_bytes_each_time(scored, tmp_path, name):
    first = make_table(name, scored, tmp_path / "a" / f"{name}.csv")
    second = make_table(name, scored, tmp_path / "b" / f"{name}.csv")
    for suffix in (".csv", ".md", ".tex"):
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()


def test_unknown_names_are_refused(scored, tmp_path):
    with pytest.raises(RoutevlError, match="unknown table 'T9_other'"):
        make_table("T9_other", scored, tmp_path / "T9.csv")
    with pytest.raises(RoutevlError, match="unknown figure 'F0'"):
        make_figure("F0", scored, tmp_path / "F0.svg")


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
