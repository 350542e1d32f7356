"""Image captioning with a causal language model (paper, section 4.2)."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from routevl.data.coco import read_captions
from routevl.errors import RoutevlError
from routevl.features.images import IMAGES
from routevl.tasks.base import LENGTH, Task, VisionLanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CaptionModel(VisionLanguageModel):
    """A causal language model that reads [visual prefix] <bos> caption <eos>."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor, routed_image: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Next-token cross-entropy over every caption token, the first and <eos> included, padding excluded.

        Shapes: input_ids, attention_mask (B, L_t); loss a scalar, mean over `count` tokens; losses and tokens (B,), their sum and
        number per example.
        """
        inputs = self.text_inputs(input_ids, attention_mask, image, routed_image)
        predicted = attention_mask[:, 1:].bool()  # <bos> predicts the first token
        with self._logits_at(nn.functional.pad(predicted, (0, 1))):
            logits = self.text_model(**inputs, use_cache=False).logits[0]  # (tokens, vocabulary)
        losses = nn.functional.cross_entropy(logits.float(), input_ids[:, 1:][predicted], reduction="none")
        of_examples = losses.new_zeros(predicted.shape).masked_scatter(predicted, losses.detach()).sum(-1)
        tokens = predicted.sum(-1)
        return {"loss": losses.mean(), "count": tokens.sum(), "losses": of_examples, "tokens": tokens}

    @contextmanager
    def _logits_at(self, text_positions: Tensor) -> Iterator[None]:
        """Give the model's head, the largest of its layers, hidden states (1, n, d) of some of the text's positions alone.

        text_positions: (B, L_t) bool; prefix and prompt stand before them.
        """

        def choose(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            [hidden_states] = args  # (B, ... + L_t, d)
            before = hidden_states.shape[1] - text_positions.shape[1]
            return (hidden_states[nn.functional.pad(text_positions, (before, 0))][None],)

        handle = self.text_model.get_output_embeddings().register_forward_pre_hook(choose)
        try:
            yield
        finally:
            handle.remove()

    @torch.inference_mode()
    def generate(self, bos: int, image: Tensor, routed_image: Tensor | None = None, **options: Any) -> Tensor:
        """Token ids (B, new tokens) that follow [visual prefix] <bos>; `options` are those of transformers' generate."""
        input_ids = torch.full((image.shape[0], 1), bos, device=image.device)
        inputs = self.text_inputs(input_ids, torch.ones_like(input_ids), image, routed_image)
        return self.text_model.generate(**inputs, **options)


class CaptionTask(Task):
    """An image in, a caption out; each of an image's reference captions is one training example."""

    files = ("captions.json",)
    selection = ("val_loss", False)

    def build(self, text_model: PreTrainedModel, *arguments: Any) -> CaptionModel:
        if self.tokenizer.eos_token_id is None:
            raise RoutevlError(f"backbone {text_model.name_or_path}: its tokenizer has no token (eos_token) that ends a caption")
        if "inputs_embeds" not in inspect.signature(text_model.prepare_inputs_for_generation).parameters:
            raise RoutevlError(
                f"backbone {text_model.name_or_path}: transformers' {type(text_model).__name__} cannot generate from embeddings; "
                "take another text backbone"
            )
        return CaptionModel(text_model, *arguments)

    def longest_text(self) -> tuple[str, int]:
        """The longer of a caption to learn and one to generate, which starts with <bos>."""
        return max(super().longest_text(), ("max_new_tokens", 1 + self.settings.max_new_tokens), key=lambda bound: bound[1])

    @property
    def bos(self) -> int:
        """The token that a caption starts from; GPT-2 has one token for both ends, and so has a model without one to begin."""
        own = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if own is None else own

    def examples(self, split: str) -> Dataset:
        path = self.data / split / "captions.json"
        annotations = read_captions(path)["annotations"]
        if not annotations:
            raise RoutevlError(f"{path}: no captions, so nothing to learn captioning from")
        texts = [annotation["caption"].strip() for annotation in annotations]
        tokens = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=self.settings.max_text_tokens - 2)[
            "input_ids"
        ]
        token_ids = [[self.bos, *ids, self.tokenizer.eos_token_id] for ids in tokens]
        return Dataset.from_dict(
            {
                "token_ids": token_ids,
                LENGTH: [len(ids) for ids in token_ids],
                "image_id": [annotation["image_id"] for annotation in annotations],
            }
        )

    def constant(self, examples: Dataset) -> float:
        """The loss of the examples' own unigram frequencies: their entropy in nats."""
        counts = Counter(token for ids in examples["token_ids"] for token in ids[1:])
        return torch.distributions.Categorical(torch.tensor(list(counts.values()), dtype=torch.float64)).entropy().item()

    def to_predict(self, split: str) -> Dataset:
        """Each image that has captions, once; where the split has no captions.json, each that it lists."""
        folder = self.data / split
        image_ids = [image["id"] for image in IMAGES.read(folder / "images.json")]
        if (folder / "captions.json").exists():
            captioned = {caption["image_id"] for caption in read_captions(folder / "captions.json")["annotations"]}
            image_ids = [image_id for image_id in image_ids if image_id in captioned]
        elif not image_ids:
            raise RoutevlError(f"{folder / 'images.json'}: no images, so nothing to caption")
        return Dataset.from_dict({"image_id": image_ids})

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        image_ids = [example["image_id"] for example in examples]
        images = self.images(image_ids)
        if "token_ids" not in examples[0]:
            return {"ids": torch.tensor(image_ids), **images}
        return {**self.text_batch([example["token_ids"] for example in examples]), **images}

    def validate(self, outputs: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        outputs = list(outputs)
        losses = sum(output["losses"].double().sum().item() for output in outputs)
        tokens = sum(output["tokens"].sum().item() for output in outputs)
        return {"val_loss": losses / tokens}

    def predict(self, model: CaptionModel, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        image_ids = batch.pop("ids").tolist()
        sequences = model.generate(
            self.bos,
            **batch,
            num_beams=self.settings.beams,
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        captions = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return [{"image_id": i, "caption": caption.strip()} for i, caption in zip(image_ids, captions, strict=True)]
