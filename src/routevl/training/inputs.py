"""What the stages train, predict and probe read: data, features and backbones, and the task that is built of them."""

from __future__ import annotations

import argparse
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers.utils import logging

from routevl.backbones.folder import check_folder, fingerprint_of
from routevl.backbones.pruning import keep_zeros, pruned_weights
from routevl.backbones.text import load_text_backbone
from routevl.errors import RoutevlError
from routevl.files import sha256_of
from routevl.methods.base import Method
from routevl.options import at_least
from routevl.settings import RunSettings
from routevl.tasks.base import Task
from routevl.tasks.table import TASKS, task_class
from routevl.visual import visual_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every stage that loads a task."""
    parser.add_argument("--data", required=True, metavar="FOLDER", help="prepared data (routevl prepare)")
    parser.add_argument("--features", metavar="FOLDER", help="stored features, unless the method reads pixels")
    parser.add_argument("--text-backbone", required=True, metavar="FOLDER", help="the frozen text model")
    parser.add_argument("--vision-backbone", required=True, metavar="FOLDER", help="the model that made the features")
    parser.add_argument(
        "--threads",
        type=at_least(1),
        default=1,
        help="CPU threads of each process; results depend on their number in the last bits, and a run resumes with the same",
    )
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=0,
        help="processes that load batches, for each process; results do not depend on them",
    )


def load_task(
    settings: RunSettings, method: Method, prepared: Mapping[str, Tensor], arguments: argparse.Namespace
) -> tuple[Task, dict[str, str]]:
    """The run's task on its backbones and visual source, and the fingerprints of what it was built from."""
    # what a backbone's folder has too much (the head it was pretrained with) is no news, what it lacks is an error of ours
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that peft still uses
    vision = fingerprint_of(check_folder(arguments.vision_backbone))
    data = Path(arguments.data)
    visual = visual_source(settings, method, arguments.features, arguments.vision_backbone, vision, data)
    text_model, tokenizer = load_text_backbone(arguments.text_backbone, TASKS[settings.task].text_model)
    text = fingerprint_of(arguments.text_backbone)
    refuse(method, text_model.config.model_type, arguments.text_backbone)
    trained_with = getattr(text_model.config, "vision_fingerprint", None)
    if trained_with not in (None, vision):
        raise RoutevlError(
            f"backbone {arguments.text_backbone}: its image stream was trained with the vision model {trained_with}, and "
            f"{arguments.vision_backbone} is {vision}: set the run's vision_backbone to the one that it was derived with"
        )
    pruned = pruned_weights(text_model)
    task = task_class(settings.task)(settings, method, prepared, text_model, tokenizer, visual, data)
    keep_zeros(task.model.text_model, pruned)
    return task, {"text_backbone": text, "vision_backbone": vision, **task.inputs()}


def refuse(method: Method, model_type: str, folder: str) -> None:
    """Raise RoutevlError where the method refuses the type of a text model."""
    if model_type in method.refuses:
        raise RoutevlError(f"backbone {folder}: the method refuses {model_type}: {method.refuses[model_type]}")


def fingerprint_of_data(task: Task) -> str:
    """sha256 (hexadecimal) over the texts that are trained on and validated with."""
    paths = [task.data / split / name for split in ("train", "val") for name in task.files]
    return hashlib.sha256("".join(map(sha256_of, [*paths, *task.vocabulary])).encode()).hexdigest()
