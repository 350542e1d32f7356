"""The one list of methods, free of torch. The workflow, the command line, tables, figures, documents and tests read it.

Its order is the order everywhere, its families have the colours. To add a method: a folder beside this file, whose __init__.py
has a subclass of `routevl.methods.base.Method`, and one row in METHODS.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.options import describe, read, text_of, words_of

if TYPE_CHECKING:
    from routevl.methods.base import Method

# family -> its colour in every figure: Okabe and Ito's (2008), which colour-blind readers can tell apart
FAMILIES = {
    "low-rank": "#0072B2",
    "adapter": "#D55E00",
    "scaling": "#CC79A7",
    "selective": "#009E73",
    "prompt": "#E69F00",
    "side network": "#F0E442",
    "full": "#56B4E9",
}


@dataclass(frozen=True)
class MethodRow:
    """One method of the list.

    Attributes:
        label: its name for readers.
        family: a key of FAMILIES.
        source: the paper that it is from.
        implementation: "<folder>:<class>" under routevl.methods.
        fixed: options of the class that this row sets; a run cannot.
    """

    label: str
    family: str
    source: str
    implementation: str
    fixed: Mapping[str, Any] = field(default_factory=dict)


_HU, _HAN = "Hu et al., 2022 (arXiv 2106.09685)", "Liu et al., 2024 (arXiv 2402.09353)"
_KARIMI = "Karimi Mahabadi et al., 2021 (arXiv 2106.04647)"
_VL_PET = "Hu et al., 2023 (arXiv 2308.09804)"

# an Adapter that reads no image
_PLAIN = {
    "routing": "none", "visual_scale": "none", "bottleneck": "shared", "routed_features": "image", "up_init": "zero",
    "position": "before_norm", "residual": True, "places": "both",
}  # fmt: skip

METHODS = {
    "lora": MethodRow("LoRA", "low-rank", "Qu et al., 2024 (arXiv 2403.09377), equation 4", "lora:Lora"),
    "adapter": MethodRow("Adapter", "adapter", "Qu et al., 2024 (arXiv 2403.09377), equation 5", "adapter:Adapter"),
    "houlsby": MethodRow("Houlsby adapter", "adapter", "Houlsby et al., 2019 (arXiv 1902.00751)", "adapter:Adapter", _PLAIN),
    "pfeiffer": MethodRow(
        "Pfeiffer adapter",
        "adapter",
        "Pfeiffer et al., 2021 (arXiv 2005.00247)",
        "adapter:Adapter",
        _PLAIN | {"places": "ffn", "activation": "relu"},
    ),
    "vl_adapter": MethodRow("VL-Adapter", "adapter", "Sung et al., 2022 (arXiv 2112.06825)", "vl_adapter:VLAdapter"),
    "phm_adapter": MethodRow("PHM-Adapter", "adapter", _KARIMI, "compacter:PhmAdapter"),
    "compacter": MethodRow("Compacter", "adapter", _KARIMI, "compacter:Compacter"),
    "vl_pet_large": MethodRow("VL-PET large", "adapter", _VL_PET, "vl_pet:VLPet", {"gate": "large"}),
    "vl_pet_middle_x": MethodRow("VL-PET middle-X", "adapter", _VL_PET, "vl_pet:VLPet", {"gate": "middle_x"}),
    "vl_pet_middle_y": MethodRow("VL-PET middle-Y", "adapter", _VL_PET, "vl_pet:VLPet", {"gate": "middle_y"}),
    "vl_pet_small": MethodRow("VL-PET small", "adapter", _VL_PET, "vl_pet:VLPetSmall"),
    "peft_lora": MethodRow("LoRA (peft)", "low-rank", _HU, "from_peft:Lora"),
    "lora_bias": MethodRow("LoRA + biases", "low-rank", _HU, "from_peft:Lora", {"bias": "all"}),
    "dora": MethodRow("DoRA", "low-rank", _HAN, "from_peft:Lora", {"use_dora": True}),
    "vera": MethodRow("VeRA", "low-rank", "Kopiczko et al., 2024 (arXiv 2310.11454)", "from_peft:Vera"),
    "fourierft": MethodRow("FourierFT", "low-rank", "Gao et al., 2024 (arXiv 2405.03003)", "from_peft:FourierFT"),
    "ia3": MethodRow("(IA)³", "scaling", "Liu et al., 2022 (arXiv 2205.05638)", "from_peft:IA3"),
    "ln_tuning": MethodRow("LN-tuning", "selective", "Zhao et al., 2024 (arXiv 2312.11420)", "from_peft:LNTuning"),
    "bitfit": MethodRow("BitFit", "selective", "Ben Zaken et al., 2022 (arXiv 2106.10199)", "selective:BitFit"),
    "gradient_norm": MethodRow("Largest gradients", "selective", "a baseline of this package", "selective:GradientNorm"),
    "prompt_tuning": MethodRow("Prompt tuning", "prompt", "Lester et al., 2021 (arXiv 2104.08691)", "from_peft:PromptTuning"),
    "prefix_tuning": MethodRow("Prefix tuning", "prompt", "Li and Liang, 2021 (arXiv 2101.00190)", "from_peft:PrefixTuning"),
    "lst": MethodRow("LST", "side network", "Sung et al., 2022 (arXiv 2206.06522)", "lst:Lst"),
    "full": MethodRow("Full fine-tuning", "full", "all parameters of the text model", "selective:Full"),
}


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises RoutevlError where there is no method of that name."""
    if name not in METHODS:
        raise RoutevlError(f"method {name!r} is not a method: choose one of {', '.join(METHODS)}")
    folder, _, class_name = METHODS[name].implementation.partition(":")
    return getattr(importlib.import_module(f"routevl.methods.{folder}"), class_name)


def new_method(name: str, options: Mapping[str, Any], where: str) -> Method:
    """A method with its options: typed values, or text as the run sheet has them.

    Raises:
        RoutevlError: no such method; an option that it does not have or that its row fixes; a value out of bounds. The line
            starts with `where`.
    """
    cls = method_class(name)
    for option in options:
        refuse_fixed(name, option, where)
    return cls(read(cls.Options, {**options, **METHODS[name].fixed}, f"{where}: method {name}"))


def free_options(name: str) -> list[str]:
    """The options of a method that its row does not fix."""
    return [f.name for f in fields(method_class(name).Options) if f.name not in METHODS[name].fixed]


def refuse_fixed(name: str, option: str, where: str) -> None:
    """Raise RoutevlError where a method's row fixes the option."""
    fixed = METHODS[name].fixed
    if option in fixed:
        raise RoutevlError(f"{where}: {option} is {text_of(fixed[option])} in the method {name}, it cannot be set")


def method_records() -> Iterator[dict[str, Any]]:
    """What documents and `routevl methods --json` say of each method."""
    for name, row in METHODS.items():
        cls = method_class(name)
        yield {
            "name": name,
            "label": row.label,
            "family": row.family,
            "source": row.source,
            "options": describe(cls.Options, but=row.fixed),
            "refuses": dict(cls.refuses),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl methods`."""
    parser.add_argument("--json", action="store_true", help="as a list of objects, with every option's type, default and help")


def run(arguments: argparse.Namespace) -> None:
    """Print the list of methods."""
    records = list(method_records())
    if arguments.json:
        print(json.dumps(records, indent=1, ensure_ascii=False))
        return
    lines = [("method", "label", "family", "options (defaults)", "source")]
    for record in records:
        options = [f"{o['name']}=" if "default" not in o else words_of({o["name"]: o["default"]})[0] for o in record["options"]]
        lines.append((record["name"], record["label"], record["family"], " ".join(options), record["source"]))
        lines += [("", f"refuses {what}: {why}", "", "", "") for what, why in record["refuses"].items()]
    widths = [max(len(line[column]) for line in lines if line[0]) for column in range(4)]
    for *cells, last in lines:
        print("  ".join([cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] + [last]).rstrip())
