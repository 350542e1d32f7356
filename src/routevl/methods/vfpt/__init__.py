"""Visual prompts: trained tokens before each layer of the vision model, Fourier-transformed or, in VPT-deep, as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from routevl.methods.selective import Selective
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

DIMENSIONS = ("all", "sequence", "hidden")


class Vfpt(Selective):
    """Before each layer of the vision model, n tokens: F = Re(FFT over tokens (FFT over hidden (P[:m]))) and P[m:], m = ⌊α n⌋.

    The vision model stays frozen, and the text model but for its layer norms. The prompts stand behind the vision model's first
    token and leave the sequence after its last layer; each layer has its own, in place of those of the layer before. Where they
    stand among the tokens makes no difference, since attention has no order.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    refuses: ClassVar[Mapping[str, str]] = {"prefix=no": "only by the prefix does the text model read what the prompts change"}

    @dataclass(frozen=True)
    class Options:
        """Options of the prompts."""

        num_virtual_tokens: int = option("prompts before each layer of the vision model", 10, least=1)
        fourier_share: float = option("share α of them that is Fourier-transformed", 1.0, least=0, most=1)
        dimension: str = option(
            "what the Fourier transform is over: tokens (`sequence`), hidden units (`hidden`), or both", "all", choices=DIMENSIONS
        )
        dropout: float = option("dropout of the prompts, before they are transformed", 0.0, least=0, below=1)

    def chosen(self, parameters: Mapping[str, Tensor], prepared: Mapping[str, Tensor]) -> Collection[str]:
        return ()

    def adapt_vision(self, vision_model: nn.Module) -> nn.Module:
        from routevl.methods.vfpt.layer import put_prompts

        return put_prompts(vision_model, self.options)
