"""Make a method known to peft, as peft's own `register_peft_method` does for the names of its closed list."""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


def register(peft_type: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Enter a method under its own `peft_type`, so that a saved adapter never loads as some other method.

    `peft.register_peft_method` accepts only the members of peft's enum; these mappings are what it fills.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_class.prefix
