"""What travels beside a call reaches that call alone: in threads, copies, recomputation, generation and compilation."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from typing import Any

import pytest
import torch
from cases import B, D, L, gpt2, roberta
from peft import get_peft_model
from torch import Tensor, nn

from routevl.conditioning import PER_EXAMPLE, PER_POSITION, Call, Conditioning
from routevl.errors import RoutevlError
from routevl.methods import RoutedAdapterConfig, RoutedLoraConfig

CONFIGS = [RoutedLoraConfig, RoutedAdapterConfig]


def routed(config: type, base: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(base, config(r=4, routing="attn", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "projection" not in name:
                parameter.normal_(0, 0.3)
    return model


def inputs(seed: int = 0, width: int = D) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 48, (B, L), generator=generator), torch.randn(B, 2, width, generator=generator)


# ------------------------------------------------------------------------------------- streams of any kind


class Shift(nn.Module):
    """A layer that reads a value per example and one per position."""

    def __init__(self, base: nn.Module, conditioning: Conditioning) -> None:
        super().__init__()
        self.base, self.conditioning = base, conditioning

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length = hidden_states.shape[:2]
        example = self.conditioning.per_example("group", batch, "group")
        position = self.conditioning.per_position("context", (batch, length), "context")
        return self.base(hidden_states) * example[:, None, None] + position[:, :, None]


def shifted() -> nn.Module:
    torch.manual_seed(0)
    model = gpt2().eval()
    conditioning = Conditioning(model, {"group": PER_EXAMPLE, "context": PER_POSITION})
    for block in model.transformer.h:
        block.mlp = Shift(block.mlp, conditioning)
    return model


def test_a_stream_per_position_means_the_same_with_a_cache_and_without() -> None:
    """Generated positions continue the last one of the prompt; beams and cached steps see what a full pass sees."""
    model, (ids, _) = shifted(), inputs()
    group, context = torch.tensor([1.0, 2.0, -1.0]), torch.randn(B, L, generator=torch.Generator().manual_seed(1))
    streams = {"group": group, "context": context}
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 49}
    for beams in (1, 3):
        cached = model.generate(ids, **streams, **options, num_beams=beams)
        assert torch.equal(cached, model.generate(ids, **streams, **options, num_beams=beams, use_cache=False))
    greedy = model.generate(ids, **streams, **options, eos_token_id=None)
    full = torch.cat([context, context[:, -1:].expand(-1, 5)], dim=1)
    logits = model(greedy[:, :-1], group=group, context=full).logits
    assert torch.equal(logits[:, L - 1 :].argmax(-1), greedy[:, L:])


def test_streams_that_do_not_fit_are_errors() -> None:
    model, (ids, _) = shifted(), inputs()
    group, context = torch.ones(B), torch.ones(B, L)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "do_sample": False, "pad_token_id": 49}
    for call in (model, lambda *a, **k: model.generate(*a, **k, **options)):
        with pytest.raises(RoutevlError, match="reads group, but the call has none"):
            call(ids, context=context)
        with pytest.raises(RoutevlError, match=r"group has batch size 2 but (the text has|there are) 3"):
            call(ids, group=group[:2], context=context)
        with pytest.raises(RoutevlError, match="batch size 6"):  # one for each beam is no image for each prompt
            call(ids, group=group.repeat(2), context=context, **({"num_beams": 2} if call is not model else {}))
    with pytest.raises(RoutevlError, match="context has 5 positions but the text has 6"):
        model(ids, group=group, context=context[:, :-1])
    assert model(ids, group=group, context=context).logits.isfinite().all()


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_images_of_another_number_than_prompts_is_refused(beams: int) -> None:
    model, (ids, features) = routed(RoutedLoraConfig, gpt2()), inputs()
    options = {"max_new_tokens": 3, "num_beams": beams, "do_sample": False, "pad_token_id": 49}
    for wrong in (features[:1], features[:2], features.repeat_interleave(2, 0)):
        for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
            with pytest.raises(RoutevlError, match=f"batch size {len(wrong)} but there are 3 prompts"):
                model.generate(**given, attention_mask=torch.ones_like(ids), visual_features=wrong, **options)


# --------------------------------------------------------------------------------- whose streams a layer reads


@pytest.mark.parametrize("config", CONFIGS)
def test_threads_that_share_a_model_have_their_own_images(config: type) -> None:
    model = routed(config, gpt2())
    ids, features = inputs()
    images = [features[:1], 3 * features[1:2]]
    options = {"attention_mask": torch.ones(1, L, dtype=torch.long), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 49}
    with torch.inference_mode():
        logits = [model(input_ids=ids[:1], visual_features=image).logits for image in images]
        tokens = [model.generate(input_ids=ids[:1], visual_features=image, **options) for image in images]
    assert not torch.allclose(*logits)
    wrong: list[str] = []
    start = threading.Barrier(2)

    def serve(number: int) -> None:
        start.wait()
        with torch.inference_mode():
            for _ in range(25):
                output = model(input_ids=ids[:1], visual_features=images[number]).logits
                wrong.extend([] if torch.equal(output, logits[number]) else ["forward"])
            for _ in range(4):
                output = model.generate(input_ids=ids[:1], visual_features=images[number], **options)
                wrong.extend([] if torch.equal(output, tokens[number]) else ["generate"])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=serve, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_streams_of_its_own(config: type, way: str) -> None:
    model = routed(config, roberta(), visual_width=20)
    ids, features = inputs(width=20)
    expected = model(ids, visual_features=features)[0]
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(ids, visual_features=features)[0], expected)
    conditioning = model.base_model.conditioning
    with pytest.raises(RoutevlError, match="the call has none"):
        conditioning.run_with(Call(conditioning.prepare({"visual_features": features})), twin, ids)
    assert torch.equal(twin(ids, visual_features=-features)[0], model(ids, visual_features=-features)[0])


@pytest.mark.parametrize("config", CONFIGS)
def test_tuners_after_each_other_on_one_base(config: type) -> None:
    """The second, trained with checkpointing as the first was, reads its own streams; unloaded, the base is as it was."""
    base = roberta()
    base.activation_checkpointing_enable()
    ids, features = inputs(width=20)
    for _ in range(2):
        model = routed(config, base, visual_width=20).train()
        with pytest.raises(RoutevlError, match="already has a tuner"):
            get_peft_model(base, config(r=2))
        model(ids, visual_features=features)[0].square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        base = model.unload()
        assert not base._forward_pre_hooks and not base._forward_hooks and "generate" not in vars(base)
    base.eval()
    torch.manual_seed(0)
    assert torch.equal(base(ids)[0], base(ids)[0])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", [roberta, gpt2])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_reads_the_streams_of_its_own_pass(config: type, base: Any, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = routed(config, base()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        losses = []
        for seed in (0, 1):
            ids, features = inputs(seed)
            losses.append(model(ids, visual_features=features)[0].square().mean())
        sum(losses).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_reentrant_checkpointing_cannot_train_a_projection_and_says_so() -> None:
    model = routed(RoutedLoraConfig, gpt2(), visual_width=20).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    ids, features = inputs(width=20)
    with pytest.raises(RoutevlError, match="use_reentrant=False"):
        model(ids, visual_features=features)


@pytest.mark.parametrize("config", CONFIGS)
def test_compiled_the_layers_read_the_same(config: type) -> None:
    model = routed(config, roberta())
    compiled = torch.compile(model, backend="eager")
    for seed in (0, 1):
        ids, features = inputs(seed)
        torch.testing.assert_close(compiled(ids, visual_features=features)[0], model(ids, visual_features=features)[0])
    with pytest.raises(RoutevlError, match="the call has none"):
        compiled(ids)


def test_an_error_in_a_call_leaves_nothing_behind() -> None:
    model, (ids, features) = routed(RoutedLoraConfig, roberta()), inputs()
    with pytest.raises(IndexError):
        model(ids + 1000, visual_features=features)
    with pytest.raises(RoutevlError, match="the call has none"):
        model(ids)
