"""A training step of routed LoRA against peft's own LoRA, with the same frozen weights, targets, rank and layer norms.

    python benchmarks/training_step.py --threads 2 --output benchmarks/results/training_step.json

One step is forward pass, backward pass and AdamW; the loss reads the last hidden states, without a head. `peft LoRA again`
is a second model like the reference: how far its ratio is from 1 shows how far the machine can be trusted.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from common import add_arguments, in_turn, prepare, random_roberta, ratios, report
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from routevl.methods import RoutedLoraConfig
from routevl.routing import without_ablations

REFERENCE = "peft LoRA"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 16])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20, help="text tokens, L_t")
    parser.add_argument("--visual-tokens", type=int, default=1, help="L_v")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    add_arguments(parser, rounds=9)
    arguments = parser.parse_args()
    device = prepare(arguments)
    base = random_roberta(arguments.layers, arguments.width).to(device)
    seconds, rows = {}, []
    for rank in arguments.ranks:
        variants = {name: training_step(base, config, arguments, device) for name, config in configurations(rank).items()}
        seconds[rank] = in_turn(variants, arguments.rounds, device, arguments.warm_up)
        rows += [{"rank": rank, **row} for row in ratios(seconds[rank], REFERENCE)]
    report(rows, arguments, seconds=seconds)


def configurations(rank: int) -> dict[str, PeftConfig]:
    """What is compared: peft's LoRA twice, and routed LoRA with each routing function."""
    same = {"r": rank, "lora_alpha": rank, "target_modules": ["query", "value"], "modules_to_save": ["LayerNorm"]}
    routed = {f"routed LoRA, {routing}": RoutedLoraConfig(routing=routing, **same) for routing in without_ablations()}
    return {REFERENCE: LoraConfig(**same), f"{REFERENCE} again": LoraConfig(**same), **routed}


def training_step(base: nn.Module, config: PeftConfig, arguments: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """A function that takes one step, on the same batch each time, of a model that shares the frozen weights of `base`."""
    shared: dict[int, object] = {id(parameter): parameter for parameter in base.parameters()}
    model = get_peft_model(copy.deepcopy(base, shared), config).to(device).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch, target = inputs(arguments, device)
    if getattr(config, "routing", "none") == "none":
        del batch["visual_features"]

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bfloat16"):
            hidden_states = model(**batch).last_hidden_state
        nn.functional.mse_loss(hidden_states.float(), target).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def inputs(arguments: argparse.Namespace, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of B random texts with L_v visual tokens each, and hidden states (B, L_t, d) to come near to."""
    shape = (arguments.batch_size, arguments.tokens)
    batch = {
        "input_ids": torch.randint(5, 50000, shape, device=device),
        "attention_mask": torch.ones(shape, dtype=torch.int64, device=device),
        "visual_features": torch.randn(arguments.batch_size, arguments.visual_tokens, arguments.width, device=device).tanh(),
    }
    return batch, torch.randn(*shape, arguments.width, device=device)


if __name__ == "__main__":
    main()
