"""The fields of every routed method's peft config."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from peft import PeftConfig

from routevl.errors import RoutevlError
from routevl.methods.routed import RoutedOptions
from routevl.options import read

PEFTS_OWN = ("target_modules", "layers_to_transform")  # options of a run that peft takes, and checks, in more forms


class MethodType(str):
    """A `peft_type` that is none of peft's enum: an equal, plain string in files and mappings, with what peft asks of the enum's
    members, which are strings too: `value`, and the name behind a dot in `str()`."""

    @property
    def value(self) -> str:
        """The plain string."""
        return str.__str__(self)

    def __str__(self) -> str:
        return f"MethodType.{self.value}"


@dataclass
class RoutedConfig(PeftConfig):
    """The fields that every routed method has. Unknown fields are a TypeError, wrong values a RoutevlError (a ValueError)."""

    PEFT_TYPE: ClassVar[MethodType]
    options_class: ClassVar[type] = RoutedOptions  # the fields that a run may set, with their bounds

    r: int = field(default=8, metadata={"help": "Rank of the bottleneck."})
    routing: str = field(default="none", metadata={"help": "Routing function, a name of routevl.routing.ROUTING."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or one regular expression) of the modules to adapt; None: those that the method adapts in any model, "
            "found by what they compute."
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
        metadata={"help": "Parameter-free scaling of the visual features, projected where need be: none, tanh or layer_norm."},
    )
    bottleneck: str = field(
        default="shared",
        metadata={"help": "How text and image meet: shared, split, after_up or cross_attention (docs/METHODS.md)."},
    )
    tasks: int = field(
        default=1,
        metadata={"help": "Tasks with bottlenecks of their own; of more than one, calls have a task_id (batch,), int64."},
    )
    up_init: str | None = field(default=None, metadata={"help": "How the up-projection starts: zero, random, or None."})
    routed_features: str = field(
        default="image",
        metadata={
            "help": "What the visual features of a call are: image, text, noise, ones or shuffled. The caller makes them; this "
            "says which ones the adapter was trained with."
        },
    )
    routed_tokens: str | None = field(
        default=None,
        metadata={
            "help": "Whether the visual features of a call are `all` tokens of an image, or their `mean`; None: as the task had "
            "it. The caller makes them; this says which ones the adapter was trained with."
        },
    )
    routed_positions: str = field(
        default="all",
        metadata={
            "help": "Which positions are routed, all or text. For text, calls have image_positions (batch, length), bool, of "
            "what an encoder-decoder's encoder reads; its decoder's positions are all text."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.PEFT_TYPE
        options = {f.name: getattr(self, f.name) for f in fields(self.options_class) if f.name not in PEFTS_OWN}
        read(self.options_class, options, type(self).__name__)
        if self.visual_width is not None and self.visual_width <= 0:
            raise RoutevlError(f"visual_width must be a positive integer or None, not {self.visual_width!r}")
