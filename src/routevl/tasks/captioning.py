"""Image captioning with a causal language model (paper, section 4.2)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from routevl.data.coco import read_captions
from routevl.errors import RoutevlError
from routevl.features.images import IMAGES
from routevl.tasks.base import Task, VisionLanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # torch's cross_entropy skips these targets


class CaptionModel(VisionLanguageModel):
    """A causal language model that reads [visual prefix] <bos> caption <eos>."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Next-token cross-entropy over every caption token, the first and <eos> included, padding excluded.

        Shapes: input_ids, attention_mask (B, L_t); loss a scalar, mean over `count` tokens; losses and tokens (B,), their sum and
        number per example.
        """
        inputs = self.text_inputs(input_ids, attention_mask, image)
        logits = self.text_model(**inputs, use_cache=False).logits[:, -input_ids.shape[1] :]  # (B, L_t, vocabulary)
        targets = input_ids.masked_fill(attention_mask == 0, IGNORED)[:, 1:]  # <bos> predicts the first token
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        ).sum(-1)
        tokens = (targets != IGNORED).sum(-1)
        return {"loss": losses.sum() / tokens.sum(), "count": tokens.sum(), "losses": losses.detach(), "tokens": tokens}

    @torch.inference_mode()
    def generate(self, bos: int, image: Tensor, **options: Any) -> Tensor:
        """Token ids (B, new tokens) that follow [visual prefix] <bos>; `options` are those of transformers' generate."""
        input_ids = torch.full((image.shape[0], 1), bos, device=image.device)
        inputs = self.text_inputs(input_ids, torch.ones_like(input_ids), image)
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
        return Dataset.from_dict(
            {
                "token_ids": [[self.bos, *ids, self.tokenizer.eos_token_id] for ids in tokens],
                "image_id": [annotation["image_id"] for annotation in annotations],
            }
        )

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
        image = self.visual.of(image_ids)
        if "token_ids" not in examples[0]:
            return {"ids": torch.tensor(image_ids), "image": image}
        return {**self.text_batch([example["token_ids"] for example in examples]), "image": image}

    def validate(self, outputs: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        outputs = list(outputs)
        losses = sum(output["losses"].double().sum().item() for output in outputs)
        tokens = sum(output["tokens"].sum().item() for output in outputs)
        return {"val_loss": losses / tokens}

    def predict(self, model: CaptionModel, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        sequences = model.generate(
            self.bos,
            batch["image"],
            num_beams=self.settings.beams,
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        captions = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        image_ids = batch["ids"].tolist()
        return [{"image_id": i, "caption": caption.strip()} for i, caption in zip(image_ids, captions, strict=True)]
