"""What routed methods share: their config fields, the visual features of the running forward pass, the tuner, the layer.

The visual features travel beside the call. The tuner takes `visual_features` (and `visual_mask`) out of the arguments of
`model(...)` and `model.generate(...)`, scales and projects them once, and every routed layer reads them from one shared
`VisualFeatures` object. They are forgotten when the call returns: no layer can see the features of an earlier batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from routevl.errors import RoutevlError
from routevl.routing import routing_function

if TYPE_CHECKING:
    from routevl.routing import RoutingFunction

# name -> parameter-free scaling of the visual features x_R, (B, L_v, d) -> the same
VISUAL_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda features: features,
    "tanh": torch.tanh,
    "layer_norm": lambda features: nn.functional.layer_norm(features, features.shape[-1:]),
}


@dataclass
class RoutedConfig(PeftConfig):
    """The fields that every routed method has. Unknown fields are a TypeError, wrong values a RoutevlError (a ValueError)."""

    r: int = field(default=8, metadata={"help": "Rank of the bottleneck."})
    routing: str = field(default="none", metadata={"help": "Routing function: none, mul, add, attn or expand."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or one regular expression) of the modules to adapt; None: the method's own for the model type."
        },
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules never to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Adapt only these layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list, if unusual."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the adapter, such as layer norms."}
    )
    visual_width: int | None = field(
        default=None,
        metadata={
            "help": "Width of the visual features where it differs from the adapted modules': one trainable projection is then "
            "learned. None: the widths are equal and there is no projection."
        },
    )
    visual_scale: str = field(
        default="none",
        metadata={"help": "Parameter-free scaling of the visual features before anything else: none, tanh or layer_norm."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or self.r <= 0:
            raise RoutevlError(f"rank r must be a positive integer, not {self.r!r}")
        if self.visual_width is not None and self.visual_width <= 0:
            raise RoutevlError(f"visual_width must be a positive integer or None, not {self.visual_width!r}")
        if self.visual_scale not in VISUAL_SCALES:
            raise RoutevlError(f"visual_scale {self.visual_scale!r} is none of {', '.join(VISUAL_SCALES)}")
        routing_function(self.routing)


class VisualFeatures:
    """The visual features of the forward pass that is running, shared by all routed layers of one model.

    Attributes:
        by_adapter: adapter name -> x_R (B, L_v, d), scaled and projected; None outside a forward pass or when none were given.
        mask: (B, L_v) bool, True where a visual token is real, or None.
    """

    def __init__(self, model: nn.Module, prepare: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self.model = model
        self.prepare = prepare  # features as given -> x_R of each active adapter
        self.by_adapter: dict[str, Tensor] | None = None
        self.mask: Tensor | None = None
        self.generating = False
        self._checkpointable: list[nn.Module] | None = None  # transformers' layers that can recompute their activations
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]
        if hasattr(model, "generate"):
            # peft calls the base model's own `generate`, which refuses arguments that it does not know
            model.generate = self._generate

    def detach(self) -> None:
        """Take the hooks off the model again, which is then as it was."""
        for handle in self._handles:
            handle.remove()
        self.model.__dict__.pop("generate", None)

    def of(self, adapter: str, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """x_R (batch_size, L_v, d) and its mask for one adapter, repeated for beams while generating.

        Raises:
            RoutevlError: the forward pass was given no visual features, or features of another batch size.
        """
        if self.by_adapter is None:
            raise RoutevlError(
                "this model routes visual features but the call has none: pass visual_features of shape (batch, L_v, d)"
            )
        features, mask = self.by_adapter[adapter], self.mask
        if features.shape[0] == batch_size:
            return features, mask
        beams, remainder = divmod(batch_size, features.shape[0])
        if not self.generating or remainder or beams == 0:
            raise RoutevlError(
                f"visual_features has batch size {features.shape[0]} but the text has {batch_size}: they must be equal"
            )
        return features.repeat_interleave(beams, 0), None if mask is None else mask.repeat_interleave(beams, 0)

    @contextmanager
    def given(self, features: Tensor | None, mask: Tensor | None, generating: bool = False) -> Iterator[None]:
        """Run the body with these visual features, then bring back what was there before."""
        before = self.by_adapter, self.mask, self.generating
        self._set(features, mask)
        self.generating = generating
        try:
            yield
        finally:
            self.by_adapter, self.mask, self.generating = before

    def _set(self, features: Tensor | None, mask: Tensor | None) -> None:
        if features is None:
            self.by_adapter, self.mask = None, None
            return
        if features.dim() != 3:
            raise RoutevlError(f"visual_features must have the shape (batch, L_v, d), not {tuple(features.shape)}")
        if mask is not None and mask.shape != features.shape[:2]:
            raise RoutevlError(f"visual_mask must have the shape {tuple(features.shape[:2])}, not {tuple(mask.shape)}")
        self.by_adapter = self.prepare(features)
        self.mask = mask

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        features, mask = kwargs.pop("visual_features", None), kwargs.pop("visual_mask", None)
        if not self.generating:
            self._set(features, mask)
        if module.training and features is not None:
            self._keep_features_when_checkpointing()
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.generating:
            self._set(None, None)

    def _generate(
        self, *args: Any, visual_features: Tensor | None = None, visual_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        with self.given(visual_features, visual_mask, generating=True):
            return type(self.model).generate(self.model, *args, **kwargs)

    def _keep_features_when_checkpointing(self) -> None:
        """Gradient checkpointing runs a layer again during the backward pass, when the features are long forgotten:
        let each checkpointed call remember its own."""
        if self._checkpointable is None:
            self._checkpointable = [module for module in self.model.modules() if hasattr(module, "gradient_checkpointing")]
        for module in self._checkpointable:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, _CheckpointWithFeatures):
                module._gradient_checkpointing_func = _CheckpointWithFeatures(checkpoint, self)

    def _run_with(self, by_adapter: dict[str, Tensor] | None, mask: Tensor | None, function: Callable, *args: Any) -> Any:
        before = self.by_adapter, self.mask
        self.by_adapter, self.mask = by_adapter, mask
        try:
            return function(*args)
        finally:
            self.by_adapter, self.mask = before


class _CheckpointWithFeatures:
    """transformers' gradient checkpointing function, with the visual features of the forward pass bound to the recomputation."""

    def __init__(self, checkpoint: Callable, visual: VisualFeatures) -> None:
        self.checkpoint = checkpoint
        self.visual = visual

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        visual = self.visual
        return self.checkpoint(partial(visual._run_with, visual.by_adapter, visual.mask, function), *args, **kwargs)


class RoutedLayer(nn.Module, BaseTunerLayer):
    """A frozen module with routed bottlenecks, one per adapter. Subclasses add the projections and the forward pass."""

    def __init__(self, base_layer: nn.Module, visual: VisualFeatures) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.visual = visual
        self.route: dict[str, RoutingFunction | None] = {}
        self.merged_adapters = []

    def routed(self, adapter: str, down: nn.Module, hidden_states: Tensor, parts: int = 1) -> Tensor:
        """route(x_H W_down, x_R W_down): (B, ..., d) -> (B, ..., parts * r), each of the `parts` bottlenecks on its own."""
        x_t = down(hidden_states)
        route = self.route[adapter]
        if route is None:
            return x_t
        features, mask = self.visual.of(adapter, hidden_states.shape[0])
        x_v = down(features.to(hidden_states.dtype))
        shape = x_t.shape
        x_t = x_t.reshape(shape[0], -1, shape[-1])  # (B, L_t, parts * r)
        if parts == 1:
            return route(x_t, x_v, mask).view(shape)
        pieces = zip(x_t.chunk(parts, -1), x_v.chunk(parts, -1), strict=True)
        return torch.cat([route(text, image, mask) for text, image in pieces], dim=-1).view(shape)

    def adapters_in_use(self) -> list[str]:
        """The names of the active adapters that this module has; none while adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.route]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """A routed adapter depends on the image, so it has no fixed weight to merge.

        Raises:
            RoutevlError: always.
        """
        raise RoutevlError("a routed adapter depends on the image and cannot be merged into the weights: use unload()")


class RoutedTuner(BaseTuner):
    """peft's tuner for routed methods. Subclasses name their layer and how to wrap a module in it."""

    uses_shared_state = True

    def _pre_injection_hook(self, model: nn.Module, config: RoutedConfig, adapter_name: str) -> None:
        self.visual = VisualFeatures(model, self._prepare)
        self.visual_projection = nn.ModuleDict()  # adapter name -> Linear(visual_width, d), only where the widths differ
        self.routed_width: dict[str, int] = {}  # name of an adapter that routes -> d, the width that all its modules work on

    def _prepare_adapter_config(self, peft_config: RoutedConfig, model_config: dict) -> RoutedConfig:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if isinstance(peft_config.target_modules, set):  # written to adapter_config.json, which must not vary from run to run
            peft_config.target_modules = sorted(peft_config.target_modules)
        return peft_config

    def _new_layer(self, target: nn.Module, name: str) -> RoutedLayer:
        """Wrap `target` in this method's layer. Raises RoutevlError for a module type that the method cannot adapt."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: RoutedConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, RoutedLayer) else self._new_layer(target, current_key)
        layer.update_layer(adapter_name, peft_config, current_key)
        if peft_config.routing != "none":
            self._route_at_width(peft_config, adapter_name, layer.width, current_key)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _route_at_width(self, config: RoutedConfig, adapter: str, width: int, name: str) -> None:
        """Check that all modules share one width, to which the visual features are projected where need be."""
        if self.routed_width.setdefault(adapter, width) != width:
            raise RoutevlError(
                f"target module {name} works on width {width} but others on {self.routed_width[adapter]}: "
                "routing needs one width, that of the visual features"
            )
        if config.visual_width not in (None, width) and adapter not in self.visual_projection:
            projection = nn.Linear(config.visual_width, width, bias=False)
            self.visual_projection[adapter] = projection.requires_grad_(not config.inference_mode)

    def _prepare(self, features: Tensor) -> dict[str, Tensor]:
        return {name: self._prepare_for(name, features) for name in self.active_adapters if name in self.routed_width}

    def _prepare_for(self, adapter: str, features: Tensor) -> Tensor:
        """x_R for one adapter: width checked, scaled, projected: (B, L_v, visual width) -> (B, L_v, d)."""
        config = self.peft_config[adapter]
        expected = config.visual_width or self.routed_width[adapter]
        if features.shape[-1] != expected:
            raise RoutevlError(
                f"visual_features has width {features.shape[-1]} but adapter {adapter!r} expects {expected}: "
                "set visual_width in its config to the features' width"
            )
        features = VISUAL_SCALES[config.visual_scale](features)
        if adapter in self.visual_projection:
            projection = self.visual_projection[adapter].to(features.device)
            features = projection(features.to(projection.weight.dtype))
        return features

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """peft's own, with the adapters' visual projections made trainable or frozen along with them."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, projection in self.visual_projection.items():
            projection.requires_grad_(name in self.active_adapters and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """peft's own, with what routing keeps for the adapter removed too."""
        super().delete_adapter(adapter_name)
        for kept in (self.visual_projection, self.routed_width):
            if adapter_name in kept:
                del kept[adapter_name]

    def _check_merge_allowed(self) -> None:
        raise RoutevlError("a routed adapter depends on the image and cannot be merged into the weights: use unload()")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self.visual.detach()
        return model
