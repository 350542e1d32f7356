"""SPT: the probe, the choice and the layers against recorded numbers and definitions; thirds of fused modules; budgets."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy
import pytest
import torch
from cases import TEXT_MODELS, D, batch_of, build, chosen_by_spt
from recorded import assert_agrees, needs_reference, put, recorded
from torch import Tensor, nn

from routevl.errors import RoutevlError
from routevl.methods.gradients import squared_gradients
from routevl.methods.spt.choice import ENTRIES, MODULES, STEPS, choice_of, choose, cost_of, ranked
from routevl.methods.spt.layer import Entries, bottleneck, low_rank
from routevl.methods.table import new_method

KINDS = ("lora", "adapter")


def options_of(kind: str, **options: float) -> SimpleNamespace:
    return new_method(f"spt_{kind}", {"dropout": 0.0, "drop_path": 0.0} | options, "test").options


# ---------------------------------------------------------------------------------- against recorded numbers


class Block(nn.Module):
    """Pre-norm, one head, GELU: that of the recorded probe."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q", "k", "v", "proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.attn[name](self.norm1(x)) for name in "qkv")
        x = x + self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Classifier(nn.Module):
    """Blocks behind a class token, which the head reads."""

    def __init__(self, width: int, inner: int, classes: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    @property
    def text_model(self) -> nn.Module:
        return self

    def forward(self, x: Tensor, label: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return {"loss": nn.functional.cross_entropy(self.head(self.norm(x)[:, 0]), label)}


@needs_reference
def test_recorded_sensitivities() -> None:
    tensors, meta = recorded("spt")
    weights = {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}
    model = Classifier(meta["d"], len(weights["blocks.0.mlp.fc1.bias"]), len(weights["head.bias"]))
    model.load_state_dict(weights)
    batches = [{n: tensors[f"batch{b}.{n}"] for n in ("x", "label")} for b in range(meta["sensitivity_batches"])]
    for name, squares in squared_gradients(model, batches).items():
        if name.endswith("k.bias"):  # a softmax does not depend on it: rounding alone
            assert max(squares.max(), tensors[f"sensitivity.{name}"].max()) < 1e-12
        else:
            assert_agrees(squares, tensors[f"sensitivity.{name}"])


@needs_reference
@pytest.mark.parametrize("budget", ["1.0", "0.8", "0.6", "0.4", "0.2", "0.1", "0.05"])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_choice(kind: str, budget: str) -> None:
    """Recorded with budgets and steps in thousands, and with a class token that counts and is not ranked."""
    tensors, meta = recorded("spt")
    case, order, beside = f"{kind}.budget{budget}", meta["parameter_order"], meta["d"]
    squares = {name: tensors[f"sensitivity.{name}"] for name in order}
    wanted = float(budget) * 1000 - beside
    choice = choose(squares, cost_of(kind, meta["r"]), wanted, 20, meta["alpha"], meta["beta"])
    assert choice.taken == tensors[f"{case}.tau"]
    assert choice.total + beside == pytest.approx(1000 * tensors[f"{case}.total_params_in_thousands"].item())
    columns = ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    matrices = tensors[f"{case}.tuned_matrices"]
    assert choice.modules == {f"blocks.{i}.{columns[j]}.weight" for i, j in matrices.nonzero().tolist()}
    facts = meta["cases"][case]
    whole = {n for n in order if squares[n].dim() == 1 and len(choice.entries[n]) == len(squares[n])}
    assert whole == set(facts["tuned_vectors"])
    found, before = [], 0
    for name in facts["unstructured_tensors"]:  # recorded numbered through all of these
        found.append(before + choice.entries[name])
        before += squares[name].numel()
    assert torch.equal(torch.cat(found), tensors[f"{case}.unstructured_flat_index"])


def entries_of(parameter: Tensor, places: Tensor) -> Entries:
    """`places` (dimensions, c), as recorded: indices, one row for each dimension."""
    flat = numpy.ravel_multi_index(places.numpy(), parameter.shape)
    return Entries(torch.from_numpy(flat), parameter)


@needs_reference
def test_recorded_sparse_layer() -> None:
    tensors, _ = recorded("spt")
    of = {n.removeprefix("sparse_linear."): t for n, t in tensors.items() if n.startswith("sparse_linear.")}
    found = {}
    for name, parameter in (("weight", of["W"]), ("bias", of["b"])):
        found[name] = entries_of(parameter, of[f"{name}_index"])
        put(found[name].values, of[f"{name}_values"])
    y = nn.functional.linear(of["x"], found["weight"](of["W"]), found["bias"](of["b"]))
    assert_agrees(y, of["y"])


@needs_reference
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_modules(kind: str) -> None:
    tensors, _ = recorded("spt")
    of = {n.removeprefix(f"structured_{kind}."): t for n, t in tensors.items() if n.startswith(f"structured_{kind}.")}
    width, width_out, r = of["x"].shape[-1], of["y"].shape[-1], len(of["p0"])
    module = low_rank(width, width_out, r) if kind == "lora" else bottleneck(width, r)
    for number, parameter in enumerate(module.parameters()):
        put(parameter, of[f"p{number}"])
    assert_agrees(module(of["x"]), of["y"])


# ------------------------------------------------------------------------------------------- by definition


def test_the_choice_by_its_definition() -> None:
    """Against numpy, with equal squares and budgets between which several numbers of weights are equally near."""
    random = numpy.random.default_rng(0)
    shapes = {"m": (6, 9), "v": (7,), "n": (20, 4), "w": (12,)}
    squares = {name: random.integers(0, 40, shape).astype(numpy.float32) for name, shape in shapes.items()}
    r, alpha, beta, step = 1, 2.0, 3.0, 2
    flat = numpy.concatenate([tensor.ravel() for tensor in squares.values()])
    owner = numpy.repeat(list(shapes), [tensor.size for tensor in squares.values()])
    order = numpy.argsort(-flat, kind="stable")
    cost = {"m": r * (6 + 9), "n": r * (20 + 4), "v": 7, "w": 12}

    def total(taken: int) -> tuple[int, set[str]]:
        counts = {name: int((owner[order[:taken]] == name).sum()) for name in shapes}
        whole = {n for n, c in counts.items() if c >= cost[n] / (alpha if len(shapes[n]) > 1 else beta)}
        return sum(cost[name] if name in whole else c for name, c in counts.items()), whole

    seen = set()
    for budget in range(5, 130, 4):
        tried = [min(step * n, len(flat)) for n in range(1, STEPS + 1)]
        taken = max(tried, key=lambda taken: (-abs(total(taken)[0] - budget), taken))
        found = choose({n: torch.from_numpy(t) for n, t in squares.items()}, cost_of("lora", r), budget, step, alpha, beta)
        assert (found.taken, found.total) == (taken, total(taken)[0])
        whole = total(taken)[1]
        assert found.modules == whole & {"m", "n"}
        for name, tensor in squares.items():
            start = list(owner).index(name)
            own = sorted(place - start for place in order[:taken] if owner[place] == name)
            own = [] if name in found.modules else list(range(tensor.size)) if name in whole else own
            assert found.entries[name].tolist() == own
        seen.add((taken, frozenset(whole)))
    assert len(seen) > 8


@pytest.mark.parametrize("shape", [(4, 6), (5,)])
def test_values_get_the_dense_gradient_at_their_places(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    (dense,) = torch.autograd.grad((parameter.sin() * weights).sum(), parameter)
    entries = Entries(torch.tensor([1, 4]), parameter.detach())
    changed = entries(parameter.detach())
    assert torch.equal(changed, parameter)
    (changed.sin() * weights).sum().backward()
    assert torch.equal(entries.values.grad, dense.flatten()[[1, 4]])


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_the_probe_squares_the_gradient_of_each_batch_and_moves_nothing(kind: str) -> None:
    method = new_method("spt_lora", {"batches": 2, "share": 0.05}, "test")
    batches = [batch_of(kind, seed) for seed in range(3)]
    model = build("full", kind, {})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = method.prepare(SimpleNamespace(model=model), iter(batches))
    assert model.training and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    parameters = dict(model.text_model.named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for batch in batches[:2]:
        gradients = torch.autograd.grad(model(**batch)["loss"], list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            squares[name] += 0 if gradient is None else gradient**2
    budget = 0.05 * sum(parameter.numel() for parameter in parameters.values())
    expected = choice_of(ranked(model.text_model), squares, budget, method.options)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert not any("embeddings.weight" in name or "wte" in name or "head" in name for name in found)
    method.options = options_of("lora", share=0.05)  # without dropout
    text_model = TEXT_MODELS[kind]().requires_grad_(False)
    built = method.build(text_model, found, [])
    count = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert 0.5 * budget < count < 1.5 * budget  # one module more is much in a model of this size


# ---------------------------------------------------------------------------------------------- in the model


@pytest.mark.parametrize("kind", KINDS)
def test_the_thirds_of_a_fused_module_are_three_matrices(kind: str) -> None:
    """GPT-2's queries, keys and values: ranked apart, and what is chosen of the values changes no query and no key."""
    text_model = TEXT_MODELS["gpt2"]().eval().requires_grad_(False)
    name = "transformer.h.0.attn.c_attn"
    squares = {n: torch.zeros_like(p) for n, p in text_model.named_parameters()}
    squares[f"{name}.weight"][:, 2 * D :] = 1.0  # (d, 3 d)
    squares[f"{name}.bias"][D : 2 * D] = 2.0
    squares[f"{name}.weight"][3, 5] = 3.0
    options = options_of(kind, r=4)
    budget = cost_of(kind, 4)(D, D) + D + 1
    prepared = choice_of(ranked(text_model), squares, budget, options)
    assert prepared[f"{MODULES}{name}.weight"].tolist() == [False, False, True]
    assert prepared[f"{ENTRIES}{name}.weight"].tolist() == [3 * 3 * D + 5]
    assert prepared[f"{ENTRIES}{name}.bias"].tolist() == list(range(D, 2 * D))
    module, bare = text_model.get_submodule(name), copy.deepcopy(text_model.get_submodule(name))
    new_method(f"spt_{kind}", {"r": 4}, "test").build(text_model, prepared, []).eval()
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), bare(x))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    changes = (module(x) - bare(x)).split(D, -1)
    query = torch.zeros(2, 3, D)
    query[..., 5] = x[..., 3] * module.parametrizations["weight"][0].values.item()
    torch.testing.assert_close(changes[0], query)
    torch.testing.assert_close(changes[1], module.parametrizations["bias"][0].values.expand(2, 3, -1))
    update = module.adapter.updates["2"]
    torch.testing.assert_close(changes[2], update(x if kind == "lora" else bare(x)[..., 2 * D :]))


def test_a_copy_goes_its_own_way() -> None:
    text_model = TEXT_MODELS["roberta"]().requires_grad_(False)
    new_method("spt_lora", {"r": 4}, "test").build(text_model, chosen_by_spt(text_model), [])
    copied, ids = copy.deepcopy(text_model.eval()), torch.arange(4, 10)[None]
    before = text_model(ids)[0]
    with torch.no_grad():
        for parameter in text_model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(copied(ids)[0], before) and not torch.equal(text_model(ids)[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_paths_are_of_whole_examples_and_in_training_alone(kind: str) -> None:
    module = low_rank(D, D, 4, drop_path=0.5) if kind == "lora" else bottleneck(D, 4, drop_path=0.5)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(40, 3, D)
    expected = module.eval()(x)
    found = module.train()(x)
    dropped = (found == 0).flatten(1).all(1)
    assert 5 < dropped.sum() < 35
    torch.testing.assert_close(found[~dropped], 2 * expected[~dropped])


def test_a_choice_of_another_model_is_refused() -> None:
    text_model = TEXT_MODELS["roberta"]().requires_grad_(False)
    prepared, method = chosen_by_spt(text_model), new_method("spt_lora", {}, "test")
    name = "encoder.layer.1.output.dense.weight"
    with pytest.raises(KeyError, match=name):
        method.build(copy.deepcopy(text_model), {n: t for n, t in prepared.items() if n != ENTRIES + name}, [])
    with pytest.raises(RoutevlError, match=f"--prepared was found for another text model: {name} has only {64 * D} entries"):
        method.build(copy.deepcopy(text_model), prepared | {ENTRIES + name: torch.tensor([64 * D])}, [])
    with pytest.raises(RoutevlError, match="ranked with all other weights .*; set freeze_layer_norm"):
        method.build(text_model, prepared, ["embeddings.LayerNorm"])


def test_gradients_that_are_not_finite_are_an_error() -> None:
    text_model = TEXT_MODELS["roberta"]()
    squares = {name: torch.zeros_like(p) for name, p in text_model.named_parameters()}
    squares["encoder.layer.0.output.dense.bias"][3] = torch.nan
    with pytest.raises(
        RoutevlError, match=r"spt: the gradients of encoder.layer.0.output.dense.bias are not finite: set precision"
    ):
        choice_of(ranked(text_model), squares, 100, options_of("lora"))
