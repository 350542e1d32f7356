"""METER (Dou et al., 2022) of a text encoder and a vision model: two streams, pretrained on pairs of image and caption.

Two losses are added: cross-entropy of masked tokens, read beside their own image (MLM), and whether an image belongs to the
caption, which half of the images do not (ITM). The text encoder is trained too; the vision model is frozen.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from routevl.backbones import pretrain
from routevl.backbones.co_attention import CoAttentionConfig, CoAttentionModel
from routevl.backbones.derivations import CoAttentionOptions
from routevl.backbones.folder import fingerprint_of
from routevl.backbones.from_transformers import of_the_folder, transformers_config
from routevl.backbones.pairs import pairs_of
from routevl.backbones.text import load_text_backbone
from routevl.backbones.vision import VisionBackbone, load_vision_backbone, vision_tokens
from routevl.errors import RoutevlError
from routevl.features.images import read_image_lists
from routevl.features.loading import pixels_of
from routevl.files import sha256_of
from routevl.training.checkpoint import Checkpoint
from routevl.training.optimisation import Optimisation, prepare_torch
from routevl.training.resumable import AllOf, resumed_steps

if TYPE_CHECKING:
    from routevl.backbones.derive import Execution

KIND = "all"  # of the image's tokens: the class token first
MASKED = 0.15  # of the tokens
LONGEST = 50  # tokens of a caption, as in METER
HELD_OUT = 1000  # pairs of the validation split at most
NO_LABEL = -100  # what torch's cross-entropy ignores
BATCH_SIZE = 64  # of images that are encoded, and of pairs that are validated with


def derive(
    source: Path, options: CoAttentionOptions, output: Path, data: Path, vision: Path, execution: Execution
) -> dict[str, Any]:
    """Make a model of two streams of a text encoder's folder and of a vision model's, and pretrain it.

    Args:
        data: prepared data; it learns from captions of the training split, and is measured on those of the validation split.

    Returns:
        the vision model's fingerprint; and where it is pretrained the number of pairs, and of the validation split the shares of
        masked tokens that are right with their own image and with another one, and of right decisions whether an image belongs
        to a caption.

    Raises:
        RoutevlError: the source is no encoder, is pruned, or has no mask token; the vision model gives no tokens of the kind
            "all"; a split has no captions, or unreadable images; the width is no multiple of the heads; training diverged; a
            checkpoint that is damaged, or of another derivation.
        SystemExit: with `exit_status`, after a stop signal; the checkpoint is then on disk.
    """
    process = PartialState()
    prepare_torch(execution.threads)
    torch.manual_seed(options.seed)
    text_model, tokenizer = load_text_backbone(source, "encoder")
    if tokenizer.mask_token is None:
        raise RoutevlError(f"backbone {source}: its tokenizer has no mask token, and so there is nothing to learn; take another")
    if text_model.is_pruned:
        raise RoutevlError(
            f"backbone {source}: it is pruned, and pretraining would fill its zeros: take what it was derived from"
        )
    backbone = load_vision_backbone(vision)
    backbone.model.to(process.device)
    width = backbone.tokens.shape(KIND)[1]
    model = CoAttentionModel(_config(text_model.config, width, options, backbone.fingerprint))
    model.text_encoder.load_state_dict(text_model.state_dict())
    learner = Learner(model, tokenizer).to(process.device)
    found: dict[str, Any] = {"vision_fingerprint": backbone.fingerprint}
    if options.epochs:
        pairs = Pairs(data / "train", options.examples, options.seed, tokenizer, backbone)
        held_out = Pairs(data / "val", HELD_OUT, options.seed, tokenizer, backbone)
        identity = {
            "options": asdict(options),
            "source": fingerprint_of(source),
            "vision": backbone.fingerprint,
            "captions": sha256_of(data / "train" / "captions.json"),
            "threads": execution.threads,
        }
        checkpoint = Checkpoint(execution.checkpoint, identity, process)

        def steps_of(batches: list[list[int]], optimisation: Optimisation) -> Iterator[list[int]]:
            of_checkpoint = checkpoint, execution.checkpoint_every, AllOf(learner), optimisation
            return resumed_steps(lambda step: batches[step:], len(batches), *of_checkpoint, "co_attention")

        pretrain.train(
            learner.train().parameters(), [len(ids) for ids in pairs.token_ids], lambda indices: learner.loss(pairs, indices),
            argparse.Namespace(**asdict(options)), "co_attention", steps_of,
        )  # fmt: skip
        found |= {"pairs": len(pairs.token_ids), **learner.measured(held_out)}
    model.cpu().save_pretrained(output)
    tokenizer.save_pretrained(output)
    return found


def write_untrained(source: Path, options: CoAttentionOptions, output: Path, vision: Path) -> None:
    """What `derive` writes beside the weights, of folders that need none: config.json and the tokenizer."""
    width = vision_tokens(vision).shape(KIND)[1]
    _config(transformers_config(source), width, options, None).save_pretrained(output)
    of_the_folder(AutoTokenizer, source, "tokenizer").save_pretrained(output)


def _config(text: PretrainedConfig, width: int, options: CoAttentionOptions, fingerprint: str | None) -> CoAttentionConfig:
    """Of a model on image tokens (B, L_v, width). Raises RoutevlError where its layers' width is no multiple of the heads."""
    hidden_size = options.hidden_size or text.hidden_size
    if hidden_size % options.heads:
        raise RoutevlError(
            f"co_attention: the width {hidden_size} is no multiple of {options.heads} heads: set heads or hidden_size"
        )
    return CoAttentionConfig(
        text_config=text.to_dict(),
        image_width=width,
        hidden_size=hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * hidden_size,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
        vision_fingerprint=fingerprint,
    )


class Pairs:
    """Pairs of a split, with what the models read of them, on the CPU.

    Attributes:
        token_ids: of the captions.
        image_ids: which image each has, (n,) int64.
        images: image id -> its tokens (L_v, d_v) float32.
    """

    def __init__(
        self, split: Path, examples: int, seed: int, tokenizer: PreTrainedTokenizerBase, backbone: VisionBackbone
    ) -> None:
        pairs = pairs_of(split / "captions.json", examples, seed)
        longest = min(LONGEST, tokenizer.model_max_length)
        self.token_ids: list[list[int]] = tokenizer([text for _, text in pairs], truncation=True, max_length=longest)["input_ids"]
        self.image_ids = torch.tensor([image_id for image_id, _ in pairs])
        self.images = _tokens(split / "images.json", self.image_ids.unique().tolist(), backbone)

    def image_tokens(self, image_ids: Tensor) -> Tensor:
        """Of so many images, (B,) -> (B, L_v, d_v)."""
        return torch.stack([self.images[image_id] for image_id in image_ids.tolist()])


@torch.no_grad()
def _tokens(images: Path, image_ids: Sequence[int], backbone: VisionBackbone) -> Mapping[int, Tensor]:
    files = {image.image_id: image for image in read_image_lists([images])}
    found: dict[int, Tensor] = {}
    device = PartialState().device
    for start in range(0, len(image_ids), BATCH_SIZE):
        part = image_ids[start : start + BATCH_SIZE]
        pixels = pixels_of((files[image_id] for image_id in part), backbone.transform).to(device)
        found |= zip(part, backbone.encode(pixels, [KIND])[KIND].cpu(), strict=True)
    return found


class Learner(nn.Module):
    """The model with its two heads of pretraining, which are then dropped."""

    def __init__(self, model: CoAttentionModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        width = model.config.hidden_size
        self.model = model
        self.words = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, model.config.text_config.vocab_size)
        )
        self.belongs = nn.Linear(2 * width, 2)
        self.tokenizer = tokenizer
        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)

    def loss(self, pairs: Pairs, indices: list[int]) -> Tensor:
        """MLM + ITM of these pairs, a scalar."""
        own = pairs.image_ids[indices]
        logits, labels = self.guessed(pairs, indices, own)
        of_words = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)
        shown = torch.where(torch.rand(len(own)) < 0.5, own.roll(1), own)
        decided = self.decided(pairs, indices, shown)
        return of_words + nn.functional.cross_entropy(decided, (shown == own).long().to(decided.device))

    def guessed(self, pairs: Pairs, indices: list[int], image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all tokens (B, T, vocabulary) beside these images, and the labels of masked ones, (B, T)."""
        batch = self.mask([{"input_ids": pairs.token_ids[index]} for index in indices]).to(self.model.device)
        return self.words(self._read(batch, pairs.image_tokens(image_ids)).last_hidden_state), batch["labels"]

    def decided(self, pairs: Pairs, indices: list[int], image_ids: Tensor) -> Tensor:
        """Logits (B, 2) of whether these images belong to the captions."""
        batch = self.tokenizer.pad({"input_ids": [pairs.token_ids[index] for index in indices]}, return_tensors="pt")
        return self.belongs(self._read(batch.to(self.model.device), pairs.image_tokens(image_ids)).pooler_output)

    def _read(self, batch: Mapping[str, Tensor], image_tokens: Tensor) -> BaseModelOutputWithPooling:
        return self.model(batch["input_ids"], batch["attention_mask"], image_embeds=image_tokens.to(self.model.device))

    @torch.inference_mode()
    def measured(self, pairs: Pairs) -> dict[str, float]:
        """Shares of masked tokens that are right, with their own and with another image, and of right decisions whether an image
        belongs to a caption, of which half do."""
        self.eval()
        right: dict[str, list[Tensor]] = {"token_accuracy": [], "token_accuracy_of_other_images": [], "matching_accuracy": []}
        for start in range(0, len(pairs.token_ids), BATCH_SIZE):
            indices = list(range(start, min(start + BATCH_SIZE, len(pairs.token_ids))))
            own = pairs.image_ids[indices]
            other = own.roll(len(own) // 2)  # captions of an image stand together
            for name, image_ids in zip(right, (own, other), strict=False):
                torch.manual_seed(start)  # the same tokens are masked
                logits, labels = self.guessed(pairs, indices, image_ids)
                right[name].append((logits.argmax(-1) == labels)[labels != NO_LABEL].cpu())
            for image_ids in (own, other):
                decided = self.decided(pairs, indices, image_ids).argmax(-1).cpu()
                right["matching_accuracy"].append(decided == (image_ids == own))
        return {name: round(torch.cat(found).float().mean().item(), 4) for name, found in right.items()}
