"""The command line: `routevl <stage> --option value ...`, one stage per step of the workflow."""

from __future__ import annotations

import argparse
import atexit
import errno
import importlib
import os
import select
import signal
import sys
from typing import NoReturn

from routevl.errors import RoutevlError
from routevl.signals import exit_status, stop_signals_raise
from routevl.startup import importing, log_modules

# stage -> (module with its add_arguments and run, suffix of these, what it does); in the order in which data flows
STAGES = {
    "methods": ("routevl.methods.table", "", "list the fine-tuning methods with their options"),
    "rehearsal-sheet": ("routevl.rehearsal", "", "write the run sheet of a rehearsal"),
    "world": ("routevl.data.world", "", "write the demo world in the file formats of COCO, VQAv2, GQA and NLVR2"),
    "download": ("routevl.data.download", "_download", "get one file of the official data and verify it"),
    "unpack": ("routevl.data.download", "_unpack", "unpack a downloaded archive"),
    "prepare": ("routevl.data.prepare", "", "check COCO and VQAv2 files, split them, build the answer vocabulary"),
    "fetch-backbone": ("routevl.backbones.fetch", "", "copy a model of the Hugging Face hub into a folder"),
    "pretrain-text": ("routevl.backbones.pretrain_text", "", "pretrain a small text backbone on text alone"),
    "pretrain-vision": ("routevl.backbones.pretrain_vision", "", "pretrain a small vision backbone on images alone"),
    "derive-backbone": ("routevl.backbones.derive", "", "make a backbone of another one, such as a pruned one"),
    "check-models": ("routevl.training.check", "", "say whether the models of a run sheet fit together"),
    "extract": ("routevl.features.extract", "", "extract one shard of visual features"),
    "index-features": ("routevl.features.index", "", "check feature shards and index them"),
    "probe": ("routevl.training.prepared", "", "what a method looks at before training"),
    "tune": ("routevl.training.tune", "", "choose the learning rate of an experiment by the validation split"),
    "train": ("routevl.training.train", "", "train one run and predict the test split"),
    "predict": ("routevl.training.predict", "", "predict with a trained run"),
    "inside": ("routevl.training.inside", "", "measure what the routing functions of a trained run do"),
    "score": ("routevl.metrics.score", "", "score a run's predictions"),
    "vqa-score": ("routevl.metrics.vqa", "", "score a VQAv2 results file as the official evaluator does"),
    "caption-score": ("routevl.metrics.captions", "", "score a COCO captions results file"),
    "gqa-score": ("routevl.metrics.gqa", "", "score a GQA results file as the official evaluator does"),
    "nlvr2-score": ("routevl.metrics.nlvr2", "", "score an NLVR2 results file as the official evaluator does"),
    "table": ("routevl.reporting.tables", "", "make a table from results"),
    "figure": ("routevl.reporting.figures", "", "draw a figure from results"),
    "headline": ("routevl.reporting.headline", "", "say in one screen what came out, from the tables"),
    "release": ("routevl.reporting.release", "", "write a run with its model card as it can be published"),
    "record": ("routevl.provenance.record", "", "run a job's command and write its manifest"),
    "audit": ("routevl.provenance.audit", "", "say whether an output and all that it was made from still stands"),
    "crate": ("routevl.provenance.crate", "", "describe results and all their jobs as a Workflow Run RO-Crate"),
    "provenance": ("routevl.provenance.summary", "", "write a page that says what made the results"),
    "compare": ("routevl.training.compare", "", "say whether two trained runs are bit-equal"),
    "startup-report": ("routevl.startup", "", "say how much of a workflow's time was start-up"),
}


# what the disk or the user can cause, as against a fault of the program
USER_ERRORS = {
    getattr(errno, name) for name in "ENOENT ENOTDIR EISDIR EEXIST ENOTEMPTY EACCES EPERM EROFS ENOSPC EDQUOT EFBIG EIO".split()
}


class Parser(argparse.ArgumentParser):
    """A parser that ends as all bad input does: with one line, not with its usage."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")


def main() -> None:
    """Run one stage. Bad input, or a library that is not installed, ends with one line on stderr and exit status 2; a stop signal
    with one line too, and 130 after Ctrl-C, 143 after SIGTERM or SIGUSR1."""
    try:
        with stop_signals_raise():
            _run()
    except KeyboardInterrupt as error:
        number = signal.Signals(next(iter(error.args), signal.SIGINT))
        _fail(f"{sys.argv[1]}: stopped by {number.name}", exit_status(number))
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        raise SystemExit(128 + signal.SIGPIPE) from None
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == "routevl":
            raise
        extra = "metrics" if STAGES[sys.argv[1]][0].startswith("routevl.metrics.") else "workflow"
        _fail(f"{sys.argv[1]} needs {error.name}: pip install 'routevl[{extra}]'")


def program() -> None:
    """`main` as the program. After a success the process ends at once: an interpreter that takes down what the libraries hold is
    busy for more than a second, in each of hundreds of jobs. What asked to be called at the end is."""
    main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _run() -> None:
    parser = Parser(prog="routevl", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="stage", required=True, metavar="stage")
    chosen = sys.argv[1] if len(sys.argv) > 1 else None
    module, suffix = None, ""
    for stage, (name, end, help) in STAGES.items():
        subparser = subparsers.add_parser(stage, help=help, description=help, allow_abbrev=False)
        if stage == chosen:  # only the chosen stage's module is imported
            with importing(stage):
                module, suffix = importlib.import_module(name), end
            getattr(module, "add_arguments" + suffix)(subparser)
    arguments = parser.parse_args()
    try:
        getattr(module, "run" + suffix)(arguments)
        sys.stdout.flush()
        log_modules()
    except RoutevlError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in USER_ERRORS:
            raise
        _fail(f"{error.filename or 'writing'}: {error.strerror}")


def _nobody_reads(pipe: int) -> bool:
    """Whether the reader of a pipe has gone, as `head` does when it has seen enough."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(message: str, status: int = 2) -> NoReturn:
    print("routevl: error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)
