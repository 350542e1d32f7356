"""How grid features become tokens of BART's encoder, and the rows of its vocabulary that number them."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

EXTRA_TOKENS = 200  # the last of them are grid tokens' numbers; the first hundred are never read, but counted
IMAGES = 2  # at most, of an item
BOX = 5  # x1, x2, y1, y2, area
STANDARD_DEVIATION = 0.02  # of weights at the start, as of BART's


def add_extra_tokens(text_model: PreTrainedModel) -> None:
    """Give a text model's vocabulary EXTRA_TOKENS more rows, from N(0, 0.02²).

    They are the same in every run: most methods leave them frozen, and no file of a run has what is frozen.
    """
    table = text_model.resize_token_embeddings(text_model.config.vocab_size + EXTRA_TOKENS, mean_resizing=False).weight
    rows = numpy.random.default_rng(0).standard_normal((EXTRA_TOKENS, table.shape[1]), dtype=numpy.float32)
    table.data[-EXTRA_TOKENS:] = torch.from_numpy(STANDARD_DEVIATION * rows)


class VisualEmbedding(nn.Module):
    """v_i = LN(W_f f_i + b_f) + LN(W_p [x1, x2, y1, y2, area] + b_p) + I[image] + E[last - i], for token i of an image.

    Grid tokens have no boxes: their five numbers are 0, and their second term is one trained vector. As b_p starts at 0, where a
    layer norm multiplies gradients by 1 / √eps = 316, nearly all of the first steps' gradient is that of b_p.

    Args:
        visual_width: of features.
        token_embedding: E, the text model's own, (rows, d), with which it is trained or frozen.
    """

    def __init__(self, visual_width: int, token_embedding: nn.Embedding) -> None:
        super().__init__()
        width = token_embedding.embedding_dim
        self.features = nn.Sequential(nn.Linear(visual_width, width), nn.LayerNorm(width))
        self.boxes = nn.Sequential(nn.Linear(BOX, width), nn.LayerNorm(width))
        self.image_order = nn.Parameter(STANDARD_DEVIATION * torch.randn(IMAGES, width))
        for layer in (self.features[0], self.boxes[0]):
            nn.init.normal_(layer.weight, std=STANDARD_DEVIATION)
            nn.init.zeros_(layer.bias)
        self.token_embedding = token_embedding

    def forward(self, features: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Features (B, N, visual_width) of one image, or (B, I, N, visual_width) of I images -> tokens (B, I * N, d), one image
        after the other; boxes as features, (..., 4): x1, x2, y1, y2 in shares of the image's width and height."""
        *images, tokens, _ = features.shape  # (B) or (B, I)
        embedded = self.features(features) + self.boxes(features.new_zeros(BOX) if boxes is None else with_area(boxes))
        embedded = embedded.view(images[0], -1, tokens, embedded.shape[-1])  # (B, I, N, d)
        from_last = self.token_embedding.num_embeddings - 1 - torch.arange(tokens, device=features.device)
        return (embedded + self.image_order[: embedded.shape[1], None] + self.token_embedding(from_last)).flatten(1, 2)


def with_area(boxes: Tensor) -> Tensor:
    """(..., 4), x1, x2, y1, y2 -> (..., 5), with the area."""
    x1, x2, y1, y2 = boxes.unbind(-1)
    return torch.cat([boxes, ((x2 - x1) * (y2 - y1))[..., None]], dim=-1)
