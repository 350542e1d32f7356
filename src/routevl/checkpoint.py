"""The state of a training run: saved in one file, loaded to the same bits, compared tensor by tensor (stage `compare`)."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from routevl.errors import RoutevlError
from routevl.files import atomic_file, read_json

OPTIMISER_STATE = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, per parameter


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def training_state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that the next step depends on: trainable parameters, the optimiser's moments, the random generators.

    The generators are those of all processes, one after the other; all processes must call this.
    """
    from accelerate import PartialState
    from accelerate.utils import gather, send_to_device

    tensors = {f"parameter/{name}": tensor for name, tensor in trainable_tensors(model).items()}
    for name, parameter in model.named_parameters():
        for key in OPTIMISER_STATE:
            if key in optimiser.state.get(parameter, {}):
                tensors[f"optimiser/{key}/{name}"] = optimiser.state[parameter][key]
    random = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["random/cuda"] = torch.cuda.get_rng_state()
    tensors |= gather(send_to_device(random, PartialState().device))
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore_training_state(tensors: dict[str, Tensor], model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Undo `training_state`, in place.

    Raises:
        RoutevlError: the state is of another model; names the first parameter that differs.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if unknown := sorted(saved ^ set(parameters)):
        raise RoutevlError(f"the checkpoint is of another model: {unknown[0]} is only in one of them")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"parameter/{name}"])
        state = {key: tensors[f"optimiser/{key}/{name}"] for key in OPTIMISER_STATE if f"optimiser/{key}/{name}" in tensors}
        if state:
            optimiser.state[parameter] = {
                key: value.clone().to(parameter.device) if key != "step" or optimiser.defaults["fused"] else value.clone()
                for key, value in state.items()
            }
    torch.set_rng_state(_own(tensors["random/cpu"]))
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(_own(tensors["random/cuda"]))


def _own(states: Tensor) -> Tensor:
    """This process's random generator, out of those of all processes; copied, for torch crashes on a view."""
    from accelerate import PartialState

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


def first_difference(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """The name of the first entry in which two final states (name -> digest or value) differ, or None."""
    return next((name for name in sorted(set(first) | set(second)) if first.get(name) != second.get(name)), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl compare`."""
    parser.add_argument("first", metavar="FOLDER", help="a trained run")
    parser.add_argument("second", metavar="FOLDER", help="the same run, trained again")


def run(arguments: argparse.Namespace) -> None:
    """Say whether two trained runs ended in the same bits: adapter, optimiser, random generators and metrics.

    Raises:
        RoutevlError: they differ; names the first tensor or line that does.
    """
    first, second = (_final_state(Path(folder)) for folder in (arguments.first, arguments.second))
    if name := first_difference(first, second):
        raise RoutevlError(f"{arguments.first} and {arguments.second} differ, first in {name}")
    print(f"bit-equal: {len(first)} tensors and lines")


def _final_state(folder: Path) -> dict[str, Any]:
    state = dict(read_json(folder / "last" / "state.json"))
    try:
        for name in ("adapter_model.safetensors", "task.safetensors"):
            state |= {f"best/{name}/{tensor}": digest for tensor, digest in digests(load_file(folder / name)).items()}
        lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, SafetensorError) as error:
        raise RoutevlError(f"{folder}: a damaged run ({error})") from error
    return state | {f"training.jsonl line {number:06d}": line for number, line in enumerate(lines, 1)}
