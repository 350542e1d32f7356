"""Training throughput of routed LoRA and Adapter at the paper's shapes: samples/s, peak memory, use of the device.

    python benchmarks/throughput.py --model roberta-large --device cuda --output benchmarks/results/throughput_roberta-large.json
    python benchmarks/throughput.py --model gpt2-medium --device cuda --output benchmarks/results/throughput_gpt2-medium.json
    python benchmarks/throughput.py --model roberta-large --small

What is trained is the package's own VqaModel or CaptionModel as a run's settings make it, on a text model of the real
architecture with random weights: visual prefix, one pooled visual token, trained layer norms, bfloat16 autocast, deterministic
kernels, AdamW. A step is forward pass, backward pass and optimiser, on a batch that lies on the device already and whose texts
all have the full length: reading data is not part of it. Each method runs in a process of its own, so that its peak memory is its
own (what torch allocated on a GPU; the whole process on a CPU).

Model FLOPs are counted by torch from the shapes of every matrix product of one sample's forward and backward pass: 2 m n k each.
So a frozen weight costs 4 FLOPs per position (forward pass, and the gradient of its input), a trained one 6 (its own gradient
too). Attention counts with its full L x L products, once, whatever a fused kernel computes again; element-wise work, AdamW
included, does not count. Utilisation is FLOPs per sample times samples/s over the device's peak.
"""

from __future__ import annotations

import argparse
import multiprocessing
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from common import add_arguments, in_turn, machine_of, prepare, random_gpt2, random_roberta, report
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from routevl.methods.base import layer_norms
from routevl.methods.table import new_method
from routevl.routing import ROUTING
from routevl.tasks.base import VisionLanguageModel
from routevl.tasks.captioning import CaptionModel
from routevl.tasks.vqa import VqaModel
from routevl.training.clock import Clock
from routevl.training.optimisation import prepare_torch

ANSWERS = 3129
VQA = {"task": "vqa", "batch_size": 512, "tokens": 20, "ranks": {"lora": 128, "adapter": 64}}
CAPTION = {"task": "caption", "batch_size": 40, "tokens": 50, "ranks": {"lora": 128, "adapter": 128}}
BASE, LARGE = {"layers": 12, "width": 768}, {"layers": 24, "width": 1024}
MODELS = {"roberta-base": VQA | BASE, "roberta-large": VQA | LARGE, "gpt2": CAPTION | BASE, "gpt2-medium": CAPTION | LARGE}
SMALL = {"layers": 2, "width": 64, "batch_size": 2, "steps": 3}

# dense bfloat16 FLOP/s of the tensor cores, by torch's name of the device; NVIDIA's data sheets (those of H100 and H200 give the
# double, for sparse matrices)
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H200": 989e12,  # SXM
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="roberta-large", help="sets task, layers, width, batch and ranks")
    parser.add_argument("--small", action="store_true", help="two narrow layers and a small batch: for two CPU cores")
    parser.add_argument("--routing", choices=ROUTING, default="mul")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--tokens", type=int, help="text tokens, L_t")
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    add_arguments(parser, rounds=3)
    chosen = parser.parse_known_args()[0]
    parser.set_defaults(**MODELS[chosen.model] | (SMALL if chosen.small else {}))
    arguments = parser.parse_args()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows = pool.map(partial(measure, arguments), arguments.ranks, chunksize=1)
    device = machine_of(torch.device(arguments.device))["device"]
    if device in PEAK_FLOPS:
        for row in rows:
            row["utilisation"] = round(1e9 * row["GFLOP/sample"] * row["samples/s"] / PEAK_FLOPS[device], 3)
    report(rows, arguments)
    if device not in PEAK_FLOPS:
        print(f"\nno utilisation: the peak FLOP/s of this device ({device}) is not in the benchmark's table")


def measure(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """Train one method for `rounds` times `steps` steps; its row of the report."""
    device = prepare(arguments)
    prepare_torch(arguments.threads)
    model = build(arguments, method).to(device).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch = {name: tensor.to(device) for name, tensor in random_batch(arguments).items()}
    flops = flops_of(model, {name: tensor[:1] for name, tensor in batch.items()})

    def train() -> None:
        for _ in range(arguments.steps):
            backward(model, batch)
            optimiser.step()
            optimiser.zero_grad()

    seconds = in_turn({method: train}, arguments.rounds, device, arguments.warm_up)[method]
    samples = arguments.rounds * arguments.steps * arguments.batch_size
    summary = Clock(device, sum(seconds), [a / arguments.steps for a in seconds], samples).summary()
    return {
        "model": arguments.model,
        "layers": arguments.layers,
        "width": arguments.width,
        "method": method,
        "rank": arguments.ranks[method],
        "batch": arguments.batch_size,
        "step (ms)": summary["step_ms_median"],
        "samples/s": summary["samples_per_second"],
        "peak memory (MiB)": summary["peak_memory_mb"],
        "GFLOP/sample": round(flops / 1e9, 3),
    }


def build(arguments: argparse.Namespace, method: str) -> VisionLanguageModel:
    """The task's model, float32, on the CPU; the visual features are as wide as the text model, so nothing projects them."""
    text_model = {"vqa": random_roberta, "caption": random_gpt2}[arguments.task](arguments.layers, arguments.width)
    options = {"r": arguments.ranks[method], "routing": arguments.routing}
    if method == "lora":
        options["lora_alpha"] = arguments.ranks[method]
    visual = SimpleNamespace(width=arguments.width, length=1, encoder=nn.Identity())
    inputs = text_model, new_method(method, options, "benchmark"), {}, layer_norms(text_model), visual, True
    return VqaModel(ANSWERS, *inputs) if arguments.task == "vqa" else CaptionModel(*inputs)


def random_batch(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """A batch of B random texts of L_t tokens with one visual token each, as the task's `collate` gives it."""
    shape = (arguments.batch_size, arguments.tokens)
    batch = {
        "input_ids": torch.randint(5, 50000, shape),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "image": torch.randn(arguments.batch_size, 1, arguments.width).tanh(),
    }
    return batch if arguments.task == "caption" else {**batch, "answer_scores": torch.rand(arguments.batch_size, ANSWERS)}


def backward(model: VisionLanguageModel, batch: dict[str, Tensor]) -> None:
    """Forward pass in bfloat16 autocast and backward pass; the gradients are left in the parameters."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        loss = model(**batch)["loss"]
    loss.backward()


def flops_of(model: VisionLanguageModel, batch: dict[str, Tensor]) -> int:
    """Model FLOPs of one forward and backward pass. Attention runs in its plain form here: torch cannot count all fused ones."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backward(model, batch)
    model.zero_grad()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
