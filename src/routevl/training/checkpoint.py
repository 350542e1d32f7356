"""The state of a training run: saved in one file, and loaded to the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from routevl.errors import RoutevlError
from routevl.files import atomic_file, lock
from routevl.tasks.base import VisionLanguageModel

if TYPE_CHECKING:
    from routevl.training.optimisation import Optimisation

CHECKPOINT = "checkpoint.safetensors"  # in a folder of its own, beside the lock of the job that writes it


def training_state(model: VisionLanguageModel, optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the next step depends on: the model's tensors and buffers, the optimiser's state, the random generators of
    torch (CPU, and the GPUs in use), numpy and Python.

    The generators are those of all processes, one after the other; all processes must call this.

    Returns:
        The tensors by name, on the CPU, and a JSON record of what else the optimiser's state has.
    """
    tensors = _tensors_of(model)
    names = _names_of_parameters(model, optimiser)
    own = optimiser.state_dict()
    state = {
        names[index]: {key: _packed(value, f"optimiser/{key}/{names[index]}", tensors) for key, value in values.items()}
        for index, values in own["state"].items()
    }
    groups = [
        {key: _packed(value, f"optimiser/group {number}/{key}", tensors) for key, value in group.items() if key != "params"}
        | {"params": [names[index] for index in group["params"]]}
        for number, group in enumerate(own["param_groups"])
    ]
    tensors |= gather(send_to_device(_random_states(model), PartialState().device))
    return _on_cpu(tensors), {"state": state, "groups": groups}


def restore_training_state(
    tensors: dict[str, Tensor], record: dict[str, Any], model: VisionLanguageModel, optimiser: Optimizer
) -> None:
    """Undo `training_state`, in place.

    Raises:
        RoutevlError: the state is of another model or optimiser; names what is missing, too much, or of another shape or type.
    """
    own = _tensors_of(model)
    names = _names_of_parameters(model, optimiser)
    refuse_other_names(tensors, chain(own, _tensors_in(record), _random_states(model)))
    for name, tensor in own.items():
        saved = tensors[name]
        if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
            expected = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise RoutevlError(f"{name} is {tuple(saved.shape)} {saved.dtype}, expected {expected}")
        tensor.copy_(saved)
    groups = [[names[index] for index in group["params"]] for group in optimiser.state_dict()["param_groups"]]
    if [group["params"] for group in record["groups"]] != groups or not record["state"].keys() <= set(chain(*groups)):
        raise RoutevlError("the optimiser's groups have other parameters")
    parameters = {name: model.get_parameter(name) for name in chain(*groups)}
    state = {
        name: {key: _unpacked(value, tensors, parameters[name].device) for key, value in values.items()}
        for name, values in record["state"].items()
    }
    indices = {name: index for index, name in names.items()}
    device = PartialState().device
    param_groups = [
        {key: _unpacked(value, tensors, device) for key, value in group.items() if key != "params"}
        | {"params": [indices[name] for name in group["params"]]}
        for group in record["groups"]
    ]
    optimiser.load_state_dict({"state": {indices[name]: values for name, values in state.items()}, "param_groups": param_groups})
    for name, values in state.items():  # torch has given them the parameter's type: as they were
        optimiser.state[parameters[name]].update(values)
    _restore_random_states(tensors, model)


def refuse_other_names(saved: Iterable[str], expected: Iterable[str]) -> None:
    """Raise RoutevlError where the names of saved tensors are not the expected ones; names the first of them."""
    saved, expected = set(saved), set(expected)
    for words, names in (("lacks", expected - saved), ("has besides", saved - expected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RoutevlError(f"it {words} {', '.join(sorted(names)[:3])}{more}")


def _tensors_of(model: VisionLanguageModel) -> dict[str, Tensor]:
    """What of a model can change in training: the method's and the task's tensors, and all buffers."""
    own = model.tensors()
    buffers = {f"buffer/{name}": buffer for name, buffer in model.named_buffers() if name not in own}
    return {f"parameter/{name}": tensor for name, tensor in own.items()} | buffers


def _names_of_parameters(model: VisionLanguageModel, optimiser: Optimizer) -> dict[int, str]:
    """The number of each parameter in the optimiser's state dict -> its name in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    numbers = chain(*(group["params"] for group in optimiser.state_dict()["param_groups"]))
    parameters = chain(*(group["params"] for group in optimiser.param_groups))
    return {number: names[id(parameter)] for number, parameter in zip(numbers, parameters, strict=True)}


# ------------------------------------------------------------------------------- nested values as JSON and tensors


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON; its tensors go to `tensors` by the name of their place.

    Raises:
        RoutevlError: it holds something that is neither a tensor nor JSON's, which a file without pickles cannot hold.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(entry, f"{name}/{key}", tensors)] for key, entry in value.items()]}
    if type(value) in (list, tuple):
        entries = [_packed(entry, f"{name}/{number}", tensors) for number, entry in enumerate(value)]
        return {type(value).__name__: entries}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise RoutevlError(f"{name} is a {type(value).__name__}: a checkpoint holds tensors, numbers, texts, lists and dicts of them")


def _unpacked(packed: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """Undo `_packed`; tensors that were not on the CPU go to `device`."""
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        tensor = tensors[packed["tensor"]]
        return tensor if packed["on_cpu"] else tensor.to(device)
    [(kind, entries)] = packed.items()
    if kind == "dict":
        return {key: _unpacked(entry, tensors, device) for key, entry in entries}
    return {"list": list, "tuple": tuple}[kind](_unpacked(entry, tensors, device) for entry in entries)


def _tensors_in(packed: Any) -> list[str]:
    """The names of the tensors of a record of packed values."""
    if isinstance(packed, dict):
        return [packed["tensor"]] if "tensor" in packed else _tensors_in(list(packed.values()))
    return [name for entry in packed for name in _tensors_in(entry)] if isinstance(packed, list) else []


# ------------------------------------------------------------------------------------------ random generators


def _random_states(model: VisionLanguageModel) -> dict[str, Tensor]:
    """This process's random generators."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state()
    states = {
        "random/cpu": torch.get_rng_state(),
        "random/numpy": _as_tensor([*keys.tolist(), position], cached if has_gauss else None),
        "random/python": _as_tensor(words, gauss),
    }
    if gpus := _gpus_of(model):
        states["random/cuda"] = torch.cat([torch.cuda.get_rng_state(gpu) for gpu in gpus])
    return states


def _restore_random_states(tensors: dict[str, Tensor], model: VisionLanguageModel) -> None:
    process, processes = PartialState().process_index, PartialState().num_processes
    # this process's out of those of all; copied, for torch crashes on a view
    own = {name: tensors[name].chunk(processes)[process].clone() for name in _random_states(model)}
    torch.set_rng_state(own["random/cpu"])
    if gpus := _gpus_of(model):
        for gpu, state in zip(gpus, own["random/cuda"].chunk(len(gpus)), strict=True):
            torch.cuda.set_rng_state(state.clone(), gpu)
    (*keys, position), cached = _from_tensor(own["random/numpy"])
    numpy.random.set_state(("MT19937", numpy.array(keys, numpy.uint32), position, int(cached is not None), cached or 0.0))
    words, gauss = _from_tensor(own["random/python"])
    random.setstate((3, tuple(words), gauss))


def _gpus_of(model: VisionLanguageModel) -> list[int]:
    """The GPUs in use by this process: its own, and those that parts of the model are on."""
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())} | {PartialState().device}
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})


def _as_tensor(words: Sequence[int], cached: float | None) -> Tensor:
    """A generator's words, and the normal variate that it holds back if any, as int64 (n + 2)."""
    bits = torch.tensor([cached or 0.0], dtype=torch.float64).view(torch.int64)
    return torch.cat([torch.tensor([*words, int(cached is not None)]), bits])


def _from_tensor(tensor: Tensor) -> tuple[list[int], float | None]:
    *words, has_cached = tensor[:-1].tolist()
    return words, tensor[-1:].view(torch.float64).item() if has_cached else None


# ----------------------------------------------------------------------------------------------------- the file


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached, contiguous, on the CPU; those that share memory with another are copied, for a file holds each apart."""
    found, memory = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in memory else tensor
        memory.add(place)
    return found


class Checkpoint:
    """The file that holds the state of something that is being trained, from which another process goes on to the same bits.

    Args:
        folder: where it is; it may be missing.
        identity: what is alike where two of them end in the same bits.
        accelerator: of this process. Its kind of device, and torch, change the last bits too, so that a file of others is
            refused. The model of the CPU or GPU does so as well, but the scheduler chooses it, and a run that it has stopped must
            go on.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], accelerator: Accelerator | PartialState) -> None:
        self.path = Path(folder) / CHECKPOINT
        self.accelerator = accelerator
        self.run = {**identity, "device": accelerator.device.type, "torch": torch.__version__}

    def save(
        self, model: VisionLanguageModel, optimisation: Optimisation, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> None:
        """Write it; all processes must call this.

        Args:
            tensors, record: what is kept beside the state of the model, of its optimisation and of the random generators, by
                names that these do not have; the record is JSON.
        """
        state, optimiser = training_state(model, optimisation.optimiser)
        if self.accelerator.is_main_process:
            own = {"run": self.run, "optimiser": optimiser, "schedule": optimisation.schedule.state_dict()}
            save_checkpoint(self.path, {**state, **tensors}, {**own, **record})

    def resume(
        self,
        model: VisionLanguageModel,
        optimisation: Optimisation,
        take: Callable[[dict[str, Tensor], dict[str, Any]], None],
    ) -> bool:
        """Undo `save`, in place, where there is a file; whether there is one.

        Args:
            take: gets all tensors and the record, and takes out the tensors that were kept beside the state; what it raises
                by KeyError and RoutevlError is what is wrong with them.

        Raises:
            RoutevlError: the file is damaged or of another run.
        """
        if not self.path.exists():
            return False
        tensors, record = self.read()
        try:
            take(tensors, record)
            restore_training_state(tensors, record["optimiser"], model, optimisation.optimiser)
            optimisation.schedule.load_state_dict(record["schedule"])
        except (KeyError, RoutevlError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise RoutevlError(f"{self.path}: a damaged checkpoint ({reason}); delete it to start again") from error
        return True

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors and record. Raises RoutevlError where it is damaged, or of another run than this one."""
        tensors, record = load_checkpoint(self.path)
        before = record.get("run", {})
        for name in self.run | before:
            if before.get(name) != self.run.get(name):
                raise RoutevlError(
                    f"{self.path}: the unfinished run has {name} {before.get(name)!r}, now it is {self.run.get(name)!r}: "
                    f"delete {self.path.parent} to start again"
                )
        return tensors, record


def save_checkpoint(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write tensors and a JSON record as one safetensors file, whole or not at all."""
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"record": json.dumps(record), "crc32": str(_checksum(tensors))})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote. Raises RoutevlError when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        record = json.loads(metadata["record"])
        if metadata["crc32"] != str(_checksum(tensors)):
            raise ValueError("its checksum is another")
        return tensors, record
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise RoutevlError(f"{path}: a damaged checkpoint ({error}); delete it to start the run again") from error


def _checksum(tensors: dict[str, Tensor]) -> int:
    """The CRC-32 of all bytes, by which a page that never reached the disk is noticed."""
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(_bytes_of(tensor), checksum)
    return checksum


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The sha256 of each tensor's dtype, shape and bytes, in hexadecimal."""
    return {name: _digest(tensor) for name, tensor in sorted(tensors.items())}


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> numpy.ndarray:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


@contextmanager
def held(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the folder of a checkpoint while the body runs; wait while another job does."""
    with ExitStack() as stack:
        if accelerator.is_main_process:
            file = stack.enter_context(lock(folder / "lock"))
            os.register_at_fork(after_in_child=file.close)  # else loaders hold it for seconds after this process was killed
        accelerator.wait_for_everyone()
        yield


def forget(checkpoint: Path) -> None:
    """Delete what training has written into the checkpoint's folder, and the folder unless it holds anything else."""
    for path in [checkpoint / CHECKPOINT, *checkpoint.glob(f".{CHECKPOINT}.*.tmp"), checkpoint / "lock"]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        checkpoint.rmdir()
