"""GenFT: the generator against recorded numbers and the formula, merging, dropout, sharing, sizes, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TEXT_MODELS, B, D, batch_of, build, one_step, shaken
from recorded import needs_reference, put, recorded
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel
from transformers.pytorch_utils import Conv1D

from routevl.backbones.skeleton import no_weights
from routevl.errors import RoutevlError
from routevl.methods.base import WEIGHTS
from routevl.methods.genft.layer import Generator, Rows, Update
from routevl.methods.table import new_method

KINDS = tuple(TEXT_MODELS)
BOTH = ("genft", "genft_vision")


def adapted(method: str, text_model: nn.Module, **options: Any) -> nn.Module:
    """A frozen text model with the method, in evaluation mode."""
    return new_method(method, options, "test").build(text_model.requires_grad_(False), {}, []).eval()


def updated(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are updated."""
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "adapter", None), Update)}


def generator_of(model: nn.Module) -> Generator:
    (generator,) = {module for module in model.modules() if isinstance(module, Generator)}  # one for all
    return generator


# ----------------------------------------------------------------------------------------- the numbers


@needs_reference
@pytest.mark.parametrize("case", ["nlp", "nlp_act", "vision"])
def test_the_recorded_updates_and_outputs(case: str) -> None:
    tensors, meta = recorded("genft")
    facts = meta["cases"][case]
    activations = {
        "inner": facts["inner"] or "identity",
        "outer": (facts["outer"] or "identity").replace("leakyrelu", "leaky_relu"),
    }
    sizes = {"h": facts["h"], "m": facts["m"], "rho": facts["rho"], "scale": facts["s"]}
    config = RobertaConfig(
        vocab_size=20, hidden_size=facts["d"], num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = adapted("genft_vision" if facts["vision"] else "genft", RobertaModel(config), **sizes, **activations).double()
    for number, half in enumerate(generator_of(model).halves, start=1):
        for place, matrix, bias in (("a", half.a, half.c), ("b", half.b, half.e)):
            put(matrix, tensors[f"{case}.generator.share_{number}_{place}_weight"])
            assert (bias is None) == (f"{case}.generator.share_{number}_{place}_bias" not in tensors)
            if bias is not None:
                put(bias, tensors[f"{case}.generator.share_{number}_{place}_bias"])
    for name in ("query", "value"):
        module = model.get_submodule(f"encoder.layer.0.attention.self.{name}")
        put(module.weight, tensors[f"{case}.{name}.W0"])
        put(module.bias, tensors[f"{case}.{name}.bias0"])
        put(module.adapter.rows[0].a, tensors[f"{case}.{name}.a"])
        put(module.adapter.rows[0].b, tensors[f"{case}.{name}.b"])
        update, output = tensors[f"{case}.{name}.delta_W"], tensors[f"{case}.{name}.y"]
        ours = module.adapter.of_weight(module.weight)
        assert_agree(ours.T if facts["vision"] else ours, update)
        assert_agree(module(tensors[f"{case}.x"]), output)


def assert_agree(ours: Tensor, recorded: Tensor) -> None:
    assert (ours - recorded).abs().max() <= 1e-12 * recorded.abs().max()


@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("method", BOTH)
def test_the_formula(method: str, m: int) -> None:
    """ΔW element by element; without rows of its own rho is not used."""
    d, h, rho, scale = 3, 2, 0.7, 0.3
    options = new_method(method, {"h": h, "m": m, "rho": rho, "scale": scale, "inner": "tanh", "bias": True}, "test").options
    vision = method == "genft_vision"
    generator = Generator(d, options, vision, torch.device("cpu")).eval().double()
    rows = generator.new_rows(torch.device("cpu"))
    own = Rows(*(nn.Parameter(normal(*p.shape)) for p in (rows.a, rows.b))) if m else None
    factor = rho if m else 1.0

    def half(number: int, matrix: Tensor) -> Tensor:
        part = generator.halves[number]
        a, b = (torch.cat([part.a, own.a]), torch.cat([part.b, own.b], 1)) if m else (part.a, part.b)
        inside = factor if vision else 1.0
        result = torch.zeros(d, d, dtype=torch.float64)
        for row in range(d):
            for column in range(d):
                hidden = [(inside * a[n] @ matrix[row] + part.c[n]).tanh() for n in range(h + m)]
                value = sum(inside * b[column, n] * hidden[n] for n in range(h + m)) + part.e[column]
                result[row, column] = torch.where(value < 0, 0.01 * value, value) if vision else value
        return result

    weight = normal(d, d)
    expected = scale * half(1, half(0, weight if vision else factor * weight).T)
    torch.testing.assert_close(generator(weight, own), expected.T if vision else expected, rtol=0, atol=1e-13)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_without_shared_rows_it_is_of_low_rank() -> None:
    model = adapted("genft", TEXT_MODELS["roberta"](), h=0, m=3, scale=0.5)
    assert not [*generator_of(model).parameters()]
    for module in updated(model).values():
        (rows,) = module.adapter.rows
        torch.testing.assert_close(module.adapter.of_weight(module.weight), 0.5 * rows.b @ rows.a)
    with pytest.raises(RoutevlError, match="h and m are both 0"):
        new_method("genft", {"h": 0, "m": 0}, "test")


# ------------------------------------------------------------------------------------------ in a model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", BOTH)
def test_in_evaluation_merged_matrices_give_the_same(method: str, kind: str) -> None:
    """Also of a module that holds query, key and value; the key is not changed."""
    model = shaken(build(method, kind, {"h": 4, "dropout": 0.5})).double()
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch_of(kind).items()}
    expected = model(**batch)["losses"]
    for module in updated(model).values():
        update = module.adapter.of_weight(module.weight.T if isinstance(module, Conv1D) else module.weight)
        if isinstance(module, Conv1D):
            assert not update[D : 2 * D].any() and update[:D].all() and update[2 * D :].all()
        module.weight.data += update.T if isinstance(module, Conv1D) else update
        module._forward_hooks.clear()
    torch.testing.assert_close(model(**batch)["losses"], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", BOTH)
def test_the_first_step_moves_the_generator_and_what_each_matrix_has(method: str) -> None:
    """All matrices teach the one generator. It starts at no zero: the first loss is not the base model's."""
    model, batch = build(method, "roberta", {"h": 4, "dropout": 0.0}, norms=False), batch_of("roberta")
    assert model(**batch)["loss"] != build("full", "roberta", {}, norms=False)(**batch)["loss"]
    trained = {name: p for name, p in model.text_model.named_parameters() if p.requires_grad}
    before = {name: p.clone() for name, p in trained.items()}
    one_step(model, batch)
    still = {name for name, p in trained.items() if torch.equal(p, before[name])}
    assert all(name.endswith(".a") and ".rows." in name for name in still)  # of the vision code, until b has moved
    assert bool(still) == (method == "genft_vision")
    one_step(model, batch)
    assert not [name for name in still if torch.equal(trained[name], before[name])]


@pytest.mark.parametrize("method", BOTH)
def test_the_generator_is_saved_once_and_rows_of_an_attention_too(method: str, tmp_path: Path) -> None:
    model = build(method, "bart", {"h": 4, "m": 3}, norms=False)
    model.save(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    attentions = len(updated(model.text_model)) // 2
    assert sum(".generator." in name for name in saved) == (8 if method == "genft" else 4)
    assert sum(name.endswith("rows.0.a") for name in saved) == attentions * (2 if method == "genft" else 1)
    assert sum(tensor.numel() for tensor in saved.values()) == model.trainable_params_by_part()["method"]


def test_dropout_hits_the_updates_and_is_repeated_with_its_seed(tmp_path: Path) -> None:
    model, batch = shaken(build("genft", "gpt2", {"h": 4, "dropout": 0.5})), batch_of("gpt2")
    model.save(tmp_path)
    again = build("genft", "gpt2", {"h": 4, "dropout": 0.5}, seed=0)
    again.load(tmp_path)
    losses = []
    for each, seed in ((model, 3), (again, 3), (model, 4)):
        torch.manual_seed(seed)
        losses.append(each.train()(**batch)["losses"])
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    module = next(iter(updated(model).values()))
    dropped = (module.adapter.of_weight(module.weight.T)[:D] == 0).double().mean()  # of the query's matrix
    assert 0.4 < dropped < 0.6


def test_while_tokens_are_generated_an_update_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = shaken(build("genft", "gpt2", {"h": 4})), []
    forward = Generator.forward
    monkeypatch.setattr(Generator, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    first = model.generate(0, batch_of("gpt2")["image"], max_new_tokens=5, do_sample=False, pad_token_id=49)
    matrices = 2 * len(updated(model))
    assert len(calls) == matrices and len(first) == B
    shaken(model, seed=2)
    model.generate(0, batch_of("gpt2")["image"], max_new_tokens=5, do_sample=False, pad_token_id=49)
    assert len(calls) == 2 * matrices  # nothing of an earlier call is kept


# ----------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("method", "count"), [("genft", 149_044), ("genft_vision", 190_464)])
def test_the_parameters_of_a_base_model_are_as_published(method: str, count: int) -> None:
    with no_weights():
        model = adapted(method, RobertaModel(RobertaConfig(), add_pooling_layer=False))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_a_matrix_that_is_not_square_is_refused_by_name() -> None:
    """Grouped-query attention has narrower values."""
    sizes = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes))
    refusal = f"genft: the value matrix of model.layers.0.self_attn.v_proj in the text backbone is ({D // 2}, {D})"
    with pytest.raises(RoutevlError, match=re.escape(refusal)):
        adapted("genft", model)
