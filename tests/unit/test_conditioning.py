"""What travels beside a call reaches that call alone: in threads, copies, recomputation, generation and compilation."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from typing import Any

import pytest
import torch
from cases import B, D, L, bart, gpt2, roberta
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LogitsProcessorList

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


def prompts_of(model: nn.Module, ids: Tensor, features: Tensor) -> list[dict[str, Any]]:
    """The ways in which transformers' `generate` takes its prompts."""
    ways = [{"input_ids": ids}, {"inputs": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}]
    if model.config.is_encoder_decoder:
        conditioning = model.base_model.conditioning
        call = Call(conditioning.prepare({"visual_features": features}))
        ways += [{"encoder_outputs": conditioning.run_with(call, model.get_encoder(), ids)}]
    return ways


@pytest.mark.parametrize(
    "search", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 2}], ids=str
)
@pytest.mark.parametrize("base", [gpt2, bart])
def test_b03_h32_images_of_another_number_than_prompts_are_refused(base: Any, search: dict[str, Any]) -> None:
    model, (ids, features) = routed(RoutedAdapterConfig, base()), inputs()
    for given in prompts_of(model, ids, features):
        for wrong in (features[:1], features[:2], features.repeat_interleave(2, 0)):
            with pytest.raises(RoutevlError, match=f"batch size {len(wrong)} but there are 3 prompts"):
                model.generate(**given, visual_features=wrong, max_new_tokens=3, pad_token_id=49, **search)
    with pytest.raises(RoutevlError, match="batch size 2 but there is 1 prompt:"):
        model.generate(visual_features=features[:2], max_new_tokens=3, pad_token_id=49, num_return_sequences=4, do_sample=True)
    assert model.generate(visual_features=features[:1], max_new_tokens=3, pad_token_id=49).shape[0] == 1


@pytest.mark.parametrize("base", [gpt2, bart])
def test_h32_however_it_is_searched_each_prompt_has_its_own_image(base: Any) -> None:
    """Beams, several returned sequences, prompts in any form, look-up and assisted decoding, a decoding loop of one's own."""
    model, (ids, features) = routed(RoutedLoraConfig, base()), inputs()
    common = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 49, "eos_token_id": None}
    for search in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        alone = [model.generate(ids[i : i + 1], visual_features=features[i : i + 1], **common, **search) for i in range(B)]
        for given in prompts_of(model, ids, features):
            together = model.generate(**given, visual_features=features, **common, **search)
            assert torch.equal(together[:, -4:], torch.cat(alone)[:, -4:])
    one = {"visual_features": features[:1], **common}
    greedy = model.generate(ids[:1], **one)
    assert torch.equal(model.generate(ids[:1], **one, prompt_lookup_num_tokens=2), greedy)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids[:1], **one, assistant_model=base().eval()), greedy)

    def first_likely(model: nn.Module, input_ids: Tensor, **options: Any) -> Tensor:
        extra = {name: options[name] for name in ("encoder_outputs",) if name in options}
        key = "decoder_input_ids" if extra else "input_ids"
        for _ in range(4):
            input_ids = torch.cat([input_ids, model(**{key: input_ids}, **extra).logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    own = model.generate(ids, visual_features=features, custom_generate=first_likely, **common)
    assert torch.equal(own, model.generate(ids, visual_features=features, **common))


def test_a_forward_pass_within_a_search_may_have_an_image_of_its_own() -> None:
    """As in contrastive decoding, which compares with another image's scores; the search then goes on with its own."""
    model, (ids, features) = routed(RoutedLoraConfig, gpt2()), inputs()
    other, inner = -2 * features, []

    def compare(input_ids: Tensor, scores: Tensor) -> Tensor:
        inner.append((input_ids, model(input_ids, visual_features=other.repeat_interleave(2, 0)).logits))
        return scores

    search = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "num_beams": 2, "pad_token_id": 49}
    compared = model.generate(ids, visual_features=features, logits_processor=LogitsProcessorList([compare]), **search)
    assert torch.equal(compared, model.generate(ids, visual_features=features, **search))
    for texts, logits in inner:
        assert torch.equal(logits, model(texts, visual_features=other.repeat_interleave(2, 0)).logits)
    with pytest.raises(RoutevlError, match="the call has none"):
        model(ids)


@pytest.mark.parametrize("config", CONFIGS)
def test_b26_features_are_projected_once_for_all_tokens_and_beams(config: type) -> None:
    model, (ids, features) = routed(config, gpt2()), inputs()
    features = torch.randn(B, 7, D)
    seen: list[int] = []
    downs = [module for name, module in model.named_modules() if name.endswith(("lora_A.default", "adapter_down.default"))]
    for down in downs:
        down.register_forward_pre_hook(lambda _, args: seen.extend([len(args[0])] * (args[0].shape[1] == 7)))
    search = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 5,
        "num_beams": 4,
        "eos_token_id": None,
        "pad_token_id": 49,
    }
    first = model.generate(ids, visual_features=features, **search)
    assert seen == [B] * len(downs)
    second = model.generate(ids, visual_features=3 * features.flip(0), **search)
    assert not torch.equal(first, second)
    assert torch.equal(first, model.generate(ids, visual_features=features, **search))
    model.add_adapter("other", config(r=4, routing="attn"))
    model.set_adapter("other")  # its update is zero yet
    plain = model.generate(ids, visual_features=features, **search)
    model.base_model.set_adapter(["default", "other"])
    assert torch.equal(model.generate(ids, visual_features=features, **search), first)
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **search), plain) and not torch.equal(plain, first)


# --------------------------------------------------------------------------------- whose streams a layer reads


@pytest.mark.parametrize("config", CONFIGS)
def test_b10_h02_threads_that_share_a_model_have_their_own_images(config: type) -> None:
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


def replica_of(model: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes for another GPU: modules of the same attributes, with copies of the parameters."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = twins.get(child)
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.clone())
    return twins[model]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("width", [D, 20])
def test_b10_replicas_in_threads_have_the_images_of_their_own_shares(config: type, width: int) -> None:
    """As DataParallel runs them; the shares' gradients reach the one model."""
    model, (ids, features) = routed(config, gpt2(), visual_width=width if width != D else None), inputs(width=width)
    expected = model(ids, visual_features=features).logits
    replicas, shares, outputs = [replica_of(model) for _ in range(B)], range(B), {}
    start = threading.Barrier(B)

    def serve(i: int) -> None:
        start.wait()
        outputs[i] = replicas[i](input_ids=ids[i : i + 1], visual_features=features[i : i + 1]).logits

    threads = [threading.Thread(target=serve, args=(i,)) for i in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([outputs[i] for i in shares]), expected)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(expected.square().mean(), list(wanted.values()))
    shared = torch.autograd.grad(torch.cat([outputs[i] for i in shares]).square().mean(), list(wanted.values()))
    for name, gradient, own in zip(wanted, gradients, shared, strict=True):
        torch.testing.assert_close(own, gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("width", [D, 20])
def test_layers_on_another_device_get_the_features_there(config: type, width: int) -> None:
    """The second block stands on a device of its own, as under a device map; "meta" refuses tensors of others like any."""
    model, (ids, features) = routed(config, gpt2(), visual_width=width if width != D else None), inputs(width=width)
    block, head = model.base_model.model.transformer.h[1], model.base_model.model.transformer.ln_f
    block.to("meta")
    block.register_forward_pre_hook(lambda _, args, kw: ((args[0].to("meta"), *args[1:]), kw), with_kwargs=True)
    head.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0], device="cpu"),))
    mask = torch.tensor([[True, False]]).expand(B, 2)
    output = model(input_ids=ids, visual_features=features, visual_mask=mask, attention_mask=None, use_cache=False).logits
    assert output.shape == (B, L, 50)


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
def test_b09_h03_tuners_after_each_other_on_one_base(config: type) -> None:
    """The second, trained with checkpointing as the first was, reads its own streams; unloaded, the base is as it was."""
    base = roberta()
    base.gradient_checkpointing_enable()
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
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        losses = []
        for seed in (0, 1):
            ids, features = inputs(seed)
            losses.append(model(ids, visual_features=features)[0].square().mean())
        sum(losses).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", [roberta, gpt2])
def test_h31_recomputation_gives_a_projection_before_the_features_its_gradient(config: type, base: Any) -> None:
    """Without reentrance as without checkpointing; with it a refusal, since nothing would be trained."""
    gradients = []
    for kind in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = routed(config, base()).train()
        torch.manual_seed(1)
        before = nn.Linear(20, D)
        if kind:
            model.gradient_checkpointing_enable(kind)
            model.enable_input_require_grads()
        ids, features = inputs(width=20)
        if kind and kind["use_reentrant"]:
            with pytest.raises(RoutevlError, match="use_reentrant=False"):
                model(ids, visual_features=before(features))
            continue
        model(ids, visual_features=before(features))[0].square().mean().backward()
        own = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        gradients.append(own | {f"before.{n}": p.grad for n, p in before.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_h31_reentrant_checkpointing_cannot_train_a_projection_and_says_so() -> None:
    model = routed(RoutedLoraConfig, gpt2(), visual_width=20).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
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
