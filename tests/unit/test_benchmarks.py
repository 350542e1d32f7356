"""The benchmarks' count of model FLOPs, against the sum over a layer's matrices done by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
D, LAYERS, TOKENS, RANK = 64, 2, 5, 4
L = 1 + TOKENS  # positions, the visual prefix included
FROZEN, TRAINED, TRAINED_ON_IMAGE = 4, 6, 4  # FLOPs per weight and position; nothing needs the image's own gradient


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import throughput

    return throughput


def by_hand(task: str, method: str, vocabulary: int, answers: int) -> int:
    attention = 3 * 2 * (2 * L * L * D)  # scores and weighted values: forward pass, and a gradient for each of the two factors
    bottlenecks = 2 * (TRAINED * L * 2 * D * RANK + TRAINED_ON_IMAGE * D * RANK)
    layer = FROZEN * L * 12 * D * D + attention + bottlenecks
    if task == "caption":
        return LAYERS * layer + FROZEN * (TOKENS - 1) * D * vocabulary  # logits of what is predicted: no prefix, no last token
    return LAYERS * layer + TRAINED * (D * 2 * D + 2 * D * answers)  # the head reads one position


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_flops_are_those_counted_by_hand(throughput: ModuleType, task: str, method: str) -> None:
    arguments = argparse.Namespace(
        task=task, routing="mul", layers=LAYERS, width=D, batch_size=1, tokens=TOKENS, ranks={method: RANK}
    )
    model = throughput.build(arguments, method).train()
    batch = throughput.random_batch(arguments)
    vocabulary = model.text_model.config.vocab_size
    assert throughput.flops_of(model, batch) == by_hand(task, method, vocabulary, throughput.ANSWERS)
