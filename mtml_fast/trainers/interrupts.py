"""Interrupts: SIGINT and SIGTERM wait for the end of the step; a second signal acts at once."""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["Interrupts"]

_NOTICE = b"\nstopping after this step (once more: stop at once)\n"


class Interrupts:
    """Inside the `with` block the first signal is only noted; afterwards `raise_received` acts on it.

    The previous handlers are back after the block. Outside the main thread, where Python allows no handlers, and for a
    signal that the process ignores (nohup), nothing changes.

    Example:
        >>> with Interrupts() as interrupts:
        ...     print("one step", interrupts.received)
        one step None
        >>> interrupts.raise_received()
    """

    def __init__(self):
        self.received: int | None = None
        self._previous = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # None is a handler that Python did not install and could not put back
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raise_received(self) -> None:
        """KeyboardInterrupt after SIGINT, SystemExit(143) after SIGTERM, nothing if no signal came."""
        if self.received is not None:
            raise _exception(self.received)

    def _handle(self, number, frame) -> None:
        if self.received is not None:
            raise _exception(number)
        self.received = number
        # print() may be in the middle of a write to the same stream
        os.write(2, _NOTICE)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
