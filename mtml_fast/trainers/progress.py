"""Progress: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

__all__ = ["Progress"]

_BAR_SECONDS = 0.3
_LINE_SECONDS = 10.0


class Progress:
    """Shows `text()` beside the step, on stderr; between two updates a call costs one reading of the clock.

    Args:
        start, total: the first and the last step.
        enabled: False shows nothing.
    """

    def __init__(self, start: int, total: int, enabled: bool = True):
        self._start, self._total = start, total
        self._bar, self._every = None, float("inf")
        if enabled:
            terminal = sys.stderr.isatty()
            self._bar = _bar(start, total) if terminal else None
            self._every = _BAR_SECONDS if self._bar is not None else _LINE_SECONDS
        self._begun = time.perf_counter()
        self._next = self._begun + self._every

    def step(self, step: int, now: float, text: Callable[[], str]) -> None:
        if now < self._next:
            return
        self._next = now + self._every
        if self._bar is not None:
            self._bar.set_postfix_str(text(), refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            left = (now - self._begun) / (step - self._start) * (self._total - step)
            print(f"step {step:,} of {self._total:,}  {text()}  {_duration(left)} left", file=sys.stderr, flush=True)

    def close(self, step: int, text: Callable[[], str]) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text(), refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.close()


def _bar(start: int, total: int):
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=0)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
