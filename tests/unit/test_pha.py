"""PHA: generated adapters, vectors of examples and losses against recorded numbers and formulas; places, sizes, gradients."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from cases import TEXT_MODELS, B, D, bart, batch_of, build, gpt2, shaken
from recorded import assert_agrees, needs_reference, put, recorded
from torch import Tensor, nn
from transformers import BartConfig, BartModel, T5Config, T5ForConditionalGeneration

from routevl.backbones.skeleton import no_weights
from routevl.backbones.structure import structure_of
from routevl.conditioning import Call
from routevl.errors import RoutevlError
from routevl.methods.hyperformer.layer import Generated, task_vectors
from routevl.methods.per_task.layer import OfTasks
from routevl.methods.pha.layer import Instances, instance_loss, new_code, new_head, ordinary_bottleneck, prototype_loss
from routevl.methods.table import new_method

CPU = torch.device("cpu")


def adapted(text_model: nn.Module, **options: Any) -> nn.Module:
    """A frozen text model with PHA's adapters, in evaluation mode."""
    return new_method("pha", {"r": 4} | options, "test").build(text_model.requires_grad_(False).eval(), {}, [])


def instances_of(model: nn.Module) -> Instances:
    return next(module for module in model.modules() if isinstance(module, Instances))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------- against the recorded numbers


def recorded_bart() -> tuple[BartModel, dict[str, Tensor], dict[str, Any]]:
    """A BART with the recorded prototypes, hypernetwork and network of examples."""
    tensors, meta = recorded("pha")
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             {"layers": meta["layers"], "attention_heads": 2, "ffn_dim": 24}.items()}  # fmt: skip
    config = BartConfig(vocab_size=50, d_model=meta["d"], max_position_embeddings=40, **sides)
    model = adapted(BartModel(config), r=meta["r"], tasks=meta["tasks"])
    first = model.decoder.layers[0].fc2.adapter.bottleneck.of_tasks[0]
    code, of = first.down.code, "hypernetwork.decoder"
    put(code.layers, tensors["hypernetwork.layer_embed.weight"])
    for place, name in ((0, "linear1"), (2, "linear2"), (3, "LayerNorm")):
        put(code.network[place].weight, tensors[f"{of}.{name}.weight"])
        put(code.network[place].bias, tensors[f"{of}.{name}.bias"])
    for head, end, widths in ((first.down.head, "down", (meta["d"], meta["r"])), (first.up.head, "up", (meta["r"], meta["d"]))):
        for name in ("weight", "bias"):  # theirs generates matrices (width, width_out), ours (width_out, width)
            of_entries = tensors[f"{of}.weight_{end}.{name}"]
            put(getattr(head.weight, name), of_entries.unflatten(0, widths).transpose(0, 1).flatten(0, 1))
            put(getattr(head.bias, name), tensors[f"{of}.bias_{end}.{name}"])
    instances = instances_of(model)
    for own, prototype in zip(instances.prototypes, tensors["prototypes"], strict=True):
        put(own, prototype)
    for place, number in ((0, 1), (2, 2)):
        put(instances.network[place].weight, tensors[f"instance_mlp.W{number}"])
        put(instances.network[place].bias, tensors[f"instance_mlp.b{number}"])
    return model, tensors, meta


@needs_reference
def test_it_generates_the_recorded_weights_and_gives_the_recorded_outputs() -> None:
    model, tensors, meta = recorded_bart()
    for number in range(meta["layers"]):
        bottlenecks = model.decoder.layers[number].fc2.adapter.bottleneck
        for row, task in enumerate(tensors["task"].tolist()):
            for end in ("down", "up"):
                made: Generated = getattr(bottlenecks.of_tasks[task], end)
                code = made.code(made.task, made.layer)
                weight = made.head.weight(code).view(*tensors[f"layer{number}.{end}_weight"].shape[:0:-1])
                assert_agrees(weight.T, tensors[f"layer{number}.{end}_weight"][row])
                assert_agrees(made.head.bias(code), tensors[f"layer{number}.{end}_bias"][row])
        call = Call(bottlenecks.conditioning.prepare({"task_id": tensors["task"]}))
        output = bottlenecks.conditioning.run_with(call, bottlenecks, tensors["x"])
        assert_agrees(output, tensors[f"layer{number}.adapter_output"])


@needs_reference
def test_the_vectors_of_examples_and_both_losses_are_the_recorded_ones() -> None:
    model, tensors, meta = recorded_bart()
    assert_agrees(instances_of(model)(tensors["encoder_states"], tensors["attention_mask"]), tensors["z"])
    weight, arguments = meta["loss_weight"], (tensors["task"], meta["tau"])
    losses = {
        "instance": weight * instance_loss(tensors["z"], *arguments),
        "prototype": weight * prototype_loss(tensors["z"], tensors["prototypes"], *arguments),
    }
    for name, loss in losses.items():
        assert_agrees(loss, tensors[f"loss.{name}_instance_weighted"])


@needs_reference
def test_it_starts_within_the_recorded_bounds() -> None:
    _, meta = recorded("pha")
    bounds, d, r = meta["official_initial_uniform_bounds"], meta["d"], meta["r"]
    for end, widths in (("down", (d, r)), ("up", (r, d))):
        head = new_head(*widths, CPU)
        for layer, name in ((head.weight, f"weight_{end}"), (head.bias, f"bias_{end}")):
            assert 0.9 * bounds[name] < layer.weight.abs().max() <= bounds[name] and not layer.bias.any()


# --------------------------------------------------------------------------------- against the formulas


def test_the_losses_equal_the_formulas() -> None:
    z, k, tasks, temperature = normal(6, 5).double(), normal(3, 5, seed=1).double(), [2, 0, 2, 1, 0, 2], 0.3
    unit = [row / numpy.linalg.norm(row) for row in z.numpy()]
    of_tasks = [row / numpy.linalg.norm(row) for row in k.numpy()]
    terms = []
    for i, task in enumerate(tasks):
        others = [j for j in range(6) if j != i]
        positive = [j for j in others if tasks[j] == task]
        e = {j: math.exp(unit[i] @ unit[j] / temperature) for j in others}
        if positive:  # the only example of task 1 has none
            terms.append(-sum(math.log(e[j] / sum(e.values())) for j in positive) / len(positive))
    assert len(terms) == 5
    assert instance_loss(z, torch.tensor(tasks), temperature).item() == pytest.approx(sum(terms) / 5, abs=1e-12)
    terms = []
    for i, task in enumerate(tasks):
        e = [math.exp(unit[i] @ prototype / temperature) for prototype in of_tasks]
        terms.append(-math.log(e[task] / (sum(e) - e[task])))
    assert prototype_loss(z, k, torch.tensor(tasks), temperature).item() == pytest.approx(sum(terms) / 6, abs=1e-12)


def test_the_losses_of_unusual_batches() -> None:
    k = torch.eye(3, 5)
    for tasks in ([0], [0, 1, 2]):  # no two of one task
        z = normal(len(tasks), 5).requires_grad_()
        loss = instance_loss(z, torch.tensor(tasks), 0.1)
        assert loss.item() == 0
        (loss + prototype_loss(z, k, torch.tensor(tasks), 0.1)).backward()
        assert z.grad.isfinite().all()
    z = normal(4, 5).requires_grad_()
    loss = instance_loss(z, torch.tensor([0, 1, 1, 2]), 0.1)
    loss.backward()
    assert loss > 0 and z.grad.isfinite().all()
    assert prototype_loss(k[:2], k, torch.tensor([0, 1]), 0.1) == pytest.approx(
        -10 + math.log(2)
    )  # the own one is not in the sum


def test_an_examples_vector_does_not_depend_on_its_padding() -> None:
    instances = Instances(task_vectors(2, CPU, 64), D, CPU)
    states, mask = normal(2, 5, D), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(instances(states, mask)[0], instances(states[:1, :3], None)[0])
    network = instances.network
    mean = states[1].mean(0)
    expected = network[2].weight @ (network[0].weight @ mean + network[0].bias).clamp(min=0) + network[2].bias
    torch.testing.assert_close(instances(states, mask)[1], expected)


def test_how_it_starts() -> None:
    torch.manual_seed(0)
    plain = ordinary_bottleneck(400, 100, CPU)
    for layer in (plain.down, plain.up):
        bound = 1e-4 * (6 / 500) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    code = new_code(task_vectors(3, CPU, 64), 50, CPU)
    assert code.layers.std().item() == pytest.approx(1, abs=0.05) and code.network[0].bias.any()
    adapter = adapted(bart(), tasks=1).model.decoder.layers[1].fc2.adapter
    h, x = normal(3, 5, D), normal(3, 5, D, seed=1)
    assert 0 < (adapter(h, x) - h).abs().max() < 0.01


# ------------------------------------------------------------------------------------- places and sizes


def test_an_encoder_has_ordinary_adapters_and_a_decoder_those_of_its_task_and_layer() -> None:
    model = adapted(bart(), tasks=3)
    of = {name.removesuffix(".adapter"): m for name, m in model.named_modules() if name.endswith(".adapter")}
    assert list(of) == [f"model.{side}.layers.{n}.fc2" for side in ("encoder", "decoder") for n in range(2)]
    assert not any(isinstance(module, Generated) for n in range(2) for module in of[f"model.encoder.layers.{n}.fc2"].modules())
    generated = [
        module for n in range(2) for module in of[f"model.decoder.layers.{n}.fc2"].modules() if isinstance(module, Generated)
    ]
    assert [(g.layer, g.task) for g in generated[::2]] == [(layer, task) for layer in range(2) for task in range(3)]
    assert len({id(g.code) for g in generated}) == 1 and len({id(g.head) for g in generated}) == 2
    assert generated[0].code.tasks is instances_of(model).prototypes
    assert all(not isinstance(module, OfTasks) for module in adapted(gpt2()).modules())


SUB_LAYERS = {
    "roberta": ("encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"),
    "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
    "bart": ("model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
}


@pytest.mark.parametrize("kind", SUB_LAYERS)
def test_an_adapter_reads_what_the_feed_forward_part_reads_and_adds_to_its_output(kind: str) -> None:
    first, last = SUB_LAYERS[kind]
    model = adapted(TEXT_MODELS[kind]())
    for parameter in model.parameters():
        parameter.data += normal(*parameter.shape) / 5 if parameter.requires_grad else 0
    read, given = [], []
    model.get_submodule(first).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    module = model.get_submodule(last)
    module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    module.register_forward_hook(lambda _, __, output: given.append(output))
    ids = torch.randint(4, 48, (3, 6))
    model(input_ids=ids, **({"decoder_input_ids": ids} if kind == "bart" else {}))
    x, inner = read
    pair = module.adapter.bottleneck
    change = pair.up(nn.functional.relu(pair.down(x)))
    assert change.abs().max() > 0.1
    torch.testing.assert_close(given[0], module.forward(inner) + change)


def test_a_model_in_which_nothing_begins_a_feed_forward_part_is_refused() -> None:
    model = gpt2()
    parts = replace(structure_of(model), feed_forward_inputs={})
    with pytest.raises(RoutevlError, match="transformer.h.0.mlp.c_proj: what its feed-forward part reads, .* is not found"):
        new_method("pha", {}, "test").adapt(model, parts)


def test_the_count_at_t5_base_is_the_originals() -> None:
    with no_weights():
        model = T5ForConditionalGeneration(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))
    model = adapted(model, r=64, tasks=8)
    of_encoder = sum(p.numel() for p in model.encoder.block.parameters() if p.requires_grad)
    assert of_encoder == 1_189_632
    of_examples = sum(p.numel() for p in instances_of(model).network.parameters())
    assert of_examples == 106_688
    everything = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert everything - of_encoder - of_examples - 8 * 64 - 12 * 64 == 6_468_736 and everything == 7_766_336


# ---------------------------------------------------------------------------------- losses in training


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses of a training step, the task's own first."""
    output = model(**batch)
    return {"loss": output["loss"], **model.method.losses(model, output, batch)}


def test_both_losses_reach_prototypes_and_encoder_and_the_tasks_own_the_layers() -> None:
    model = shaken(build("pha", "bart", {"r": 4, "tasks": 3})).train()
    losses = step(model, batch_of("bart"))
    assert list(losses) == ["loss", "instance", "prototype"]
    code = next(module for module in model.modules() if isinstance(module, Generated)).code
    prototypes, network = instances_of(model).prototypes, instances_of(model).network
    encoder = model.text_model.model.encoder.layers[0].fc2.adapter.bottleneck.down.weight

    def reached(loss: Tensor) -> list[bool]:
        tensors = [*prototypes, code.layers, network[0].weight, encoder]
        gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        return [gradient is not None and bool(gradient.any()) for gradient in gradients]

    assert reached(losses["loss"]) == [True, False, True, True, False, True]  # no example is of task 1
    assert reached(losses["instance"]) == [False] * 3 + [False, True, True]
    assert reached(losses["prototype"]) == [True] * 3 + [False, True, True]


def test_the_order_of_a_batch_does_not_matter() -> None:
    model = shaken(build("pha", "bart", {"r": 4, "tasks": 3})).double().train()
    batch = {name: t.double() if t.is_floating_point() else t for name, t in batch_of("bart").items()}
    order = torch.tensor([2, 0, 1])
    losses, others = step(model, batch), step(model, {name: tensor[order] for name, tensor in batch.items()})
    for name, loss in losses.items():
        torch.testing.assert_close(others[name], loss, rtol=1e-10, atol=1e-10)


def test_losses_are_of_the_last_step_of_their_own_model() -> None:
    model, other = (build("pha", "bart", {"r": 4, "tasks": 3}) for _ in range(2))
    batch = batch_of("bart")
    message = "PHA's losses are of a forward pass in training mode, and there was none"
    with pytest.raises(RoutevlError, match=message):
        step(model, batch)  # in evaluation mode
    step(model.train(), batch)
    with pytest.raises(RoutevlError, match=message):
        model.method.losses(model, {}, batch)
    other.train()(**batch)
    with pytest.raises(RoutevlError, match=message):
        model.method.losses(model, {}, batch)
    alone = build("pha", "bart", {"r": 4}).train()
    assert list(step(alone, batch)) == ["loss"]


def test_two_tasks_come_apart() -> None:
    """Examples gather around the prototype of their task, far from the other's."""
    model = build("pha", "bart", {"r": 4, "tasks": 2, "temperature": 0.5}).train()
    task_id = torch.tensor([0, 1, 0, 1, 1, 0])
    text = torch.where(task_id == 0, 7, 30)[:, None] + torch.arange(5)
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text), "image": normal(6, 1, D), "task_id": task_id}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def margins() -> Tensor:
        instances = instances_of(model)
        states = model.text_model.get_encoder()(input_ids=text).last_hidden_state
        cosines = nn.functional.cosine_similarity(instances(states, None)[:, None], torch.stack([*instances.prototypes]), dim=-1)
        return cosines[torch.arange(6), task_id] - cosines[torch.arange(6), 1 - task_id]

    with torch.no_grad():
        assert margins().min() < 0.2
    for _ in range(20):
        optimiser.zero_grad()
        sum(step(model, batch).values()).backward()
        optimiser.step()
    with torch.no_grad():
        assert margins().min() > 1


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_without_an_encoder_the_vectors_are_of_all_that_is_read(kind: str) -> None:
    model = adapted(TEXT_MODELS[kind](), tasks=2).train()
    ids, mask = torch.randint(4, 48, (B, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    method, batch = new_method("pha", {"r": 4, "tasks": 2}, "test"), {"task_id": torch.tensor([0, 1, 1])}
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **batch).hidden_states[-1]
    found = method.losses(SimpleNamespace(text_model=model), {}, batch)["instance"]
    vectors = instances_of(model)(states, mask)
    torch.testing.assert_close(found, 0.1 * instance_loss(vectors, batch["task_id"], 0.1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_has_losses_of_its_own(copied: Any) -> None:
    model = build("pha", "bart", {"r": 4, "tasks": 3}).train()
    step(model, batch_of("bart"))
    again = copied(model)
    losses, others = step(model, batch_of("bart")), step(again, batch_of("bart"))
    assert all(torch.equal(others[name], loss) for name, loss in losses.items())
    with torch.no_grad():
        instances_of(again).network[2].bias += 1
    assert torch.equal(step(model, batch_of("bart"))["prototype"], losses["prototype"])
    assert not torch.equal(step(again, batch_of("bart"))["prototype"], losses["prototype"])
