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
        published: what config/published.csv calls it; "" where that has no figures of it.
        differs: in what it is not its source's.
    """

    label: str
    family: str
    source: str
    implementation: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""
    differs: str = ""


_HU, _HAN = "Hu et al., 2022 (arXiv 2106.09685)", "Liu et al., 2024 (arXiv 2402.09353)"
_SUNG = "Sung et al., 2022 (arXiv 2112.06825)"
_KARIMI = "Karimi Mahabadi et al., 2021 (arXiv 2106.04647)"
_VL_PET = "Hu et al., 2023 (arXiv 2308.09804)"
_DAS = "Wu et al., 2023 (arXiv 2309.01479)"
_GENFT = "Xu et al., 2026 (arXiv 2506.11042)"
_CONTEXT = "Hadji-Kyriacou and Arandjelović, 2023 (arXiv 2312.08900)"
_SPT = "He et al., 2023 (arXiv 2303.08566)"

# an Adapter that reads no image
_PLAIN = {
    "routing": "none", "visual_scale": "none", "bottleneck": "shared", "routed_features": "image", "routed_tokens": None,
    "routed_positions": "all", "up_init": "zero", "position": "before_norm", "residual": True, "places": "both",
}  # fmt: skip

_OFFICIAL = "the faults of the official code (docs/DIFFERENCES.md)"
_PEFT = "peft's own code, initialisation and choice of modules"
_NO_EMBEDDING = "no visual embedding and no prompts of its own, which belong to the task"
_VISUAL_PROMPTS = (
    "a frozen language model reads the vision model's tokens as its prefix, in place of a classifier; "
    "AdamW, as in all runs, in place of SGD"
)
_PORT = "a port to any text model; the original has encoder-decoders alone"
_SPT_DIFFERS = (
    "a port from ViTs to any text model; chosen entries of norms are trained, which its code leaves out; each kind is "
    "trained by its own choice (its code: adapters by LoRA's)"
)
_NO_CONNECTOR = "no connector and no loss of its own, which belong to the task; no dropout of contexts"

BASELINE = "lora"  # what the methods are compared with, without routing
METHODS = {
    "lora": MethodRow(
        "LoRA", "low-rank", "Qu et al., 2024 (arXiv 2403.09377), equation 4", "lora:Lora", published="LoRA", differs=_OFFICIAL
    ),
    "adapter": MethodRow(
        "Adapter", "adapter", "Qu et al., 2024 (arXiv 2403.09377), equation 5", "adapter:Adapter", differs=_OFFICIAL
    ),
    "houlsby": MethodRow(
        "Houlsby adapter", "adapter", "Houlsby et al., 2019 (arXiv 1902.00751)", "adapter:Adapter", _PLAIN,
        differs="GELU; the bottleneck starts at exactly the identity",
    ),
    "pfeiffer": MethodRow(
        "Pfeiffer adapter", "adapter", "Pfeiffer et al., 2021 (arXiv 2005.00247)", "adapter:Adapter",
        _PLAIN | {"places": "ffn", "activation": "relu"},
        differs="it reads the feed-forward part's own output; AdapterHub's also moves the residual connection and the norm",
    ),
    "vl_adapter": MethodRow(
        "VL-Adapter", "adapter", _SUNG, "vl_adapter:VLAdapter",
        published="VL-Adapter", differs=_NO_EMBEDDING,
    ),
    "phm_adapter": MethodRow(
        "PHM-Adapter", "adapter", _KARIMI, "compacter:PhmAdapter", published="Compacter",
        differs=f"{_NO_EMBEDDING}; it is what the vision-language literature calls Compacter",
    ),
    "compacter": MethodRow("Compacter", "adapter", _KARIMI, "compacter:Compacter", differs=_NO_EMBEDDING),
    "hyperformer": MethodRow(
        "HyperFormer", "adapter", "Karimi Mahabadi et al., 2021 (arXiv 2106.04489)", "hyperformer:HyperFormer",
        published="HyperFormer", differs=f"as in VL-Adapter's code, without generated layer norms; {_NO_EMBEDDING}",
    ),
    "pha": MethodRow(
        "PHA", "adapter", "Zhao et al., 2023 (arXiv 2310.11670)", "pha:Pha",
        differs="a feed-forward part's dropout is of its adapter's output too; no label smoothing; a port to any text model",
    ),
    "vl_pet_large": MethodRow(
        "VL-PET large", "adapter", _VL_PET, "vl_pet:VLPet", {"gate": "large"}, published="VL-PET large", differs=_PORT
    ),
    "vl_pet_middle_x": MethodRow(
        "VL-PET middle-X", "adapter", _VL_PET, "vl_pet:VLPet", {"gate": "middle_x"}, published="VL-PET middle-X", differs=_PORT
    ),
    "vl_pet_middle_y": MethodRow(
        "VL-PET middle-Y", "adapter", _VL_PET, "vl_pet:VLPet", {"gate": "middle_y"}, published="VL-PET middle-Y", differs=_PORT
    ),
    "vl_pet_small": MethodRow(
        "VL-PET small", "adapter", _VL_PET, "vl_pet:VLPetSmall", published="VL-PET small",
        differs=f"{_PORT}; its mean leaves padding out (`masked_mean=no` is the original)",
    ),
    "das": MethodRow(
        "DAS", "adapter", _DAS, "das:DAS",
        differs="layers of any text model, of METER those of both streams; no vector in the place of the first position, and "
        "poolers and type embeddings stay frozen",
    ),
    "peft_lora": MethodRow("LoRA (peft)", "low-rank", _HU, "from_peft:Lora", differs=_PEFT),
    "lora_bias": MethodRow("LoRA + biases", "low-rank", _HU, "from_peft:Lora", {"bias": "all"}, differs=_PEFT),
    "dora": MethodRow("DoRA", "low-rank", _HAN, "from_peft:Lora", {"use_dora": True}, differs=_PEFT),
    "vera": MethodRow("VeRA", "low-rank", "Kopiczko et al., 2024 (arXiv 2310.11454)", "from_peft:Vera", differs=_PEFT),
    "fourierft": MethodRow("FourierFT", "low-rank", "Gao et al., 2024 (arXiv 2405.03003)", "from_peft:FourierFT", differs=_PEFT),
    "genft": MethodRow(
        "GenFT", "low-rank", _GENFT, "genft:GenFT", differs="any text model; layer norms are trained, unless `freeze_layer_norm`"
    ),
    "genft_vision": MethodRow(
        "GenFT (vision)", "low-rank", _GENFT, "genft:GenFTVision",
        differs="of the text model; a is drawn, where a = b = 0 in the original, at which neither gets a gradient",
    ),
    "context_lora": MethodRow("Context-PEFT (LoRA)", "low-rank", _CONTEXT, "context_peft:ContextLora", differs=_NO_CONNECTOR),
    "ia3": MethodRow("(IA)³", "scaling", "Liu et al., 2022 (arXiv 2205.05638)", "from_peft:IA3", differs=_PEFT),
    "context_ia3": MethodRow("Context-PEFT ((IA)³)", "scaling", _CONTEXT, "context_peft:ContextIA3", differs=_NO_CONNECTOR),
    "ln_tuning": MethodRow("LN-tuning", "selective", "Zhao et al., 2024 (arXiv 2312.11420)", "from_peft:LNTuning", differs=_PEFT),
    "bitfit": MethodRow(
        "BitFit", "selective", "Ben Zaken et al., 2022 (arXiv 2106.10199)", "selective:BitFit", published="BitFit",
        differs="layer norms are trained whole, unless `freeze_layer_norm`",
    ),
    "context_bitfit": MethodRow(
        "Context-PEFT (BitFit)", "selective", _CONTEXT, "context_peft:ContextBitFit", differs=_NO_CONNECTOR
    ),
    "gradient_norm": MethodRow("Largest gradients", "selective", "a baseline of this package", "selective:GradientNorm"),
    "spt_lora": MethodRow("SPT-LoRA", "selective", _SPT, "spt:Spt", {"kind": "lora"}, differs=_SPT_DIFFERS),
    "spt_adapter": MethodRow("SPT-Adapter", "selective", _SPT, "spt:Spt", {"kind": "adapter"}, differs=_SPT_DIFFERS),
    "adapeft": MethodRow(
        "AdaPEFT", "selective", "Xu and Bu, 2025 (arXiv 2505.12579)", "adapeft:AdaPeft",
        differs="there is no public code: candidates, the points of the fit and the length of the probe are our own",
    ),
    "prompt_tuning": MethodRow(
        "Prompt tuning", "prompt", "Lester et al., 2021 (arXiv 2104.08691)", "from_peft:PromptTuning", differs=_PEFT
    ),
    "prefix_tuning": MethodRow(
        "Prefix tuning", "prompt", "Li and Liang, 2021 (arXiv 2101.00190)", "from_peft:PrefixTuning", differs=_PEFT
    ),
    "vl_prompt": MethodRow(
        "Prompt (VL-Adapter)", "prompt", _SUNG, "vl_prompt:VLPrompt", published="Prompt tuning",
        differs="no visual embedding of its own, which belongs to the task",
    ),
    "vpt": MethodRow(
        "VPT-deep", "prompt", "Jia et al., 2022 (arXiv 2203.12119)", "vfpt:Vfpt", {"fourier_share": 0.0, "dimension": "all"},
        differs=_VISUAL_PROMPTS,
    ),
    "vfpt": MethodRow("VFPT", "prompt", "Zeng et al., 2024 (arXiv 2411.01327)", "vfpt:Vfpt", differs=_VISUAL_PROMPTS),
    "lst": MethodRow(
        "LST", "side network", "Sung et al., 2022 (arXiv 2206.06522)", "lst:Lst",
        differs="the image stands before the text; a port to any text model, the vision-language original is of T5 alone",
    ),
    "full": MethodRow(
        "Full fine-tuning", "full", "all parameters of the text model", "selective:Full", published="Full fine-tuning"
    ),
    "full_both": MethodRow(
        "Full fine-tuning (both models)", "full", "all parameters of text and vision model", "selective:FullBoth",
        differs="the vision model has no dropout, as where features are stored",
    ),
}  # fmt: skip


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
