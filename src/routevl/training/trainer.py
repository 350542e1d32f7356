"""The training loop: one run from its examples to a folder of weights, metrics and settings."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from routevl.errors import RoutevlError
from routevl.files import atomic_folder, read_json, write_json
from routevl.methods.base import Method
from routevl.options import add_checkpoint_every, at_least, words_of
from routevl.progress import progress
from routevl.settings import RunSettings
from routevl.signals import StopSignal, leave
from routevl.training.card import Card
from routevl.training.checkpoint import Checkpoint, digests, refuse_other_names, training_state
from routevl.training.clock import Clock
from routevl.training.distributed import average, greatest
from routevl.training.flops import forward_flops
from routevl.training.inputs import add_arguments as add_inputs
from routevl.training.inputs import fingerprint_of_data, load_task
from routevl.training.optimisation import compile_layers, optimisation_of, prepare_torch
from routevl.training.order import data_loader, epoch_batches, first_batch, lengths_of, share_of_padding, training_batches
from routevl.training.prepared import PREPARED, load_prepared

LEAST_LEARNED = 0.001  # of a constant answer's value


def add_training_arguments(parser: argparse.ArgumentParser, **of_prepared: str) -> None:
    """Options of the stages that train, beside those of the settings; `of_prepared`: of argparse, where there can be several."""
    add_inputs(parser)
    what = "what `routevl probe` found with the same seed, for a method that prepares"
    parser.add_argument("--prepared", metavar="FILE", help=what, **of_prepared)
    add_checkpoint_every(parser)
    parser.add_argument("--log-every", type=at_least(1), default=10, metavar="STEPS", help="steps between logged losses")


class Diverged(RoutevlError):
    """The loss, or a validation score, is no longer a finite number."""


class Trainer:
    """One training run. `fit` can be killed at any moment and run again in a new process, to the same bits.

    Several processes train one model: each takes its share of every batch, and all make the same step. Batches, the loss over a
    batch, and so the gradients are those of one process, but for the last bits (sums are cut differently) and for dropout. Only
    the first process writes. Runs are bit-equal, resumed or not, where they have equally many processes and CPU threads.

    Attributes:
        task, model: of the run; the model is on the accelerator's device.
        examples, validation, to_predict: the training, validation and test split.
        step: optimiser steps so far, of `total_steps`.
        identity: what two runs have alike that end in the same bits, of which run.json keeps record.
    """

    def __init__(self, settings: RunSettings, arguments: argparse.Namespace, accelerator: Accelerator) -> None:
        self.settings, self.arguments, self.accelerator = settings, arguments, accelerator
        self.run = Path(arguments.model).name
        self.method: Method = settings.new_method()
        prepare_torch(arguments.threads)
        set_seed(settings.seed)
        prepared, of_prepared = load_prepared(self.method, arguments.prepared)
        self.task, inputs = load_task(settings, self.method, prepared, arguments)
        if accelerator.process_index:  # the model starts the same everywhere, dropout differs
            set_seed((settings.seed + accelerator.process_index) % 2**32)
        self.examples = self.task.training_examples()
        self.validation = self.task.examples("val")
        self.to_predict = self.task.to_predict("test")  # now, so that a wrong test split is noticed before training
        for items in (self.examples, self.validation, self.to_predict):
            self.task.visual.check(self.task.image_ids(items))  # an error where an image is not there
        self.inputs = inputs | of_prepared | {"data": fingerprint_of_data(self.task)}
        self.execution = {"processes": accelerator.num_processes, "threads": arguments.threads}
        self.identity = settings.as_record() | self.inputs | self.execution
        self.batches_per_epoch = sum(math.ceil(len(part) / size) for part, size in self.task.parts(self.examples))
        self.total_steps = settings.epochs * self.batches_per_epoch
        if settings.compile:
            compile_layers(self.task.model.text_model)
        # not for DDP: the gradients are averaged here
        self.model = accelerator.prepare_model(self.task.model, evaluation_mode=True)
        groups = self.method.groups(self.task.model, settings.learning_rate)
        self.optimisation = optimisation_of(settings, groups, self.total_steps)
        self.step = 0
        self.history: list[dict[str, Any]] = []  # the lines of training.jsonl
        self.best: dict[str, Tensor] = {}  # the model's tensors after the best epoch so far
        self.best_epoch: dict[str, Any] = {}  # its line of the history
        self.clock = Clock(accelerator.device)
        self.stop = StopSignal()
        self.checkpoint = Checkpoint(arguments.checkpoint, self.identity, accelerator)

    # -- the loop

    def fit(self) -> None:
        """Train to the last epoch, from the checkpoint if there is one.

        Raises:
            RoutevlError: the checkpoint is damaged or of another run.
            Diverged: the loss, or a validation score, is no longer a finite number.
            SystemExit: with `exit_status`, after a stop signal; the checkpoint is then on disk.
        """
        self.stop.remember()
        self._resume()
        for _ in progress(self._steps(), self.total_steps - self.step, f"train {self.run}"):
            self._stop_if_told()
            if self.step % self.arguments.checkpoint_every == 0:
                self._save()
        self._save()
        if not self.learned:
            metric = self.task.selection[0]
            self.accelerator.print(
                f"train {self.run}: it has learned nothing: its best {metric} is {self.best_epoch[metric]:.4f}, and a constant "
                f"answer has {self.constant:.4f}",
                flush=True,
            )

    def _steps(self) -> Iterator[int]:
        if self._validation_is_due():  # the process before was stopped in it
            self._end_epoch(self.step // self.batches_per_epoch - 1)
        while self.step < self.total_steps:
            epoch, first_batch = divmod(self.step, self.batches_per_epoch)
            self.model.train()
            batches = epoch_batches(self.task, self.examples, epoch)[first_batch:]
            examples, workers = self.task.of_epoch(self.examples, epoch), self.arguments.workers
            loaded = training_batches(self.task, examples, self.accelerator, workers, batches)
            for members, batch in zip(batches, loaded, strict=True):
                self._train_step(epoch, batch, len(members))
                if self._validation_is_due():
                    self._save()
                    self._end_epoch(epoch)
                yield self.step

    def _validation_is_due(self) -> bool:
        """Whether an epoch is over, but the last line of the history is still of training."""
        return self.step % self.batches_per_epoch == 0 and bool(self.history) and "loss" in self.history[-1]

    def _train_step(self, epoch: int, batch: dict[str, Tensor], examples: int) -> None:
        self.clock.start()
        output = self.model(**batch)
        losses = {"loss": output["loss"], **self.method.losses(self.task.model, output, batch)}
        self.accelerator.backward(sum(losses.values()))
        losses = average(self.accelerator, self.optimisation.parameters, losses, output["count"], examples)
        learning_rate = self.optimisation.schedule.get_last_lr()[0]
        self.optimisation.step()
        self.step += 1
        self.method.after_step(self)
        if self.step % self.arguments.log_every == 0 or self.step % self.batches_per_epoch == 0:
            values = {name: loss.item() for name, loss in losses.items()}
            line = {"step": self.step, "epoch": epoch + 1, **values, "learning_rate": learning_rate}
            self._check_finite(line)
            self.history.append(line)
        self.clock.stop(examples)

    def _stop_if_told(self) -> None:
        if number := greatest(self.accelerator, self.stop.number):
            self._save()
            self.accelerator.end_training()
            leave(number, f"train {self.run}: told to stop, checkpoint at step {self.step}")

    def _end_epoch(self, epoch: int) -> None:
        """Validate, and remember the epoch's weights if they are the best so far."""
        with self.clock.validation(len(self.validation)):
            line = {"step": self.step, "epoch": epoch + 1, **self._validate()}
        self._check_finite(line)
        self.history.append(line)
        last_counts = self.settings.selection == "last"
        if last_counts or not self.best_epoch or self._better_by(line, self.best_epoch[self.task.selection[0]]) > 0:
            self.best_epoch = line
            self.best = {name: tensor.cpu().clone() for name, tensor in self.task.model.tensors().items()}
        values = ", ".join(f"{name} {value:.4f}" for name, value in line.items() if name.startswith("val_"))
        self.accelerator.print(f"train {self.run}: epoch {epoch + 1}/{self.settings.epochs}: {values}", flush=True)

    def _better_by(self, line: Mapping[str, Any], value: float) -> float:
        """How much better an epoch's line is than a value of the metric that chooses the best epoch."""
        metric, more_is_better = self.task.selection
        return line[metric] - value if more_is_better else value - line[metric]

    @cached_property
    def constant(self) -> float:
        """The validation metric of the best constant answer (`Task.constant`)."""
        return self.task.constant(self.validation)

    @property
    def learned(self) -> bool:
        """Whether the best epoch is better than a constant answer, by more than a thousandth of that one's value."""
        return self._better_by(self.best_epoch, self.constant) > LEAST_LEARNED * self.constant

    def _validate(self) -> dict[str, float]:
        size = self.settings.prediction_batch_size
        with self.accelerator.split_between_processes(self.validation) as share:
            batches = iter(data_loader(self.task, share, self.accelerator, self.arguments.workers, batch_size=size))
        outputs = []
        self.model.eval()
        with torch.inference_mode():
            for _ in range(math.ceil(len(self.validation) / self.accelerator.num_processes / size)):
                self._stop_if_told()
                if batch := next(batches, None):  # a process can have one batch less than others
                    outputs.append({name: value for name, value in self.model(**batch).items() if value.dim()})
        self.model.train()
        outputs = [{name: value.cpu() for name, value in output.items()} for output in outputs]
        return self.task.validate(gather_object(outputs))

    def _check_finite(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if not math.isfinite(value):
                settings = [*words_of(self.settings.options), f"learning_rate={self.settings.learning_rate}"]
                scale = " or set visual_scale to tanh or layer_norm" if "visual_scale" in self.settings.options else ""
                raise Diverged(
                    f"training diverged: {name} is {value} at step {line['step']} of {self.total_steps} of run {self.run} "
                    f"({self.settings.method} {' '.join(settings)}); lower learning_rate{scale}"
                )

    def _padding(self) -> float:
        """The share of all text positions trained on that is padding."""
        lengths = lengths_of(self.examples)
        epochs = (epoch_batches(self.task, self.examples, epoch) for epoch in range(self.settings.epochs))
        return round(statistics.fmean(share_of_padding(lengths, batches) for batches in epochs), 4)

    def _forward_flops(self) -> int:
        """FLOPs of a forward pass for each of the first `batch_size` examples of the validation split, with their padding."""
        batch = first_batch(self.task, self.validation, self.accelerator)
        return round(forward_flops(self.model, batch) / min(self.settings.batch_size, len(self.validation)))

    # -- the state

    def _save(self) -> None:
        best = {f"best/{name}": tensor for name, tensor in self.best.items()}
        record = {
            "step": self.step,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "clock": self.clock.as_record(),
        }
        self.checkpoint.save(self.task.model, self.optimisation, best, record)

    def _resume(self) -> None:
        if self.checkpoint.resume(self.task.model, self.optimisation, self._take):
            print(f"train {self.run}: resuming from step {self.step} of {self.total_steps}", file=sys.stderr, flush=True)

    def _take(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Of a checkpoint what is the trainer's own; see `Checkpoint.resume`."""
        self.step, self.history, self.best_epoch = record["step"], record["history"], record["best_epoch"]
        self.clock = Clock(self.accelerator.device, **record["clock"])
        self.best = {name.removeprefix("best/"): tensors.pop(name) for name in sorted(tensors) if name.startswith("best/")}
        refuse_other_names(self.best, self.task.model.tensors() if self.best_epoch else ())

    # -- the result

    def write_model(self, folder: Path) -> None:
        """Write the run's folder: the best epoch's weights, the last one's under last/, both with a model card, metrics,
        settings and timing. The best epoch's weights are left in the model, in all processes."""
        model = self.task.model
        state = digests(training_state(model, self.optimisation.optimiser)[0])
        if not self.accelerator.is_main_process:
            self._restore_best()
            return
        # now: the pass that counts FLOPs would raise the peak of memory
        timing = self.clock.summary() | {"processes": self.accelerator.num_processes, "padding": self._padding()}
        counts = model.trainable_params_by_part()
        with atomic_folder(folder, "run.json") as temporary:
            model.save(temporary / "last")
            self._restore_best()
            model.save(temporary)
            if self.arguments.prepared:
                shutil.copy(self.arguments.prepared, temporary / PREPARED)
            write_json(temporary / "last" / "state.json", state)
            (temporary / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.history), encoding="utf-8")
            tuned = {"tuned": read_json(self.arguments.tuned)} if self.arguments.tuned else {}
            record = {
                "run": self.run,
                "settings": self.settings.as_record(),
                **tuned,
                "inputs": self.inputs,
                "execution": self.execution,
                "best_epoch": self.best_epoch,
                "constant": {self.task.selection[0]: self.constant},
                "learned": self.learned,
                "trainable_params": sum(counts.values()),
                "trainable_params_by_part": counts,
                "total_params": sum(parameter.numel() for parameter in model.parameters()),
                "text_model_params": self.task.text_model_params,
                "forward_flops": self._forward_flops(),
            }
            write_json(temporary / "run.json", record)
            examples = {"train": len(self.examples), "val": len(self.validation), "test": len(self.to_predict)}
            card = Card(record, self.arguments, examples, model.text_model)
            card.write(temporary)
            card.write(temporary / "last", self.history[-1])
            write_json(temporary / "timing.json", timing)

    def load_model(self, folder: Path) -> bool:
        """Load the run's folder where it is finished: of the same settings, inputs, processes and threads.

        Raises:
            RoutevlError: it is, but the checkpoint is damaged or of another run.
        """
        if not (folder / "run.json").exists():
            return False
        record = read_json(folder / "run.json")
        if record.get("settings", {}) | record.get("inputs", {}) | record.get("execution", {}) != self.identity:
            return False
        if self.checkpoint.path.exists():
            self.checkpoint.read()
        self.task.model.load(folder)
        return True

    def _restore_best(self) -> None:
        tensors = self.task.model.tensors()
        for name, tensor in self.best.items():
            tensors[name].copy_(tensor)
