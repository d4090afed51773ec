"""The command line: `mtml-fast train | evaluate | adapt | env`, also `python -m mtml_fast`.

Errors are one line on stderr; MTML_FAST_DEBUG=1 shows the traceback. Exit codes: 0 done, 1 training failed, 2 bad
input, 130 and 143 stopped by Ctrl-C and SIGTERM (a run that was stopped goes on when the command is given again).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

__all__ = ["main"]

_BAD_INPUT = (ValueError, TypeError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # `train` alone, or with options alone, means the paper's sinusoid experiment
    first = arguments[1] if len(arguments) > 1 else "-"
    if arguments[:1] == ["train"] and first.startswith("-") and first not in ("-h", "--help"):
        arguments.insert(1, "sinusoid")
    try:
        with warnings.catch_warnings():
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


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
