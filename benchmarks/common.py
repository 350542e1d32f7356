"""What the benchmarks share: variants timed in turn in one process, their ratios, the machine, random backbones."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from routevl.files import write_json
from routevl.progress import progress

PACKAGES = ("torch", "transformers", "peft", "timm")
HEAD_WIDTH = 64  # of RoBERTa's, GPT-2's and ViT's attention heads


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Options of every benchmark."""
    parser.add_argument("--rounds", type=int, default=rounds, help="times that each variant is measured")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before these, which are not counted")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", metavar="JSON", help="write every measured time there, with the machine and the versions")


def prepare(arguments: argparse.Namespace) -> torch.device:
    """Set seed and threads; the device to measure on."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    return torch.device(arguments.device)


def in_turn(
    variants: dict[str, Callable[[], Any]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each variant in each round.

    A round runs every variant once, each time starting with another one, so that a drift of the machine hits all alike.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in progress(range(-warm_up, rounds), warm_up + rounds, "rounds"):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed = seconds_of(variants[name], device)
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, its work on the device included."""
    _wait_for(device)
    start = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(seconds: dict[str, list[float]], reference: str) -> list[dict[str, Any]]:
    """One row per variant: its median seconds, and its ratio to the reference in two ways.

    `ratio`, with its range, is the median over the rounds, where time of the same round is divided by time of the same round;
    `ratio of medians` divides the median seconds.
    """
    rows = []
    for name, times in seconds.items():
        quotients = [a / b for a, b in zip(times, seconds[reference], strict=True)]
        rows.append(
            {
                "variant": name,
                "seconds": round(statistics.median(times), 4),
                "ratio": round(statistics.median(quotients), 3),
                "lowest": round(min(quotients), 3),
                "highest": round(max(quotients), 3),
                "ratio of medians": round(statistics.median(times) / statistics.median(seconds[reference]), 3),
            }
        )
    return rows


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace, **more: Any) -> None:
    """Print the rows as a Markdown table below the machine; with --output write them, `more` and all settings as JSON."""
    machine = machine_of(torch.device(arguments.device))
    if getattr(arguments, "small", False):
        print(f"SMALL shapes, which say nothing about the paper's, on {machine['device']}")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print()
    print(f"| {' | '.join(rows[0])} |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        write_json(arguments.output, {"machine": machine, "settings": settings, "rows": rows, **more})


def machine_of(device: torch.device) -> dict[str, str]:
    """Device, number of CPU cores and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"device": name, "cores": str(os.cpu_count()), "python": platform.python_version(), **versions}


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def random_roberta(layers: int, width: int) -> RobertaModel:
    """A frozen RoBERTa with random weights; 12 layers of width 768 are RoBERTa-base."""
    config = RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=4 * width,
    )
    return RobertaModel(config, add_pooling_layer=False).requires_grad_(False)


def random_gpt2(layers: int, width: int) -> GPT2LMHeadModel:
    """A frozen GPT-2 with random weights; 12 layers of width 768 are GPT-2. Token 0 is <bos> and <eos>."""
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // HEAD_WIDTH, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).requires_grad_(False)
