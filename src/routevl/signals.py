"""Stop signals: every stage ends in one line and leaves nothing half-written; training writes its checkpoint first."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_STOPPED = 143  # 128 + SIGTERM, after SIGUSR1 too: a scheduler's word
EXIT_INTERRUPTED = 130  # 128 + SIGINT: Ctrl-C
AGAIN = 0.05  # seconds until Stopped is raised again where it was swallowed
SAME_PRESS = 1.0  # seconds; the terminal sends Ctrl-C to all processes, and `routevl record` passes its own on


class Stopped(KeyboardInterrupt):
    """A stop signal came; the first argument is its number."""


def exit_status(number: int) -> int:
    """The exit status of a process that was told to stop by that signal, and did so in good order."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED


def handled() -> list[signal.Signals]:
    """The stop signals of this process. A shell lets the jobs that a script starts behind itself ignore Ctrl-C: so it stays."""
    return [n for n in STOP_SIGNALS if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]


def ignore_stop_signals() -> None:
    """From here on nothing interrupts the way out, up to the end of the interpreter."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave(number: int, message: str) -> NoReturn:
    """End the process, which that signal told to stop, with a message on stderr."""
    ignore_stop_signals()  # one is enough
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(exit_status(number))


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """In the body a stop signal raises Stopped, so that files that are being written are removed on the way out.

    Libraries in C that are being imported may make an error of their own of it; that is Stopped too in the end. What Python calls
    while it frees a generator or another object swallows it: then it is raised again.
    """
    came, last = 0, -SAME_PRESS

    def stop(number: int, frame: Any) -> None:
        nonlocal came, last
        came, before, last = number, last, time.monotonic()
        if last - before >= SAME_PRESS:
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
            raise Stopped(number)

    def again(number: int, frame: Any) -> None:
        if not _is_handling_stopped():
            raise Stopped(came)

    before = {number: signal.signal(number, stop) for number in handled()}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, again)
    try:
        yield
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if came:
            ignore_stop_signals()
            raise Stopped(came) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            if signal.getsignal(number) in (stop, again):
                signal.signal(number, handler)


def _is_handling_stopped() -> bool:
    """Whether the code that was interrupted is on its way out already, such as one that removes what it has written."""
    error = sys.exception()
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


@contextmanager
def stop_handlers_kept() -> Iterator[None]:
    """What the body sets for stop signals ends with it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class StopSignal:
    """The stop signal that this process got, if any; `number` is 0 until then."""

    def __init__(self) -> None:
        self.number = 0

    def remember(self) -> None:
        """From here on a stop signal is noted, for the training loop to see."""

        def note(number: int, frame: Any) -> None:
            self.number = number

        for number in handled():
            signal.signal(number, note)

    def exit_at_once(self, message: str) -> None:
        """From here on a stop signal, or one that came before, ends the process with a message on stderr."""

        for number in handled():
            signal.signal(number, lambda number, frame: leave(number, message))
        if self.number:
            leave(self.number, message)


def ignore_stop_signals_of_others(worker: int) -> None:
    """In a process that loads batches: obey stop signals of the main process alone. A scheduler, or Ctrl-C, may signal all
    processes of a job, but the main process needs its loaders until the checkpoint is written."""
    main_process = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != main_process:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=wait, daemon=True).start()
