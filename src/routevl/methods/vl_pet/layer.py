"""VL-PET's gates.

A gate reads x, the input of the sub-layer, and h', its adapted output, both (B, T, d), and gives what h' is multiplied by:
(B, T, d), (B, T, 1), (d) or (B, 1, 1), from the finest granularity to the coarsest. At the start σ is about 0.5, so that all but
`middle_y` halve what the sub-layer adds; this is part of the method.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from routevl.conditioning import Conditioning
from routevl.methods.bottleneck.layer import STANDARD_DEVIATION, Bottleneck, linear, plain_bottleneck
from routevl.routing import mean_visual_token


class LargeGate(nn.Module):
    """σ(U_g gelu_new(D_g x)): (B, T, d), for each position and component."""

    def __init__(self, width: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.bottleneck = plain_bottleneck(width, rank, width, device)

    def forward(self, x: Tensor, adapted: Tensor) -> Tensor:
        return self.bottleneck(x).sigmoid()


class MiddleXGate(nn.Module):
    """σ(w · (x + h') + c): (B, T, 1), for each position."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.score = linear(width, 1, device)

    def forward(self, x: Tensor, adapted: Tensor) -> Tensor:
        return self.score(x + adapted).sigmoid()


class MiddleYGate(nn.Module):
    """1 + g: (d), for each component."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.offset = nn.Parameter(STANDARD_DEVIATION * torch.randn(width, device=device))

    def forward(self, x: Tensor, adapted: Tensor) -> Tensor:
        return 1 + self.offset


class SmallGate(nn.Module):
    """The mean over positions of σ(w · [x; h'] + c): (B, 1, 1), for each example.

    Args:
        conditioning: has `token_mask` (B, T), whose positions count; None: all count, padding too.
    """

    def __init__(self, width: int, device: torch.device, conditioning: Conditioning | None) -> None:
        super().__init__()
        self.score = linear(2 * width, 1, device)
        self.conditioning = conditioning

    def forward(self, x: Tensor, adapted: Tensor) -> Tensor:
        gates = self.score(torch.cat([x, adapted], dim=-1)).sigmoid()  # (B, T, 1)
        if self.conditioning is None:
            return gates.mean(dim=1, keepdim=True)
        mask = self.conditioning.per_position("token_mask", gates.shape[:2], "token_mask").to(gates.device)
        return mean_visual_token(gates, mask)  # the masked mean over positions, whatever they hold


class GatedBottleneck(nn.Module):
    """G ∘ h', h' = h + the bottleneck of h."""

    def __init__(self, bottleneck: Bottleneck, gate: nn.Module) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.gate = gate

    def forward(self, hidden_states: Tensor, x: Tensor) -> Tensor:
        """h and x, (B, T, d) -> (B, T, d)."""
        adapted = hidden_states + self.bottleneck(hidden_states)
        return (adapted * self.gate(x, adapted)).to(hidden_states.dtype)
