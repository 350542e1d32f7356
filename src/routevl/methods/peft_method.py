"""What methods share that are tuners of Hugging Face peft: their own, and the routed ones of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl.errors import RoutevlError
from routevl.methods.base import Method
from routevl.options import option

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn


def modules_option(what: str) -> Any:
    """An option of a method that names modules: None, or the ends of their names, as in peft, with commas between them."""
    return option(f"{what}, by the ends of their names with commas between them; `none`: found in the model", None)


class PeftMethod(Method):
    """A method whose model is a `PeftModel`; a run's folder is an ordinary peft adapter folder."""

    def config_fields(self) -> dict[str, Any]:
        """The options as fields of a peft config."""
        fields = asdict(self.options)
        fields |= {name: value.split(",") for name, value in fields.items() if name.endswith("_modules") and value}
        if fields.get("layers_to_transform") is not None:
            fields["layers_to_transform"] = [int(number) for number in fields["layers_to_transform"].split(",")]
        return fields

    def config(self, text_model: nn.Module, train_also: list[str]) -> PeftConfig:
        """The peft config of the options."""
        raise NotImplementedError

    def build(self, text_model: nn.Module, prepared: Mapping[str, Tensor], train_also: list[str]) -> nn.Module:
        from peft import get_peft_model

        check_ends(train_also, text_model)
        try:
            return get_peft_model(text_model, self.config(text_model, train_also))
        except RoutevlError:  # which is a ValueError too
            raise
        except ValueError as error:  # an option or a model that peft refuses
            raise RoutevlError(f"peft refuses this model or these options: {error}") from error

    def part_of(self, name: str) -> str:
        return "layer_norm" if ".modules_to_save." in name else "method"

    def save(self, text_model: nn.Module, folder: Path) -> None:
        text_model.active_peft_config.revision = getattr(
            text_model.config, "_commit_hash", None
        )  # of base_model_name_or_path, on the hub
        # "auto" would ask the hub for the text model's config; no method here trains its embeddings
        text_model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()  # peft's empty template; `routevl.training.card` writes the card of a run

    def load(self, text_model: nn.Module, folder: Path) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        saved = load_file(folder / "adapter_model.safetensors")
        set_peft_model_state_dict(text_model, saved)
        # what peft reports as missing or unexpected is not right for prompts and biases: compare what it would save now
        loaded = get_peft_model_state_dict(text_model, save_embedding_layers=False)
        if different := sorted(saved.keys() ^ loaded.keys()):
            raise KeyError(f"{different[0]} is only in one of them")
        if different := [name for name, tensor in saved.items() if not tensor.equal(loaded[name].to(tensor.device))]:
            raise KeyError(f"{different[0]} could not be set")


def check_ends(names: list[str], text_model: nn.Module) -> None:
    """Raise RoutevlError where peft, which compares the ends of names, would take other modules for those of the list too."""
    ends = tuple(names)
    others = [name for name, _ in text_model.named_modules() if name not in names and name.endswith(ends)]
    if others:
        end = next(end for end in ends if others[0].endswith(end))
        raise RoutevlError(
            f"{others[0]} would be trained as a layer norm, since peft compares the ends of names and one is called {end!r}: "
            "set freeze_layer_norm, or take a method that is not peft's"
        )
