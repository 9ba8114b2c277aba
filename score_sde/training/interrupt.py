"""Ends a run cleanly: the first signal is recorded for the training loop to see, a second has its usual effect.

The signals are SIGTERM, SIGINT (Ctrl-C), and those that schedulers send before a time limit or a preemption: SIGUSR1 and
SIGUSR2.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["hand_on", "interrupts"]

NOTED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


@contextmanager
def interrupts() -> Iterator[list[signal.Signals]]:
    """A list to which the first such signal is appended; outside the main thread, signals are left alone."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    usual = {number: signal.getsignal(number) for number in NOTED}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        restore()

    for number in usual:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def hand_on(number: signal.Signals) -> None:
    """Raises the signal again once the run has ended, for a launcher's own handler: submitit requeues the job in its."""
    if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler):
        signal.raise_signal(number)
