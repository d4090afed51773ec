"""The command line: `mtml-fast train | evaluate | adapt | env`, also `python -m mtml_fast`.

Errors are one line on stderr; MTML_FAST_DEBUG=1 shows the traceback. Exit codes: 0 done, 1 training failed, 2 bad
input, 130 and 143 stopped by Ctrl-C and SIGTERM (a run that was stopped goes on when the command is given again).

A Ctrl-C in the first second or two, while Python still imports torch for the package, comes before any line of this
file: a shell sees 130 then as well, but with Python's traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from mtml_fast.cli.presets import expanded

__all__ = ["main"]

_BAD_INPUT = (ValueError, TypeError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"]:
            arguments[1:] = expanded(arguments[1:])
            # alone, or with options alone, it means the paper's sinusoid experiment
            first = arguments[1] if len(arguments) > 1 else "-"
            if first.startswith("-") and first not in ("-h", "--help"):
                arguments.insert(1, "sinusoid")
        with _sigterm_as_exit(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {_one_line(message)}", file=sys.stderr)
            return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("MTML_FAST_DEBUG") == "1":
            raise
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            # without the number that Python puts in front
            text = error.strerror
        elif isinstance(error, (*_BAD_INPUT, FloatingPointError)):
            text = str(error)
        else:
            text = f"{type(error).__name__}: {error} (MTML_FAST_DEBUG=1 shows where)"
        print(f"error: {_one_line(text)}", file=sys.stderr)
        return 2 if isinstance(error, _BAD_INPUT) else 1


def _run(arguments: Sequence[str]) -> int:
    try:
        from mtml_fast.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        raise ImportError(f"the command line needs {error.name}: pip install 'mtml_fast[train]'") from None
    return run(arguments)


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SystemExit(143) where SIGTERM would kill at once: files that are being written are tidied up."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    own = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
