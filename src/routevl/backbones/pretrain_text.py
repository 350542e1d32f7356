"""Stage `pretrain-text`: a RoBERTa (masked tokens) or GPT-2 (next token) on sentences about scenes, never an image."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

from routevl.backbones import pretrain
from routevl.backbones.pretrain import HELD_OUT, HELD_OUT_DATA, TRAINING_DATA, random_generator
from routevl.data.shapes_language import sentences
from routevl.files import atomic_folder, check_replaceable
from routevl.options import at_least

POSITIONS = 128  # text tokens and visual prefix together
MASKED = 0.15  # of the tokens, as in RoBERTa
NO_LABEL = -100  # what torch's cross-entropy ignores

Collate = Callable[[list[list[int]]], dict[str, Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl pretrain-text`."""
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument("--sentences", type=at_least(1), required=True, help="training sentences about random scenes")
    parser.add_argument("--vocabulary-size", type=at_least(300), default=800, help="byte-level BPE tokens, at least 300")
    pretrain.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train a tokenizer and a text model on sentences alone, and save them as a Hugging Face folder.

    Raises:
        RoutevlError: a bad option, or training diverged.
    """
    check_replaceable(arguments.output, "config.json")
    pretrain.prepare(arguments)
    training = sentences(random_generator(arguments.seed, TRAINING_DATA), arguments.sentences)
    held_out = sentences(random_generator(arguments.seed, HELD_OUT_DATA), HELD_OUT)
    tokenizer, model = ARCHITECTURES[arguments.architecture](training, arguments)
    collate = _collator(tokenizer)
    encoded = _encode(tokenizer, training)

    def loss_of(indices: list[int]) -> Tensor:
        return model(**collate([encoded[index] for index in indices])).loss

    description = f"pretrain-text ({arguments.architecture})"
    pretrain.train(model.parameters(), [len(ids) for ids in encoded], loss_of, arguments, description)
    quality = _quality(model, collate, _encode(tokenizer, held_out))
    with atomic_folder(arguments.output, "config.json") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        pretrain.write_record(folder, "pretrain-text", quality, arguments)


def write_untrained(folder: str | Path, options: Mapping[str, Any]) -> None:
    """What a pretraining with these options would have beside the weights: config.json, and a tokenizer of fewer sentences."""
    arguments = pretrain.arguments_of(add_arguments, options)
    tokenizer, model = ARCHITECTURES[arguments.architecture](sentences(random_generator(0, TRAINING_DATA), 100), arguments)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _roberta(sentences: list[str], arguments: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    vocabulary = byte_pairs(sentences, arguments.vocabulary_size, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
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
    vocabulary = byte_pairs(sentences, arguments.vocabulary_size, ["<|endoftext|>"])
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


def byte_pairs(sentences: list[str], vocabulary_size: int, special_tokens: list[str]) -> dict[str, Any]:
    """A byte-level BPE vocabulary and its merges, the special tokens first: {"vocab": token -> id, "merges": pairs}."""
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


def _collator(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Pads sequences of token ids to int64 (B, T) and sets the labels: 15% of RoBERTa's tokens, masked; all of GPT-2's."""
    if tokenizer.mask_token is not None:
        mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
        return lambda sequences: mask([{"input_ids": ids} for ids in sequences])

    def pad(sequences: list[list[int]]) -> dict[str, Tensor]:
        rows = [torch.tensor(ids) for ids in sequences]
        # GPT-2 has no padding token: its padding is hidden by the attention mask and not a target.
        labels = pad_sequence(rows, batch_first=True, padding_value=NO_LABEL)
        return {"input_ids": labels.clamp(min=0), "attention_mask": (labels != NO_LABEL).long(), "labels": labels}

    return pad


def _quality(model: PreTrainedModel, collate: Collate, encoded: list[list[int]]) -> dict[str, float]:
    """Perplexity and accuracy of the predicted tokens (masked ones for RoBERTa, all next ones for GPT-2)."""
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
