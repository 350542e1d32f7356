"""Stage `check-models`: whether the models of a run sheet fit together, before anything is computed with them."""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from routevl.backbones import pretrain_text, pretrain_vision
from routevl.backbones.derivations import DERIVATIONS, read_options
from routevl.backbones.fetch import SMALL_FILES, hub_snapshot
from routevl.backbones.skeleton import no_weights, run_for_shapes
from routevl.backbones.structure import NAME_THEM
from routevl.backbones.text import text_skeleton
from routevl.backbones.vision import BLANK, Tokens, vision_skeleton, vision_tokens
from routevl.configuration import read_configuration
from routevl.data.records import write_lines
from routevl.errors import RoutevlError
from routevl.files import write_json
from routevl.live_vision import VisionEncoder
from routevl.methods.base import Method
from routevl.progress import progress
from routevl.settings import RunSettings
from routevl.sheet import Experiment, read_sheet, settings_of
from routevl.sheet import check as check_sheet
from routevl.tasks.table import TASKS, task_class
from routevl.training.inputs import refuse
from routevl.training.prepared import bare

IMAGES = [1, 2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl check-models`."""
    parser.add_argument("--configuration", required=True, metavar="FILE", help="of the workflow, in YAML or JSON")
    parser.add_argument("--asked", help="what to write into the output beside what was found, to know it by")
    parser.add_argument("--output", metavar="JSON", help="where what has been checked goes, with the trainable parameters")


def run(arguments: argparse.Namespace) -> None:
    """Build every distinct combination of text backbone, task, method and vision backbone of a configuration's run sheet, without
    weights, and put a batch of two through it.

    Raises:
        RoutevlError: some cannot work. There is a line about each fault: the experiment, the model and the key that mends it.
    """
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # tensors are so small that threads only wait for each other
    config = read_configuration(arguments.configuration)
    if missing := {"experiments", "backbones", "features", "runs", "tasks"} - config.keys():
        raise RoutevlError(f"{arguments.configuration}: not a configuration of the workflow: it has no key {min(missing)}")
    experiments = read_sheet(config["experiments"])
    check_sheet(experiments, config)
    cases = distinct_cases(experiments, config)
    checked, faults = [], {}
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name) / "data")
        folders = Folders(config["backbones"], Path(name))
        for case in progress(cases, len(cases), "check"):
            try:
                text, vision = (folders.of(kind, getattr(case.experiment, f"{kind}_backbone")) for kind in ("text", "vision"))
                counts = check(case.settings, text, vision, Path(name) / "data")
            except RoutevlError as error:
                faults.setdefault(str(error), case.experiment)
            else:
                checked.append({**case.names(), "trainable_params_by_part": counts})
    if faults:
        *others, last = [f"experiment {experiment.experiment!r}: {fault}" for fault, experiment in faults.items()]
        for line in others:
            print(f"check-models: error: {line}", file=sys.stderr)
        raise RoutevlError(last)
    if arguments.output:
        write_json(arguments.output, {"asked": arguments.asked, "checked": checked})


class Folders:
    """Where the configurations and tokenizers of the backbones are: the user's folder, a hub model's small files in the hub's
    cache, or what the demo's pretraining would begin with, written into `scratch`. A derived backbone counts as its source,
    unless it is another kind of model."""

    def __init__(self, backbones: Mapping[str, Any], scratch: Path) -> None:
        self.backbones, self.scratch = backbones, scratch

    def of(self, kind: str, name: str) -> Path:
        """The folder of a text or a vision backbone. Raises RoutevlError as `routevl fetch-backbone`."""
        entry = self.backbones[kind][name]
        if "derive" in entry:
            return self._derived(kind, name, entry["derive"])
        if "path" in entry:
            path = Path(entry["path"])
            return path if path.is_dir() else hub_snapshot(entry["path"], entry.get("revision", "main"), SMALL_FILES)
        folder = self.scratch / name
        if not folder.exists():
            stage = pretrain_text if kind == "text" else pretrain_vision
            stage.write_untrained(folder, entry["pretrain"])
        return folder

    def _derived(self, kind: str, name: str, entry: Mapping[str, Any]) -> Path:
        source, row, folder = self.of(kind, entry["from"]), DERIVATIONS[entry["by"]], self.scratch / name
        if not row.joins:
            return source
        if not folder.exists():
            where = f"configuration: backbones.{kind}.{name}.derive"
            options = read_options(entry["by"], entry.get("options", {}), where)
            name_of_module, _, _ = row.implementation.partition(":")
            module = importlib.import_module(f"routevl.backbones.{name_of_module}")
            module.write_untrained(source, options, folder, self.of("vision", entry["with"]))
        return folder


class Case(NamedTuple):
    """The first experiment of its kind, with the settings of its runs."""

    experiment: Experiment
    settings: RunSettings

    def names(self) -> dict[str, str]:
        """What it is a combination of."""
        columns = ("experiment", "task", "text_backbone", "vision_backbone", "method")
        return {name: getattr(self.experiment, name) for name in columns}


def distinct_cases(experiments: Sequence[Experiment], config: Mapping[str, Any]) -> list[Case]:
    """The first experiment of each combination of what decides the shapes: models, method, what it adapts, how it sees."""
    cases: dict[tuple, Case] = {}
    for experiment in experiments:
        settings = settings_of(experiment, experiment.seeds[0], config)
        sees = settings.new_method().uses_image, settings.prefix, experiment.vision_backbone, settings.visual_tokens
        named = settings.options.items()  # of these the texts and the tasks decide what is built, but not which routing function
        options = tuple((n, v) for n, v in named if n == "tasks" or (isinstance(v, str) and n != "routing"))
        how = settings.freeze_layer_norm, settings.gradient_checkpointing, settings.max_text_tokens, settings.max_new_tokens
        kind = experiment.text_backbone, settings.task, settings.method, options, *how, *sees
        cases.setdefault(kind, Case(experiment, settings))
    return list(cases.values())


def check(settings: RunSettings, text_backbone: Path, vision_backbone: Path, data: Path) -> dict[str, int]:
    """Build a task on the backbones of two folders, and put the examples of `write_data` through it. Of a method with a phase
    before training the bare text model is built, which this phase begins with.

    Returns:
        its trainable parameters by part; the answers' head has two outputs.

    Raises:
        RoutevlError: it cannot work, for any reason.
    """
    skeleton, tokenizer = _text_skeleton(text_backbone, TASKS[settings.task].text_model)
    text_model, method = copy.deepcopy(skeleton), settings.new_method()
    refuse(method, text_model.config.model_type, str(text_backbone))
    method = bare(method) if method.prepares() else method
    try:
        visual = _Shapes(vision_backbone, method, settings.visual_tokens)
        with no_weights():
            task = task_class(settings.task)(settings, method, {}, text_model, tokenizer, visual, data)
        run_for_shapes(task.model.eval(), task.collate(list(task.examples("train"))))
    except RoutevlError as error:
        raise RoutevlError(f"backbone {text_backbone}, method {settings.method}: {error}") from error
    except Exception as error:  # of the model's own code, of any kind
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RoutevlError(
            f"backbone {text_backbone}, method {settings.method}: cannot be run ({reason}); {NAME_THEM}, or take another backbone"
        ) from error
    return task.model.trainable_params_by_part()


@cache
def _text_skeleton(folder: Path, kind: str) -> tuple[Any, Any]:
    return text_skeleton(folder, kind)


@cache
def _vision_tokens(folder: Path) -> Tokens:
    return vision_tokens(folder)


def write_data(folder: Path) -> None:
    """A training split of two examples of every task, prepared as `routevl prepare` would."""
    texts = dict(zip(IMAGES, ("is it a bus?", "what is on the left of it?"), strict=True))
    questions = [{"question_id": n, "image_id": n, "question": text} for n, text in texts.items()]
    annotation = {"question_type": "is", "answer_type": "yes/no", "multiple_choice_answer": "yes", "answers": [{"answer": "yes"}]}
    captions = [{"id": n, "image_id": n, "caption": text} for n, text in texts.items()]
    of_gqa = {"isBalanced": True, "answer": "yes"}
    of_nlvr2 = {"label": "True", "image_ids": IMAGES}
    files = {
        "train/images.json": [{"id": n, "file_name": f"{n}.jpg"} for n in texts],
        "train/questions.json": {"questions": questions},
        "train/annotations.json": {"annotations": [{"question_id": n, "image_id": n, **annotation} for n in texts]},
        "train/captions.json": {"annotations": captions},
        "train/gqa.json": {str(n): {"imageId": str(n), "image_id": n, "question": text, **of_gqa} for n, text in texts.items()},
        "answers.json": ["yes", "no"],
    }
    for name, content in files.items():
        write_json(folder / name, content)
    statements = [{"identifier": f"train-0-{n}-0", "sentence": text, **of_nlvr2} for n, text in texts.items()]
    write_lines(folder / "train/nlvr2.jsonl", statements)


class _Shapes:
    """A `routevl.visual.VisualSource` of zeros: features, or pixels for a method that needs them and adapts the vision model."""

    def __init__(self, folder: Path, method: Method, tokens: str) -> None:
        self.length, self.width = _vision_tokens(folder).shape(tokens)
        self.image_ids = torch.tensor(IMAGES)
        self.encoder, self.shape = nn.Identity(), (self.length, self.width)
        if "pixels" in method.needs:
            backbone = vision_skeleton(folder)
            self.shape = backbone.transform(Image.new("RGB", BLANK[0])).shape
            with no_weights():
                self.encoder = VisionEncoder(backbone, method, tokens)

    def of(self, image_ids: Sequence[int]) -> Tensor:
        return torch.zeros(len(image_ids), *self.shape)

    def check(self, image_ids: Sequence[int]) -> None:
        """Nothing can be missing."""
