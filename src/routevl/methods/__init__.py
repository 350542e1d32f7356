"""PEFT methods, those with a routing function in their bottleneck as methods of Hugging Face peft.

table.py lists them all; base.py says what a method may be. The list needs no torch, so the configs of the methods that are peft
tuners of this package (RoutedLoraConfig, RoutedAdapterConfig) are loaded when the first of them is asked for, which makes all of
them known to peft; where peft is loaded already, importing this package does.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def _load_tuners() -> dict[str, Any]:
    """The configs of all folders with a tuner of their own (model.py, which registers it), by name."""
    tuners = sorted(Path(__file__).parent.glob("*/model.py"))
    modules = [importlib.import_module(f"{__name__}.{path.parent.name}.model") for path in tuners]
    return {name: value for module in modules for name, value in vars(module).items() if name.endswith("Config")}


def __getattr__(name: str) -> Any:
    if name.endswith("Config") and name in (configs := _load_tuners()):
        return configs[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "peft" in sys.modules:
    _load_tuners()
