"""A synthetic results folder: the files that scored runs leave, without any training."""

from __future__ import annotations

import argparse
import csv
import json
import math
import zlib
from collections.abc import Collection
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from routevl.metrics.score import items_of_data_sets
from routevl.options import read_words
from routevl.reporting import figures, tables
from routevl.settings import SHARED_SETTINGS, RunSettings
from routevl.sheet import COLUMNS

PUBLISHED, CLAIMS = (Path(__file__).parents[1] / "config" / name for name in ("published.csv", "claims.tsv"))
SKILL = {"none": 0.0, "mul": 0.10, "add": 0.08, "attn": 0.12, "expand": 0.03}
TRAINED = {"ia3": 1_100, "bitfit": 2_900, "prompt_tuning": 1_900, "full": 855_000}  # by the method itself; others by their rank
COLORS, SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "triangle")
CAPTION_METRICS = {"Bleu_1": 0.7, "Bleu_2": 0.55, "Bleu_3": 0.4, "Bleu_4": 0.3, "METEOR": 0.27, "ROUGE_L": 0.52}
BACKBONES = {"vqa": "roberta_demo", "caption": "gpt2_demo", "multitask": "bart_demo"}
VALIDATED = {"vqa": "val_accuracy", "caption": "val_CIDEr", "multitask": "val_score"}
SETTINGS = {
    "freeze_layer_norm": False, "batch_size": 8, "prediction_batch_size": 8, "learning_rate": 1e-3, "warmup": 0.1,
    "weight_decay": 0.0, "max_text_tokens": 20, "beams": 2, "max_new_tokens": 8, "precision": "float32",
    "gradient_checkpointing": False,
}  # fmt: skip


def experiment(task="vqa", method="lora", routing="none", rank=4, epochs=2, prefix="yes", seeds="1", feeds="", **changes) -> dict:
    """A row of the run sheet. Its name is made of what is given; `changes` are other columns, `options` are added to."""
    routed = method in ("lora", "adapter")
    options = [f"r={rank}"] if routed else []
    options += [f"lora_alpha={rank}"] if method == "lora" else []
    options += [f"routing={routing}"] if routing != "none" else []
    name = "_".join([task, method, *([routing, f"r{rank}"] if routed else []), f"e{epochs}"])
    return {
        "experiment": name + ("" if prefix == "yes" else "_noprefix"), "task": task,
        "text_backbone": BACKBONES[task], "vision_backbone": "vit_demo", "method": method,
        "versus": "", "epochs": str(epochs), "prefix": prefix, "visual_tokens": "pooled", "seeds": seeds, "feeds": feeds,
        **changes, "options": " ".join([*options, *changes.get("options", "").split()]),
    }  # fmt: skip


def write_sheet(path: Path, experiments: list[dict]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(experiments)
    return path


def write_results(folder: Path, experiments: list[dict], images: int = 40, collapsed: Collection[str] = ()) -> Path:
    """The files that scored runs leave, routed runs better than plain ones, `collapsed` ones next to nothing; returns it."""
    test = write_test_split(folder / "data" / "test", images)
    for row in experiments:
        for seed in row["seeds"].split(","):
            write_run(folder, row, int(seed), test, f"{row['experiment']}_seed{seed}" in collapsed)
    return folder


def write_test_split(folder: Path, images: int) -> dict:
    generator = np.random.default_rng(1)
    entries, questions, annotations, captions = [], [], [], []
    for image_id in range(1, images + 1):
        color, shape = generator.choice(COLORS), generator.choice(SHAPES)
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


def write_run(folder: Path, row: dict, seed: int, test: dict, collapsed: bool = False) -> None:
    run = f"{row['experiment']}_seed{seed}"
    options = read_words(row["options"].split(), "options")
    shared = {name: options.pop(name) for name in SHARED_SETTINGS if name in options}
    values = SETTINGS | shared | {"task": row["task"], "method": row["method"], "seed": seed}
    values |= {"epochs": row["epochs"], "prefix": row["prefix"], "visual_tokens": row["visual_tokens"]}
    settings = RunSettings.read(values, options, run)
    generator = np.random.default_rng(zlib.crc32(run.encode()))
    rank, routing = settings.options.get("r") or 4, settings.options.get("routing", "none")
    blind = routing == "none" and not settings.prefix
    room = 1.0 if rank == 4 and settings.epochs == 2 else 0.35
    skill = 0.52 + 0.03 * math.log2(rank / 4) + 0.02 * (settings.epochs - 2) + SKILL[routing] * room - 0.2 * blind
    if collapsed:
        skill = 0.1
    write_model(folder / "models" / run, settings, run, skill, generator, learned=not collapsed)
    scores_of = {"vqa": vqa_scores, "caption": caption_scores, "multitask": multitask_scores}[row["task"]]
    metrics, items, predictions = scores_of(test, skill, generator)
    content = {"run": run, "task": row["task"], "n": len(items["ids"]), "metrics": metrics}
    if row["task"] == "caption":
        content["missing"] = {"SPICE": "needs Stanford CoreNLP files, which are not installed"}
    write(folder / "scores" / run / "metrics.json", content)
    write(folder / "scores" / run / "items.json", items)
    write(folder / "predictions" / run / "results.json", predictions)
    if routing != "none":
        write(folder / "inside" / f"{run}.json", inside(routing, rank, generator))


def write_model(folder: Path, settings: RunSettings, run: str, skill: float, generator, learned: bool) -> None:
    own = TRAINED.get(settings.method, 2 * 4 * 2 * 128 * (settings.options.get("r") or 4))
    head = 45_000 if settings.task == "vqa" else 0
    parts = {"method": own, "layer_norm": 2304, "head": head, "visual_projection": 0}
    trainable = sum(parts.values())
    write(
        folder / "run.json",
        {"run": run, "settings": settings.as_record(), "trainable_params": trainable, "trainable_params_by_part": parts,
         "total_params": 900_000 + trainable, "text_model_params": 900_000, "forward_flops": 7_000_000 + own, "learned": learned,
         "constant": {"val_loss": 4.0} if settings.task == "caption" else {VALIDATED[settings.task]: 20.0}},
    )  # fmt: skip
    write(
        folder / "timing.json",
        {"train_seconds": 15.0 + generator.random(), "steps": 200, "step_ms_median": 31 + generator.random(),
         "samples_per_second": 2000.0, "peak_memory_mb": 612.0, "device": "cpu"},
    )  # fmt: skip
    saved = "method.safetensors" if settings.method in ("bitfit", "full") else "adapter_model.safetensors"
    (folder / saved).write_bytes(b"\0" * (4 * min(own, 5000) + 512))
    metric = VALIDATED[settings.task]
    lines, step = [], 0
    for epoch in range(1, settings.epochs + 1):
        for _ in range(10):
            step += 10
            loss = 0.2 + 0.6 * math.exp(-step / 120) + 0.03 * generator.random()
            lines.append({"step": step, "epoch": epoch, "loss": loss, "learning_rate": 1e-3})
        score = skill * (1 - 0.5 * math.exp(-epoch)) * (2 if settings.task == "caption" else 100)
        lines.append({"epoch": epoch, "step": step, "val_loss": loss, metric: score})
    folder.joinpath("training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def inside(routing: str, rank: int, generator) -> dict:
    """The query's and the value's bottleneck of three layers."""
    bottlenecks = []
    for layer, part in product(range(3), ("query", "value")):
        cosine, cka, share = generator.uniform(0.1, 0.9, 3)
        measures = {"cosine_before": cosine / 2, "cosine_after": cosine, "cka_before": cka / 2, "cka_after": cka}
        measures |= {"effective_rank_before": 0.9 * rank, "effective_rank_after": 0.4 * rank}
        measures["along_image"] = 1.0 if routing in ("attn", "expand") else share
        bottlenecks.append({"module": f"layer.{layer}.{part}", "layer": layer, "part": 0, **measures})
    return {"examples": 8, "bottlenecks": bottlenecks}


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
        kind: {"accuracy": average("question_type", kind), "n": sum(a["question_type"] == kind for a in annotations)}
        for kind in question_types
    }
    wrong = {"yes/no": "no", "number": "7", "other": "purple"}
    predictions = [
        {"question_id": a["question_id"], "answer": a["multiple_choice_answer"] if ok else wrong[a["answer_type"]]}
        for ok, a in zip(right, annotations, strict=True)
    ]
    ids = [a["question_id"] for a in annotations]
    images = [a["image_id"] for a in annotations]
    return metrics, {"ids": ids, "images": images, "accuracy": scores.tolist()}, predictions


def caption_scores(test: dict, skill: float, generator) -> tuple[dict, dict, list]:
    captions = test["captions"]
    difficulty = np.random.default_rng(8).gamma(4, 0.25, len(captions))
    scores = np.maximum(0, difficulty * 2 * skill + generator.normal(0, 0.1, len(captions)))
    metrics = {name: value * (0.7 + skill / 2) for name, value in CAPTION_METRICS.items()}
    predictions = [
        {"image_id": c["image_id"], "caption": c["caption"].replace("red", "blue") if s < 1 else c["caption"]}
        for c, s in zip(captions, scores, strict=True)
    ]
    images = [c["image_id"] for c in captions]
    items = {"ids": images, "images": images, "CIDEr": scores.tolist()}
    return metrics | {"CIDEr": float(scores.mean()), "SPICE": None}, items, predictions


def multitask_scores(test: dict, skill: float, generator) -> tuple[dict, dict, dict]:
    """VQA and captions of the images, and three GQA questions and two NLVR2 examples for as many other images."""
    of_vqa, vqa_items, _ = vqa_scores(test, skill, generator)
    _, caption_items, _ = caption_scores(test, skill, generator)
    images = caption_items["images"]
    by_item = {"vqa": dict(zip(vqa_items["ids"], vqa_items["accuracy"], strict=True))}
    for name, each in (("gqa", 3), ("nlvr2", 2)):
        difficulty = np.random.default_rng(9).normal(0, 0.25, each * len(images))
        right = difficulty + generator.normal(0, 0.15, len(difficulty)) < (skill - 0.4)
        by_item[name] = {f"{image}-0-{number}": 100.0 * right[each * place + number]
                         for place, image in enumerate(images) for number in range(each)}  # fmt: skip
    by_item["caption"] = {image: 100 * cider for image, cider in zip(images, caption_items["CIDEr"], strict=True)}
    of_item = {item: 1000 + int(item.split("-")[0]) for name in ("gqa", "nlvr2") for item in by_item[name]}
    of_item |= dict(zip(vqa_items["ids"], vqa_items["images"], strict=True))
    of_images = {name: of_item for name in ("vqa", "gqa", "nlvr2")} | {"caption": {image: image for image in images}}
    means = {name: float(np.mean(list(scores.values()))) for name, scores in by_item.items()}
    metrics = {"average": float(np.mean(list(means.values()))), **means, "nlvr2_consistency": means["nlvr2"] / 2}
    metrics |= {f"vqa_{name}": of_vqa[name] for name in ("yes_no", "number", "other")}
    files = {"vqa": "vqa.json", "gqa": "gqa.json", "nlvr2": "nlvr2.csv", "caption": "caption.json"}
    return metrics, items_of_data_sets(means, by_item, of_images), files


# Two tasks with LoRA and two routing functions; the blind baseline; methods without a routing function; and multi-task runs.
RUNS = [
    experiment(
        task, "lora", routing, seeds="1,2,3" if routing != "add" else "1", feeds=feeds + ("" if routing == "none" else ",F7"),
        versus="" if routing == "none" else f"{task}_lora_none_r4_e2",
    )
    for task, feeds in (("vqa", "T0,T1,T4,T5,T6,F2,F3,F5,F6,F8,F9"), ("caption", "T0,T2,T4,T6,F2,F5,F8,F9"))
    for routing in ("none", "mul", "add")
] + [
    experiment("vqa", "lora", "none", prefix="no", feeds="T1,F2,F5,F6"),
    experiment("vqa", "full", feeds="T6,T7,F4"),
    experiment("vqa", "bitfit", feeds="T7,F4"),
    experiment("vqa", "ia3", feeds="T6,T7,F4", versus="vqa_lora_none_r4_e2"),
    experiment("caption", "prompt_tuning", feeds="T7,F4"),
    experiment("multitask", seeds="1,2,3", feeds="T3,F10"),
    experiment("multitask", routing="mul", seeds="1,2,3", feeds="T3,F10", versus="multitask_lora_none_r4_e2"),
]  # fmt: skip


def make_table(name: str, folder: Path, output: Path, published: Path = PUBLISHED, claims: Path = CLAIMS) -> Path:
    inputs = {"experiments": folder / "experiments.tsv", "results": folder, "published": published, "claims": claims}
    tables.run(argparse.Namespace(name=name, output=output, **inputs))
    return output


def make_figure(name: str, folder: Path, output: Path) -> Path:
    inputs = {"experiments": folder / "experiments.tsv", "results": folder, "data": folder / "data" / "test"}
    figures.run(argparse.Namespace(name=name, output=output, **inputs))
    return output
