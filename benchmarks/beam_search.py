"""Beam search of a routed GPT-2, with the key-value cache against without it, and with many visual tokens against one.

    python benchmarks/beam_search.py --threads 2 --output benchmarks/results/beam_search.json
    python benchmarks/beam_search.py --threads 2 --visual-tokens 196

Every caption has --new-tokens tokens. The captions with and without the cache must be equal, else this ends with an error. They
begin with <bos> and have no visual prefix: transformers always uses the cache where generation starts from embeddings, as a
prefix needs. With --visual-tokens the time of the same search with one visual token stands in place of that without the cache.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from common import add_arguments, in_turn, prepare, random_gpt2, ratios, report
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from routevl.methods import RoutedLoraConfig
from routevl.routing import ROUTING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routing", choices=[name for name in ROUTING if name != "none"], default="mul")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--images", type=int, default=4, help="captioned together")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument("--visual-tokens", type=int, default=1, help="of each image, L_v")
    add_arguments(parser, rounds=5)
    arguments = parser.parse_args()
    device = prepare(arguments)
    model = routed_gpt2(arguments).to(device).eval()
    bos = torch.zeros(arguments.images, 1, dtype=torch.int64, device=device)
    captions: dict[str, Tensor] = {}

    def search(name: str, visual_tokens: int = 1, use_cache: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(arguments.images, visual_tokens, arguments.width, generator=generator).tanh().to(device)
        captions[name] = model.generate(
            input_ids=bos,
            attention_mask=torch.ones_like(bos),
            visual_features=features,
            num_beams=arguments.beams,
            min_new_tokens=arguments.new_tokens,
            max_new_tokens=arguments.new_tokens,
            do_sample=False,
            pad_token_id=0,
            use_cache=use_cache,
        )

    if arguments.visual_tokens == 1:
        reference, other = "with the cache", partial(search, "without", use_cache=False)
    else:
        reference, other = "one visual token", partial(search, "many", visual_tokens=arguments.visual_tokens)
    variants = {reference: partial(search, reference, visual_tokens=1), other.args[0]: other}
    seconds = in_turn(variants, arguments.rounds, device, arguments.warm_up)
    if arguments.visual_tokens == 1 and not torch.equal(captions[reference], captions["without"]):
        raise SystemExit(f"the captions differ: {captions}")
    report(ratios(seconds, reference), arguments, seconds=seconds)


def routed_gpt2(arguments: argparse.Namespace) -> PeftModel:
    """A GPT-2 of random weights with routed LoRA, whose up-projections are not zero, so that captions depend on the image."""
    adapter = RoutedLoraConfig(r=arguments.rank, lora_alpha=arguments.rank, routing=arguments.routing)
    model = get_peft_model(random_gpt2(arguments.layers, arguments.width), adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


if __name__ == "__main__":
    main()
