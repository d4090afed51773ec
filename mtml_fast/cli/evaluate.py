"""mtml-fast evaluate: measure a trained run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtml_fast.cli import report
from mtml_fast.cli.config import check_option


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder that mtml-fast train wrote.")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Of the data set.")] = "test",
    tasks: Annotated[int | None, typer.Option(help="How many tasks; as in training if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Inner steps; as in training if not given.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the data, where it has moved.")] = None,
) -> None:
    """Adapt a run's best weights to fixed tasks and print the mean and its 95 % interval."""
    if tasks is not None:
        check_option("tasks", tasks, least=2)
    if steps is not None:
        check_option("steps", steps, least=0)
    line, _ = report.evaluation(run, split=split, num_tasks=tasks, steps=steps, root=root)
    print(f"\n{line}")
