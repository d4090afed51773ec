"""Plain PyTorch, and the same under torch.compile."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import torch

from benchmarks.peers import Settings, Unavailable
from mtml_fast.cli import meta_step
from mtml_fast.cli.meta_step import MetaStep
from mtml_fast.cli.timing import Provider


def bmm(step: MetaStep, settings: Settings) -> Provider:
    return Provider(meta_step.bmm(step), torch.__version__)


def torch_func(step: MetaStep, settings: Settings) -> Provider:
    return Provider(meta_step.torch_func(step), torch.__version__)


def compiled_torch_func(step: MetaStep, settings: Settings) -> Provider:
    # graphs of other workloads count against a limit of recompilations
    torch.compiler.reset()
    call = meta_step.compiled_torch_func(step)
    start = time.perf_counter()
    try:
        with _limit(settings.compile_limit):
            call()
    except _TooLong:
        raise Unavailable(f"did not compile in {settings.compile_limit:.0f} s", recorded=True) from None
    except Exception as error:
        raise Unavailable(f"does not compile: {_first_line(error)}", recorded=True) from None
    return Provider(call, torch.__version__, time.perf_counter() - start)


class _TooLong(BaseException):
    """Not an Exception, which the compiler might catch."""


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(number, frame):
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
