"""Loading a trained run for use, whichever its method is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from routevl.backbones.pruning import keep_zeros, pruned_weights
from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.methods.base import layer_norms
from routevl.settings import RunSettings
from routevl.tasks.table import task_class
from routevl.training.prepared import PREPARED, load_prepared

if TYPE_CHECKING:
    from torch import nn


def load_run(text_model: nn.Module, folder: str | Path, weights: str = "") -> nn.Module:
    """A text model with a run's method in it, trained; without the task's head, which `routevl predict` loads too.

    Args:
        text_model: the one that the run was trained on, as `load_text_backbone` loads it. It is changed.
        folder: the run's, which holds run.json.
        weights: "last" takes those of the last epoch in place of the best epoch's.

    Raises:
        RoutevlError: not a run's folder, or one of another text model.
    """
    folder = Path(folder)
    settings = RunSettings.from_record(read_json(folder / "run.json")["settings"], str(folder / "run.json"))
    method = settings.new_method()
    try:
        prepared, _ = load_prepared(method, folder / PREPARED if method.prepares() else None)
        task_class(settings.task).extend(text_model)
        pruned = pruned_weights(text_model)
        model = method.build(text_model, prepared, [] if settings.freeze_layer_norm else layer_norms(text_model))
        method.load(model, folder / weights)
        keep_zeros(model, pruned)
    except (KeyError, FileNotFoundError, RuntimeError) as error:
        raise RoutevlError(f"{folder / weights}: not a run of this text model, or damaged ({error})") from error
    return model.eval()
