"""Stage `pretrain-text`: a RoBERTa (masked tokens), GPT-2 (next token) or BART (infilled spans) on sentences about scenes, never
an image."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
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
from routevl.backbones.pretrain import HELD_OUT, HELD_OUT_DATA, NOISE, TRAINING_DATA, random_generator
from routevl.data.scenes import pick, sample_scene
from routevl.data.shapes_gqa import gqa_questions
from routevl.data.shapes_language import questions, sentences
from routevl.data.shapes_nlvr2 import statements
from routevl.files import atomic_folder, check_replaceable
from routevl.options import at_least

POSITIONS = 128  # text tokens and visual prefix together
MASKED = 0.15  # of the tokens, as in RoBERTa
INFILLED, SPAN = 0.3, 3.0  # of the tokens, and how many on average a span has, as in BART
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
    architecture = ARCHITECTURES[arguments.architecture]
    training = architecture.sentences(random_generator(arguments.seed, TRAINING_DATA), arguments.sentences)
    held_out = architecture.sentences(random_generator(arguments.seed, HELD_OUT_DATA), HELD_OUT)
    tokenizer, model = architecture.build(training, arguments)
    collate = architecture.collator(tokenizer, arguments.seed)
    encoded = _encode(tokenizer, training)

    def loss_of(indices: list[int]) -> Tensor:
        return model(**collate([encoded[index] for index in indices])).loss

    description = f"pretrain-text ({arguments.architecture})"
    pretrain.train(model.parameters(), [len(ids) for ids in encoded], loss_of, arguments, description)
    quality = _quality(model, collate, _encode(tokenizer, held_out), architecture.ahead)
    with atomic_folder(arguments.output, "config.json") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        pretrain.write_record(folder, "pretrain-text", quality, arguments)


def write_untrained(folder: str | Path, options: Mapping[str, Any]) -> None:
    """What a pretraining with these options would have beside the weights: config.json, and a tokenizer of fewer sentences."""
    arguments = pretrain.arguments_of(add_arguments, options)
    architecture = ARCHITECTURES[arguments.architecture]
    tokenizer, model = architecture.build(architecture.sentences(random_generator(0, TRAINING_DATA), 100), arguments)
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


def _bart(sentences: list[str], arguments: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    vocabulary = byte_pairs(sentences, arguments.vocabulary_size, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer = BartTokenizer(**vocabulary, model_max_length=POSITIONS)
    sizes = {"layers": arguments.layers, "attention_heads": arguments.heads, "ffn_dim": 4 * arguments.hidden_size}
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=arguments.hidden_size,
        **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()},
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        init_std=arguments.hidden_size**-0.5,  # at 0.02 so narrow a decoder does not come to read what its encoder has read
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, BartForConditionalGeneration(config)


def byte_pairs(sentences: list[str], vocabulary_size: int, special_tokens: list[str]) -> dict[str, Any]:
    """A byte-level BPE vocabulary and its merges, the special tokens first: {"vocab": token -> id, "merges": pairs}."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(sentences, vocab_size=vocabulary_size, special_tokens=special_tokens, show_progress=False)
    merges = json.loads(trained.to_str())["model"]["merges"]
    return {"vocab": trained.get_vocab(), "merges": [tuple(pair) for pair in merges]}


def _encode(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[list[int]]:
    """Token ids: RoBERTa's and BART's with <s> and </s>, GPT-2's with <|endoftext|> on both sides."""
    encoded = tokenizer(sentences, truncation=True, max_length=POSITIONS - 2)["input_ids"]
    if tokenizer.mask_token is not None:
        return encoded
    return [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encoded]


def _masked(tokenizer: PreTrainedTokenizerBase, seed: int) -> Collate:
    """Pads sequences of token ids to int64 (B, T); 15% of the tokens are masked, and are the labels."""
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    return lambda sequences: mask([{"input_ids": ids} for ids in sequences])


def _whole(tokenizer: PreTrainedTokenizerBase, seed: int) -> Collate:
    """Pads sequences of token ids to int64 (B, T); all tokens are labels."""

    def pad(sequences: list[list[int]]) -> dict[str, Tensor]:
        # GPT-2 has no padding token: its padding is hidden by the attention mask and not a target.
        labels = _padded(sequences)
        return {"input_ids": labels.clamp(min=0), "attention_mask": (labels != NO_LABEL).long(), "labels": labels}

    return pad


def _infilled(tokenizer: PreTrainedTokenizerBase, seed: int) -> Collate:
    """Pads corrupted sequences of token ids to int64 (B, T); all tokens of the whole sequences, (B, T'), are labels."""
    generator = random_generator(seed, NOISE)

    def corrupt(sequences: list[list[int]]) -> dict[str, Tensor]:
        read = _padded([without_spans(ids, tokenizer.mask_token_id, generator) for ids in sequences])
        mask = read != NO_LABEL
        return {
            "input_ids": read.masked_fill(~mask, tokenizer.pad_token_id),
            "attention_mask": mask.long(),
            "labels": _padded(sequences),
        }

    return corrupt


def without_spans(ids: list[int], mask: int, generator: numpy.random.Generator) -> list[int]:
    """BART's text infilling of `<s> ... </s>`: one `mask` in the place of each of some spans. Their lengths are random,
    Poisson(3), and they have 30% of the tokens between the two in all. A span of no tokens is a `mask` more."""
    first, *inside, last = ids
    lengths, left = [], math.ceil(INFILLED * len(inside))
    while left:
        lengths.append(min(int(generator.poisson(SPAN)), left))
        left -= lengths[-1]
    slots = len(inside) - sum(lengths) + len(lengths)  # a kept token or a span each
    spans = dict(zip(sorted(generator.choice(slots, len(lengths), replace=False).tolist()), lengths, strict=True))
    corrupted, position = [first], 0
    for slot in range(slots):
        corrupted.append(mask if slot in spans else inside[position])
        position += spans.get(slot, 1)
    return [*corrupted, last]


def _padded(sequences: list[list[int]]) -> Tensor:
    return pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True, padding_value=NO_LABEL)


def _about_pairs_too(generator: numpy.random.Generator, n: int) -> list[str]:
    """As `sentences`, half of them; then questions like GQA's, statements like NLVR2's, and answers without what they answer: a
    decoder has to know their words."""
    written = sentences(generator, (n + 1) // 2)
    while len(written) < n:
        scenes = [sample_scene(generator) for _ in range(4)]
        asked = gqa_questions(scenes[0], generator, 1)[0]
        answers = (asked.answer, questions(scenes[0], generator, 1)[0].answer, "true", "false")
        stated = statements([(scenes[0], scenes[1]), (scenes[2], scenes[3])], generator, 1)  # which may find none
        written += [asked.text, pick(generator, answers), *(statement.text for statement in stated)]
    return written[:n]


class Architecture(NamedTuple):
    """A text model, and what it learns.

    Attributes:
        sentences: a generator and a number -> so many sentences.
        build: these and the stage's arguments -> tokenizer, untrained model.
        collator: tokenizer and seed -> what makes a batch of sequences of token ids.
        ahead: how many positions after the one that predicts it a label stands.
    """

    sentences: Callable[[numpy.random.Generator, int], list[str]]
    build: Callable[[list[str], argparse.Namespace], tuple[PreTrainedTokenizerBase, PreTrainedModel]]
    collator: Callable[[PreTrainedTokenizerBase, int], Collate]
    ahead: int


ARCHITECTURES = {
    "roberta": Architecture(sentences, _roberta, _masked, ahead=0),
    "gpt2": Architecture(sentences, _gpt2, _whole, ahead=1),
    "bart": Architecture(_about_pairs_too, _bart, _infilled, ahead=0),  # which shifts its labels itself
}


def _quality(model: PreTrainedModel, collate: Collate, encoded: list[list[int]], ahead: int) -> dict[str, float]:
    """Perplexity and accuracy of the labels: of RoBERTa's masked tokens, of all of GPT-2's and BART's."""
    model.eval()
    loss_sum, right, predicted = 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, len(encoded), 100):
            batch = collate(encoded[start : start + 100])
            labels, logits = batch["labels"], model(**batch).logits
            logits, labels = logits[:, : logits.shape[1] - ahead].flatten(0, 1), labels[:, ahead:].flatten()
            loss_sum += torch.nn.functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum").item()
            right += (logits.argmax(-1) == labels).sum().item()
            predicted += (labels != NO_LABEL).sum().item()
    return {"token_accuracy": right / predicted, "perplexity": math.exp(loss_sum / predicted)}
