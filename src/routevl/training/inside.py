"""Stage `inside`: what a trained run's routing functions do, bottleneck by bottleneck."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from routevl.backbones.co_attention import has_image_stream
from routevl.errors import RoutevlError
from routevl.files import write_json
from routevl.methods.routed.layer import RoutedLayer
from routevl.options import at_least, of_each_run
from routevl.progress import progress
from routevl.routing import mean_visual_token
from routevl.training.inputs import add_arguments as add_inputs
from routevl.training.order import data_loader
from routevl.training.predict import load_trained

NEGLIGIBLE = 1e-5  # of a tensor's norm: rounding of float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl inside`."""
    add_inputs(parser)
    of_each = {"nargs": "+", "required": True}
    parser.add_argument(
        "--model", metavar="FOLDER", help="trained runs whose method routes, on one text model of one stream", **of_each
    )
    parser.add_argument(
        "--examples", type=at_least(2), default=256, help="examples of the validation split to look at, drawn by the run's seed"
    )
    parser.add_argument("--output", metavar="JSON", help="where the measurements go, one for each run", **of_each)


def run(arguments: argparse.Namespace) -> None:
    """Put validation examples through trained runs, one after another, and measure each of their bottlenecks.

    Raises:
        RoutevlError: as `routevl predict`; a run has no routing function, or an encoder-decoder or a model of two streams.
    """
    for one in of_each_run(arguments, "output", "model"):
        _look_into(one)


def _look_into(arguments: argparse.Namespace) -> None:
    task, accelerator = load_trained(arguments)
    text_model = task.model.text_model
    if text_model.config.is_encoder_decoder or has_image_stream(text_model):  # whose positions are not all those of the text
        kind = "a model of two streams" if has_image_stream(text_model) else "an encoder-decoder"
        raise RoutevlError(f"{arguments.model}: its text model is {kind}, which this stage does not look into")
    layers = {name: module for name, module in task.model.named_modules() if isinstance(module, RoutedLayer)}
    tapped = {name: layer for name, layer in layers.items() if mixers_of(layer)}
    if not tapped:
        raise RoutevlError(f"{arguments.model}: the run has no routing function to look into")
    examples = task.examples("val")
    chosen = numpy.random.default_rng(task.settings.seed).permutation(len(examples))[: arguments.examples]
    loader = data_loader(
        task, examples.select(sorted(chosen)), accelerator, arguments.workers, batch_size=task.settings.prediction_batch_size
    )
    bottlenecks: dict[tuple[str, int], Bottleneck] = {}
    model = task.model.eval()
    with torch.inference_mode(), accelerator.autocast(), tapping(tapped) as calls:
        for batch in progress(loader, len(loader), f"inside {Path(arguments.model).name}"):
            model(**batch)
            for name, of_layer in calls.items():
                for part, call in enumerate(of_layer):
                    bottlenecks.setdefault((name, part), Bottleneck()).add(batch["attention_mask"].bool(), *call)
                of_layer.clear()
    records = [place_of(name) | {"part": part} | found.measured() for (name, part), found in bottlenecks.items()]
    write_json(arguments.output, {"examples": len(chosen), "bottlenecks": records})
    accelerator.end_training()


# a call of a routing function: x_t (B, L, r), x_v (B, L_v, r), the mask (B, L_v) of x_v or None, and what came out (B, L, r)
RoutingCall = tuple[Tensor, Tensor, Tensor | None, Tensor]


@contextmanager
def tapping(layers: Mapping[str, RoutedLayer]) -> Iterator[dict[str, list[RoutingCall]]]:
    """Note where the streams of the layers meet, by the layer's name, one call for each of its bottlenecks."""
    calls: dict[str, list[RoutingCall]] = {name: [] for name in layers}
    hooks = [
        mixer.register_forward_hook(partial(_note, calls[name])) for name, layer in layers.items() for mixer in mixers_of(layer)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _note(calls: list[RoutingCall], mixer: nn.Module, args: tuple[Tensor, Tensor, Tensor | None], routed: Tensor) -> None:
    calls.append((*args, routed))


def mixers_of(layer: RoutedLayer) -> list[nn.Module]:
    """What mixes the streams of a layer's bottlenecks; nothing where it does not route."""
    return [mixer for adapter in layer.adapters_in_use() if adapter in layer.mixers for mixer in layer.mixers[adapter]]


def place_of(name: str) -> dict[str, str | int]:
    """Where a module of the run's model is: its name in the text model, and its layer, counted from 0 (outside of layers 0)."""
    numbers = re.findall(r"\.(\d+)\.", name)
    return {"module": name.removeprefix("text_model.base_model.model."), "layer": int(numbers[0]) if numbers else 0}


class Bottleneck:
    """What went through one bottleneck at the text's positions, on the CPU in float64: n examples, m real text tokens.

    Attributes:
        text, routed: x_t and route(x_t, x_v), (m, r).
        image: the mean of each example's x_v, (n, r).
        tokens: how many text tokens each example has, (n,).
        one_visual_token: whether L_v is 1.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.one_visual_token = True

    def add(self, real: Tensor, x_t: Tensor, x_v: Tensor, mask: Tensor | None, routed: Tensor) -> None:
        """A batch's call; `real` (B, L_t), bool, are its text positions without padding, behind those of a prefix."""
        text, after = (states[:, -real.shape[1] :][real] for states in (x_t, routed))
        image = mean_visual_token(x_v, mask).squeeze(1)
        self.parts.append(tuple(tensor.double().cpu() for tensor in (text, after, image, real.sum(1))))
        self.one_visual_token &= x_v.shape[1] == 1

    def measured(self) -> dict[str, float | None]:
        """The measurements by name; None where one is not defined, such as for an image that is the same in all examples.

        cosine_before, cosine_after: mean cosine of x_t and of route(x_t, x_v) to the image's x_v, over tokens.
        cka_before, cka_after: linear CKA (Kornblith et al., 2019) of their means over an example's tokens to x_v, over examples.
        effective_rank_before, effective_rank_after: of all tokens' x_t and route(x_t, x_v) (Roy and Vetterli, 2007).
        along_image: the share of the squared length of route(x_t, x_v) that lies along x_v; where L_v is 1.
        """
        text, routed, image, tokens = (torch.cat(part) for part in zip(*self.parts, strict=True))
        owner = torch.repeat_interleave(torch.arange(len(tokens)), tokens.long())
        found: dict[str, float | None] = {}
        for when, states in (("before", text), ("after", routed)):
            means = torch.zeros_like(image).index_add_(0, owner, states) / tokens[:, None]
            found[f"cosine_{when}"] = cosine(states, image[owner])
            found[f"cka_{when}"] = linear_cka(means, image)
            found[f"effective_rank_{when}"] = effective_rank(states)
        return found | {"along_image": along(routed, image[owner]) if self.one_visual_token else None}


# ------------------------------------------------------------------------------------------ the measures


def cosine(states: Tensor, others: Tensor) -> float:
    """The mean cosine of the rows of two (m, r); that of a row of zeros is 0."""
    return nn.functional.cosine_similarity(states, others, dim=-1).mean().item()


def linear_cka(states: Tensor, others: Tensor) -> float | None:
    """Linear centred kernel alignment of two (n, r), from 0 to 1; None where one has the same row n times, but for rounding."""
    first, second = states - states.mean(0), others - others.mean(0)
    if any(c.norm() <= NEGLIGIBLE * whole.norm() for c, whole in ((first, states), (second, others))):
        return None
    return ((first.T @ second).norm() ** 2 / ((first.T @ first).norm() * (second.T @ second).norm())).item()


def effective_rank(states: Tensor) -> float:
    """exp of the entropy of the singular values of an (m, r), scaled to a sum of 1: from 1 to min(m, r), and 0 for zeros."""
    values = torch.linalg.svdvals(states)
    if not values.any():
        return 0.0
    return torch.distributions.Categorical(values).entropy().exp().item()


def along(states: Tensor, others: Tensor) -> float | None:
    """The share of the squared length of the rows of one (m, r) that lies along the rows of another; None where there is none."""
    lengths = (states * nn.functional.normalize(others, dim=-1)).sum(-1)
    return (lengths.square().sum() / states.square().sum()).item() if states.any() else None
