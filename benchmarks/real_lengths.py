"""A training step on real texts, batched by length and with logits only where something is learned, against steps with padding.

    python benchmarks/real_lengths.py --texts captions_val2017.json --batch-size 40
    python benchmarks/real_lengths.py --texts v2_OpenEnded_mscoco_val2014_questions.json --batch-size 512

--texts is a COCO captions or a VQAv2 questions file, plain or gzip-compressed, and decides the task: captions by a GPT-2, or
answers by a RoBERTa, with routed LoRA, visual prefix and trained layer norms, and random weights of the real shapes. Texts become
tokens by a byte-level BPE that is learned from them, as no published tokenizer comes with this package. Each variant makes
--steps steps, forward pass, backward pass and AdamW, on batches of an epoch that are spread evenly over the batches' lengths.
The logits are those of a step in float32, what the largest layer leaves in memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import throughput
import torch
from common import add_arguments, in_turn, prepare, ratios, report
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from routevl.tasks.base import VisionLanguageModel
from routevl.training.optimisation import prepare_torch
from routevl.training.order import grouped_by_length

VOCABULARY = 8000  # of the tokens; the models have their own, as wide as the real ones
FULL_LENGTH = 50  # the paper's longest caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--routing", default="mul")
    parser.add_argument("--steps", type=int, default=4, help="steps per round")
    add_arguments(parser, rounds=3)
    arguments = parser.parse_args()
    device = prepare(arguments)
    prepare_torch(arguments.threads)
    arguments.task, token_ids = read_texts(arguments.texts)
    arguments.ranks = {"lora": arguments.rank}
    model = throughput.build(arguments, "lora").to(device).train()
    variants = {name: list(batches) for name, batches in variants_of(arguments, token_ids).items()}
    runs = {name: partial(train, model, batches, "all logits" in name, device) for name, batches in variants.items()}
    seconds = in_turn(runs, arguments.rounds, device, arguments.warm_up)
    rows = ratios(seconds, "grouped")
    for row in rows:
        masks = [mask for _, mask in variants[row["variant"]]]
        tokens = sum(int(m.sum()) for m in masks)
        row["tokens"] = tokens
        row["padding"] = round(1 - tokens / sum(m.numel() for m in masks), 3)
        if arguments.task == "caption":
            logits = sum(m.numel() + len(m) if "all logits" in row["variant"] else int(m[:, 1:].sum()) for m in masks)
            row["logits (MiB)"] = round(4 * logits / len(masks) * model.text_model.config.vocab_size / 2**20)
    report(rows, arguments, seconds=seconds)


def read_texts(path: Path) -> tuple[str, list[list[int]]]:
    """The task and the token ids of each text, with a token before and one behind it."""
    data = path.read_bytes()
    content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    task, texts = (
        ("vqa", [entry["question"] for entry in content["questions"]])
        if "questions" in content
        else ("caption", [entry["caption"] for entry in content["annotations"]])
    )
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    return task, [[1, *encoding.ids[: FULL_LENGTH - 2], 1] for encoding in tokenizer.encode_batch(texts)]


def variants_of(arguments: argparse.Namespace, token_ids: list[list[int]]) -> dict[str, Iterator[tuple[Tensor, Tensor]]]:
    """Name -> batches (input_ids, attention_mask) of an epoch: grouped by length as in training, or at random."""
    size = arguments.batch_size
    lengths = numpy.array([len(ids) for ids in token_ids])

    def some_of(order: numpy.ndarray) -> numpy.ndarray:
        """--steps of an epoch's full batches, spread evenly over how many tokens they have."""
        whole = order[: len(order) // size * size].reshape(-1, size)
        by_tokens = whole[lengths[whole].sum(axis=1).argsort(kind="stable")]
        return by_tokens[((numpy.arange(arguments.steps) + 0.5) * len(by_tokens) / arguments.steps).astype(int)].ravel()

    grouped = some_of(grouped_by_length(lengths, size, numpy.random.default_rng(0)))
    shuffled = some_of(numpy.random.default_rng(1).permutation(len(token_ids)))
    variants = {
        "grouped": batches(token_ids, grouped, size),
        "padded to the batch's longest": batches(token_ids, shuffled, size),
    }
    if arguments.task == "caption":
        variants["grouped, all logits"] = batches(token_ids, grouped, size)
        variants[f"padded to {FULL_LENGTH}, all logits"] = batches(token_ids, shuffled, size, FULL_LENGTH)
    return variants


def batches(token_ids: list[list[int]], order: numpy.ndarray, size: int, length: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the texts in that order, padded to their longest, or to a length."""
    for start in range(0, len(order), size):
        rows = [torch.tensor(token_ids[index]) for index in order[start : start + size]]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        more = max(0, length - ids.shape[1])
        yield nn.functional.pad(ids, (0, more)), nn.functional.pad(mask, (0, more))


def train(model: VisionLanguageModel, steps: list[tuple[Tensor, Tensor]], all_logits: bool, device: torch.device) -> None:
    """One step on each batch."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    for input_ids, attention_mask in steps:
        batch: dict[str, Any] = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
        batch["image"] = torch.ones(len(input_ids), 1, model.width, device=device)
        if all_logits:
            loss = loss_of_all_logits(model, **batch)
        else:
            answers = {"answer_scores": torch.zeros(len(input_ids), throughput.ANSWERS, device=device)}
            loss = model(**batch, **(answers if hasattr(model, "head") else {}))["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def loss_of_all_logits(model: VisionLanguageModel, input_ids: Tensor, attention_mask: Tensor, image: Tensor) -> Tensor:
    """The loss of CaptionModel, with the logits of all positions."""
    logits = model.text_model(**model.text_inputs(input_ids, attention_mask, image), use_cache=False).logits
    targets = input_ids.masked_fill(attention_mask == 0, -100)[:, 1:]
    return nn.functional.cross_entropy(logits[:, -input_ids.shape[1] : -1].float().transpose(1, 2), targets)


if __name__ == "__main__":
    main()
