"""CLIP-BART's prompts: where an encoder reads them, and that nothing else of the text model changes; see test_clip_bart.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import TEXT_MODELS, D, bart
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from routevl.errors import RoutevlError
from routevl.methods.base import layer_norms
from routevl.methods.table import new_method

OPTIONS = {"num_virtual_tokens": 3, "hidden_size": 7}


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=D, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def prompted(text_model: nn.Module, norms: bool = False, **options: Any) -> nn.Module:
    """A frozen text model with prompts that are as large as trained ones, in evaluation mode."""
    text_model.requires_grad_(False).eval()
    train_also = layer_norms(text_model) if norms else []
    model = new_method("vl_prompt", OPTIONS | options, "test").build(text_model, {}, train_also)
    for parameter in model.get_encoder().prompts.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return model


def text() -> dict[str, Tensor]:
    """Three texts, the last with padding."""
    ids = torch.randint(4, 48, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def vectors(model: nn.Module) -> Tensor:
    """The prompt by its formula, (1, 3, d)."""
    prompt = model.get_encoder().prompts.of_tasks[0]
    first, _, second = prompt.network
    inner = torch.tanh(prompt.vectors @ first.weight.T + first.bias)
    return (inner @ second.weight.T + second.bias)[None]


def test_a_t5_reads_them_as_input_embeddings() -> None:
    torch.manual_seed(0)
    base, batch = t5().eval(), text()
    embeddings, decoder = base.get_input_embeddings()(batch["input_ids"]), {"decoder_input_ids": batch["input_ids"]}
    torch.manual_seed(0)
    model = prompted(t5())
    mask = torch.cat([torch.ones(3, 3, dtype=torch.int64), batch["attention_mask"]], dim=1)
    joined = {"inputs_embeds": torch.cat([vectors(model).expand(3, -1, -1), embeddings], dim=1), "attention_mask": mask}
    expected = base(**joined, **decoder).logits
    torch.testing.assert_close(model(**batch, **decoder).logits, expected)
    embedded = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    torch.testing.assert_close(model(**embedded, **decoder).logits, expected)
    search = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **search), base.generate(**joined, **search))


@pytest.mark.parametrize("masked", [True, False])
def test_a_bart_norms_them_and_gives_them_no_positions(masked: bool) -> None:
    """Its encoder's states are those of its own layers on [prompt; text]; the text's positions begin at 0, as without."""
    model, batch = prompted(bart()).double(), text()
    if not masked:
        del batch["attention_mask"]
    encoder = model.get_encoder()
    states = model(**batch, decoder_input_ids=batch["input_ids"]).encoder_last_hidden_state
    norm = encoder.layernorm_embedding
    tokens = encoder.embed_tokens(batch["input_ids"]) + encoder.embed_positions.weight[2 : 2 + 6]
    joined = torch.cat([vectors(model).expand(3, -1, -1), tokens], dim=1)
    hidden_states = nn.functional.layer_norm(joined, (D,), norm.weight, norm.bias)
    mask = torch.cat([torch.ones(3, 3), batch.get("attention_mask", torch.ones(3, 6))], dim=1).bool()
    for layer in encoder.layers:
        hidden_states = layer(hidden_states, mask[:, None, None].expand(-1, -1, mask.shape[1], -1))
    torch.testing.assert_close(states[mask], hidden_states[mask], rtol=0, atol=1e-12)


def test_the_decoder_attends_to_them_and_not_to_padding() -> None:
    model, batch = prompted(bart()), text()
    decoder = {"decoder_input_ids": batch["input_ids"]}
    logits = model(**batch, **decoder).logits
    short = {name: tensor[2:, :4] for name, tensor in batch.items()}
    torch.testing.assert_close(model(**short, decoder_input_ids=batch["input_ids"][2:]).logits, logits[2:])
    states = model.get_encoder()(**batch).last_hidden_state
    assert states.shape == (3, 3 + 6, D)
    states[:, :3] *= -5
    assert not torch.allclose(model(**batch, **decoder, encoder_outputs=[states]).logits, logits)


@pytest.mark.parametrize("kind", [bart, t5])
def test_the_frozen_model_is_left_as_it_was_beneath_them(kind: Any) -> None:
    torch.manual_seed(0)
    base, batch = kind().eval().requires_grad_(False), text()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = base(**batch, decoder_input_ids=batch["input_ids"]).logits
    model = prompted(base)
    assert not torch.equal(model(**batch, decoder_input_ids=batch["input_ids"]).logits, expected)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    assert torch.equal(model(**batch, decoder_input_ids=batch["input_ids"]).logits, expected)


def test_the_norms_of_a_run_are_trained_beside_them() -> None:
    method = new_method("vl_prompt", OPTIONS, "test")
    trained = {name for name, parameter in prompted(bart(), norms=True).named_parameters() if parameter.requires_grad}
    parts = [{name for name in trained if method.part_of(name) == part} for part in ("method", "layer_norm")]
    assert len(parts[0]) == 5 and parts[1] == trained - parts[0]
    assert all("norm" in name for name in parts[1]) and len(parts[1]) == 2 * len(layer_norms(bart()))


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_other_models_are_refused(kind: str) -> None:
    with pytest.raises(RoutevlError, match="vl_prompt refuses .*: its prompts stand in the encoder of a BART or a T5"):
        prompted(TEXT_MODELS[kind]())
