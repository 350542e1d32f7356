"""The search space of SPViT: an attention, the convolutions that are parts of it, and a gate for each choice.

Every attention has three gates, every hidden unit of a feed-forward part one. A gate is open with the probability σ(θ); in
training it is drawn, and its gradient is that of a sigmoid (straight-through). In evaluation it is open where σ(θ) > 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from routevl.backbones.spvit.form import BRANCHES, SIDES, Convolution, convolved

START = 1.5  # θ of a new gate: it is open four times in five
TEMPERATURE = 0.01  # of the softmax over heads
TAPS, CENTRE = 9, 4  # of a 3 x 3 kernel


# ---------------------------------------------------------------------------------------------------- gates


def new_gates(number: int) -> nn.Parameter:
    """θ of new gates, (number,)."""
    return nn.Parameter(torch.full((number,), START))


def drawn(gates: Tensor) -> Tensor:
    """Gates θ (n,) -> 0 or 1 (n,): open where logit(u) + θ > 0, u uniform, with the gradient of σ(logit(u) + θ)."""
    noisy = torch.rand_like(gates).logit() + gates
    return _straight_through(noisy > 0, noisy.sigmoid())


def counted(gates: Tensor) -> Tensor:
    """Gates θ (n,) -> 0 or 1 (n,) for the costs: open where p = σ(θ) > 0.5, with the gradient of σ(p - 0.5)."""
    over = gates.sigmoid() - 0.5
    return _straight_through(over > 0, over.sigmoid())


def opened(gates: Tensor) -> Tensor:
    """Gates θ (n,) -> 0 or 1 (n,): open where σ(θ) > 0.5."""
    return (gates > 0).to(gates)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard`, the gradient of `soft`."""
    return hard.to(soft) + (soft - soft.detach())


def shares(gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What share of a layer's output the 1 x 1 convolution, the 3 x 3 convolution and the attention have, each 0 or 1, by the
    layer's gates, 0 or 1 (3,), of which each counts only where those before it are open.

    Where a gate after it is open too, a gate is a constant: to close it would change more than the choice between neighbours.
    """
    first, second, third = gates.detach()
    both = first * second
    followed = torch.stack([both, both * third, torch.zeros_like(third)])
    first, second, third = torch.where(followed > 0, gates.detach(), gates)
    second = first * second
    third = second * third
    return first * (1 - second) * (1 - third), second * (1 - third), third


def chosen(gates: Tensor) -> str:
    """Which of BRANCHES a layer's gates θ (3,) choose."""
    return BRANCHES[int(opened(gates).cumprod(0).sum())]


# ------------------------------------------------------------------------------------------- parts of a layer


class MixedConvolution(nn.Module):
    """U relu(BatchNorm(W * x + b)) + c, whose W and U are mixtures of the value and output matrices of an attention's heads.

    With P = softmax(η / TEMPERATURE) over heads, tap k of W is V_k = Σ_h P_hk V_h, b = Σ_k b_k with b_k likewise, and
    U = Σ_k Σ_h P_hk O_h; c is the attention's own. Tap k looks at the patch k // 3 - 1 columns and k % 3 - 1 rows away.

    Args:
        attention: of timm, with h heads of width d_h.
        mixture: η (h, TAPS).
        side: 3, or 1 for the tap in the middle alone.
        grid: as in `Convolution`.
    """

    def __init__(self, attention: nn.Module, mixture: nn.Parameter, side: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.attention, self.mixture, self.side, self.grid = attention, mixture, side, grid
        self.norm = nn.BatchNorm2d(attention.head_dim)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """W (d_h, d, side, side), b (d_h,), U (d, d_h) and c (d,)."""
        taps = slice(None) if self.side == 3 else slice(CENTRE, CENTRE + 1)
        heads = self.attention.num_heads
        of_heads = (self.mixture / TEMPERATURE).softmax(0)[:, taps]  # (h, k)
        values = self.attention.qkv.weight.unflatten(0, (3, heads, -1))[2]  # (h, d_h, d)
        kernel = torch.einsum("hk,hed->edk", of_heads, values)
        kernel = kernel.unflatten(2, (self.side, self.side)).transpose(2, 3)  # columns by rows -> rows by columns
        bias = self.attention.qkv.bias
        if bias is not None:
            bias = torch.einsum("hk,he->e", of_heads, bias.unflatten(0, (3, heads, -1))[2])
        up = torch.einsum("hk,dhe->de", of_heads, self.attention.proj.weight.unflatten(1, (heads, -1)))
        return kernel, bias, up, self.attention.proj.bias

    def forward(self, tokens: Tensor, **masks: Any) -> Tensor:
        kernel, bias, up, up_bias = self.weights()
        return convolved(tokens, self.grid, kernel, bias, self.norm, up, up_bias)

    @torch.no_grad()
    def plain(self) -> Convolution:
        """The same in evaluation, with weights of its own and the norm in them."""
        kernel, bias, up, up_bias = self.weights()
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        convolution = Convolution(len(up), len(kernel), self.side, self.grid).to(kernel.device)
        convolution.down.weight.copy_(kernel * scale[:, None, None, None])
        bias = torch.zeros_like(scale) if bias is None else bias
        convolution.down.bias.copy_((bias - self.norm.running_mean) * scale + self.norm.bias)
        convolution.up.weight.copy_(up)
        convolution.up.bias.copy_(torch.zeros_like(up[:, 0]) if up_bias is None else up_bias)
        return convolution.eval()


def new_mixture(attention: nn.Module) -> nn.Parameter:
    """η of the convolutions of an attention, (h, TAPS): all heads weigh the same."""
    return nn.Parameter(torch.ones(attention.num_heads, TAPS))


class SinglePath(nn.Module):
    """An attention of timm with its convolutions, which share its weights, behind three gates."""

    def __init__(self, attention: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.attention = attention
        mixture = new_mixture(attention)
        self.conv1, self.conv3 = (MixedConvolution(attention, mixture, side, grid) for side in SIDES.values())
        self.gates = new_gates(3)

    def forward(self, tokens: Tensor, **masks: Any) -> Tensor:
        of_conv1, of_conv3, of_attention = shares(drawn(self.gates) if self.training else opened(self.gates))
        of_all = of_conv1 * self.conv1(tokens) + of_conv3 * self.conv3(tokens)
        return of_attention * self.attention(tokens, **masks) + of_all


class GatedUnits(nn.Module):
    """The activation function of a feed-forward part, with a gate behind each of its hidden units."""

    def __init__(self, activation: nn.Module, units: int) -> None:
        super().__init__()
        self.activation = activation
        self.gates = new_gates(units)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(hidden) * (drawn(self.gates) if self.training else opened(self.gates))


def add_gates(model: nn.Module) -> None:
    """Put gates into a plain vision transformer of timm."""
    for block in model.blocks:
        block.attn = SinglePath(block.attn, model.patch_embed.grid_size)
        block.mlp.act = GatedUnits(block.mlp.act, block.mlp.fc1.out_features)


def gates_of(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """θ of each layer's attention (3,), and of its feed-forward part's units (u,)."""
    return [block.attn.gates for block in model.blocks], [block.mlp.act.gates for block in model.blocks]


# ---------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Costs:
    """Multiply-adds for an image, counted as in the source: of feed-forward parts at the patches alone.

    Attributes:
        branches: of a layer with each of BRANCHES.
        unit: of a hidden unit of a feed-forward part.
        rest: of the patch embedding and the norms.
    """

    branches: tuple[int, int, int, int]
    unit: int
    rest: int

    def of(self, branches: Sequence[str], units: Sequence[int]) -> int:
        """Those of a compressed model."""
        return self.rest + sum(self.branches[BRANCHES.index(branch)] for branch in branches) + self.unit * sum(units)

    def expected(self, of_attentions: Sequence[Tensor], of_units: Sequence[Tensor]) -> Tensor:
        """Those of a model in the search, by the gates that `gates_of` gives: a scalar with their gradients."""
        layers = torch.stack([torch.stack(shares(counted(gates))) for gates in of_attentions])  # (layers, 3)
        costs = torch.tensor(self.branches[1:], dtype=layers.dtype, device=layers.device)
        return self.rest + (layers * costs).sum() + self.unit * counted(torch.cat([*of_units])).sum()


def costs_of(model: nn.Module) -> Costs:
    """The costs of a plain vision transformer of timm."""
    width, hidden = model.embed_dim, model.blocks[0].attn.head_dim
    patches = model.patch_embed.num_patches
    tokens = patches + model.num_prefix_tokens
    attention = 4 * tokens * width**2 + 2 * width * tokens**2
    norms = (2 * len(model.blocks) + 1) * 2 * width * tokens
    embedding = patches * model.patch_embed.proj.weight.numel()
    branches = (0, 2 * width * hidden * patches, 10 * width * hidden * patches, attention)
    return Costs(branches, 2 * patches * width, embedding + norms)
