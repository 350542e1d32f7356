"""The list of tasks, free of torch: what the workflow, the run sheet, tables and figures know of each.

To add a task: a module beside this one with a subclass of `routevl.tasks.base.Task`, and one row in TASKS.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routevl.errors import RoutevlError

if TYPE_CHECKING:
    from routevl.tasks.base import Task


@dataclass(frozen=True)
class TaskRow:
    """One task.

    Attributes:
        label, word: its name as a heading, and in a sentence.
        implementation: "<module>:<class>" under routevl.tasks.
        text_model: the kind of text backbone that it needs (`routevl.backbones.text.load_text_backbone`).
        metric: the main one of metrics.json; `score` says what it is.
        scale: what stored scores are multiplied by for readers.
        metrics: all columns of its table's csv, and `shown` those that readers see, with their headings.
        pipeline_tag, metric_types: how the Hugging Face hub calls the task, and each shown metric.
    """

    label: str
    word: str
    title: str
    implementation: str
    text_model: str
    metric: str
    score: str
    scale: float
    metrics: tuple[str, ...]
    shown: Mapping[str, str]
    pipeline_tag: str
    metric_types: Mapping[str, str]


TASKS = {
    "vqa": TaskRow(
        label="VQA",
        word="VQA",
        title="VQA accuracy (%) on the test split",
        implementation="vqa:VqaTask",
        text_model="encoder",
        metric="accuracy",
        score="VQA accuracy (%)",
        scale=1.0,
        metrics=("accuracy", "yes_no", "number", "other"),
        shown={"accuracy": "Accuracy", "yes_no": "Yes/no", "number": "Number", "other": "Other"},
        pipeline_tag="visual-question-answering",
        metric_types=dict.fromkeys(("accuracy", "yes_no", "number", "other"), "accuracy"),
    ),
    "caption": TaskRow(
        label="Captioning",
        word="captioning",
        title="Captioning on the test split",
        implementation="captioning:CaptionTask",
        text_model="decoder",
        metric="CIDEr",
        score="CIDEr (×100)",
        scale=100.0,  # captioning metrics are stored as fractions
        metrics=("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE"),
        shown={"Bleu_4": "B@4", "METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"},
        pipeline_tag="image-to-text",
        metric_types={"Bleu_4": "bleu", "METEOR": "meteor", "ROUGE_L": "rouge", "CIDEr": "cider"},
    ),
    "multitask": TaskRow(
        label="Multi-task",
        word="multi-task learning",
        title="Multi-task learning on the test split",
        implementation="clip_bart.task:MultitaskTask",
        text_model="encoder-decoder",
        metric="average",
        score="Average of four tasks",
        scale=1.0,
        metrics=("average", "vqa", "gqa", "nlvr2", "caption", "nlvr2_consistency", "vqa_yes_no", "vqa_number", "vqa_other"),
        shown={"average": "Average", "vqa": "VQA", "gqa": "GQA", "nlvr2": "NLVR2", "caption": "CIDEr"},
        pipeline_tag="image-text-to-text",
        metric_types={"average": "average", "vqa": "accuracy", "gqa": "accuracy", "nlvr2": "accuracy", "caption": "cider"},
    ),
}


def task_class(name: str) -> type[Task]:
    """The class of a task. Raises RoutevlError where there is no task of that name."""
    if name not in TASKS:
        raise RoutevlError(f"task {name!r} is not a task: choose one of {', '.join(TASKS)}")
    module, _, class_name = TASKS[name].implementation.partition(":")
    return getattr(importlib.import_module(f"routevl.tasks.{module}"), class_name)
