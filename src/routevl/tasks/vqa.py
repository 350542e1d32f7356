"""Visual question answering as classification over an answer vocabulary (paper, section 4.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from routevl.data.vqav2 import read_pair, read_questions
from routevl.errors import RoutevlError
from routevl.files import read_json, sha256_of
from routevl.metrics.vqa import soft_scores
from routevl.tasks.base import LENGTH, Task, VisionLanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VqaModel(VisionLanguageModel):
    """An encoder whose hidden state at the first text position ([CLS]) is classified; no pooler, for RoBERTa ships none.

    Of a model of two streams what its poolers give is classified.
    """

    def __init__(self, n_answers: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        d = self.width
        read = 2 * d if self.two_streams else d
        self.head = nn.Sequential(nn.Linear(read, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, n_answers))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor,
        answer_scores: Tensor | None = None,
        routed_image: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits (B, n_answers); with answer_scores (B, n_answers) in [0, 1] the loss and each answer's score too.

        The loss is binary cross-entropy on the soft scores, summed over answers and averaged over examples, whose number is
        `count`.
        """
        inputs = self.text_inputs(input_ids, attention_mask, image, routed_image)
        output = self.text_model(**inputs)
        if self.two_streams:
            read = output.pooler_output  # (B, 2 d)
        else:
            read = output.last_hidden_state[:, -input_ids.shape[1]]  # of (B, ... + L_t, d): a prompt's positions stand first
        logits = self.head(read).float()
        if answer_scores is None:
            return {"logits": logits}
        losses = nn.functional.binary_cross_entropy_with_logits(logits, answer_scores, reduction="none").sum(-1)
        accuracies = answer_scores.gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)
        count = losses.new_full((), len(losses))
        return {"loss": losses.mean(), "count": count, "losses": losses.detach(), "accuracies": accuracies}


class VqaTask(Task):
    """Questions and ten annotators' answers in, one answer of the vocabulary out."""

    files = ("questions.json", "annotations.json")
    selection = ("val_accuracy", True)

    def build(self, text_model: PreTrainedModel, *arguments: Any) -> VqaModel:
        self.answers: list[str] = read_json(self.data / "answers.json")
        if not (type(self.answers) is list and self.answers and all(type(answer) is str for answer in self.answers)):
            raise RoutevlError(f"{self.data / 'answers.json'}: expected the answer vocabulary, a list of at least one answer")
        self.answer_index = {answer: index for index, answer in enumerate(self.answers)}
        return VqaModel(len(self.answers), text_model, *arguments)

    def inputs(self) -> dict[str, str]:
        """The answer vocabulary, to whose order the head's outputs belong."""
        return {"answers": sha256_of(self.data / "answers.json")}

    def examples(self, split: str) -> Dataset:
        folder = self.data / split
        questions, annotations = read_pair(folder / "questions.json", folder / "annotations.json")
        if not questions:
            raise RoutevlError(f"{folder / 'questions.json'}: no questions, so nothing to learn vqa from")
        targets = [self._targets([answer["answer"] for answer in annotation["answers"]]) for annotation in annotations]
        answers = {
            "answer_index": [list(target) for target in targets],
            "answer_score": [list(target.values()) for target in targets],
        }
        return Dataset.from_dict(self._asked(questions) | answers)

    def constant(self, examples: Dataset) -> float:
        """The accuracy in percent of the answer that is right most often."""
        sums: Counter[int] = Counter()
        for example in examples.select_columns(["answer_index", "answer_score"]):
            sums.update(dict(zip(example["answer_index"], example["answer_score"], strict=True)))
        return 100 * max(sums.values(), default=0.0) / len(examples)

    def to_predict(self, split: str) -> Dataset:
        """Each question; no answers are needed."""
        path = self.data / split / "questions.json"
        questions = read_questions(path)
        if not questions:
            raise RoutevlError(f"{path}: no questions, so nothing to answer")
        return Dataset.from_dict(self._asked(questions))

    def _asked(self, questions: list[dict[str, Any]]) -> dict[str, list[Any]]:
        token_ids = self._tokenise(questions)
        return {
            "token_ids": token_ids,
            LENGTH: [len(ids) for ids in token_ids],
            "image_id": [question["image_id"] for question in questions],
            "question_id": [question["question_id"] for question in questions],
        }

    def _tokenise(self, questions: list[dict[str, Any]]) -> list[list[int]]:
        texts = [question["question"] for question in questions]
        return self.tokenizer(texts, truncation=True, max_length=self.settings.max_text_tokens)["input_ids"]

    def _targets(self, answers: list[str]) -> dict[int, float]:
        """Vocabulary index -> the official accuracy that this answer would get, where above zero."""
        return {self.answer_index[a]: score for a, score in soft_scores(answers).items() if a in self.answer_index and score > 0}

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.text_batch([example["token_ids"] for example in examples])
        batch |= self.images([example["image_id"] for example in examples])
        if "answer_index" not in examples[0]:
            batch["ids"] = torch.tensor([example["question_id"] for example in examples])
        else:
            rows = [row for row, example in enumerate(examples) for _ in example["answer_index"]]
            indices, scores = ([each for example in examples for each in example[f"answer_{of}"]] for of in ("index", "score"))
            batch["answer_scores"] = torch.zeros(len(examples), len(self.answers))
            batch["answer_scores"][rows, indices] = torch.tensor(scores, dtype=torch.float32)
        return batch

    def validate(self, outputs: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        outputs = list(outputs)
        accuracies = torch.cat([output["accuracies"] for output in outputs])
        losses = torch.cat([output["losses"] for output in outputs])
        return {"val_loss": losses.double().mean().item(), "val_accuracy": 100 * accuracies.double().mean().item()}

    def predict(self, model: VqaModel, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        question_ids = batch.pop("ids").tolist()
        chosen = model(**batch)["logits"].argmax(-1).tolist()
        return [{"question_id": q, "answer": self.answers[a]} for q, a in zip(question_ids, chosen, strict=True)]
