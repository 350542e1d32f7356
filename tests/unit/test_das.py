"""DAS: layers, gates and search against recorded numbers, formulas and a stub whose best answer is known; caches and FLOPs."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import LAYERS, TEXT_MODELS, D, bart, batch_of, build, gpt2, roberta
from recorded import assert_agrees, needs_reference, put, recorded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, RobertaConfig, RobertaModel
from transformers.models.roberta.modeling_roberta import RobertaLayer

from routevl.backbones.skeleton import layers_in, no_weights
from routevl.errors import RoutevlError
from routevl.methods.bottleneck.layer import InParallel, change_sub_layer, note_input
from routevl.methods.das import search as das_search
from routevl.methods.das.layer import Detour, NormedBottleneck
from routevl.methods.das.search import chosen, drawn, drawn_apart, moved, search
from routevl.methods.table import new_method

CPU = torch.device("cpu")
SMALL = {"skipped": 1, "r": 4, "skip_width": 12}


# ------------------------------------------------------------------------------------ recorded numbers


def recorded_bottleneck(tensors: dict[str, Tensor], place: str, rank: int) -> NormedBottleneck:
    bottleneck = NormedBottleneck(tensors[f"{place}.adapter_layer_norm_before.weight"].shape[0], rank, CPU)
    parts = {"norm": "adapter_layer_norm_before", "down": "down_proj", "up": "up_proj"}
    for name, parameter in bottleneck.named_parameters():
        part, _, kind = name.partition(".")
        put(parameter, tensors[f"{place}.{parts[part]}.{kind}"])
    return bottleneck


@needs_reference
def test_the_recorded_bottleneck_in_a_layers_place() -> None:
    tensors, meta = recorded("das")
    bottleneck = recorded_bottleneck(tensors, "skip_adapter.param", meta["skip_bottleneck"])
    layer = nn.Identity()
    Detour(layer, bottleneck, None).skipped = True
    assert_agrees(layer(tensors["layer.x"]), tensors["skip_adapter.y"])


@needs_reference
def test_the_recorded_layer_with_its_three_bottlenecks() -> None:
    tensors, meta = recorded("das")
    config = RobertaConfig(
        hidden_size=meta["d"], num_attention_heads=meta["heads"], intermediate_size=2 * meta["d"], is_decoder=True,
        add_cross_attention=True, layer_norm_eps=1e-12, attn_implementation="eager",
    )  # fmt: skip
    layer = RobertaLayer(config, layer_idx=0).eval()
    for name, parameter in layer.named_parameters():
        put(parameter, tensors[f"layer.param.{name}"])
    places = ("attention.output.adapter", "crossattention.output.adapter", "adapter")
    own, cross, feed_forward = (
        recorded_bottleneck(tensors, f"layer.param.{place}", meta["parallel_bottleneck"]) for place in places
    )
    change_sub_layer(layer, "attention.self.query", "attention.output.dense", InParallel(own))
    change_sub_layer(layer, "crossattention.self.query", "crossattention.output.dense", InParallel(cross))
    note_input(layer.intermediate.dense)
    Detour(layer, None, feed_forward)
    mask = (1 - tensors["layer.text_mask"])[:, None, None] * torch.finfo(torch.float32).min
    with torch.no_grad():
        output = layer(tensors["layer.x"], attention_mask=mask, encoder_hidden_states=tensors["layer.other_modality"])
    assert_agrees(output, tensors["layer.y"])


@needs_reference
def test_the_recorded_moves_of_the_gates_and_what_is_skipped_then() -> None:
    tensors, meta = recorded("das")
    gates = torch.zeros(12, dtype=torch.float64)
    at_ends = {0: chosen(gates.tolist(), meta["k"])}
    for number, (epoch, _) in enumerate(tensors["update.epoch_step"].tolist()):
        assert_agrees(gates, tensors["update.gate_before"][number].double()) if number else None
        torch.testing.assert_close((-tensors["update.losses"][number]).exp(), tensors["update.rewards"][number])
        gates = moved(gates, tensors["update.subsets"][number].tolist(), tensors["update.losses"][number])
        assert_agrees(gates, tensors["update.gate_after"][number].double())
        at_ends[epoch] = chosen(gates.tolist(), meta["k"])
    for epoch, skipped in at_ends.items():
        assert skipped == tensors["skipped_at_epoch_end"][epoch].tolist()


def moves_of(monkeypatch: pytest.MonkeyPatch, steps: int, **options: Any) -> list[list[int]]:
    """The epochs and steps before which a search moves its gates."""
    losses, moves = [], []
    monkeypatch.setattr(das_search, "moved", lambda gates, sets, of_sets, _: moves.append(len(losses)) or gates)
    run_search(lambda skipped: losses.append(skipped) or 1.0, steps, layers=12, **options)
    compared = 3  # losses in each move
    return [[*divmod(computed - compared * (number + 1), steps)] for number, computed in enumerate(moves)]


@needs_reference
def test_gates_move_at_the_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, meta = recorded("das")
    options = {"every": meta["das_turn"], "still_epochs": meta["warmup_epoch"], "search_epochs": meta["das_epoch"]}
    assert moves_of(monkeypatch, meta["steps_per_epoch"], **options) == tensors["update.epoch_step"].tolist()


def test_gates_move_every_few_steps_but_not_in_the_first_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been counted then counts."""
    assert moves_of(monkeypatch, 7, every=3) == [[1, 0], [1, 3], [1, 6], [2, 2], [2, 5]]
    assert moves_of(monkeypatch, 7, every=10, still_epochs=0) == [[1, 3], [2, 6]]


# ------------------------------------------------------------------------------------------ the search


class Stub(nn.Module):
    """A model whose loss is a function of which layers are skipped."""

    def __init__(self, detours: list[Any], loss_of: Any) -> None:
        super().__init__()
        self.detours, self.loss_of = detours, loss_of
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight * 0 + self.loss_of(frozenset(n for n, d in enumerate(self.detours) if d.skipped))}


class StubBatches:
    """Batches without anything in them."""

    def __init__(self, in_epoch: int) -> None:
        self.in_epoch = in_epoch

    def of_epoch(self, epoch: int) -> list[dict[str, Tensor]]:
        return [{}] * self.in_epoch

    def steps(self, epochs: int, *_: Any) -> Iterator[tuple[int, dict[str, Tensor]]]:
        return ((epoch, batch) for epoch in range(epochs) for batch in self.of_epoch(epoch))

    def validation(self) -> dict[str, Tensor]:
        return {}


def settings(seed: int = 0, freeze_layer_norm: bool = True) -> SimpleNamespace:
    """What the search reads of a run's settings."""
    none = {"weight_decay": 0.0, "max_grad_norm": None, "warmup_steps": lambda steps: 0}
    return SimpleNamespace(seed=seed, learning_rate=0.01, freeze_layer_norm=freeze_layer_norm, **none)


def run_search(loss_of: Any, steps: int, layers: int, seed: int = 0, **options: Any) -> Tensor:
    detours = [SimpleNamespace(skipped=False) for _ in range(layers)]
    model = Stub(detours, loss_of)
    task = SimpleNamespace(model=model, settings=settings(seed))
    groups = lambda model, learning_rate: [{"params": [*model.parameters()], "lr": learning_rate}]  # noqa: E731
    return search(task, StubBatches(steps), groups, detours, new_method("das", options, "test").options)


def test_the_search_finds_the_layers_that_cost_least() -> None:
    costs = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.9])
    gates = run_search(lambda skipped: sum(costs[n].item() for n in skipped), 200, 6, skipped=2, reward_scale=20.0)
    assert chosen(gates.tolist(), 2) == [1, 3]


def test_the_search_is_a_function_of_the_seed() -> None:
    loss_of = lambda skipped: 0.1 * sum(skipped)  # noqa: E731
    first, again, other = (run_search(loss_of, 30, 6, seed, skipped=2) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.any()


def test_a_move_is_that_of_the_formula() -> None:
    gates, sets, losses = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), [(0, 1), (1, 2)], torch.tensor([0.5, 0.1])
    p = 1 / (1 + (-gates).exp())
    r = 3 * torch.exp(-losses).double()
    away = r - r.mean()
    expected = [gates[0] + away[0] * p[0] * (1 - p[0]), gates[1], gates[2] + away[1] * p[2] * (1 - p[2])]
    torch.testing.assert_close(moved(gates, sets, losses, 3.0), torch.stack(expected), rtol=0, atol=1e-6)


def test_sets_differ_and_likely_layers_are_drawn_more_often() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sets = drawn_apart(torch.zeros(4), 2, 6, generator)  # all that there are
        assert len(set(sets)) == 6 and all(len(set(layers)) == 2 for layers in sets)
    gates = torch.tensor([1.0, 0.0, -1.0]).double()
    counts = torch.zeros(3)
    for _ in range(3000):
        counts[list(drawn(gates, 1, generator))] += 1
    torch.testing.assert_close(counts / 3000, (gates.sigmoid() / gates.sigmoid().sum()).float(), rtol=0, atol=0.03)


@pytest.mark.parametrize("freeze", [True, False])
def test_the_search_trains_adapters_and_gives_each_layer_a_gate(freeze: bool) -> None:
    gates = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build("full", "roberta", {})
        before = {name: p.clone() for name, p in model.text_model.named_parameters()}
        batches = StubBatches(4)
        batches.of_epoch = lambda epoch: [batch_of("roberta", 4 * epoch + n) for n in range(4)]
        batches.validation = lambda: batch_of("roberta", 99)
        method = new_method("das", SMALL | {"every": 2, "subsets": 2}, "test")
        task = SimpleNamespace(model=model, settings=settings(freeze_layer_norm=freeze))
        gates.append(method.prepare(task, batches))
        after = dict(model.text_model.named_parameters())
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        assert all("LayerNorm" in name for name in changed) and bool(changed) != freeze
        assert all((after[name] != 0).any() for name in after if ".adapter." in name and name.endswith("up.bias"))
    assert gates[0] == gates[1] and gates[0].keys() == {*layers_in(roberta())}
    assert all(gate.shape == () for gate in gates[0].values()) and any(gate != 0 for gate in gates[0].values())


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(RoutevlError, match="das: skipped is 4, but the text backbone has 2 layers: set a smaller skipped"):
        new_method("das", {}, "test").build(roberta(), gates(roberta(), 0), [])
    with pytest.raises(RoutevlError, match="subsets is 3, but there are 2 sets"):
        run_search(lambda skipped: 1.0, 3, layers=2, skipped=1)
    with pytest.raises(RoutevlError, match="still_epochs is 3 of 3 search_epochs, so that gates would never move"):
        new_method("das", {"still_epochs": 3}, "test")


# ------------------------------------------------------------------------------------------- the model


def gates(text_model: nn.Module, *without: int) -> dict[str, Tensor]:
    """A search's result, by which these layers are skipped."""
    return {name: torch.tensor(float(n in without)) for n, name in enumerate(layers_in(text_model))}


def skipping(text_model: nn.Module, *without: int, **options: Any) -> nn.Module:
    """A frozen text model with these layers skipped, its adapters moved, in evaluation mode."""
    text_model.requires_grad_(False)
    options = SMALL | {"skipped": len(without)} | options
    built = new_method("das", options, "test").build(text_model, gates(text_model, *without), []).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return built


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_a_skipped_layer_is_its_bottleneck_alone(kind: str) -> None:
    """Its own parameters change nothing, those of another layer do."""
    text_model = skipping(TEXT_MODELS[kind](), 1)
    ids = {"input_ids": torch.tensor([[5, 6, 7]])} | ({"decoder_input_ids": torch.tensor([[5, 6]])} if kind == "bart" else {})
    layers = [*layers_in(text_model).values()]
    states: list[Tensor] = []
    layers[1].register_forward_hook(lambda _, args, output: states.extend((args[0], output)))
    with torch.no_grad():
        expected = text_model(**ids)[0]
        x, output = states
        adapter = layers[1].adapter.skip
        normed = nn.functional.layer_norm(x, (D,), adapter.norm.weight, adapter.norm.bias, 1e-5)
        torch.testing.assert_close(output, x + adapter.up(adapter.down(normed).clamp(min=0)))
        for place, alike in ((1, True), (0, False)):
            for name, parameter in layers[place].named_parameters():
                if ".adapter." not in f".{name}":
                    parameter += 1
            assert torch.equal(text_model(**ids)[0], expected) is alike


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_a_kept_layer_is_that_of_the_formula(kind: str) -> None:
    """Before the residual connection of the attention, and after everything: post-norm and pre-norm."""
    text_model = skipping(TEXT_MODELS[kind](), 1)
    layer = [*layers_in(text_model).values()][0]
    x = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        if kind == "roberta":
            attended = layer.attention.self(x)[0]
            own = layer.attention.output
            h = own.LayerNorm(
                nn.functional.linear(attended, own.dense.weight, own.dense.bias) + own.dense.adapter.bottleneck(x) + x
            )
            inner = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(h))
            expected = layer.output.LayerNorm(layer.output.dense(inner) + h)
        else:
            projection, weights = layer.attn.c_proj, {}
            handle = projection.register_forward_pre_hook(lambda _, args: weights.update(read=args[0]))
            layer.attn(layer.ln_1(x))
            handle.remove()
            h = weights["read"] @ projection.weight + projection.bias + projection.adapter.bottleneck(x) + x
            expected = h + layer.mlp(layer.ln_2(h))
        torch.testing.assert_close(layer(x), expected + layer.adapter.feed_forward(h))


@pytest.mark.parametrize("without", [(LAYERS,), (0, LAYERS), (LAYERS + 1,)])
def test_a_bart_whose_decoder_skips_writes_with_its_cache_as_without(without: tuple[int, ...]) -> None:
    """The first decoder layer's cache tells how many positions came before."""
    text_model = skipping(bart(), *without)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    search = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 49}
    both = [text_model.generate(ids, use_cache=cached, **search) for cached in (True, False)]
    assert torch.equal(*both)


def test_a_skipped_block_writes_no_cache_entry() -> None:
    text_model = skipping(gpt2(), 0)
    cache = text_model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers if layer.is_initialized] == [3] * (LAYERS - 1)


def test_a_copy_and_a_pickled_one_skip_by_themselves() -> None:
    text_model = skipping(roberta(), 0)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = text_model(ids)[0]
        for again in (copy.deepcopy(text_model), pickle.loads(pickle.dumps(text_model))):
            assert torch.equal(again(ids)[0], expected)
            layers_in(again)["encoder.layer.0"].adapter.skip.up.bias += 1
            assert not torch.equal(again(ids)[0], expected)
        assert torch.equal(text_model(ids)[0], expected)


def flops_of(text_model: nn.Module, positions: int) -> int:
    """FLOPs of a forward pass over one text."""
    embeddings = torch.zeros(1, positions, text_model.config.hidden_size, device=text_model.device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        text_model(inputs_embeds=embeddings)
    return counter.get_total_flops()


def test_a_skipped_layer_costs_the_flops_of_its_bottleneck() -> None:
    tokens, ffn, r, wide = 5, 64, 4, 12
    layer = 2 * tokens * (4 * D * D + 2 * D * ffn) + 2 * 2 * tokens * tokens * D  # matrices; scores and their mean
    beside = 2 * 2 * tokens * 2 * D * r  # two sub-layers
    plain = flops_of(roberta().eval(), tokens)
    assert flops_of(skipping(roberta(), 0), tokens) == plain - layer + (LAYERS - 1) * beside + 2 * tokens * 2 * D * wide
    assert plain >= LAYERS * layer


def test_the_flops_and_parameters_of_a_base_model_are_as_documented() -> None:
    """Four of RoBERTa-base's twelve layers skipped, with the default widths."""
    with no_weights():
        plain, model = (RobertaModel(RobertaConfig(), add_pooling_layer=False) for _ in range(2))
        model = skipping(model, 0, 1, 2, 3, r=None, skip_width=None)
    counts = [flops_of(text_model.to("meta"), 21) for text_model in (plain, model)]
    assert [round(count / 1e9, 2) for count in counts] == [3.58, 2.56]
    assert round(100 * (1 - counts[1] / counts[0]), 1) == 28.5
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_177_536


def test_layers_that_are_not_understood_are_refused() -> None:
    """A layer whose attention and feed-forward part stand side by side."""
    sizes = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, use_parallel_residual=True, **sizes))
    with pytest.raises(RoutevlError, match="das: what the output of .* is added to in the text backbone is not found"):
        skipping(model, 0)
    scaled = gpt2()
    scaled.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(RoutevlError, match="attention depends on its layer's number"):
        skipping(scaled, 0)


def test_gates_of_another_model_are_refused() -> None:
    found = gates(gpt2(), 0)
    with pytest.raises(KeyError, match=re.escape("encoder.layer.0")):
        new_method("das", SMALL, "test").build(roberta(), found, [])
