"""Generation with trained prompts from embeddings: peft rebuilds its input from token ids, and so drops the visual prefix."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor


class PromptedCausalLM(PeftModelForCausalLM):
    """peft's model for prompt and prefix tuning, whose `generate` begins as its forward pass does."""

    def generate(self, inputs_embeds: Tensor, attention_mask: Tensor, num_beams: int = 1, **options: Any) -> Tensor:
        """Token ids (B, new tokens) that follow inputs_embeds (B, L, d); `options` are those of transformers' generate."""
        batch_size, prompt = len(inputs_embeds), self.active_peft_config.num_virtual_tokens
        attention_mask = torch.cat([attention_mask.new_ones(batch_size, prompt), attention_mask], dim=1)
        if self.active_peft_config.peft_type == "PROMPT_TUNING":
            before = self.get_prompt(batch_size).to(inputs_embeds.dtype)
        else:  # the cache holds them; transformers cuts as many positions off the input, where it expects what is cached
            before = inputs_embeds.new_zeros(batch_size, prompt, inputs_embeds.shape[2])
            options["past_key_values"] = self.get_prompt(batch_size * num_beams)
        inputs_embeds = torch.cat([before, inputs_embeds], dim=1)
        return self.base_model.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, num_beams=num_beams, **options
        )
