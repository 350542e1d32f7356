"""Where the side network starts: rows and columns of the backbone's own matrices, chosen by structured pruning.

The matrices are walked in the order in which they are called. Of each the columns are kept whose numbers are the rows kept of the
one before, and of the rows the 1 / reduction whose importances over these columns have the largest sum. Query, key and value
together keep the rows where the product of their importances has it, and so do the first matrices of a gated feed-forward part. A
layer norm keeps what the matrix before it keeps. The first columns are those of the token embeddings with the largest importance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from routevl.backbones.matrices import joined, matrices_of, turned
from routevl.backbones.skeleton import LINEAR, layers_of, ready_to_run, stacks_of, widths_of
from routevl.backbones.structure import Fused, structure_of
from routevl.errors import RoutevlError

# -------------------------------------------------------------------------------------------- the walk


@dataclass
class Step:
    """Modules that are cut together: linear ones that read the same hidden states, or a single one of another kind.

    Attributes:
        stack: the name of theirs in the text model.
        names: their names in the stack.
        modules: the backbone's.
        fused: how each holds several matrices; None where it is one.
    """

    stack: str
    names: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    fused: list[Fused | None] = field(default_factory=list)

    @property
    def linear(self) -> bool:
        """Whether its modules are matrices."""
        return isinstance(self.modules[0], LINEAR)


def steps_of(text_model: PreTrainedModel) -> list[Step]:
    """What is cut, in order. Raises RoutevlError as `structure_of`."""
    structure = structure_of(text_model)
    ends = {*structure.attention_outputs, *structure.cross_attention_outputs, *structure.feed_forward_outputs}
    steps: list[Step] = []
    for number, (stack_name, stack) in enumerate(stacks_of(text_model).items()):
        goes_on = False  # whether the next linear module reads what the last one did
        for name, module in _called(stack, crosses=number > 0).items():
            full = f"{stack_name}.{name}".lstrip(".")
            linear = isinstance(module, LINEAR)
            if not (linear and goes_on) or full in ends:
                steps.append(Step(stack_name))
            steps[-1].names.append(name)
            steps[-1].modules.append(module)
            steps[-1].fused.append(structure.fused.get(full))
            goes_on = linear and full not in ends
    return steps


@torch.no_grad()
def _called(stack: PreTrainedModel, crosses: bool) -> dict[str, nn.Module]:
    """The modules with parameters that a stack calls in its layers, and its last norm, by name and in this order."""
    layers, called = layers_of(stack), {}
    inside = {*layers.modules()}
    names = {
        module: name
        for name, module in stack.named_modules()
        if [*module.parameters(recurse=False)] and (module in inside or type(module).__name__.endswith("Norm"))
    }

    def note(module: nn.Module, *_: Any) -> None:
        called.setdefault(names[module], module)

    hooks = [module.register_forward_hook(note) for module in names]
    hooks.append(layers[0].register_forward_pre_hook(lambda *_: called.clear()))  # what came before is no part of the layers
    device = next((p.device for p in stack.parameters() if not p.is_meta), torch.device("cpu"))
    hidden_states = torch.zeros(1, 1, stack.config.hidden_size, device=device)
    try:
        with ready_to_run(stack):
            stack(inputs_embeds=hidden_states, **({"encoder_hidden_states": hidden_states} if crosses else {}))
    finally:
        for hook in hooks:
            hook.remove()
    return called


def choose(
    text_model: PreTrainedModel, reduction: int, first: Tensor, score: Callable[[Step, Tensor], Tensor]
) -> list[tuple[Step, Tensor, Tensor]]:
    """Each step with its columns and its rows, places that are sorted.

    Args:
        first: the scores of the first columns.
        score: a step of matrices and its columns -> the score of each of its rows.

    Raises:
        RoutevlError: as `structure_of`; a module that does not read what the matrix before it gives, such as a norm of heads.
    """
    chosen, columns, width = [], _largest(first, reduction), len(first)
    for step in steps_of(text_model):
        for name, module in zip(step.names, step.modules, strict=True):
            read = widths_of(module)[0] if step.linear else len(next(module.parameters()))
            if read != width and (step.linear or type(module).__name__.endswith("Norm")):
                raise RoutevlError(f"lst: the text backbone's {name} has width {read}, not {width}: take another text backbone")
        rows = columns
        if step.linear:
            scores = score(step, columns)
            rows, width = _largest(scores, reduction), len(scores)
        chosen.append((step, columns, rows))
        columns = rows
    return chosen


def _largest(scores: Tensor, reduction: int) -> Tensor:
    """The places of the 1 / reduction largest scores, sorted; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[: len(scores) // reduction].sort().values


# --------------------------------------------------------------------------------------- scores, and the cut


def row_scores(text_model: PreTrainedModel, importance: Mapping[str, Tensor], reduction: int) -> dict[str, Tensor]:
    """How good the rows are that the side network could start from.

    Args:
        importance: name of each parameter of the text model -> the importance of its entries.

    Returns:
        The name of each step's first weight -> the score of each row of its matrices, and the name of the token embeddings ->
        that of each column: float64.

    Raises:
        RoutevlError: as `choose`; matrices of one step that have not equally many rows, as in grouped-query attention.
    """
    names = {parameter: name for name, parameter in text_model.named_parameters()}
    first = names[text_model.get_input_embeddings().weight]
    scores = {first: importance[first].double().sum(0)}

    def score(step: Step, columns: Tensor) -> Tensor:
        weights = (turned(module, importance[names[module.weight]]) for module in step.modules)
        matrices = [matrix for pair in zip(weights, step.fused, strict=True) for matrix in matrices_of(*pair)]
        if len({matrix.shape for matrix in matrices}) > 1:
            raise RoutevlError(f"lst: {', '.join(step.names)} of the text backbone have not equally many rows")
        total = torch.stack(matrices).double().prod(0)[:, columns].sum(1)  # products of squares are too small for float32
        return scores.setdefault(names[step.modules[0].weight], total)

    choose(text_model, reduction, scores[first], score)
    return scores


def cut(text_model: PreTrainedModel, sides: Mapping[str, PreTrainedModel], scores: Mapping[str, Tensor], reduction: int) -> None:
    """Set the layers and last norms of the side network's stacks to the backbone's rows and columns with the largest scores, and
    let them be trained.

    Args:
        scores: of `row_scores`; a scalar stands for equal scores.

    Raises:
        RoutevlError: as `choose`; a module whose widths are not those of the model's configuration; scores of another model.
        KeyError: scores of another model.
    """
    names = {parameter: name for name, parameter in text_model.named_parameters()}

    def found(name: str, rows: int) -> Tensor:
        own = scores[name]
        if own.dim() and len(own) != rows:
            raise RoutevlError(f"--prepared was found for another text model: {name} has {rows} rows, not {len(own)}")
        return own.expand(rows)

    def score(step: Step, columns: Tensor) -> Tensor:
        weight = step.modules[0].weight
        rows = len(matrices_of(turned(step.modules[0], weight), step.fused[0])[0])
        return found(names[weight], rows)

    embeddings = text_model.get_input_embeddings().weight
    for step, columns, rows in choose(text_model, reduction, found(names[embeddings], embeddings.shape[1]), score):
        for name, module, fused in zip(step.names, step.modules, step.fused, strict=True):
            side = sides[step.stack].get_submodule(name).requires_grad_(True)
            try:
                side.load_state_dict(_part_of(module, fused, rows, columns))
            except RuntimeError as error:
                raise RoutevlError(
                    f"lst: the text backbone's {name} ({type(module).__name__}) does not follow the widths of its configuration: "
                    "take another text backbone"
                ) from error


def _part_of(module: nn.Module, fused: Fused | None, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """The parameters that a module's twin in the side network starts from, by their names in it."""
    if not isinstance(module, LINEAR):  # a norm; or a table such as T5's of relative positions, a column for each head
        return {name: parameter[columns] if parameter.dim() == 1 else parameter for name, parameter in module.named_parameters()}
    matrices = matrices_of(turned(module, module.weight), fused)
    part = {"weight": turned(module, joined([matrix[rows][:, columns] for matrix in matrices], fused))}
    if module.bias is not None:
        part["bias"] = joined([bias[rows] for bias in matrices_of(module.bias, fused)], fused)
    return part
