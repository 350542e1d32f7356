"""The network that generates HyperFormer's bottlenecks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from routevl.methods.bottleneck.layer import STANDARD_DEVIATION, linear

VECTOR, HIDDEN, CODE = 512, 128, 8  # widths of t and l, between W_1 and W_2, and of z
EPSILON = 1e-6  # of the norm


def task_vectors(tasks: int, device: torch.device, width: int = VECTOR) -> nn.ParameterList:
    """t of each task, (width), from N(0, 1); apart, so that a task that is not in a batch gets no gradient."""
    return nn.ParameterList(torch.randn(width, device=device) for _ in range(tasks))


class Code(nn.Module):
    """z = LN(W_2 relu(W_1 [t; l] + b_1) + b_2), (c), of each task and layer of a stack.

    Args:
        vectors: t of each task, which the stacks of a model have in common.
        layers: how many layers the stack has; their l are from N(0, 0.02²).
        hidden, width: of W_1's outputs, and c.
    """

    def __init__(
        self, vectors: nn.ParameterList, layers: int, device: torch.device, hidden: int = HIDDEN, width: int = CODE
    ) -> None:
        super().__init__()
        self.tasks = vectors
        self.layers = nn.Parameter(STANDARD_DEVIATION * torch.randn(layers, len(vectors[0]), device=device))
        first, second = linear(2 * len(vectors[0]), hidden, device), linear(hidden, width, device)
        self.network = nn.Sequential(first, nn.ReLU(), second, nn.LayerNorm(width, EPSILON, device=device))

    def forward(self, task: int, layer: int) -> Tensor:
        """Their numbers, from 0 on -> (c)."""
        return self.network(torch.cat([self.tasks[task], self.layers[layer]]))


class Head(nn.Module):
    """Makes a projection of a code z (c): W (width_out, width) and b (width_out), each a linear function of z."""

    def __init__(self, width: int, width_out: int, device: torch.device, code: int = CODE) -> None:
        super().__init__()
        self.weight = linear(code, width_out * width, device)
        self.bias = linear(code, width_out, device)

    def forward(self, code: Tensor, hidden_states: Tensor) -> Tensor:
        """x (..., width) -> W x + b, (..., width_out)."""
        weight = self.weight(code).view(-1, hidden_states.shape[-1])
        return nn.functional.linear(hidden_states, weight, self.bias(code))


class Generated(nn.Module):
    """The projection that a head makes of the code of a task and a layer: (..., width) -> (..., width_out)."""

    def __init__(self, code: Code, head: Head, task: int, layer: int) -> None:
        super().__init__()
        self.code, self.head = code, head
        self.task, self.layer = task, layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.head(self.code(self.task, self.layer), hidden_states)
