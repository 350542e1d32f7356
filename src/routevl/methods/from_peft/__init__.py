"""Hugging Face peft's own methods, each a row of the list and an options dataclass here: the fields of peft's config that a run
may set. They read no image, which comes by the visual prefix alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from routevl.methods.base import NoOptions, layer_norms
from routevl.methods.peft_method import PeftMethod, check_ends, modules_option
from routevl.options import option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftConfig
    from torch import Tensor, nn


class FromPeft(PeftMethod):
    """A method of peft, by its `peft_type`, on the modules that peft chooses for the type of the text model; found in the model
    where peft knows none."""

    peft_type: ClassVar[str]

    def found_in(self, text_model: nn.Module) -> dict[str, list[str]]:
        """Fields of the config that name modules, of a method that adapts some. Raises RoutevlError where there are none."""
        return {}

    def config(self, text_model: nn.Module, train_also: list[str]) -> PeftConfig:
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import constants

        peft_type, fields = PeftType[self.peft_type], self.config_fields()
        known = getattr(constants, f"TRANSFORMERS_MODELS_TO_{self.peft_type}_TARGET_MODULES_MAPPING", {})
        if fields.get("target_modules", ()) is None and text_model.config.model_type not in known:
            fields |= {name: modules for name, modules in self.found_in(text_model).items() if fields[name] is None}
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**fields, modules_to_save=train_also or None)


class OnQueryAndValue(FromPeft):
    """A method that adapts query and value; modules that hold them and the key, such as GPT-2's, whole."""

    def found_in(self, text_model: nn.Module) -> dict[str, list[str]]:
        from routevl.backbones.structure import QUERY, VALUE, structure_of, targets

        return {"target_modules": targets(text_model, structure_of(text_model).computing(QUERY, VALUE))}


class Lora(OnQueryAndValue):
    """W0 + (lora_alpha / r) B A."""

    peft_type = "LORA"

    @dataclass(frozen=True)
    class Options:
        """Options of peft's LoRA."""

        r: int = option("rank of the update", 8, least=1)
        lora_alpha: float = option("the update is scaled by lora_alpha / r", 8.0, above=0)
        lora_dropout: float = option("dropout on the input of the down-projection", 0.0, least=0, below=1)
        bias: str = option("which biases of the text model are trained", "none", choices=("none", "all", "lora_only"))
        use_dora: bool = option("learn the magnitude of each column apart from its direction", False)
        target_modules: str | None = modules_option("modules to adapt")


class Vera(OnQueryAndValue):
    """One pair of frozen random projections for all modules of a shape; two scaling vectors are trained in each module."""

    peft_type = "VERA"

    @dataclass(frozen=True)
    class Options:
        """Options of VeRA."""

        r: int = option("rank of the shared random projections", 256, least=1)
        vera_dropout: float = option("dropout on the input of the down-projection", 0.0, least=0, below=1)
        d_initial: float = option("start of the inner scaling vector", 0.1)
        projection_prng_key: int = option("seed of the random projections", 0, least=0)
        target_modules: str | None = modules_option("modules to adapt")


class FourierFT(OnQueryAndValue):
    """The update's spectrum has few trained coefficients, at random places that are the same in every module."""

    peft_type = "FOURIERFT"

    @dataclass(frozen=True)
    class Options:
        """Options of FourierFT."""

        n_frequency: int = option("trained coefficients of each module, at most its number of entries", 1000, least=1)
        scaling: float = option("scale of the update", 150.0, above=0)
        random_loc_seed: int = option("seed of the coefficients' places", 777, least=0)
        target_modules: str | None = modules_option("modules to adapt")


class IA3(FromPeft):
    """Trained vectors that scale keys, values and the feed-forward layer's inner activations."""

    peft_type = "IA3"

    @dataclass(frozen=True)
    class Options:
        """Options of (IA)³."""

        target_modules: str | None = modules_option("modules that are scaled")
        feedforward_modules: str | None = modules_option("those of them whose input is scaled, in place of their output")

    def found_in(self, text_model: nn.Module) -> dict[str, list[str]]:
        from routevl.backbones.structure import KEY, VALUE, structure_of, targets

        structure = structure_of(text_model)
        feed_forward = targets(text_model, structure.ends_of_feed_forward())
        attention = targets(text_model, structure.computing(KEY, VALUE))
        return {"target_modules": attention + feed_forward, "feedforward_modules": feed_forward}


class LNTuning(FromPeft):
    """The layer norms alone are trained."""

    peft_type = "LN_TUNING"
    Options = NoOptions

    def config(self, text_model: nn.Module, train_also: list[str]) -> PeftConfig:
        from peft import LNTuningConfig

        norms = layer_norms(text_model)
        check_ends(norms, text_model)
        return LNTuningConfig(target_modules=norms)

    def part_of(self, name: str) -> str:
        return "layer_norm"


_ENCODER_DECODER = "prompts of an encoder-decoder are not implemented here"


class PromptLearning(FromPeft):
    """Trained vectors that the text model reads before its input."""

    refuses: ClassVar[Mapping[str, str]] = {
        "bart": _ENCODER_DECODER,
        "t5": _ENCODER_DECODER,
        "co_attention": "prompts of a model of two streams are not implemented here",
    }

    def config(self, text_model: nn.Module, train_also: list[str]) -> PeftConfig:
        config = super().config(text_model, train_also)
        config.task_type = "CAUSAL_LM" if text_model.can_generate() else "FEATURE_EXTRACTION"
        return config

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        if not text_model.can_generate():
            return super().build(text_model, prepared, train_also)
        from routevl.methods.from_peft.prompts import PromptedCausalLM

        check_ends(train_also, text_model)
        return PromptedCausalLM(text_model, self.config(text_model, train_also))


class PromptTuning(PromptLearning):
    """Trained vectors before the input embeddings."""

    peft_type = "PROMPT_TUNING"

    @dataclass(frozen=True)
    class Options:
        """Options of prompt tuning."""

        num_virtual_tokens: int = option("trained positions before the input", 20, least=1)


class PrefixTuning(PromptLearning):
    """Trained keys and values before those of the input, in every layer."""

    peft_type = "PREFIX_TUNING"
    refuses: ClassVar[Mapping[str, str]] = {
        **PromptLearning.refuses,
        "gradient_checkpointing": "its trained keys and values stand in the cache, which checkpointing turns off",
    }

    @dataclass(frozen=True)
    class Options:
        """Options of prefix tuning."""

        num_virtual_tokens: int = option("trained positions before the input", 20, least=1)
