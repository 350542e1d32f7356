"""GenFT: updates of frozen matrices, generated from the matrices themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from routevl.methods.bottleneck import BottleneckMethod
from routevl.options import option

if TYPE_CHECKING:
    from torch import nn

    from routevl.backbones.structure import Structure

H = "rows of the generator that all matrices share"
M = "rows of each matrix's own; 0: none, and rho is not used"
SCALE = "factor of the updates"
DROPOUT = "dropout of the entries of what the generator gives, in both of its halves"
BIAS = "whether the generator has biases"
INNER, OUTER = "activation inside each half of the generator", "activation after each half of the generator"
ACTIVATIONS = ("identity", "relu", "leaky_relu", "gelu", "tanh")


class GenFT(BottleneckMethod):
    """(W + s ΔW) x in place of W x for the query and value matrices W, (d, d). One small network makes ΔW of every W, with
    `m` of its h + m rows belonging to W alone. Official code for language models."""

    of_attention: ClassVar[bool] = False  # whether the query and value of an attention have their own rows in common
    transposed: ClassVar[bool] = False  # whether ΔW's transpose is added, and rho belongs to the generator's matrices

    @dataclass(frozen=True)
    class Options:
        """Options of the generator."""

        h: int = option(H, 24, least=0)
        m: int = option(M, 2, least=0)
        rho: float = option("factor of the matrices that the generator reads", 0.5, above=0)
        scale: float = option(SCALE, 0.05, above=0)
        dropout: float = option(DROPOUT, 0.1, least=0, below=1)
        inner: str = option(INNER, "identity", choices=ACTIVATIONS)
        outer: str = option(OUTER, "identity", choices=ACTIVATIONS)
        bias: bool = option(BIAS, True)

        def conflicts(self) -> Iterator[str]:
            """What is wrong with options that are right each by itself."""
            if self.h == self.m == 0:
                yield "h and m are both 0, so that nothing would be trained: set one of them"

    def adapt(self, text_model: nn.Module, parts: Structure) -> None:
        """See `routevl.methods.genft.layer.generate_updates`, which may raise RoutevlError."""
        from routevl.methods.genft.layer import generate_updates

        generate_updates(text_model, parts, self.options, self.transposed, self.of_attention)


class GenFTVision(GenFT):
    """GenFT as in the official code for vision transformers: (W + s ΔWᵀ) x, ρ times each matrix of the generator in place of W,
    and rows that the query and value of an attention share."""

    of_attention: ClassVar[bool] = True
    transposed: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        """Options of the generator."""

        h: int = option(H, 32, least=1)
        m: int = option(M, 5, least=0)
        rho: float = option("factor of the generator's matrices", 1.4, above=0)
        scale: float = option(SCALE, 1.0, above=0)
        dropout: float = option(DROPOUT, 0.0, least=0, below=1)
        inner: str = option(INNER, "identity", choices=ACTIVATIONS)
        outer: str = option(OUTER, "leaky_relu", choices=ACTIVATIONS)
        bias: bool = option(BIAS, False)
