"""The tuner that routed methods share, and how they become known to peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from routevl.backbones.co_attention import has_image_stream
from routevl.backbones.skeleton import LINEAR
from routevl.backbones.structure import Structure, structure_of, targets
from routevl.conditioning import PER_EXAMPLE, PER_POSITION, Conditioning, refuse_a_second
from routevl.errors import RoutevlError
from routevl.methods.per_task.layer import tasks_of
from routevl.methods.routed import routes
from routevl.methods.routed.config import RoutedConfig
from routevl.methods.routed.layer import CANNOT_MERGE, RoutedLayer
from routevl.methods.vl_pet import encoder_of

# name -> parameter-free scaling of the visual features x_R, (B, L_v, d) -> the same
VISUAL_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda features: features,
    "tanh": torch.tanh,
    "layer_norm": lambda features: nn.functional.layer_norm(features, features.shape[-1:]),
}
OF_LORA = ("add_weighted_adapter", "subtract_mutated_init")  # methods of peft's LoraModel, which would be looked for in the model
STREAMS = {
    "visual_features": PER_EXAMPLE,
    "visual_mask": PER_EXAMPLE,
    "image_positions": PER_POSITION,
    "task_id": PER_EXAMPLE,
}


def register(peft_type: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Enter a method under its own `peft_type`, so that a saved adapter never loads as some other method.

    `peft.register_peft_method` accepts only the members of peft's enum; these mappings are what it fills.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_class.prefix


class RoutedTuner(BaseTuner):
    """peft's tuner for routed methods. Subclasses name their layer, a RoutedLayer, and the modules that they adapt by default.

    `model(...)` and `model.generate(...)` take `visual_features` (B, L_v, d_v) and `visual_mask` (B, L_v), bool, beside their own
    arguments; `task_id` (B,), int64, where adapters are of several tasks; and `image_positions` (B, L), bool, where they route
    some of the positions alone, of an encoder-decoder those of the encoder. The features are projected, where d_v is not d, and
    scaled once per call.

    Attributes:
        visual_projection: adapter name -> the trainable Linear(d_v, d), only where the widths differ; for a prefix too.
        routed_width: name of an adapter that routes -> d, the width that all its modules work on.
        of_decoder: names of the modules that read a decoder's own positions, where an adapter does not route all positions.
    """

    uses_shared_state = True
    left_to_the_model: ClassVar[tuple[str, ...]] = ("target_modules",)  # fields of the config that `complete` fills in where None

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        refuse_a_second(model)  # before peft writes the new config into the first tuner's
        super().__init__(model, *args, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: RoutedConfig, adapter_name: str) -> None:
        self.conditioning = Conditioning(model, STREAMS, self._prepare)
        self.visual_projection = nn.ModuleDict()
        self.routed_width: dict[str, int] = {}
        self.of_text: frozenset[str] = frozenset()
        self.of_image: frozenset[str] = frozenset()

    def default_targets(self, structure: Structure, config: RoutedConfig, model: nn.Module) -> list[str]:
        """The names of the modules that are adapted unless others are named. Raises RoutevlError where there are none."""
        raise NotImplementedError

    def complete(self, config: RoutedConfig, model: nn.Module) -> Structure:
        """Fill in what the config leaves to the model.

        Returns:
            the model's parts; empty ones where they cannot be found but need not be.

        Raises:
            RoutevlError: the parts cannot be found, or cannot be routed.
        """
        try:
            structure = structure_of(model)
        except RoutevlError:
            if config.target_modules is None:
                raise
            return Structure()
        if config.target_modules is None:
            names = self.default_targets(structure, config, model)
            if config.layers_to_transform is not None:  # peft would take modules by their full names in every layer
                names = _in_layers(names, config)
            config.target_modules = targets(model, names)
            if routes(config) and (shared := structure.shared.intersection(names)):
                raise RoutevlError(
                    f"{min(shared)} also reads a table of positions, which no image belongs to, and so cannot be routed: take "
                    f"those of {', '.join(config.target_modules)} that read the text alone as target_modules"
                )
        return structure

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """peft's own, which leaves the model as it was where it fails, and the other adapters as trainable as they were."""
        trained = {name: projection.weight.requires_grad for name, projection in self.visual_projection.items()}
        config = self.peft_config[adapter_name]
        try:
            if any(getattr(config, name) is None for name in self.left_to_the_model):
                self.complete(config, model)
            if config.routed_positions != "all":
                self.of_text, self.of_image = _of_one_kind(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if config.layers_to_transform is not None:
                _in_layers(self.targeted_module_names, config)
            if config.visual_width is not None:
                with init_empty_weights() if kwargs.get("low_cpu_mem_usage") else nullcontext():
                    self.project_from(config.visual_width, adapter_name)
        except Exception:
            self._take_back(adapter_name)
            raise
        for name, trainable in trained.items():
            self.visual_projection[name].requires_grad_(trainable)

    def _take_back(self, adapter: str) -> None:
        """Remove what an injection that failed has done."""
        layers = [module for module in self.model.modules() if isinstance(module, RoutedLayer)]
        if any(layer.down.keys() - {adapter} for layer in layers):
            self.delete_adapter(adapter)
        else:
            self.unload()

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
        mixed = peft_config.routed_positions == "text" and current_key not in self.of_text
        layer.image_alone[adapter_name] = mixed and current_key in self.of_image
        layer.text_alone[adapter_name] = mixed and current_key not in self.of_image
        if routes(peft_config) and self.routed_width.setdefault(adapter_name, layer.width) != layer.width:
            raise RoutevlError(
                f"target module {current_key} works on width {layer.width} but others on {self.routed_width[adapter_name]}: "
                "routing needs one width, that of the visual features; name modules of one width as target_modules"
            )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def can_adapt(self, module: nn.Module) -> bool:
        """Whether the method has a layer for such a module."""
        return isinstance(module, LINEAR)

    def _new_layer(self, target: nn.Module, name: str) -> RoutedLayer:
        kind = type(target).__name__
        if not self.can_adapt(target):
            raise RoutevlError(f"target module {name} is a {kind}: routed methods adapt Linear and Conv1D modules")
        if isinstance(target, NonDynamicallyQuantizableLinear):
            raise RoutevlError(f"target module {name} is a {kind}, whose weight nn.MultiheadAttention reads without calling it")
        return self.tuner_layer_cls(target, self.conditioning)

    def project_from(self, width: int, adapter: str = "default") -> nn.Linear | None:
        """Let an adapter take visual features of another width than its modules', through a trainable projection.

        Args:
            width: d_v, which becomes `visual_width` in the adapter's config.

        Returns:
            Linear(d_v, d), on the modules' device; None where the adapter does not route, or d_v is d.
        """
        config = self.peft_config[adapter]
        if self.routed_width.get(adapter, width) == width:
            return None
        layer = next(module for module in self.model.modules() if isinstance(module, RoutedLayer) and adapter in module.down)
        config.visual_width = width
        projection = nn.Linear(width, self.routed_width[adapter])
        if not projection.weight.is_meta:
            projection.to(next(layer.down[adapter].parameters()))
        trainable = adapter in self.active_adapters and not config.inference_mode
        self.visual_projection[adapter] = projection.requires_grad_(trainable)
        return projection

    def _prepare(self, given: dict[str, Tensor]) -> dict[Any, Tensor | None]:
        """x_R (B, L_v, d) of each adapter that routes, the mask, the image's positions, and the examples' tasks.

        Raises:
            RoutevlError: features, mask, positions or tasks of the wrong shape; a task that there is not.
        """
        features, mask, positions = map(given.get, ("visual_features", "visual_mask", "image_positions"))
        if features is None and mask is not None:
            raise RoutevlError("the call has a visual_mask but no visual_features")
        tasks = [self.peft_config[name].tasks for name in self.active_adapters]
        of_tasks = tasks_of(given, min(tasks, default=1)) if "task_id" in given else {}
        if positions is not None and (positions.dim() != 2 or positions.dtype != torch.bool):
            raise RoutevlError(f"image_positions must be (batch, length) bool, not {tuple(positions.shape)} {positions.dtype}")
        if features is None:
            return of_tasks
        if features.dim() != 3:
            raise RoutevlError(f"visual_features must have the shape (batch, L_v, d), not {tuple(features.shape)}")
        if mask is not None and mask.shape != features.shape[:2]:
            raise RoutevlError(f"visual_mask must have the shape {tuple(features.shape[:2])}, not {tuple(mask.shape)}")
        routed = [name for name in self.active_adapters if name in self.routed_width]
        of_images = {("visual_features", name): self._prepare_for(name, features) for name in routed}
        of_positions = {} if positions is None else {"image_positions": positions}
        return of_tasks | of_images | of_positions | {"visual_mask": mask}

    def _prepare_for(self, adapter: str, features: Tensor) -> Tensor:
        """x_R for one adapter: width checked, projected, scaled: (B, L_v, d_v) -> (B, L_v, d)."""
        config = self.peft_config[adapter]
        expected = config.visual_width or self.routed_width[adapter]
        if features.shape[-1] != expected:
            raise RoutevlError(
                f"visual_features has width {features.shape[-1]} but adapter {adapter!r} expects {expected}: "
                "set visual_width in its config to the features' width"
            )
        if adapter in self.visual_projection:
            projection = self.visual_projection[adapter]
            features = projection(features.to(projection.weight))  # its device and dtype
        return VISUAL_SCALES[config.visual_scale](features)

    # -- what peft asks of a tuner: the projections, which are on no layer, follow the layers; what cannot be done is refused

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """peft's own, with the adapters' visual projections made trainable or frozen along with them."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, projection in self.visual_projection.items():
            projection.requires_grad_(name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """peft's own, for the visual projections too."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.visual_projection:
                self.visual_projection[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """peft's own, with what routing keeps for the adapter removed too; the adapter that it makes active is trainable."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        for kept in (self.visual_projection, self.routed_width):
            if adapter_name in kept:
                del kept[adapter_name]
        for name in self.active_adapters if was_active else ():
            if name in self.visual_projection:
                self.visual_projection[name].requires_grad_(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype and adapter_name in self.visual_projection:
            self.visual_projection[adapter_name].float()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: RoutedConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        saved = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        parts, own = (*cls.tuner_layer_cls.adapter_layer_names, "visual_projection"), model.state_dict().keys()
        missing = [n for n in own if n not in saved and any(f".{part}.{adapter_name}." in n for part in parts)]
        unexpected = [name for name in saved if name not in own and any(f".{part}." in name for part in parts)]
        if missing or unexpected:
            what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model has not"
            raise RoutevlError(f"{config.peft_type.value}: the adapter {what}: it is damaged, or of another model")
        return saved

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        for name in ("adapter_names", "alora_offsets"):  # peft takes them out of the call
            if kwargs.get(name) is not None:
                raise RoutevlError(
                    f"{name} is not possible with {self.peft_config[self.active_adapters[0]].peft_type.value}: all examples of a "
                    "call go through the active adapter; use set_adapter() and one call for each adapter"
                )
        yield

    def _check_merge_allowed(self) -> None:
        raise RoutevlError(CANNOT_MERGE)

    def unmerge_adapter(self) -> None:
        """Raises RoutevlError: nothing can be merged."""
        raise RoutevlError(CANNOT_MERGE)

    def __getattr__(self, name: str) -> Any:
        if name in OF_LORA:
            raise AttributeError(f"{type(self).__name__} has no {name}: it is for peft's LORA, not for routed methods")
        return super().__getattr__(name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self.conditioning.detach()
        return model


def _of_one_kind(model: nn.Module, config: RoutedConfig) -> tuple[frozenset[str], frozenset[str]]:
    """The modules whose positions are all text, and those whose positions are all an image's: of an encoder-decoder those outside
    its encoder that do not compute keys or values of what it has read, and none; of a model of two streams all of either kind; of
    any other model none. Raises RoutevlError where they are not found."""
    of_streams, config_of_model = has_image_stream(model), getattr(model, "config", None)
    if not of_streams and not getattr(config_of_model, "is_encoder_decoder", False):
        return frozenset(), frozenset()
    try:
        crossing = structure_of(model).cross_attention_inputs
    except RoutevlError as error:
        raise RoutevlError(f"routed_positions={config.routed_positions}: {error}; or set routed_positions=all") from error
    names = {name for name, _ in model.named_modules()}
    if of_streams:  # keys and values of the other stream have its positions
        of_image = {name for name in names if name.startswith("cross_modal_image.") != (name in crossing)}
        return frozenset(names - of_image), frozenset(of_image)
    encoder = encoder_of(model)
    return frozenset(name for name in names if not name.startswith(encoder) and name not in crossing), frozenset()


def layer_of(name: str) -> int | None:
    """The number of the layer that a module is in, by the first number in its name; None where it is in none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _in_layers(names: Sequence[str], config: RoutedConfig) -> list[str]:
    """The modules in the layers that a config names. Raises RoutevlError where one of these layers has no module to adapt."""
    chosen = config.layers_to_transform
    chosen = {chosen} if isinstance(chosen, int) else set(chosen)
    there = {layer_of(name) for name in names} - {None}
    if missing := chosen - there:
        numbers = ", ".join(map(str, sorted(there))) or "none"
        raise RoutevlError(f"layers_to_transform: layer {min(missing)} has no module to adapt (layers with some: {numbers})")
    return [name for name in names if layer_of(name) in chosen]
