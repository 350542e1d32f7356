"""One stage in several processes: its command line once per process, started and watched by torch's elastic launcher."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from routevl.errors import RoutevlError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"  # where a process leaves its error to the launcher


def is_launched() -> bool:
    """Whether this process is one of several that a launcher (`launch` or torchrun) has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(processes: int) -> None:
    """Run this command line in `processes` processes on this machine, each on a GPU of its own where there are GPUs.

    Only the first process's output is shown. Stop signals are passed on; when a process ends badly, the others are told to stop
    and killed after half a minute.

    Raises:
        RoutevlError: there are fewer GPUs; or what one of the processes raised.
        SystemExit: told to stop, or with the status of the process that ended badly first.
    """
    import logging
    import tempfile
    import uuid

    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from routevl.training import EXIT_STOPPED, STOP_SIGNALS

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise RoutevlError(f"--processes {processes}: each needs a GPU of its own, but there are {gpus}")
    logging.disable()  # of the launcher alone: what it has to say follows from how the processes end
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else accelerate sets torch's threads; --threads does
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder, local_ranks_filter={0}),
            signals_to_handle="SIGTERM,SIGUSR1,SIGINT,SIGHUP,SIGQUIT",
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", __name__, *sys.argv[1:])
        except SignalException as error:
            raise SystemExit(EXIT_STOPPED if error.sigval in STOP_SIGNALS else 128 + error.sigval) from None
        except ChildFailedError as error:
            _end_as(error.failures, processes)


def _end_as(failures: dict[int, ProcessFailure], processes: int) -> NoReturn:
    """End as the processes did; `failures` are in the order in which they were noticed, so the first is the cause."""
    for failure in failures.values():
        if os.path.exists(failure.error_file) and isinstance(failure.message, str):  # of `leave_to_launcher`
            raise RoutevlError(failure.message)
    rank, failure = next(iter(failures.items()))
    if failure.exitcode < 0:
        print(f"routevl: error: process {rank + 1} of {processes} was ended by {failure.signal_name()}", file=sys.stderr)
        raise SystemExit(128 - failure.exitcode)
    if os.path.exists(failure.error_file):
        print(failure.message["extraInfo"]["py_callstack"], file=sys.stderr)
    raise SystemExit(failure.exitcode)


def leave_to_launcher(message: str) -> bool:
    """Leave an error of this process to the launcher, which says it once for all; False where there is no launcher."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path:
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    return bool(path)


def main() -> None:
    """Run the command line in one of the processes of `launch`."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from routevl import cli

    try:
        cli.main()
    except Exception as error:  # a fault of the program, shown by the launcher too
        get_error_handler().record_exception(error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
