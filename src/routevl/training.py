"""Stages `train` and `predict`: one run from stored features to a peft adapter and its predictions."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routevl import settings as run_settings
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, lock, read_json, sha256_of, write_json
from routevl.settings import RunSettings

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from routevl.tasks.base import Task

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STOPPED = 143  # 128 + SIGTERM: told to stop, checkpoint written


def add_arguments_train(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl train`."""
    _add_inputs(parser)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="where the trained adapter goes")
    parser.add_argument("--predictions", required=True, metavar="FOLDER", help="where the test split's predictions go")
    parser.add_argument(
        "--checkpoint", required=True, metavar="FOLDER", help="state of an unfinished run; resumed from when there"
    )
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS", help="steps between checkpoints")
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="steps between logged losses")
    run_settings.add_arguments(parser)


def add_arguments_predict(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl predict`."""
    _add_inputs(parser)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a trained run")
    parser.add_argument("--split", default="test", help="split of --data to predict")
    parser.add_argument("--predictions", required=True, metavar="FOLDER", help="where results.json goes")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="FOLDER", help="prepared data (routevl prepare)")
    parser.add_argument("--features", required=True, metavar="FOLDER", help="stored features (routevl extract)")
    parser.add_argument("--text-backbone", required=True, metavar="FOLDER", help="the frozen text model")
    parser.add_argument("--vision-backbone", required=True, metavar="FOLDER", help="the model that made the features")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the work, on a GPU each or on the CPU")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads of each process; results depend on their number in the last bits"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that load batches, for each process; results do not depend on them"
    )


def import_libraries() -> None:
    """Import at one point what the stages need, so that start-up can be measured apart from work."""
    import accelerate  # noqa: F401
    from transformers import MODEL_MAPPING, AutoTokenizer  # noqa: F401
    from transformers.utils import logging

    from routevl.tasks import TASKS  # noqa: F401

    # what a backbone's folder has too much (the head it was pretrained with) is no news, what it lacks is an error of ours
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that peft still uses


# ------------------------------------------------------------------------------------------------ train


def run_train(arguments: argparse.Namespace) -> None:
    """Train, resuming where an earlier process stopped; then write the adapter folder and the predictions.

    Raises:
        RoutevlError: wrong settings or inputs; the loss is no longer a finite number.
        SystemExit: with EXIT_STOPPED, after SIGTERM or SIGUSR1; the checkpoint is then on disk.
    """
    settings = run_settings.from_arguments(arguments)
    _check_execution(arguments)
    run = Path(arguments.model).name
    accelerator = new_accelerator(settings)
    with lock(Path(arguments.checkpoint) / "lock") if accelerator.is_main_process else nullcontext() as held:
        if held:
            os.register_at_fork(after_in_child=held.close)  # else loaders hold it for seconds after this process was killed
        accelerator.wait_for_everyone()
        trainer = Trainer(settings, arguments, run, accelerator)
        trainer.fit()
        trainer.write_model(Path(arguments.model))
        trainer.exit_when_told_to_stop()
        write_predictions(trainer.task, accelerator, Path(arguments.predictions), trainer.to_predict, arguments.workers)
        if accelerator.is_main_process:
            shutil.rmtree(arguments.checkpoint)
    accelerator.end_training()


def _check_execution(arguments: argparse.Namespace) -> None:
    """Raise RoutevlError where an option about how to run, not what, is out of range; a stage has some of them."""
    for name, least in (("processes", 1), ("threads", 1), ("workers", 0), ("checkpoint_every", 1), ("log_every", 1)):
        value = getattr(arguments, name, least)
        if value < least:
            raise RoutevlError(f"--{name.replace('_', '-')} {value}: expected {least} or more")


class Trainer:
    """One training run. `fit` can be killed at any moment and run again in a new process, to the same bits.

    Several processes train one model: each takes its share of every batch, and all make the same step. Batches, the loss over a
    batch, and so the gradients are those of one process, but for the last bits (sums are cut differently) and for dropout. Only
    the first process writes. Runs are bit-equal, resumed or not, where they have equally many processes.
    """

    def __init__(self, settings: RunSettings, arguments: argparse.Namespace, run: str, accelerator: Accelerator) -> None:
        import torch
        from accelerate.utils import set_seed
        from transformers import get_linear_schedule_with_warmup

        self.settings, self.arguments, self.run, self.accelerator = settings, arguments, run, accelerator
        prepare_torch(arguments.threads)
        set_seed(settings.seed)
        self.task, self.inputs = load_task(settings, arguments)
        if accelerator.process_index:  # the model starts the same everywhere, dropout differs
            set_seed((settings.seed + accelerator.process_index) % 2**32)
        self.examples = self.task.examples("train")
        self.validation = self.task.examples("val")
        self.to_predict = self.task.to_predict("test")  # now, so that a wrong test split is noticed before training
        for items in (self.examples, self.validation, self.to_predict):
            self.task.features.positions(items.unique("image_id"))  # an error where an image has no features
        self.inputs["data"] = _fingerprint_of_data(self.task)
        self.batches_per_epoch = math.ceil(len(self.examples) / settings.batch_size)
        self.total_steps = settings.epochs * self.batches_per_epoch
        self.parameters = [parameter for parameter in self.task.model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
        # not for DDP: _average_over_processes averages the gradients
        self.model = accelerator.prepare_model(self.task.model, evaluation_mode=True)
        self.optimiser = accelerator.prepare_optimizer(optimiser)
        self.schedule = get_linear_schedule_with_warmup(
            self.optimiser.optimizer, settings.warmup_steps(self.total_steps), self.total_steps
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []  # the lines of training.jsonl
        self.best: dict[str, torch.Tensor] = {}  # trainable tensors of the best epoch so far
        self.best_epoch: dict[str, Any] = {}  # its line of the history
        self.clock = Clock()
        self.stop_signal: int | None = None
        self.checkpoint = Path(arguments.checkpoint) / "checkpoint.safetensors"

    # -- the loop

    def fit(self) -> None:
        """Train to the last epoch, from the checkpoint if there is one."""
        from routevl.progress import progress

        for number in STOP_SIGNALS:
            signal.signal(number, self._on_stop_signal)
        self._resume()
        for _ in progress(self._steps(), self.total_steps - self.step, f"train {self.run}"):
            self._stop_if_told()
            if self.step % self.arguments.checkpoint_every == 0:
                self._save()
        self._save()

    def _on_stop_signal(self, number: int, frame: Any) -> None:
        self.stop_signal = number

    def _stop_if_told(self) -> None:
        if self._told_to_stop():
            self._save()
            print(f"train {self.run}: told to stop, checkpoint at step {self.step}", file=sys.stderr, flush=True)
            self.accelerator.end_training()
            raise SystemExit(EXIT_STOPPED)

    def _told_to_stop(self) -> bool:
        """Whether a stop signal came to any of the processes, which all ask at the same points."""
        import torch

        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        told = torch.tensor(float(self.stop_signal is not None), device=self.accelerator.device)
        return self.accelerator.reduce(told, "sum").item() > 0

    def exit_when_told_to_stop(self) -> None:
        """From here on a stop signal ends the process at once; `fit` has written its last checkpoint."""

        def leave(number: int, frame: Any) -> None:
            for other in STOP_SIGNALS:
                signal.signal(other, signal.SIG_IGN)  # one is enough, and the way out must not be interrupted
            print(f"train {self.run}: told to stop, training is done, predictions are not", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_STOPPED)

        for number in STOP_SIGNALS:
            signal.signal(number, leave)
        if self.stop_signal:
            leave(self.stop_signal, None)

    def _steps(self) -> Iterator[int]:
        if self._validation_is_due():  # the process before was stopped in it
            self._end_epoch(self.step // self.batches_per_epoch - 1)
        while self.step < self.total_steps:
            epoch, first_batch = divmod(self.step, self.batches_per_epoch)
            self.model.train()
            for batch in self._loader(epoch, first_batch):
                self._train_step(epoch, batch)
                if self._validation_is_due():
                    self._save()
                    self._end_epoch(epoch)
                yield self.step

    def _validation_is_due(self) -> bool:
        """Whether an epoch is over, but the last line of the history is still of training."""
        return self.step % self.batches_per_epoch == 0 and bool(self.history) and "loss" in self.history[-1]

    def _loader(self, epoch: int, first_batch: int) -> Any:
        """The epoch's batches from `first_batch` on; their order depends on seed and epoch alone."""
        import torch

        order = torch.randperm(len(self.examples), generator=_generator(self.settings.seed, epoch)).tolist()
        size = self.settings.batch_size
        processes = self.accelerator.process_index, self.accelerator.num_processes
        batches = EpochBatches(order[first_batch * size :], size, *processes)
        return data_loader(self.task, self.examples, self.accelerator, self.arguments.workers, batch_sampler=batches)

    def _train_step(self, epoch: int, batch: dict[str, torch.Tensor]) -> None:
        size = self.settings.batch_size
        examples = min(size, len(self.examples) - self.step % self.batches_per_epoch * size)
        self.clock.start()
        output = self.model(**batch)
        self.accelerator.backward(output["loss"])
        loss = self._average_over_processes(output["loss"].detach(), output["count"], examples)
        self.optimiser.step()
        learning_rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.optimiser.zero_grad()
        self.step += 1
        if self.step % self.arguments.log_every == 0 or self.step % self.batches_per_epoch == 0:
            line = {"step": self.step, "epoch": epoch + 1, "loss": loss.item(), "learning_rate": learning_rate}
            self._check_finite(line)
            self.history.append(line)
        self.clock.stop(examples)

    def _average_over_processes(self, loss: torch.Tensor, count: torch.Tensor, examples: int) -> torch.Tensor:
        """Give all processes the gradients of the loss over the whole batch of `examples`, and return that loss.

        Each process has a mean over `count` terms of its own, which weighs as much; a process without an example weighs nothing.
        The sum is over one flat tensor: DDP would sum in buckets that it regroups after its first step, so that from three
        processes on a resumed run would have other last bits.
        """
        import torch
        from torch.nn.utils import parameters_to_vector, vector_to_parameters

        if self.accelerator.num_processes == 1:
            return loss
        gradients = [parameter.grad for parameter in self.parameters]
        means = torch.cat([parameters_to_vector(gradients), torch.stack([loss, torch.ones_like(loss)])])
        sums = self.accelerator.reduce(means * count * (self.accelerator.process_index < examples), "sum")
        vector_to_parameters(sums[:-2] / sums[-1], gradients)
        return sums[-2] / sums[-1]

    def _end_epoch(self, epoch: int) -> None:
        """Validate, and remember the epoch's weights if they are the best so far."""
        from routevl.checkpoint import trainable_tensors

        line = {"step": self.step, "epoch": epoch + 1, **self._validate()}
        self._check_finite(line)
        self.history.append(line)
        metric, more_is_better = self.task.selection
        sign = 1 if more_is_better else -1
        if not self.best_epoch or sign * line[metric] > sign * self.best_epoch[metric]:
            self.best_epoch = line
            self.best = {name: tensor.cpu().clone() for name, tensor in trainable_tensors(self.model).items()}
        values = ", ".join(f"{name} {value:.4f}" for name, value in line.items() if name.startswith("val_"))
        self.accelerator.print(f"train {self.run}: epoch {epoch + 1}/{self.settings.epochs}: {values}", flush=True)

    def _validate(self) -> dict[str, float]:
        import torch
        from accelerate.utils import gather_object

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

    def _check_finite(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if not math.isfinite(value):
                raise RoutevlError(
                    f"training diverged: {name} is {value} at step {line['step']} of {self.total_steps} of run {self.run} "
                    f"(routing {self.settings.routing}, rank {self.settings.rank}, learning rate {self.settings.learning_rate}); "
                    "lower learning_rate or set visual_scale to tanh or layer_norm"
                )

    # -- the state

    def _save(self) -> None:
        from routevl.checkpoint import save_checkpoint, training_state

        tensors = training_state(self.model, self.optimiser.optimizer)
        if not self.accelerator.is_main_process:
            return
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        record = {
            "settings": self.settings.as_record(),
            "inputs": self.inputs,
            "processes": self.accelerator.num_processes,
            "step": self.step,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "schedule": self.schedule.state_dict(),
            "clock": self.clock.as_record(),
        }
        save_checkpoint(self.checkpoint, tensors, record)

    def _resume(self) -> None:
        from routevl.checkpoint import load_checkpoint, restore_training_state

        if not self.checkpoint.exists():
            return
        tensors, record = load_checkpoint(self.checkpoint)
        try:
            self._check_same_run(record["settings"] | record["inputs"] | {"processes": record["processes"]})
            restore_training_state(tensors, self.model, self.optimiser.optimizer)
            self.step, self.history, self.best_epoch = record["step"], record["history"], record["best_epoch"]
            self.clock = Clock(**record["clock"])
            self.schedule.load_state_dict(record["schedule"])
        except KeyError as error:
            raise RoutevlError(f"{self.checkpoint}: a damaged checkpoint (it lacks {error}); delete it to start again") from error
        self.best = {name.removeprefix("best/"): tensor for name, tensor in tensors.items() if name.startswith("best/")}
        for group, learning_rate in zip(self.optimiser.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        print(f"train {self.run}: going on from step {self.step} of {self.total_steps}", file=sys.stderr, flush=True)

    def _check_same_run(self, before: dict[str, Any]) -> None:
        """Raise RoutevlError where the unfinished run had other settings or inputs than this one; names the first."""
        now = self.settings.as_record() | self.inputs | {"processes": self.accelerator.num_processes}
        for name in now | before:
            if before.get(name) != now.get(name):
                raise RoutevlError(
                    f"{self.checkpoint}: the unfinished run has {name} {before.get(name)!r}, now it is {now.get(name)!r}: "
                    f"delete {self.checkpoint.parent} to start again"
                )

    # -- the result

    def write_model(self, folder: Path) -> None:
        """Write the run's folder: the best epoch's adapter, the last one's under last/, metrics, settings and timing.
        The best epoch's weights are left in the model, in all processes."""
        from routevl.checkpoint import digests, training_state

        model = self.model
        state = digests(training_state(model, self.optimiser.optimizer))
        if not self.accelerator.is_main_process:
            self._restore_best()
            return
        counts = model.trainable_params_by_part()
        with atomic_folder(folder) as temporary:
            model.save(temporary / "last")
            self._restore_best()
            model.save(temporary)
            write_json(temporary / "last" / "state.json", state)
            lines = "".join(_json_line(line) for line in self.history)
            (temporary / "training.jsonl").write_text(lines, encoding="utf-8")
            record = {
                "run": self.run,
                "settings": self.settings.as_record(),
                "inputs": self.inputs,
                "best_epoch": self.best_epoch,
                "trainable_params": sum(counts.values()),
                "trainable_params_by_part": counts,
                "total_params": sum(parameter.numel() for parameter in model.parameters()),
                "text_model_params": self.task.text_model_params,
            }
            write_json(temporary / "run.json", record)
            timing = self.clock.summary(self.accelerator.device) | {"processes": self.accelerator.num_processes}
            write_json(temporary / "timing.json", timing)

    def _restore_best(self) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in self.best.items():
            parameters[name].data.copy_(tensor)


class EpochBatches:
    """A batch sampler: one process's share of each batch of `batch_size` examples in a given order, the last batch smaller.

    The processes take a batch's examples in turn. One that the last batch has no example for gets the first, so that all have as
    many batches; it must not count.
    """

    drop_last = False

    def __init__(self, order: list[int], batch_size: int, process: int, processes: int) -> None:
        self.order = order
        self.batch_size = batch_size
        self.process = process
        self.processes = processes

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.order), self.batch_size):
            batch = self.order[start : start + self.batch_size]
            yield batch[self.process :: self.processes] or batch[:1]


def _json_line(record: dict[str, Any]) -> str:
    import json

    return json.dumps(record) + "\n"


def _generator(seed: int, epoch: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed((seed << 32) + epoch)


def prepare_torch(threads: int) -> None:
    """Threads as asked, and only deterministic kernels."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def new_accelerator(settings: RunSettings) -> Accelerator:
    """accelerate's view of the devices and processes at hand: a GPU for each process, else the CPU for all."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # processes can wait long for the one that waits for the lock, or has the slowest captions; dead ones are seen by the launcher
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    precision = "bf16" if settings.precision == "bfloat16" else "no"
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])


def load_task(settings: RunSettings, arguments: argparse.Namespace) -> tuple[Task, dict[str, str]]:
    """The run's task on its backbone and features, and the fingerprints of what it was built from."""
    from routevl.backbones import check_folder, fingerprint_of, load_text_backbone
    from routevl.features import Features
    from routevl.tasks import TASKS

    vision = fingerprint_of(check_folder(arguments.vision_backbone))
    features = Features(arguments.features, settings.visual_tokens, expected_fingerprint=vision)
    task_class = TASKS[settings.task]
    model, tokenizer = load_text_backbone(arguments.text_backbone, task_class.text_task)
    text = fingerprint_of(arguments.text_backbone)
    task = task_class(settings, model, tokenizer, features, Path(arguments.data))
    return task, {"text_backbone": text, "vision_backbone": vision, **task.inputs()}


def _fingerprint_of_data(task: Task) -> str:
    """sha256 (hexadecimal) over the texts that are trained on and validated with."""
    paths = [task.data / split / name for split in ("train", "val") for name in task.files]
    return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()


def data_loader(task: Task, examples: Any, accelerator: Accelerator, workers: int, **options: Any) -> Any:
    """Batches of `examples`, collated by the task, on the accelerator's device."""
    import torch
    from accelerate.data_loader import prepare_data_loader

    loader = torch.utils.data.DataLoader(
        examples,
        collate_fn=task.collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),  # its own, so that making a loader does not advance the global one
        worker_init_fn=_obey_the_main_process_alone,
        **options,
    )
    # for one process: where there are several, the options or the examples are this one's share already
    return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)


def _obey_the_main_process_alone(worker: int) -> None:
    """In a process that loads batches: pass over stop signals of others. A scheduler may signal all processes of a job, but
    the main process needs its loaders until the checkpoint is written."""
    main_process = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != main_process:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=wait, daemon=True).start()


class Clock:
    """How long training takes. Kept apart from the metrics, which are the same in every repetition."""

    def __init__(self, seconds: float = 0.0, step_seconds: list[float] | None = None, samples: int = 0) -> None:
        self.seconds = seconds
        self.step_seconds = step_seconds or []
        self.samples = samples

    def start(self) -> None:
        import time

        self._started = time.perf_counter()

    def stop(self, samples: int) -> None:
        import time

        self.step_seconds.append(round(time.perf_counter() - self._started, 6))
        self.seconds += self.step_seconds[-1]
        self.samples += samples

    def as_record(self) -> dict[str, Any]:
        """What `Clock(**record)` goes on from."""
        return {"seconds": self.seconds, "step_seconds": self.step_seconds, "samples": self.samples}

    def summary(self, device: torch.device) -> dict[str, Any]:
        """What timing.json holds; memory in MiB, of the GPU where there is one, else of this process."""
        import resource
        import statistics

        import torch

        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {
            "train_seconds": round(self.seconds, 3),
            "steps": len(self.step_seconds),
            "step_ms_median": round(1000 * statistics.median(self.step_seconds), 3),
            "samples_per_second": round(self.samples / self.seconds, 1),
            "peak_memory_mb": round(peak, 1),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        }


# -------------------------------------------------------------------------------------------- predict


def run_predict(arguments: argparse.Namespace) -> None:
    """Predict a split with a trained run.

    Raises:
        RoutevlError: not a trained run, or one of another text or vision model than those given.
    """
    _check_execution(arguments)
    prepare_torch(arguments.threads)
    path = Path(arguments.model) / "run.json"
    record = read_json(path)
    if not (isinstance(record, dict) and all(isinstance(record.get(name), dict) for name in ("settings", "inputs"))):
        raise RoutevlError(f"{path}: not the record of a trained run")
    settings = RunSettings.from_record(record["settings"], str(path))
    accelerator = new_accelerator(settings)
    task, inputs = load_task(settings, arguments)
    for name, fingerprint in inputs.items():
        trained = record["inputs"].get(name, "none")
        if trained != fingerprint:
            given = f"{arguments.data}/answers.json" if name == "answers" else getattr(arguments, name)
            raise RoutevlError(
                f"{arguments.model}: an adapter of another model: it was trained with the {name} of fingerprint "
                f"{trained[:12]}, but {given} has {fingerprint[:12]}"
            )
    task.model.load(Path(arguments.model))
    task.model.to(accelerator.device)
    write_predictions(task, accelerator, Path(arguments.predictions), task.to_predict(arguments.split), arguments.workers)
    accelerator.end_training()


def write_predictions(task: Task, accelerator: Accelerator, folder: Path, items: Any, workers: int) -> None:
    """Predict items with the task's model and write results.json in the official format, in the order of the items."""
    import torch
    from accelerate.utils import gather_object

    from routevl.progress import progress

    model = task.model.eval()
    with accelerator.split_between_processes(items) as share:  # in their order, which gathering keeps
        loader = data_loader(task, share, accelerator, workers, batch_size=task.settings.prediction_batch_size)
    results = []
    with torch.inference_mode(), accelerator.autocast():
        for batch in progress(loader, len(loader), f"predict {folder.name}"):
            results += task.predict(model, batch)
    results = gather_object(results)
    if accelerator.is_main_process:
        with atomic_folder(folder) as temporary:
            write_json(temporary / "results.json", results)
