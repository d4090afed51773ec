"""The commands put together, and typer's own errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

import mtml_fast
from mtml_fast.cli import adapt, bench, evaluate, train

app = typer.Typer(
    help="Multi-task meta-learning: train, evaluate and adapt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(train.app, name="train")
app.command("evaluate", epilog="Example: mtml-fast evaluate runs/omniglot --split test --tasks 1000")(evaluate.evaluate)
app.command("adapt", epilog="Example: mtml-fast adapt runs/omniglot --support mine.npz --query new.npz --out adapted")(
    adapt.adapt
)
app.command("bench", epilog="Example: mtml-fast bench --widths 784,256,5 --tasks 32 --support 5 --steps 5")(bench.bench)


@app.command("env", epilog="Example: mtml-fast env")
def env() -> None:
    """Print which implementation serves each operator on each device, and why."""
    from mtml_fast import env

    env.main()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mtml_fast {mtml_fast.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    try:
        code = app(list(arguments), prog_name="mtml-fast", standalone_mode=False)
    except typer.Abort:
        # what typer makes of Ctrl-C
        return 130
    except Exception as error:
        # typer's own errors, whose classes move between its versions, can format themselves
        if not hasattr(error, "format_message"):
            raise
        text = " ".join(error.format_message().split())
        # no command at all: the message is the help itself, already shown
        if text and "\n" not in error.format_message():
            print(f"error: {text}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0
