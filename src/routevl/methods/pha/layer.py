"""PHA's adapters, what generates them, the vectors of examples and the losses on them."""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from routevl.errors import RoutevlError
from routevl.methods.bottleneck.layer import Bottleneck
from routevl.methods.hyperformer.layer import Code, Head
from routevl.routing import mean_visual_token

HIDDEN, WIDTH = 128, 64  # of the networks between their two layers; of prototypes, vectors of layers and examples, and codes
SCALE = 1e-3  # of generated weights at the start, beside those that Glorot's rule would have
GAIN = 1e-4  # likewise, of ordinary adapters

# the network that has made vectors of examples last in this thread, and those vectors (B, WIDTH)
_NOTED: ContextVar[tuple[nn.Module, Tensor] | None] = ContextVar("routevl_pha_instances", default=None)


# ----------------------------------------------------------------------------------------- the adapters


class ReluBottleneck(Bottleneck):
    """U relu(D x)."""

    activation = staticmethod(nn.functional.relu)


def ordinary_bottleneck(width: int, rank: int, device: torch.device) -> Bottleneck:
    """That of all tasks: weights as Glorot's, times GAIN, and no biases yet."""
    down, up = nn.Linear(width, rank, device=device), nn.Linear(rank, width, device=device)
    for layer in (down, up):
        nn.init.xavier_uniform_(layer.weight, GAIN)
        nn.init.zeros_(layer.bias)
    return ReluBottleneck(down, up)


def new_code(prototypes: nn.ParameterList, layers: int, device: torch.device) -> Code:
    """Makes the codes of tasks and layers; the vectors of layers are from N(0, 1), the network as torch draws it."""
    code = Code(prototypes, layers, device, HIDDEN, WIDTH)
    nn.init.normal_(code.layers)
    for layer in code.network:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return code


def new_head(width: int, width_out: int, device: torch.device) -> Head:
    """Makes a projection (..., width) -> (..., width_out) of a code; it starts near zero."""
    head = Head(width, width_out, device, WIDTH)
    for layer, inputs in ((head.weight, WIDTH * width), (head.bias, WIDTH)):
        bound = SCALE * math.sqrt(3 / inputs)
        nn.init.uniform_(layer.weight, -bound, bound)
    return head


# ----------------------------------------------------------------------------------- vectors of examples


class Instances(nn.Module):
    """M_2 relu(M_1 m + c_1) + c_2, m the mean of an example's hidden states: a vector that the losses alone read.

    Args:
        prototypes: those of the tasks, (WIDTH) each.
    """

    def __init__(self, prototypes: nn.ParameterList, width: int, device: torch.device) -> None:
        super().__init__()
        self.prototypes = prototypes
        first, second = nn.Linear(width, HIDDEN, device=device), nn.Linear(HIDDEN, WIDTH, device=device)
        self.network = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, d), and (B, L), 0 where they are padding -> (B, WIDTH)."""
        return self.network(mean_visual_token(hidden_states, mask).squeeze(1))  # the mean over positions, whatever they hold


def note_instances(text_model: nn.Module, instances: Instances) -> None:
    """Let a training step note the vectors of its examples: of the encoder's states, or of all that a model without one reads.
    What has these states gets `instances` as its part."""
    stack = text_model.get_encoder() if text_model.config.is_encoder_decoder else text_model.base_model
    stack.instances = instances
    stack.register_forward_hook(_note, with_kwargs=True)


def _note(stack: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    if stack.training:
        _NOTED.set((stack.instances, stack.instances(output[0], kwargs.get("attention_mask"))))


def noted_instances(text_model: nn.Module) -> tuple[Tensor, Tensor]:
    """The vectors of the examples of the last training step, (B, WIDTH), and the prototypes (tasks, WIDTH), of one dtype.

    Raises:
        RoutevlError: there was no such step since they were last asked for.
    """
    noted = _NOTED.get()
    _NOTED.set(None)  # keep nothing alive until the next step
    instances = next(module for module in text_model.modules() if isinstance(module, Instances))
    if noted is None or noted[0] is not instances:
        raise RoutevlError("PHA's losses are of a forward pass in training mode, and there was none since the last ones")
    prototypes = torch.stack([*instances.prototypes])
    return noted[1].to(prototypes.dtype), prototypes  # the step may have been under autocast


# -------------------------------------------------------------------------------------------- the losses


def instance_loss(vectors: Tensor, task_id: Tensor, temperature: float) -> Tensor:
    """How far the examples of a task are from each other, beside all: a scalar; 0 where no two are of one task.

    The mean over examples i with others of their task, P_i, of -1/|P_i| Σ_{j in P_i} log(e_ij / Σ_{k != i} e_ik), with
    e_ij = exp(cosine of their vectors / temperature).

    Args:
        vectors: (B, c) float32.
        task_id: (B,) int64.
    """
    vectors = nn.functional.normalize(vectors, dim=-1)
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    positive = (task_id[:, None] == task_id) & ~itself  # (B, B)
    counted = positive.any(1)
    if not counted.any():
        return vectors.new_zeros(())
    similarity = (vectors @ vectors.T / temperature)[counted]  # (n, B)
    positive, itself = positive[counted], itself[counted]
    log_likelihood = similarity - similarity.masked_fill(itself, -math.inf).logsumexp(1, keepdim=True)
    return -((log_likelihood * positive).sum(1) / positive.sum(1)).mean()


def prototype_loss(vectors: Tensor, prototypes: Tensor, task_id: Tensor, temperature: float) -> Tensor:
    """How far examples are from the prototype of their task, beside the others: a scalar, which may be negative.

    The mean over examples of -log(e_t / Σ_{t' != t} e_t'), t being their own task, with e_t = exp(cosine of vector and
    prototype / temperature); as in the original, the sum is over the others alone.

    Args:
        vectors: (B, c) float32.
        prototypes: (tasks, c) float32, of two tasks or more.
        task_id: (B,) int64.
    """
    similarity = nn.functional.normalize(vectors, dim=-1) @ nn.functional.normalize(prototypes, dim=-1).T / temperature
    own = nn.functional.one_hot(task_id, len(prototypes)).bool()  # (B, tasks)
    return (similarity.masked_fill(own, -math.inf).logsumexp(1) - similarity[own]).mean()
