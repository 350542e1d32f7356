"""CLIP-BART's prompts: vectors that the encoder of an encoder-decoder reads before all else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from routevl.errors import RoutevlError
from routevl.methods.per_task import PerTask, tasks_option
from routevl.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

NO_ENCODER = "its prompts stand in the encoder of a BART or a T5"


class VLPrompt(PerTask):
    """W_2 tanh(W_1 e + b_1) + b_2 of trained vectors e, before what the encoder reads: normed as token embeddings, but without
    positions."""

    refuses: ClassVar[Mapping[str, str]] = {"roberta": NO_ENCODER, "gpt2": NO_ENCODER, "co_attention": NO_ENCODER}

    @dataclass(frozen=True)
    class Options:
        """Options of CLIP-BART's prompts."""

        num_virtual_tokens: int = option("trained positions before the input", 40, least=1)
        hidden_size: int = option("width between W_1 and W_2", 800, least=1)
        tasks: int = tasks_option("prompts")

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        from routevl.methods.per_task.layer import streams_of_tasks
        from routevl.methods.vl_prompt.layer import Prompt, Prompts, prompt_encoder

        if text_model.config.model_type not in ("bart", "t5"):
            raise RoutevlError(f"vl_prompt refuses {type(text_model).__name__}: {NO_ENCODER}")
        for name in train_also:
            text_model.get_submodule(name).requires_grad_(True)
        options, width, device = self.options, text_model.get_input_embeddings().embedding_dim, text_model.device
        sizes = (options.num_virtual_tokens, width, options.hidden_size)
        prompts = [Prompt(*sizes, device) for _ in range(options.tasks)]
        prompt_encoder(text_model, Prompts(prompts, streams_of_tasks(text_model, options.tasks)))
        return text_model

    def part_of(self, name: str) -> str:
        return "method" if ".prompts." in name else "layer_norm"
