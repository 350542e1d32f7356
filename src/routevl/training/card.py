"""The model card of a trained run: README.md beside its weights, in the form of the Hugging Face hub.

It says what is known when training ends, and nothing else: what is unknown is left out. `routevl release` adds the test scores.
Free of torch.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from routevl.backbones.folder import Origin, origin_of, public_name
from routevl.files import atomic_file, read_json
from routevl.methods.table import METHODS
from routevl.options import text_of, words_of
from routevl.routing import ROUTING
from routevl.settings import RunSettings
from routevl.tasks.table import TASKS

if TYPE_CHECKING:
    from torch import nn

CARD = "README.md"
TAG = "routevl"  # by which a card of this package is known
PROVENANCE = "## Provenance"
PACKAGES = ("routevl", "peft", "transformers", "torch")
# settings that have lines of their own
_APART = ("task", "method", "options", "prefix", "visual_tokens", "control", "seed")


@dataclass(frozen=True)
class Card:
    """What the cards of a run's folder and of its folder last/ say.

    Attributes:
        record: what run.json says.
        arguments: of the stage `train`, which name the folders.
        examples: split -> how many examples of it were trained on, validated with or predicted.
        text_model: with the method in it.
    """

    record: Mapping[str, Any]
    arguments: argparse.Namespace
    examples: Mapping[str, int]
    text_model: nn.Module

    def write(self, folder: Path, last: Mapping[str, Any] | None = None) -> None:
        """Write README.md beside the weights in `folder`: the best epoch's, or those of `last`, a line of the history."""
        adapter = read_json(path) if (path := folder / "adapter_config.json").is_file() else None
        sections = [
            f"# {self.record['run']}{' (last epoch)' if last else ''}",
            f"A text model fine-tuned for {self._task.word} by this method: {self._what()}.",
            "## Model",
            _list(self._model()),
            "## Training",
            _list(self._training(last)),
            "## How to load",
            self._how_to_load(adapter, last is not None),
            PROVENANCE,
            provenance(_manifest(Path(self.arguments.job))),
        ]
        card = ModelCard(f"---\n{self._metadata(adapter is not None).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
        with atomic_file(folder / CARD) as temporary:
            card.save(temporary)

    # -- what it says

    @property
    def _settings(self) -> Mapping[str, Any]:
        return self.record["settings"]

    @property
    def _task(self) -> Any:
        return TASKS[self._settings["task"]]

    def _what(self) -> str:
        routing = self._settings["options"].get("routing", "none")
        return METHODS[self._settings["method"]].label + (f" with the routing function `{routing}`" if routing != "none" else "")

    def _metadata(self, is_peft: bool) -> ModelCardData:
        text = origin_of(self.arguments.text_backbone)
        relation = "adapter" if is_peft else "finetune"
        return ModelCardData(
            **({"base_model": text.hub_id, "base_model_relation": relation} if text.is_on_the_hub else {}),
            library_name="peft" if is_peft else TAG,
            pipeline_tag=self._task.pipeline_tag,
            tags=[TAG, "vision-language", self._settings["method"]]
            + ([f"base_model:{relation}:{text.hub_id}"] if text.is_on_the_hub else []),
            **text.license,
        )

    def _model(self) -> dict[str, str]:
        settings, counts = self._settings, self.record["trainable_params_by_part"]
        row, text = METHODS[settings["method"]], origin_of(self.arguments.text_backbone)
        routing = settings["options"].get("routing", "none")
        trained, total = self.record["trainable_params"], self.record["total_params"]
        parts = ", ".join(f"{part.replace('_', ' ')} {count:,}" for part, count in counts.items() if count)
        method = RunSettings.from_record(settings, "run.json").new_method()
        readers = ["the method"] if method.uses_image else []
        readers += ["the prefix before the text's embeddings"] if settings["prefix"] else []
        image = f"the vision model's `{settings['visual_tokens']}` tokens, read by {' and '.join(readers) or 'nothing'}"
        if settings["control"] != "none":
            image += f"; `{settings['control']}` stands in for the image's own"
        if method.stand_in is not None:
            image += f"; `{method.stand_in}` stands in for what the method reads"
        return {
            "Task": self._task.label,
            "Method": f"{row.label} ({row.source})",
            "Options": _code(words_of({**row.fixed, **settings["options"]})),
            "Routing function": _formula(routing) if routing != "none" else "",
            "Image": image,
            "Text model": _backbone(self.arguments.text_backbone, self.record["inputs"]["text_backbone"], text),
            "Licence of the text model": text.license.get("license_name", text.license.get("license", "not stated")),
            "Vision model": _backbone(
                self.arguments.vision_backbone,
                self.record["inputs"]["vision_backbone"],
                origin_of(self.arguments.vision_backbone),
            ),
            "Trained parameters": f"{trained:,} of {total:,} ({100 * trained / total:.2f}%): {parts}",
        }

    def _training(self, last: Mapping[str, Any] | None) -> dict[str, str]:
        data, settings = Path(self.arguments.data), self._settings
        paths = [image["file_name"] for split in self.examples for image in read_json(data / split / "images.json")]
        folders = sorted({f"`{public_name(Path(path).parent)}`" for path in paths})
        sizes = ", ".join(f"{split} {count:,}" for split, count in self.examples.items())
        epoch, chosen = last or self.record["best_epoch"], "the last" if last else "the one with the best validation score"
        scores = _scores({name: value for name, value in epoch.items() if name.startswith("val_")})
        of = f"those of epoch {epoch['epoch']} of {settings['epochs']} (step {epoch['step']}), {chosen}"
        return {
            "Data": f"examples: {sizes}; images from {', '.join(folders)}; sha256 of the texts of training and validation: "
            f"`{self.record['inputs']['data']}`",
            "Settings": _code(words_of({name: value for name, value in settings.items() if name not in _APART})),
            "Seed": text_of(settings["seed"]),
            "These weights": f"{of}: {scores}",
            "Learned": "" if self.record["learned"] else f"nothing: a constant answer has {_scores(self.record['constant'])}",
        }

    # -- how to load it

    def _how_to_load(self, adapter: Mapping[str, Any] | None, last: bool) -> str:
        folder = public_name(self.arguments.model)
        texts = [self._code_of_a_tuner(folder + "/last" * last, adapter) if adapter else self._code_of_a_run(folder, last)]
        if adapter and adapter.get("routing", "none") != "none":
            own = adapter.get("visual_width")
            projected = not own and self.record["trainable_params_by_part"].get("visual_projection")
            width = own or self.text_model.config.hidden_size
            by = ", to which `visual_projection` of `task.safetensors` brings the vision model's features" if projected else ""
            texts.append(f"Each call takes `visual_features` beside the text: (batch, visual tokens, {width}), float32{by}.")
        if not last:
            inputs = ("data", "features", "text_backbone", "vision_backbone")
            given = {"model": self.arguments.model} | {name: getattr(self.arguments, name) for name in inputs}
            options = [("--" + name.replace("_", "-"), public_name(path)) for name, path in given.items() if path]
            command = shlex.join(["routevl", "predict", *chain(*options), "--predictions", "./predictions"])
            texts.append("`task.safetensors` holds what was trained outside the text model. This predicts with all of it:")
            texts.append(f"```bash\n{command}\n```")
        return "\n\n".join(texts)

    def _code_of_a_tuner(self, folder: str, adapter: Mapping[str, Any]) -> str:
        kinds = {"encoder": "AutoModel", "decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}
        auto = kinds[self._task.text_model]
        arguments = [json.dumps(adapter["base_model_name_or_path"])]
        arguments += [f"revision={json.dumps(adapter['revision'])}"] if adapter["revision"] else []
        arguments += ["add_pooling_layer=False"] if getattr(self.text_model, "pooler", "") is None else []
        config = type(self.text_model.active_peft_config)
        home = type(self.text_model.get_base_model()).__module__
        own = [f"import {home}  # makes the model known to transformers"] if home.startswith("routevl.") else []
        if config.__module__.startswith("routevl.methods."):
            own += [f"from routevl.methods import {config.__name__}  # makes {adapter['peft_type']} known to peft"]
        return _python(
            "from peft import PeftModel",
            *own,
            f"from transformers import {auto}",
            "",
            f"text_model = {auto}.from_pretrained({', '.join(arguments)})",
            f"model = PeftModel.from_pretrained(text_model, {json.dumps(folder)})",
        )

    def _code_of_a_run(self, folder: str, last: bool) -> str:
        text = origin_of(self.arguments.text_backbone)
        path, download = json.dumps(public_name(self.arguments.text_backbone)), []
        if text.is_on_the_hub:
            download = ["from huggingface_hub import snapshot_download"]
            path = f"snapshot_download({json.dumps(text.hub_id)}, revision={json.dumps(text.commit)})"
        arguments = [json.dumps(folder), *(['"last"'] if last else [])]
        return "It is no adapter of peft's: this package loads it.\n\n" + _python(
            *download,
            "from routevl.backbones.text import load_text_backbone",
            "from routevl.training.load import load_run",
            "",
            f"text_model, tokenizer = load_text_backbone({path}, {json.dumps(self._task.text_model)})",
            f"model = load_run(text_model, {', '.join(arguments)})",
        )


def _scores(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def provenance(manifest: str | None, *more: str) -> str:
    """The lines of the last section: with which packages, and which manifest tells everything else."""
    told = [f"Manifest of training: `{manifest}`"] if manifest else []
    return "\n".join(f"- {line}" for line in (*told, *more, ", ".join(f"{name} {version(name)}" for name in PACKAGES)))


def _manifest(model: Path) -> str | None:
    """Where the manifest of a training job of the workflow is, by the folder of the job's first run."""
    return public_name(model.parents[1] / "manifests" / "train" / f"{model.name}.json") if model.parent.name == "models" else None


def _backbone(path: str, fingerprint: str, origin: Origin) -> str:
    """Where a frozen model comes from, and its fingerprint."""
    of = f"`{public_name(path)}`"
    if origin.is_on_the_hub:
        of = f"`{origin.hub_id}` of the Hugging Face hub, commit `{origin.commit}`"
    elif origin.hub_id:
        of += f", made of `{origin.hub_id}` of the Hugging Face hub, commit `{origin.commit}`"
    elif origin.pretraining:
        settings = _code(words_of(origin.pretraining["settings"]))
        of += f", pretrained by `routevl {origin.pretraining['stage']}` with {settings}"
    steps = [f"derived by `{step['by']}` with {_code(words_of(step['options']))}" for step in origin.derivations]
    return "; ".join([of, *steps, f"sha256 of its weights and configuration: `{fingerprint}`"])


def _formula(routing: str) -> str:
    """A routing function in words, of the first line of its docstring."""
    first, _, _ = (ROUTING[routing].function.__doc__ or "").partition("\n")
    return f"`{routing}`, x_t and x_v being the text's and the image's projections in the bottleneck: {first}"


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _code(words: list[str]) -> str:
    return f"`{' '.join(words)}`" if words else ""


def _list(lines: Mapping[str, str]) -> str:
    return "\n".join(f"- **{name}:** {text}" for name, text in lines.items() if text)
