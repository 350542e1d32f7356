"""The phases of SPViT: a search of weights and gates together, a cut, and fine-tuning of what is left from the original weights.

Both phases learn to give the tokens that the original model gives of a training split's images: neither texts nor labels.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from accelerate import PartialState
from PIL.Image import Image
from timm.models import save_for_hf
from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR

from routevl.backbones.derivations import SpvitOptions
from routevl.backbones.folder import copy_but_weights, fingerprint_of
from routevl.backbones.spvit.form import BRANCHES, KEY, SIDES, Nothing, narrow
from routevl.backbones.spvit.search import Costs, MixedConvolution, add_gates, chosen, costs_of, gates_of, new_mixture, opened
from routevl.backbones.vision import vision_folder
from routevl.backbones.vision_timm import TimmFolder
from routevl.errors import RoutevlError
from routevl.features.images import BadImages, ImageFile, read_image_lists
from routevl.features.loading import load_batches
from routevl.files import read_json, sha256_of, write_json
from routevl.training.checkpoint import Checkpoint
from routevl.training.optimisation import Optimisation, prepare_torch
from routevl.training.resumable import AllOf, resumed_steps

if TYPE_CHECKING:
    from routevl.backbones.derive import Execution

SEARCH, TUNING = PHASES = ("search", "fine-tuning")
WARM_UP = 0.05  # of a phase's steps
WEIGHT_DECAY = 0.05  # of the weights, as of DeiT's


class Kept(NamedTuple):
    """What each layer keeps: one of BRANCHES, and the numbers of the hidden units of its feed-forward part."""

    branches: list[str]
    units: list[list[int]]

    def multiply_adds(self, costs: Costs) -> int:
        """Those of the compressed model for an image."""
        return costs.of(self.branches, [len(units) for units in self.units])


def compress(source: Path, options: SpvitOptions, output: Path, data: Path, execution: Execution) -> dict[str, Any]:
    """Compress a plain vision transformer of timm.

    Args:
        data: prepared data; the images of its training split are learned from.

    Returns:
        of each layer one of BRANCHES, and how many hidden units its feed-forward part has; multiply-adds for an image, and
        parameters, before and after; the `distance` of the tokens from the original's on the validation split.

    Raises:
        RoutevlError: it is no such model; no images, or an unreadable one; the loss is no finite number; a checkpoint that is
            damaged, or of another derivation.
        SystemExit: with `exit_status`, after a stop signal; the checkpoint is then on disk.
    """
    prepare_torch(execution.threads)
    original, transform = plain_transformer(source)
    lists = {split: data / split / "images.json" for split in ("train", "val")}
    images = {split: read_image_lists([path]) for split, path in lists.items()}
    for split, path in lists.items():
        if not images[split]:
            raise RoutevlError(f"{path}: no images, of which SPViT needs some in both splits: prepare data that have them")
    identity = {
        "options": asdict(options),
        "source": fingerprint_of(source),
        "images": sha256_of(lists["train"]),
        "threads": execution.threads,
    }
    phases = Phases(original, transform, images["train"], options, execution, identity)
    kept = phases.kept or phases.search()
    model = phases.tune(kept)
    unseen = phases.distance_on(model, images["val"])
    write(model.cpu(), kept, source, output)
    costs = costs_of(original)
    return {
        "branches": kept.branches,
        "units": [len(units) for units in kept.units],
        "multiply_adds_before": whole(original).multiply_adds(costs),
        "multiply_adds_after": kept.multiply_adds(costs),
        "params_before": sum(parameter.numel() for parameter in original.parameters()),
        "params_after": sum(parameter.numel() for parameter in model.parameters()),
        "distance": unseen,
    }


# ---------------------------------------------------------------------------------------------------- the model


def plain_transformer(source: Path) -> tuple[nn.Module, Callable[[Image], Tensor]]:
    """The model of a folder, frozen, and its preprocessing. Raises RoutevlError where it is no plain transformer of timm."""
    folder = vision_folder(source)
    model = folder.load().float().eval().requires_grad_(False) if isinstance(folder, TimmFolder) else None
    if type(model) is not VisionTransformer or model.dynamic_img_size or not all(map(_is_plain, model.blocks)):
        raise RoutevlError(
            f"backbone {source}: not a plain vision transformer of timm, such as vit_base_patch16_224, which is what SPViT "
            "compresses: derive it `from` one"
        )
    return model, folder.transform(model)


def _is_plain(block: nn.Module) -> bool:
    """Whether a layer is timm's usual one, whose attention is as wide as the layer."""
    if not (type(block) is Block and type(block.attn) is Attention and type(block.mlp) is Mlp):
        return False
    attention, feed_forward = block.attn, block.mlp
    norms = (attention.q_norm, attention.k_norm, getattr(attention, "norm", nn.Identity()), feed_forward.norm)
    gate = getattr(attention, "gate", None)
    usual = all(isinstance(norm, nn.Identity) for norm in norms) and gate is None and isinstance(feed_forward.fc1, nn.Linear)
    return usual and attention.proj.in_features == attention.proj.out_features


def whole(model: nn.Module) -> Kept:
    """All that a plain vision transformer has."""
    return Kept([BRANCHES[-1]] * len(model.blocks), [[*range(block.mlp.fc1.out_features)] for block in model.blocks])


def kept_by(model: nn.Module) -> Kept:
    """What the gates of a searched model keep."""
    of_attentions, of_units = gates_of(model)
    return Kept([chosen(gates) for gates in of_attentions], [opened(gates).nonzero().flatten().tolist() for gates in of_units])


@torch.no_grad()
def cut(model: nn.Module, kept: Kept) -> None:
    """Take from a plain vision transformer, in place, what is not kept; its convolutions are `MixedConvolution`s of its own
    attentions."""
    for block, branch, units in zip(model.blocks, *kept, strict=True):
        if branch in SIDES:
            mixture = new_mixture(block.attn)
            block.attn = MixedConvolution(block.attn, mixture, SIDES[branch], model.patch_embed.grid_size)
        elif branch == "nothing":
            block.attn = Nothing()
        first, second = block.mlp.fc1, block.mlp.fc2
        narrow(block.mlp, len(units))
        block.mlp.fc1.weight.copy_(first.weight[units])
        block.mlp.fc2.weight.copy_(second.weight[:, units])
        if first.bias is not None:
            block.mlp.fc1.bias.copy_(first.bias[units])
            block.mlp.fc2.bias.copy_(second.bias)


def in_stored_form(model: nn.Module) -> nn.Module:
    """A cut model in evaluation, in the form that `take_form` gives, in place."""
    for block in model.blocks:
        if isinstance(block.attn, MixedConvolution):
            block.attn = block.attn.plain()
    return model.eval().requires_grad_(False)


def write(model: nn.Module, kept: Kept, source: Path, output: Path) -> None:
    """Write the folder of a compressed model, with what the source's has beside its weights."""
    copy_but_weights(source, output)
    arguments = read_json(source / "config.json").get("model_args", {})
    save_for_hf(model, str(output), model_args=arguments, safe_serialization=True)
    layers = {"branches": kept.branches, "units": [len(units) for units in kept.units]}
    write_json(output / "config.json", read_json(output / "config.json") | {KEY: layers})


# --------------------------------------------------------------------------------------------------- the phases


class Phases:
    """Search and fine-tuning of a model, resumed from the checkpoint of an earlier process.

    Args:
        identity: what two derivations have alike that end in the same bits.

    Attributes:
        kept: what a search that is over has kept.
    """

    def __init__(
        self,
        original: nn.Module,
        transform: Callable[[Image], Tensor],
        images: Sequence[ImageFile],
        options: SpvitOptions,
        execution: Execution,
        identity: dict[str, Any],
    ) -> None:
        process = PartialState()
        self.device = process.device
        self.original = original.to(self.device)
        self.transform, self.images, self.options, self.execution = transform, images, options, execution
        self.checkpoint = Checkpoint(execution.checkpoint, identity, process)
        record = self.checkpoint.read()[1] if self.checkpoint.path.exists() else {"kept": None, "phase": None}
        self.kept, self.unfinished = Kept(*record["kept"]) if record["kept"] else None, record["phase"]

    def search(self) -> Kept:
        """Train weights and gates, and see which gates are open."""
        torch.manual_seed(self.options.seed)
        model = self._student()
        add_gates(model)
        model.to(self.device)
        of_attentions, of_units = gates_of(model)
        gates = [*of_attentions, *of_units]
        others = {id(parameter) for parameter in gates}
        weights = [parameter for parameter in model.parameters() if id(parameter) not in others]
        groups = [
            {"params": weights, "lr": self.options.learning_rate},
            {"params": gates, "lr": self.options.gate_learning_rate, "weight_decay": 0.0},
        ]
        costs = costs_of(self.original)
        before = whole(self.original).multiply_adds(costs)

        def penalty() -> Tensor:
            share = costs.expected(of_attentions, of_units) / before
            return self.options.penalty * (self.options.flops - share).square()

        self._train(SEARCH, model, groups, self.options.search_epochs, penalty)
        kept = kept_by(model)
        share = kept.multiply_adds(costs) / before
        print(f"spvit: the search has kept {100 * share:.1f}% of the multiply-adds, for flops {self.options.flops}", flush=True)
        if kept == whole(self.original):
            print("spvit: it has cut nothing: set a higher gate_learning_rate or more search_epochs", file=sys.stderr, flush=True)
        return kept

    def tune(self, kept: Kept) -> nn.Module:
        """What is kept, fine-tuned from the original weights."""
        self.kept = kept
        model = self._student()
        cut(model, kept)
        model.to(self.device)
        groups = [{"params": [*model.parameters()], "lr": self.options.learning_rate}]
        self._train(TUNING, model, groups, self.options.tune_epochs, lambda: 0.0)
        return in_stored_form(model)

    @torch.inference_mode()
    def distance_on(self, model: nn.Module, images: Sequence[ImageFile]) -> float:
        """The mean `distance` of a model's tokens from the original's on other images."""
        size = self.options.batch_size
        batches = [images[start : start + size] for start in range(0, len(images), size)]
        total = sum(len(pixels) * self._distance(model, pixels).item() for pixels in self._pixels(batches))
        return total / len(images)

    def _student(self) -> nn.Module:
        """A copy of the original to train."""
        return copy.deepcopy(self.original).requires_grad_(True).train()

    def _distance(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """The mean squared distance of a model's tokens from the original's, as a share of these tokens' variance."""
        with torch.no_grad():
            expected = self.original.forward_features(pixels)
        return mse_loss(model.forward_features(pixels), expected) / expected.var()

    def _train(
        self, phase: str, model: nn.Module, groups: list[dict[str, Any]], epochs: int, penalty: Callable[[], Tensor | float]
    ) -> None:
        """Train all of a model, from the checkpoint if that is of this phase."""
        batches = self._batches(phase, epochs)
        total = len(batches)
        optimisation = Optimisation(groups, WEIGHT_DECAY, lambda optimiser: _schedule(optimiser, total), max_grad_norm=None)
        steps = resumed_steps(
            lambda step: self._pixels(batches[step:]), total, self.checkpoint, self.execution.checkpoint_every, AllOf(model),
            optimisation, f"spvit: {phase}", record={"kept": self.kept, "phase": phase}, resume=self.unfinished == phase,
        )  # fmt: skip
        for pixels in steps:
            loss = self._distance(model, pixels) + penalty()
            if not torch.isfinite(loss):
                raise RoutevlError(f"spvit: the loss of the {phase} is {loss.item()}: set a lower learning_rate")
            loss.backward()
            optimisation.step()

    def _batches(self, phase: str, epochs: int) -> list[list[ImageFile]]:
        """The images of each step of a phase: in every epoch all of them, in an order that seed, phase and epoch decide."""
        batches, size = [], self.options.batch_size
        for epoch in range(epochs):
            generator = numpy.random.default_rng([self.options.seed, PHASES.index(phase), epoch])
            order = generator.permutation(len(self.images)).tolist()
            batches += [[self.images[n] for n in order[start : start + size]] for start in range(0, len(order), size)]
        return batches

    def _pixels(self, batches: list[Sequence[ImageFile]]) -> Iterator[Tensor]:
        """The pixels of batches of images, (B, 3, H, W). Raises BadImages."""
        for pixels in load_batches(batches, self.transform, self.device, self.execution.workers):
            if isinstance(pixels, list):
                raise BadImages(pixels)
            yield pixels.to(self.device, non_blocking=True)


def _schedule(optimiser: torch.optim.Optimizer, total: int) -> LambdaLR:
    """The first group's learning rate rises over WARM_UP of all steps and then falls to zero; those of others stay."""
    rising = max(1, round(WARM_UP * total))

    def of_weights(step: int) -> float:
        return min((step + 1) / rising, (total - step) / max(1, total - rising))

    return LambdaLR(optimiser, [of_weights, *([lambda step: 1.0] * (len(optimiser.param_groups) - 1))])
