"""The state of a training run: saved in one file, and loaded to the same bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from routevl.errors import RoutevlError
from routevl.files import atomic_file
from routevl.tasks.base import VisionLanguageModel


def training_state(model: VisionLanguageModel, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that the next step depends on: the model's tensors, the optimiser's state, the random generators.

    The generators are those of all processes, one after the other; all processes must call this.
    """
    tensors = {f"parameter/{name}": tensor for name, tensor in model.tensors().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser/{key}/{name}"] = torch.as_tensor(value)
    random = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["random/cuda"] = torch.cuda.get_rng_state()
    tensors |= gather(send_to_device(random, PartialState().device))
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore_training_state(tensors: dict[str, Tensor], model: VisionLanguageModel, optimiser: torch.optim.Optimizer) -> None:
    """Undo `training_state`, in place.

    Raises:
        RoutevlError: the state is of another model; names the first tensor that differs.
    """
    own = model.tensors()
    saved = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if unknown := sorted(saved ^ set(own)):
        raise RoutevlError(f"the checkpoint is of another model: {unknown[0]} is only in one of them")
    for name, tensor in own.items():
        tensor.copy_(tensors[f"parameter/{name}"])
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimiser":
            key, _, parameter = rest.partition("/")
            on_device = key != "step" or optimiser.defaults["fused"]
            moved = tensor.to(parameters[parameter].device) if on_device else tensor
            optimiser.state[parameters[parameter]][key] = moved.clone()
    torch.set_rng_state(_own(tensors["random/cpu"]))
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(_own(tensors["random/cuda"]))


def _own(states: Tensor) -> Tensor:
    """This process's random generator, out of those of all processes; copied, for torch crashes on a view."""
    return states.chunk(PartialState().num_processes)[PartialState().process_index].clone()


def save_checkpoint(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write tensors and a JSON record as one safetensors file, whole or not at all."""
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"record": json.dumps(record)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote. Raises RoutevlError when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            return {name: file.get_tensor(name).clone() for name in file.keys()}, record  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise RoutevlError(f"{path}: a damaged checkpoint ({error}); delete it to start the run again") from error


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The sha256 of each tensor's dtype, shape and bytes, in hexadecimal."""
    return {name: _digest(tensor) for name, tensor in sorted(tensors.items())}


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
