"""Stop signals: a training job that is told to stop first writes its checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STOPPED = 143  # 128 + SIGTERM: told to stop, checkpoint written


class StopSignal:
    """The stop signal that this process got, if any; `number` is None until then."""

    def __init__(self) -> None:
        self.number: int | None = None

    def remember(self) -> None:
        """From here on a stop signal is noted, for the training loop to see."""

        def note(number: int, frame: Any) -> None:
            self.number = number

        for number in STOP_SIGNALS:
            signal.signal(number, note)

    def exit_at_once(self, message: str) -> None:
        """From here on a stop signal, or one that came before, ends the process with a message on stderr."""

        def leave(number: int, frame: Any) -> NoReturn:
            for other in STOP_SIGNALS:
                signal.signal(other, signal.SIG_IGN)  # one is enough, and the way out must not be interrupted
            print(message, file=sys.stderr, flush=True)
            raise SystemExit(EXIT_STOPPED)

        for number in STOP_SIGNALS:
            signal.signal(number, leave)
        if self.number:
            leave(self.number, None)


def ignore_stop_signals_of_others(worker: int) -> None:
    """In a process that loads batches: obey stop signals of the main process alone. A scheduler may signal all processes of a
    job, but the main process needs its loaders until the checkpoint is written."""
    main_process = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != main_process:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=wait, daemon=True).start()
