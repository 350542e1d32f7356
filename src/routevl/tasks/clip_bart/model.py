"""The model of CLIP-BART: text and image in, text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bart.modeling_bart import shift_tokens_right

from routevl.tasks.base import VisionLanguageModel
from routevl.tasks.clip_bart.joint_encoder import embed_text_alone, text_of
from routevl.tasks.clip_bart.visual_embedding import VisualEmbedding

IGNORED = -100  # labels that are padding, as everywhere in transformers


class ClipBart(VisionLanguageModel):
    """A BART whose encoder reads the tokens of one image or two and a text, and whose decoder writes an answer or a caption.

    `image` is features (B, N, d_v), or (B, 2, N, d_v) of a pair; the text is `<s> ... </s>`, padded on the right. A method that
    reads the image itself gets the mean of its embedded tokens, of both images' where there are two, unless it wants all.

    Args:
        choices: the first tokens of the answers "true" and "false", between which `decide` does.
        text_model: a BartForConditionalGeneration whose last rows of token embeddings number the grid (`add_extra_tokens`).
        arguments: the others of VisionLanguageModel.

    Raises:
        RoutevlError: as VisionLanguageModel; the text model is no BART.
    """

    routed_tokens = "mean"

    def __init__(self, choices: tuple[int, int], text_model: PreTrainedModel, *arguments: Any) -> None:
        embed_text_alone(text_model)
        super().__init__(text_model, *arguments)
        self.choices = choices

    def add_projections(self, visual_width: int) -> None:
        self.method_projects, self.prefix_projection = False, None
        embeddings = self.text_model.get_input_embeddings()
        self.visual_projection = VisualEmbedding(visual_width, embeddings) if self.sees_image else nn.Identity()

    def forward(self, labels: Tensor, scores: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the labels: `<s> ... </s>`, then -100, (B, T) int64, which the decoder reads after a first `</s>`.

        With scores (B,) float32, as of answers, the loss is a mean over items: each one's mean over its tokens, times its score.
        Without, as of captions, it is the mean over all tokens of the batch. `count` is the number of items, or of tokens. Of
        each item, (B,): losses and tokens, their sum and their number; right, how many tokens are the likeliest ones; decided,
        whether `decide` gives the label; and what the batch has of task_id and scores. batch: the arguments of `text_inputs`.
        """
        config = self.text_model.config
        logits = self._logits(batch, shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id))
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED).sum(-1)
        tokens = (labels != IGNORED).sum(-1)
        if scores is None:
            loss, count = losses.sum() / tokens.sum(), tokens.sum()
        else:
            loss, count = (losses / tokens * scores).mean(), losses.new_full((), len(losses))
        of_items = {
            "losses": losses.detach(),
            "tokens": tokens,
            "right": (logits.argmax(-1) == labels).sum(-1),  # no token is the label of padding
            "decided": self._decided(logits) == (labels[:, 1] == self.choices[0]),
            "task_id": batch.get("task_id"),
            "scores": scores,
        }
        return {"loss": loss, "count": count} | {name: value for name, value in of_items.items() if value is not None}

    @torch.inference_mode()
    def decide(self, **batch: Tensor) -> Tensor:
        """Whether "true" is more likely than "false" after `</s> <s>`: (B,) bool; batch: the arguments of `text_inputs`."""
        config = self.text_model.config
        start = batch["input_ids"].new_tensor([[config.decoder_start_token_id, config.bos_token_id]])
        return self._decided(self._logits(batch, start.expand(len(batch["input_ids"]), -1)))

    def _decided(self, logits: Tensor) -> Tensor:
        """The same by all logits, (B, T, vocabulary)."""
        true, false = self.choices
        return logits[:, 1, true] > logits[:, 1, false]

    @torch.inference_mode()
    def generate(self, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
        """Token ids (B, 1 + new tokens) from `</s>` on, padded on the right; the encoder runs once.

        Args:
            batch: the arguments of `text_inputs`.
            options: those of transformers' generate.
        """
        with text_of(batch["input_ids"].shape[1]):
            return self.text_model.generate(**self.text_inputs(**batch), **options)

    def _logits(self, batch: Mapping[str, Tensor], decoder_input_ids: Tensor) -> Tensor:
        """What the decoder says at each position: (B, T, vocabulary) float32."""
        with text_of(batch["input_ids"].shape[1]):
            output = self.text_model(**self.text_inputs(**batch), decoder_input_ids=decoder_input_ids, use_cache=False)
        return output.logits.float()
