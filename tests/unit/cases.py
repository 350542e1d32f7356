"""The cases of the table of behaviours: every method on every kind of text model that it takes, at toy size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from routevl.backbones.skeleton import layers_in
from routevl.methods.adapeft.candidates import OUTSIDE, partition
from routevl.methods.adapeft.probe import SELECTED
from routevl.methods.base import layer_norms
from routevl.methods.spt.choice import ENTRIES, MODULES, parameters_of, ranked
from routevl.methods.table import METHODS, free_options, method_class, new_method
from routevl.tasks.base import VisionLanguageModel
from routevl.tasks.captioning import CaptionModel
from routevl.tasks.vqa import VqaModel
from routevl.training.optimisation import Optimisation

B, L, D, LAYERS, VOCABULARY, TASKS = 3, 6, 32, 2, 50, 3
SMALL = {"vera": {"r": 16}, "fourierft": {"n_frequency": 50}} | {
    m: {"num_virtual_tokens": 3} for m in ("prompt_tuning", "prefix_tuning", "vpt", "vfpt")
}
SMALL |= {
    name: {"r": 4} for name in ("lora", "adapter", "houlsby", "pfeiffer", "peft_lora", "lora_bias", "dora", "pha", "context_lora")
}
SMALL |= {"gradient_norm": {"share": 0.1, "batches": 2}, "lst": {"reduction": 4, "dropout": 0.0}}
SMALL |= {"genft": {"h": 4, "dropout": 0.0}, "genft_vision": {"h": 4, "m": 3}}
SMALL |= {"das": {"skipped": 1, "r": 4, "skip_width": 12}}
SMALL |= {name: {"r": 4, "dropout": 0.0, "drop_path": 0.0} for name in ("spt_lora", "spt_adapter")}
SMALL |= {"adapeft": {"r": 4, "batches": 4, "every": 2}}
SMALL |= {"vl_prompt": {"num_virtual_tokens": 3, "hidden_size": 16}}
# ablations of the routed methods that have modules of their own; the others are in test_ablations.py
BOTTLENECKS = [
    {"routing": "mul", "bottleneck": "split"},
    {"routing": "attn", "bottleneck": "after_up", "up_init": "random"},
    {"routing": "none", "bottleneck": "cross_attention"},
]


def roberta(dropout: float = 0.0) -> RobertaModel:
    sizes = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return RobertaModel(
        RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=40, **sizes, **drop), add_pooling_layer=False
    )


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    drop = {name: dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    sizes = {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 40}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=49, **sizes, **drop))


def bart(dropout: float = 0.0) -> BartForConditionalGeneration:
    stack = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             {"layers": LAYERS, "attention_heads": 4, "ffn_dim": 64}.items()}  # fmt: skip
    ends = {"bos_token_id": 0, "eos_token_id": 49, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    config = BartConfig(vocab_size=VOCABULARY, d_model=D, max_position_embeddings=40, dropout=dropout, **stack, **ends)
    return BartForConditionalGeneration(config)


TEXT_MODELS = {"roberta": roberta, "gpt2": gpt2, "bart": bart}


class EncoderDecoderModel(VisionLanguageModel):
    """An encoder-decoder that reads [visual prefix] text and learns to repeat the text; until there is a task of it."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor,
        routed_image: Tensor | None = None,
        task_id: Tensor | None = None,
    ) -> dict[str, Tensor]:
        inputs = self.text_inputs(input_ids, attention_mask, image, routed_image, task_id)
        logits = self.text_model(**inputs, decoder_input_ids=input_ids).logits
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none").sum(-1)
        return {"loss": losses.mean(), "count": losses.new_full((), len(losses)), "losses": losses}

    @torch.inference_mode()
    def generate(self, bos: int, image: Tensor, task_id: Tensor | None = None, **options: Any) -> Tensor:
        input_ids = torch.full((image.shape[0], 1), bos)
        inputs = self.text_inputs(input_ids, torch.ones_like(input_ids), image, task_id=task_id)
        return self.text_model.generate(**inputs, **options)


def small_options(method: str) -> list[dict[str, Any]]:
    """The options that a method is tried with: no routing, two routing functions and the other bottlenecks, where it routes."""
    small, options = SMALL.get(method, {}), free_options(method)
    chosen = [{"routing": routing} for routing in ("none", "mul", "attn")] if "routing" in options else [{}]
    return [small | own for own in (*chosen, *(BOTTLENECKS if "bottleneck" in options else ()))]


def with_tasks(method: str) -> list[dict[str, Any]]:
    """The options that a method is tried with for several tasks, where it can have something of each."""
    options = free_options(method)
    apart = {"tasks": TASKS} | ({"sharing": "multiple"} if "sharing" in options else {})
    return [small | apart for small in small_options(method)[:2]] if "tasks" in options else []  # one that routes, if any does


def trains_norms(method: str) -> bool:
    """Whether the layer norms of the text model can be trained beside a method."""
    return "freeze_layer_norm=no" not in method_class(method).refuses


VARIED = ("routing", "bottleneck", "tasks", "routed_tokens", "routed_positions")  # options by which cases of a method differ


def name_of(case: tuple[str, str, dict[str, Any]]) -> str:
    method, kind, options = case
    return "-".join([method, *(str(options[name]) for name in VARIED if name in options), kind])


CASES = [
    (method, kind, options)
    for method in METHODS
    for options in small_options(method)
    for kind in TEXT_MODELS
    if kind not in method_class(method).refuses
]
CASES += [(method, "bart", options) for method in METHODS for options in with_tasks(method)]  # the others' models know no tasks
REFUSED = [(method, kind) for method in METHODS for kind in TEXT_MODELS if kind in method_class(method).refuses]


def scores_of(text_model: nn.Module) -> dict[str, Tensor]:
    """What a phase before training could have found: the last parameters are the best."""
    return {name: torch.tensor(float(place)) for place, (name, _) in enumerate(text_model.named_parameters())}


def gates_of(text_model: nn.Module) -> dict[str, Tensor]:
    """What a search could have found: the first layers are the best to skip."""
    return {name: torch.tensor(-float(place)) for place, name in enumerate(layers_in(text_model))}


def chosen_by_spt(text_model: nn.Module) -> dict[str, Tensor]:
    """What SPT's phase before training could have found: modules for the matrices of the attentions, and single entries of the
    other ones and of norms' weights; all biases whole."""
    found = {}
    for name, (part, parameter) in parameters_of(ranked(text_model)).items():
        own = text_model.get_parameter(name)
        module = own.dim() > 1 and "att" in name.rpartition(".")[0].rpartition(".")[0]
        whole = parameter == "bias"
        found[ENTRIES + name] = torch.arange(0 if module else own.numel() if whole else 3)
        if own.dim() > 1:
            found[MODULES + name] = torch.tensor([module] * len(part.split(parameter, own)))
    return found


def prepared_for(method: str, text_model: nn.Module) -> dict[str, Tensor]:
    """What a method's phase before training could have found."""
    if method == "das":
        return gates_of(text_model)
    if method.startswith("spt_"):
        return chosen_by_spt(text_model)
    if method == "adapeft":  # all but what is in no layer
        return {SELECTED + name: torch.tensor(not name.endswith(OUTSIDE)) for name in partition(text_model)}
    return scores_of(text_model)


def build(
    method: str,
    kind: str,
    options: dict[str, Any],
    seed: int = 0,
    width: int = D,
    prefix: bool = True,
    dropout: float = 0.0,
    checkpointing: bool = False,
    norms: bool = True,
) -> VisionLanguageModel:
    """A model of a case, in evaluation mode; the image has visual tokens of `width`."""
    torch.manual_seed(seed)
    text_model = TEXT_MODELS[kind](dropout).eval().requires_grad_(False)
    if checkpointing:
        text_model.gradient_checkpointing_enable()
    visual = SimpleNamespace(width=width, encoder=nn.Identity())
    chosen = new_method(method, options, "test")
    train_also = layer_norms(text_model) if norms and trains_norms(method) else []
    arguments = (text_model, chosen, prepared_for(method, text_model), train_also, visual, prefix)
    if kind == "roberta":
        return VqaModel(7, *arguments).eval()
    return {"gpt2": CaptionModel, "bart": EncoderDecoderModel}[kind](*arguments).eval()


def shaken(model: VisionLanguageModel, seed: int = 1) -> VisionLanguageModel:
    """The same model with every trained tensor moved, so that what starts at zero does something."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.tensors().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def batch_of(kind: str, seed: int = 0, width: int = D, visual_tokens: int = 1) -> dict[str, Tensor]:
    """B texts without padding, with their images; for the classifier with the answers' scores, for a BART with their tasks."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(4, 48, (B, L), generator=generator),
        "attention_mask": torch.ones(B, L, dtype=torch.int64),
        "image": torch.randn(B, visual_tokens, width, generator=generator),
    }
    if kind == "roberta":
        batch["answer_scores"] = torch.rand(B, 7, generator=generator)
    if kind == "bart":
        batch["task_id"] = tasks_of()
    return batch


def tasks_of() -> Tensor:
    """The tasks of B examples, not in order and two of them alike, (B,)."""
    return torch.tensor([TASKS - 1, 0, TASKS - 1])


def rows(batch: dict[str, Tensor], *chosen: int) -> dict[str, Tensor]:
    """Some of a batch's examples."""
    return {name: tensor[list(chosen)] for name, tensor in batch.items()}


def one_step(model: VisionLanguageModel, batch: dict[str, Tensor]) -> None:
    """One optimiser step."""
    groups = model.method.groups(model, 0.01)
    optimisation = Optimisation(groups, 0.0, lambda optimiser: torch.optim.lr_scheduler.ConstantLR(optimiser, 1.0), None)
    model.train()
    model(**batch)["loss"].backward()
    optimisation.step()
    model.eval()
