"""What the examples write: a table in markdown, and a picture of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

# figures of several runs, or one that stands somewhere else
Cell = Sequence[float] | float


def text(cell: Cell, digits: int = 3) -> str:
    """ "0.912 ± 0.004", the mean and the standard deviation over the runs; or the number alone."""
    if not isinstance(cell, Sequence):
        return f"{cell:.{digits}f}"
    spread = f" ± {statistics.stdev(cell):.{digits}f}" if len(cell) > 1 else ""
    return f"{statistics.mean(cell):.{digits}f}{spread}"


def table(first: str, columns: dict[str, Sequence[Cell]], rows: Sequence[str]) -> str:
    """Rows and columns by name, and a last row of means: over the rows, then over the runs."""
    lines = [[first, *columns], ["---"] * (1 + len(columns))]
    lines += [[row, *(text(column[i]) for column in columns.values())] for i, row in enumerate(rows)]
    lines += [["mean", *(text(_mean(column)) for column in columns.values())]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save_points(path: Path, title: str, columns: dict[str, Sequence[Cell]], rows: Sequence[str]) -> None:
    """A group of points a row, one a column, with its spread; a column of single numbers is a line across the group."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    axes = figure.subplots()
    measured = [name for name, column in columns.items() if isinstance(column[0], Sequence)]
    for name, column in columns.items():
        if name in measured:
            shift = (measured.index(name) - (len(measured) - 1) / 2) * 0.8 / len(measured)
            places = [i + shift for i in range(len(rows))]
            means = [statistics.mean(cell) for cell in column]
            spread = [statistics.stdev(cell) if len(cell) > 1 else 0 for cell in column]
            axes.errorbar(places, means, spread, fmt="o", markersize=4, linewidth=1, label=name)
        else:
            starts = [i - 0.43 for i in range(len(rows))]
            axes.hlines(column, starts, [start + 0.86 for start in starts], colors="black", linewidth=1, label=name)
    axes.set_xticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylabel(title)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(frameon=False, fontsize=8, ncols=len(columns), loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _mean(column: Sequence[Cell]) -> Cell:
    if not isinstance(column[0], Sequence):
        return statistics.mean(column)
    return [statistics.mean(run) for run in zip(*column, strict=True)]
