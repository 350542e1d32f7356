"""What a forward pass costs, in floating-point operations as torch counts them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def forward_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """FLOPs of a model's forward pass over a batch, in evaluation mode; the model's mode stays as it is.

    A multiplication with the addition that follows it is two. Counted is what is computed: products of matrices, attention and
    convolutions, by their shapes, so that a weight that is zero costs what any other does, and a layer that is skipped nothing.
    Element-wise operations, norms and Fourier transforms are not counted.
    """
    training, trained = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    # the counter's hooks want a gradient function of whatever requires a gradient, and a view made without gradients has none
    for parameter in trained:
        parameter.requires_grad_(False)
    # one way of attention on all devices: the fused kernels of some of them are unknown to the counter
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    for parameter in trained:
        parameter.requires_grad_(True)
    model.train(training)
    return counter.get_total_flops()
