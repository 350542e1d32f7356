"""The multi-task setting: questions of VQAv2 and GQA, NLVR2's statements about two images, and captions, by one CLIP-BART."""

from __future__ import annotations

import csv
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn

from routevl.data import coco, gqa, nlvr2, vqav2
from routevl.data.prepare import read_vocabulary
from routevl.errors import RoutevlError
from routevl.features.images import IMAGES
from routevl.files import write_json
from routevl.metrics.vqa import soft_scores
from routevl.tasks.base import LENGTH, Task
from routevl.tasks.clip_bart.model import IGNORED, ClipBart
from routevl.tasks.clip_bart.visual_embedding import add_extra_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DataSet(NamedTuple):
    """One of the data sets; its number is the `task_id` of its items.

    Attributes:
        file: of predictions.
        prompt: before its texts.
        share: its items in a batch, for each of VQA's.
        longest: tokens of a target, `<s>` and `</s>` included; None: it is not cut.
    """

    file: str
    prompt: str
    share: float
    longest: int | None = None


DATA_SETS = {  # in the order of the original, whose numbers these are
    "vqa": DataSet("vqa.json", "vqa: ", 1, longest=10),
    "gqa": DataSet("gqa.json", "gqa: ", 100 / 60),
    "nlvr2": DataSet("nlvr2.csv", "nlvr: ", 20 / 60),
    "caption": DataSet("caption.json", "caption: ", 50 / 60, longest=40),
}
NAMES = tuple(DATA_SETS)
VQA, GQA, NLVR2, CAPTION = range(len(NAMES))
DECISIONS = ("true", "false")  # NLVR2's targets
ANSWER = 19  # tokens of a generated answer; with the first `</s>` that are 20
DRAWS = 1  # the random stream of answers, beside that of the order
MEASURED = ("task_id", "losses", "tokens", "right", "decided")  # of each item in validation, beside its score


class MultitaskTask(Task):
    """Four data sets learned at once, every one as text in and text out; predictions are in each one's own format."""

    files = ("questions.json", "annotations.json", "captions.json", "gqa.json", "nlvr2.jsonl")
    selection = ("val_score", True)
    image_takes_positions = False
    extend = staticmethod(add_extra_tokens)

    def build(self, text_model: PreTrainedModel, *arguments: Any) -> ClipBart:
        self.vocabulary = (self.data / "answers.json",)
        self.answers = read_vocabulary(self.data / "answers.json")
        true, false = (self.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in DECISIONS)
        if true == false:
            raise RoutevlError(f"backbone {text_model.name_or_path}: its tokens for true and false begin alike")
        return ClipBart((true, false), text_model, *arguments)

    # ------------------------------------------------------------------------------------------ examples

    def examples(self, split: str) -> Dataset:
        """Raises RoutevlError where a data set has none."""
        parts = [read(split, answered=True) for read in self._readers().values()]
        for name, part in zip(NAMES, parts, strict=True):
            if not len(part):
                raise RoutevlError(f"{self.data / split}: nothing of {name}, without which there is no multi-task learning")
        return concatenate_datasets(parts)

    def training_examples(self) -> Dataset:
        """The examples of the training split, of which `max_train_examples` keeps the first of each data set."""
        examples, most = self.examples("train"), self.settings.max_train_examples
        if most is None:
            return examples
        return examples.select(numpy.concatenate([members[:most] for members in _members(examples)]))

    def to_predict(self, split: str) -> Dataset:
        """The items of the data sets that the split has files of; no answers are needed, and of captions each image, once."""
        parts = [read(split, answered=False) for file, read in self._readers().items() if (self.data / split / file).exists()]
        if not any(map(len, parts)):
            raise RoutevlError(f"{self.data / split}: no questions, statements or images, so nothing to predict")
        return concatenate_datasets([part for part in parts if len(part)])

    def _readers(self) -> dict[str, Callable[..., Dataset]]:
        """The file of a split that a data set's items are read of, and what reads them."""
        return {"questions.json": self._vqa, "gqa.json": self._gqa, "nlvr2.jsonl": self._nlvr2, "images.json": self._captions}

    def _vqa(self, split: str, answered: bool) -> Dataset:
        path, known, targets = self.data / split / "questions.json", set(self.answers), None
        if answered:
            questions, annotations = vqav2.read_pair(path, path.with_name("annotations.json"))
            scores = [soft_scores([answer["answer"] for answer in annotation["answers"]]) for annotation in annotations]
            targets = [{a: score for a, score in sorted(of.items()) if score > 0 and a in known} or {"": 0.0} for of in scores]
        else:
            questions = vqav2.read_questions(path)
        images, keys = [[q["image_id"]] for q in questions], [str(q["question_id"]) for q in questions]
        return self._data_set(VQA, [q["question"] for q in questions], images, keys, targets)

    def _gqa(self, split: str, answered: bool) -> Dataset:
        questions = gqa.read_questions(self.data / split / "gqa.json")
        of = questions.values()
        targets = [{question["answer"]: 1.0} for question in of] if answered else None
        return self._data_set(GQA, [q["question"] for q in of], [[q["image_id"]] for q in of], list(questions), targets)

    def _nlvr2(self, split: str, answered: bool) -> Dataset:
        of = nlvr2.read_examples(self.data / split / "nlvr2.jsonl")
        images, keys = [list(example.image_ids) for example in of], [example.identifier for example in of]
        targets = [{DECISIONS[0 if example.label else 1]: 1.0} for example in of] if answered else None
        return self._data_set(NLVR2, [example.sentence for example in of], images, keys, targets)

    def _captions(self, split: str, answered: bool) -> Dataset:
        """A caption each; to predict, an image each that has some, or each of the split's where it has no captions.json."""
        path, targets = self.data / split / "captions.json", None
        if answered or path.exists():
            annotations = coco.read_captions(path)["annotations"]
            images = [caption["image_id"] for caption in annotations]
            targets = [{caption["caption"].strip(): 1.0} for caption in annotations]
        else:
            images = [image["id"] for image in IMAGES.read(path.with_name("images.json"))]
        if not answered:
            images, targets = list(dict.fromkeys(images)), None
        return self._data_set(CAPTION, [""] * len(images), [[image] for image in images], list(map(str, images)), targets)

    def _data_set(
        self,
        number: int,
        texts: list[str],
        images: list[list[int]],
        keys: list[str],
        targets: list[dict[str, float]] | None,
    ) -> Dataset:
        """The items of one data set: each one's text, image or two, and name; with targets, its answers with their scores too, of
        which one is learned."""
        of = DATA_SETS[NAMES[number]]
        prompt = of.prompt if self.settings.task_prompts else ""
        longest = None if number == NLVR2 else self.settings.max_text_tokens  # statements: as long as the model has positions
        token_ids = self._tokens([prompt + text for text in texts], longest)
        items = {
            "data_set": [number] * len(texts),
            "token_ids": token_ids,
            LENGTH: [len(ids) for ids in token_ids],
            "images": images,
            "key": keys,
        }
        if targets is not None:
            target_ids = iter(self._tokens([target for of_item in targets for target in of_item], of.longest))
            items["target_ids"] = [[next(target_ids) for _ in of_item] for of_item in targets]
            items["scores"] = [list(of_item.values()) for of_item in targets]
        return Dataset.from_dict(items)

    def _tokens(self, texts: list[str], longest: int | None) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=longest)["input_ids"] if texts else []

    def image_ids(self, items: Dataset) -> Sequence[int]:
        return sorted({image for images in items["images"] for image in images})

    # ----------------------------------------------------------------------------------------- an epoch

    def parts(self, examples: Dataset) -> list[tuple[numpy.ndarray, int]]:
        """The data sets: batch_size is VQA's, the others' are in the original's proportions; or all in one, for mixed batches."""
        if self.settings.mixed_batches:
            return super().parts(examples)
        sizes = [max(1, int(self.settings.batch_size * data_set.share)) for data_set in DATA_SETS.values()]
        return list(zip(_members(examples), sizes, strict=True))

    def of_epoch(self, examples: Dataset, epoch: int) -> Dataset:
        """The examples with a number from [0, 1) each, by which one of its answers is taken: a function of seed, epoch, item."""
        draws = numpy.random.default_rng([self.settings.seed, epoch, DRAWS]).random(len(examples))
        return examples.add_column("draw", draws)

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.text_batch([example["token_ids"] for example in examples])
        batch |= self._images_of([example["images"] for example in examples])
        batch["task_id"] = torch.tensor([example["data_set"] for example in examples])
        if "target_ids" not in examples[0]:
            return {"ids": [example["key"] for example in examples], **batch}
        chosen = [_chosen(example["scores"], example.get("draw")) for example in examples]
        labels = [torch.tensor(example["target_ids"][n]) for example, n in zip(examples, chosen, strict=True)]
        batch["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        # a batch that is for captions has a loss over tokens, any other one over items, captions among them
        if self.settings.mixed_batches or not (batch["task_id"] == CAPTION).all():
            batch["scores"] = torch.tensor([example["scores"][n] for example, n in zip(examples, chosen, strict=True)])
        return batch

    def _images_of(self, images: list[list[int]]) -> dict[str, Tensor]:
        """Features (B, L_v, d_v), or (B, 2, L_v, d_v) where an item has two images; then also the mask of those that have one."""
        most = max(map(len, images))
        flat = [ids[min(place, len(ids) - 1)] for ids in images for place in range(most)]
        batch = self.images(flat)
        if most > 1:
            batch = {name: tensor.unflatten(0, (-1, most)) for name, tensor in batch.items()}
            if min(map(len, images)) < most:
                there = torch.tensor([[int(place < len(ids)) for place in range(most)] for ids in images])
                batch["visual_mask"] = there.repeat_interleave(self.visual.length, dim=1)
        return batch

    # -------------------------------------------------------------------------------------- validation

    def constant(self, examples: Dataset) -> float:
        """`val_score` of each data set's most frequent answer, decision or token."""
        worth: list[Counter[tuple[int, ...]]] = [Counter() for _ in NAMES]
        totals = [0] * len(NAMES)
        for example in examples.select_columns(["data_set", "target_ids", "scores"]):
            number, best = example["data_set"], _chosen(example["scores"], None)
            target = example["target_ids"][best]
            counted = [(token,) for token in target] if number == CAPTION else [tuple(target)]
            totals[number] += len(counted)
            for unit in counted:
                worth[number][unit] += example["scores"][best]
        return 100 * statistics.fmean(max(of.values()) / total for of, total in zip(worth, totals, strict=True))

    def validate(self, outputs: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Each data set's score in percent, and their mean.

        Of VQA and GQA what greedy decoding earns with each item's best answer, which it gives where every token of that is the
        likeliest after those before it; of NLVR2 right decisions; of captions the share of tokens that are the likeliest.
        """
        outputs = [{"scores": torch.ones(len(output["tokens"])), **output} for output in outputs]
        of = {name: torch.cat([output[name] for output in outputs]) for name in (*MEASURED, "scores")}
        earned = (of["right"] == of["tokens"]) * of["scores"]
        measured = {
            "vqa": earned[of["task_id"] == VQA],
            "gqa": earned[of["task_id"] == GQA],
            "nlvr2": of["decided"][of["task_id"] == NLVR2],
        }
        scores = {name: 100 * values.double().mean().item() for name, values in measured.items()}
        captions = of["task_id"] == CAPTION
        scores["caption"] = 100 * of["right"][captions].sum().item() / of["tokens"][captions].sum().item()
        loss = of["losses"].double().sum().item() / of["tokens"].sum().item()
        of_each = {f"val_{name}": score for name, score in scores.items()}
        return {"val_loss": loss, "val_score": statistics.fmean(scores.values()), **of_each}

    # -------------------------------------------------------------------------------------- prediction

    def predict(self, model: ClipBart, batch: dict[str, Any]) -> list[dict[str, Any]]:
        keys, numbers = batch.pop("ids"), batch["task_id"].tolist()
        predicted: dict[int, dict[str, Any]] = {}
        for number in dict.fromkeys(numbers):
            rows = [row for row, of_row in enumerate(numbers) if of_row == number]
            members = {name: tensor[rows] for name, tensor in batch.items()}
            texts = model.decide(**members).tolist() if number == NLVR2 else self._written(model, number, members)
            for row, text in zip(rows, texts, strict=True):
                predicted[row] = {"data_set": NAMES[number]} | _entry(number, keys[row], text)
        return [predicted[row] for row in range(len(keys))]

    def _written(self, model: ClipBart, number: int, batch: dict[str, Tensor]) -> list[str]:
        """Captions by beam search, answers greedily."""
        beams, longest = (self.settings.beams, self.settings.max_new_tokens) if number == CAPTION else (1, ANSWER)
        sequences = model.generate(batch, num_beams=beams, max_new_tokens=longest, do_sample=False)
        known = sequences.masked_fill(sequences >= len(self.tokenizer), self.tokenizer.pad_token_id)  # an extra token is no text
        return [text.strip() for text in self.tokenizer.batch_decode(known, skip_special_tokens=True)]

    def write_predictions(self, predictions: list[dict[str, Any]], folder: Path) -> None:
        """Write each data set's official file, and as results.json which file is whose."""
        of: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
        for entry in predictions:
            of[entry.pop("data_set")].append(entry)
        for name in ("vqa", "gqa", "caption"):
            write_json(folder / DATA_SETS[name].file, of[name])
        with open(folder / DATA_SETS["nlvr2"].file, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(entry.values() for entry in of["nlvr2"])
        write_json(folder / "results.json", {name: data_set.file for name, data_set in DATA_SETS.items()})


def _members(examples: Dataset) -> list[numpy.ndarray]:
    """Which of n examples each data set has, int64 (m,)."""
    numbers = numpy.asarray(examples.with_format("numpy", columns=["data_set"])["data_set"][:])
    return [numpy.flatnonzero(numbers == number) for number in range(len(NAMES))]


def _chosen(scores: Sequence[float], draw: float | None) -> int:
    """Which answer of an item is taken: by a draw from [0, 1), in proportion to its score; without a draw the best one."""
    if draw is None:
        return max(range(len(scores)), key=scores.__getitem__)
    reached = numpy.cumsum(scores)
    return int(numpy.searchsorted(reached, draw * reached[-1], side="right")) if reached[-1] else 0


def _entry(number: int, key: str, predicted: str | bool) -> dict[str, Any]:
    """A prediction as the data set's official file has it."""
    if number == VQA:
        return {"question_id": int(key), "answer": predicted}
    if number == GQA:
        return {"questionId": key, "prediction": predicted}
    return {"identifier": key, "label": predicted} if number == NLVR2 else {"image_id": int(key), "caption": predicted}
