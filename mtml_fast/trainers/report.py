"""Reports of a run: the history as CSV, its curves as a PNG, a table as text."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence

from mtml_fast.files import write_atomically

__all__ = ["HISTORY", "save_curves", "save_figure", "save_history", "table"]

HISTORY = ("step", "train_loss", "train_accuracy", "validation", "tasks_per_second", "seconds")


def save_history(path: str | os.PathLike, rows: Sequence[dict]) -> None:
    """Write rows of `HISTORY` as CSV; a value that was not measured is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HISTORY, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def save_curves(path: str | os.PathLike, rows: Sequence[dict], monitor: str | None = None) -> None:
    """Draw the loss (and the accuracy, where there is one) against the meta-step.

    Args:
        rows: rows of `HISTORY`.
        monitor: what the column `validation` holds: "loss", "accuracy" or another metric.
    """
    columns = {name: [(row["step"], row[name]) for row in rows if row[name] is not None] for name in HISTORY}
    panels = {"loss": columns["train_loss"]}
    if columns["train_accuracy"] or (columns["validation"] and monitor != "loss"):
        panels[monitor if columns["validation"] and monitor != "loss" else "accuracy"] = columns["train_accuracy"]

    figure = new_figure(width=4.6 * len(panels), height=3.2)
    for axes, (name, train) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        if train:
            axes.plot(*zip(*train, strict=True), color="#1f77b4", linewidth=0.6, alpha=0.35)
            axes.plot(*zip(*_smoothed(train), strict=True), color="#1f77b4", linewidth=1.6, label="training")
        if name == monitor and columns["validation"]:
            style = {"color": "#d62728", "linewidth": 1.4, "marker": "o", "markersize": 3}
            axes.plot(*zip(*columns["validation"], strict=True), **style, label="validation")
        if name == "loss" and all(value > 0 for _, value in train):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        axes.set_xlabel("meta-step")
        axes.set_ylabel("query loss" if name == "loss" else f"query {name}")
        axes.xaxis.set_major_locator(_few_ticks())
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    save_figure(figure, path)


def new_figure(width: float, height: float):
    """An empty matplotlib figure in inches, without pyplot and so without any global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'mtml_fast[train]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: str | os.PathLike) -> None:
    """Write a figure as a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, content.getvalue())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, the first column to the left and the others to the right.

    Example:
        >>> print(table(["steps", "MSE"], [["1", "0.67"], ["10", "0.35"]]))
        steps   MSE
        -----  ----
        1      0.67
        10     0.35
    """
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells):
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    # the mean over a fiftieth of the run, so that noise of single rows does not hide the course
    width = max(1, len(points) // 50)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]


def _plain_ticks(axis) -> None:
    """0.2, 0.5, 1, 2, ... on a logarithmic axis, which matplotlib would write as powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _few_ticks():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=True)
