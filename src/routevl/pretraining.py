"""The demo's own small backbones, each pretrained on one modality alone.

    pretrain-text    a RoBERTa (masked tokens) or GPT-2 (next token) on sentences about scenes, never an image
    pretrain-vision  a ViT on the attributes of drawn scenes, never a word

Fine-tuning then has to learn how images and words belong together, as with the paper's backbones.
Training runs on the CPU: the models are tiny, and the same seed and thread count give the same bits on one
machine.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.files import atomic_folder, write_json

if TYPE_CHECKING:
    import numpy
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Batch = dict[str, torch.Tensor]

POSITIONS = 128  # text tokens and visual prefix together
HELD_OUT = 1000  # sentences or scenes that the quality is measured on
TRAINING_DATA, HELD_OUT_DATA, TRAINING_ORDER = range(3)  # independent random streams of one seed
WARM_UP = 0.1  # of all steps
WEIGHT_DECAY = 0.01
POSITION_SCALE = 0.5  # of the ViT's initial position embeddings; at timm's 0.02 it is slow to learn what is where
POSITIVE_WEIGHT = 5.0  # only one attribute in sixteen is present
BATCHES_PER_POOL = 16  # sorted by length among themselves
MASKED = 0.15  # of the tokens, as in RoBERTa
NO_LABEL = -100  # what torch's cross-entropy ignores


def random_generator(seed: int, stream: int) -> numpy.random.Generator:
    """A numpy generator for one use (`stream`) of a seed."""
    import numpy

    return numpy.random.default_rng([seed, stream])


# ---------------------------------------------------------------------------------------------- options


def _add_common_arguments(parser: argparse.ArgumentParser, batch_size: int, learning_rate: float) -> None:
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the backbone's folder")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True, help="passes over the training data")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="highest of the one-cycle schedule")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def _check_options(arguments: argparse.Namespace, *more: str) -> None:
    for option in (
        "epochs",
        "hidden_size",
        "layers",
        "heads",
        "batch_size",
        "learning_rate",
        "threads",
        *more,
    ):
        value = getattr(arguments, option)
        if value <= 0:
            raise RoutevlError(f"--{option.replace('_', '-')} {value}: expected a positive number")
    if arguments.hidden_size % arguments.heads:
        raise RoutevlError(f"--hidden-size {arguments.hidden_size} is not a multiple of --heads {arguments.heads}")
    if arguments.seed < 0:
        raise RoutevlError(f"--seed {arguments.seed}: expected 0 or more")


# --------------------------------------------------------------------------------------------- training


def _prepare_torch(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a tenth of the time
    torch.manual_seed(arguments.seed)


def train(
    parameters: Iterable[torch.nn.Parameter],
    batches: Iterator[Any],
    steps: int,
    learning_rate: float,
    loss_of: Callable[[Any], torch.Tensor],
    description: str,
) -> None:
    """Minimise `loss_of(batch)` over all batches: AdamW, one-cycle learning rate, gradient norm at most 1.

    Raises:
        RoutevlError: the loss became infinite or not a number.
    """
    import torch

    from routevl.progress import progress

    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    total = max(steps, 3)
    warm_up = max(WARM_UP, 2 / total)  # torch divides by the lengths of warm-up and decay, less a step
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=total, pct_start=warm_up, cycle_momentum=False
    )
    for batch in progress(batches, steps, description):
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise RoutevlError(f"{description}: the loss is {loss.item()}; set a lower --learning-rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def batch_indices(lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """The members of each batch: a new order in every epoch, like lengths together to save padding."""
    generator = random_generator(seed, TRAINING_ORDER)
    for _ in range(epochs):
        order = generator.permutation(len(lengths)).tolist()
        pool = batch_size * BATCHES_PER_POOL
        pools = [sorted(order[start : start + pool], key=lengths.__getitem__) for start in range(0, len(order), pool)]
        batches = [members[start : start + batch_size] for members in pools for start in range(0, len(members), batch_size)]
        yield from (batches[index] for index in generator.permutation(len(batches)).tolist())


def _finish(folder: Path, stage: str, quality: dict[str, float], arguments: argparse.Namespace) -> None:
    settings = {
        name: value
        for name, value in vars(arguments).items()
        if isinstance(value, int | float | str) and name not in ("output", "stage")
    }
    write_json(folder / "pretraining.json", {"stage": stage, "held_out": quality, "settings": settings})
    print(f"{stage}: held-out " + ", ".join(f"{name} {value:.4g}" for name, value in quality.items()))


# ------------------------------------------------------------------------------------------------- text


def import_libraries() -> None:
    """Import at one point what the stage needs, so that start-up can be measured apart from work."""
    import timm  # noqa: F401
    from transformers import GPT2LMHeadModel, RobertaForMaskedLM  # noqa: F401


def add_arguments_pretrain_text(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl pretrain-text`."""
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument("--sentences", type=int, required=True, help="training sentences about random scenes")
    parser.add_argument("--vocabulary-size", type=int, default=800, help="byte-level BPE tokens, at least 300")
    _add_common_arguments(parser, batch_size=32, learning_rate=2e-3)


def run_pretrain_text(arguments: argparse.Namespace) -> None:
    """Train a tokenizer and a text model on sentences alone, and save them as a Hugging Face folder.

    Raises:
        RoutevlError: a bad option, or training diverged.
    """
    _check_options(arguments, "sentences")
    if arguments.vocabulary_size < 300:
        raise RoutevlError(
            f"--vocabulary-size {arguments.vocabulary_size}: expected at least 300 (256 bytes and the special tokens come first)"
        )
    _prepare_torch(arguments)
    from routevl.data.shapes import sentences

    training = sentences(random_generator(arguments.seed, TRAINING_DATA), arguments.sentences)
    held_out = sentences(random_generator(arguments.seed, HELD_OUT_DATA), HELD_OUT)
    tokenizer, model = ARCHITECTURES[arguments.architecture](training, arguments)
    collate = _collator(tokenizer, arguments.seed)
    encoded = _encode(tokenizer, training)
    steps = math.ceil(len(encoded) / arguments.batch_size) * arguments.epochs
    lengths = [len(ids) for ids in encoded]
    chosen = batch_indices(lengths, arguments.batch_size, arguments.epochs, arguments.seed)
    batches = (collate([encoded[index] for index in indices]) for indices in chosen)
    train(
        model.parameters(),
        batches,
        steps,
        arguments.learning_rate,
        lambda batch: model(**batch).loss,
        f"pretrain-text ({arguments.architecture})",
    )
    quality = _text_quality(model, _collator(tokenizer, arguments.seed), _encode(tokenizer, held_out))
    with atomic_folder(arguments.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _finish(folder, "pretrain-text", quality, arguments)


def _roberta(sentences: list[str], arguments: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

    vocabulary = _byte_pairs(sentences, arguments.vocabulary_size, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer = RobertaTokenizer(**vocabulary, model_max_length=POSITIONS)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        intermediate_size=4 * arguments.hidden_size,
        max_position_embeddings=POSITIONS + tokenizer.pad_token_id + 1,  # RoBERTa counts from there
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, RobertaForMaskedLM(config)


def _gpt2(sentences: list[str], arguments: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    vocabulary = _byte_pairs(sentences, arguments.vocabulary_size, ["<|endoftext|>"])
    tokenizer = GPT2Tokenizer(**vocabulary, model_max_length=POSITIONS)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=arguments.hidden_size,
        n_layer=arguments.layers,
        n_head=arguments.heads,
        n_positions=POSITIONS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, GPT2LMHeadModel(config)


ARCHITECTURES = {"roberta": _roberta, "gpt2": _gpt2}


def _byte_pairs(sentences: list[str], vocabulary_size: int, special_tokens: list[str]) -> dict[str, Any]:
    """A byte-level BPE vocabulary and its merges, the special tokens first."""
    import json

    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(sentences, vocab_size=vocabulary_size, special_tokens=special_tokens, show_progress=False)
    merges = json.loads(trained.to_str())["model"]["merges"]
    return {"vocab": trained.get_vocab(), "merges": [tuple(pair) for pair in merges]}


def _encode(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[list[int]]:
    """Token ids: RoBERTa's with <s> and </s>, GPT-2's with <|endoftext|> on both sides."""
    encoded = tokenizer(sentences, truncation=True, max_length=POSITIONS - 2)["input_ids"]
    if tokenizer.mask_token is not None:
        return encoded
    return [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encoded]


def _collator(tokenizer: PreTrainedTokenizerBase, seed: int) -> Callable[[list[list[int]]], Batch]:
    """Pads a batch and sets the labels: 15% of the tokens, masked, for RoBERTa; all of them for GPT-2."""
    import torch
    from transformers import DataCollatorForLanguageModeling

    def pad(sequences: list[list[int]]) -> Batch:
        rows = [torch.tensor(ids) for ids in sequences]
        # GPT-2 has no padding token: its padding is hidden by the attention mask and not a target.
        padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_LABEL)
        return {"input_ids": input_ids, "attention_mask": (labels != NO_LABEL).long(), "labels": labels}

    if tokenizer.mask_token is None:
        return pad
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, seed=seed)

    def pad_and_mask(sequences: list[list[int]]) -> Batch:
        batch = pad(sequences)
        batch["input_ids"], batch["labels"] = mask.torch_mask_tokens(batch["input_ids"])
        return batch

    return pad_and_mask


def _text_quality(
    model: PreTrainedModel, collate: Callable[[list[list[int]]], Batch], encoded: list[list[int]]
) -> dict[str, float]:
    """Perplexity and accuracy of the predicted tokens (masked ones for RoBERTa, all next ones for GPT-2)."""
    import torch

    model.eval()
    shift = 0 if model.config.model_type == "roberta" else 1
    loss_sum, right, predicted = 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, len(encoded), 100):
            batch = collate(encoded[start : start + 100])
            labels = batch.pop("labels")
            logits = model(**batch).logits
            logits, labels = logits[:, : logits.shape[1] - shift].flatten(0, 1), labels[:, shift:].flatten()
            loss_sum += torch.nn.functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum").item()
            right += (logits.argmax(-1) == labels).sum().item()
            predicted += (labels != NO_LABEL).sum().item()
    return {"token_accuracy": right / predicted, "perplexity": math.exp(loss_sum / predicted)}


# ----------------------------------------------------------------------------------------------- vision


def add_arguments_pretrain_vision(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl pretrain-vision`."""
    parser.add_argument("--images", type=int, required=True, help="training images of random scenes")
    parser.add_argument("--image-size", type=int, default=48, help="pixels a side")
    parser.add_argument("--patch-size", type=int, default=8, help="pixels a side")
    _add_common_arguments(parser, batch_size=32, learning_rate=2e-3)


def run_pretrain_vision(arguments: argparse.Namespace) -> None:
    """Train a ViT on drawn scenes to tell what stands in each cell of the grid; save it as a timm folder.

    A linear head, dropped afterwards, reads the attributes of all cells from the [CLS] token, which so has to
    gather the whole image, and those of its own cell alone from each patch token, which so has to know
    where it is.

    Raises:
        RoutevlError: a bad option, or training diverged.
    """
    _check_options(arguments, "images", "image_size", "patch_size")
    from routevl.data.shapes import ATTRIBUTES

    if arguments.image_size % arguments.patch_size:
        raise RoutevlError(f"--image-size {arguments.image_size} is not a multiple of --patch-size {arguments.patch_size}")
    _prepare_torch(arguments)
    import torch

    model = _vision_transformer(arguments)
    head = torch.nn.Linear(arguments.hidden_size, ATTRIBUTES)
    transform = _transform_of(model)
    images, targets = _draw(arguments.images, arguments, TRAINING_DATA)

    def loss_of(indices: list[int]) -> torch.Tensor:
        pixels = torch.stack([transform(images[index]) for index in indices])
        hidden_states = model.forward_features(pixels)  # (B, 1 + L, d)
        tokens = torch.cat([hidden_states[:, :1], _mean_over_cells(hidden_states[:, 1:])], dim=1)
        expected = torch.cat([targets[indices, None], _only_own_cell(targets[indices])], dim=1)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            head(tokens), expected, pos_weight=torch.tensor(POSITIVE_WEIGHT), reduction="sum"
        ) / len(indices)

    steps = math.ceil(arguments.images / arguments.batch_size) * arguments.epochs
    batches = batch_indices([1] * arguments.images, arguments.batch_size, arguments.epochs, arguments.seed)
    parameters = [*model.parameters(), *head.parameters()]
    train(parameters, batches, steps, arguments.learning_rate, loss_of, "pretrain-vision")
    quality = _vision_quality(model.eval(), head, transform, *_draw(HELD_OUT, arguments, HELD_OUT_DATA))
    with atomic_folder(arguments.output) as folder:
        _save_timm(model, folder)
        _finish(folder, "pretrain-vision", quality, arguments)


def _vision_transformer(arguments: argparse.Namespace) -> torch.nn.Module:
    import timm
    import torch

    size = arguments.image_size
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=0,
        img_size=size, patch_size=arguments.patch_size, embed_dim=arguments.hidden_size,
        depth=arguments.layers, num_heads=arguments.heads,
        pretrained_cfg_overlay={"input_size": (3, size, size), "crop_pct": 1.0, "num_classes": 0},
    )  # fmt: skip
    torch.nn.init.normal_(model.pos_embed, std=POSITION_SCALE)
    return model


def _transform_of(model: torch.nn.Module) -> Callable[[Image], torch.Tensor]:
    """The preprocessing that feature extraction will read from the saved folder."""
    from timm.data import create_transform, resolve_model_data_config

    return create_transform(**resolve_model_data_config(model), is_training=False)


def _draw(count: int, arguments: argparse.Namespace, stream: int) -> tuple[list[Image], torch.Tensor]:
    """Images of random scenes and their attributes, float32 (count, ATTRIBUTES)."""
    import numpy
    import torch

    from routevl.data.shapes import attributes, render, sample_scene

    generator = random_generator(arguments.seed, stream)
    images, targets = [], []
    for _ in range(count):
        scene = sample_scene(generator)
        images.append(render(scene, arguments.image_size, generator))
        targets.append(attributes(scene))
    return images, torch.from_numpy(numpy.stack(targets)).float()


def _mean_over_cells(patches: torch.Tensor) -> torch.Tensor:
    """Patch tokens (B, L, d) -> the mean of those in each cell of the scenes' grid (B, cells, d)."""
    import torch

    from routevl.data.shapes import GRID

    side = math.isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (B, d, side, side)
    return torch.nn.functional.adaptive_avg_pool2d(grid, GRID).flatten(2).transpose(1, 2)


def _only_own_cell(targets: torch.Tensor) -> torch.Tensor:
    """Attributes of all cells (B, cells * a) -> a copy per cell, zero elsewhere (B, cells, cells * a)."""
    import torch

    from routevl.data.shapes import GRID

    cells = GRID * GRID
    own = torch.eye(cells)[:, :, None] * targets.unflatten(1, (1, cells, -1))  # (B, cells, cells, a)
    return own.flatten(2)


def _vision_quality(
    model: torch.nn.Module,
    head: torch.nn.Module,
    transform: Callable[[Image], torch.Tensor],
    images: list[Image],
    targets: torch.Tensor,
) -> dict[str, float]:
    """How well the pooled token tells the attributes: F1 over all of them, accuracy per thing in a scene."""
    import torch

    from routevl.data.shapes import ATTRIBUTES_PER_CELL, COLORS, SHAPES, SIZES

    with torch.inference_mode():
        logits = torch.cat(
            [
                head(model.forward_features(torch.stack([transform(image) for image in images[start : start + 100]]))[:, 0])
                for start in range(0, len(images), 100)
            ]
        )
    found, there = logits > 0, targets > 0
    quality = {"attribute_f1": 2 * (found & there).sum().item() / (found.sum() + there.sum()).item()}
    occupied = there.unflatten(1, (-1, ATTRIBUTES_PER_CELL)).any(-1)
    kinds = {"shape": len(SHAPES), "color": len(COLORS), "size": len(SIZES)}
    groups = [
        part.split(list(kinds.values()), dim=-1)
        for part in (tensor.unflatten(1, (-1, ATTRIBUTES_PER_CELL))[occupied] for tensor in (logits, targets))
    ]
    for kind, guessed, expected in zip(kinds, *groups, strict=True):
        quality[f"{kind}_accuracy"] = (guessed.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return quality


def _save_timm(model: torch.nn.Module, folder: Path) -> None:
    from timm.models import save_for_hf

    save_for_hf(model, str(folder), model_args=dict(model._model_args), safe_serialization=True)
