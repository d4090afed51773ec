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


def save_bars(path: Path, title: str, columns: dict[str, Sequence[Cell]], rows: Sequence[str]) -> None:
    """A group of bars a row, one bar a column; a column of single numbers becomes a line across its group."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    axes = figure.subplots()
    bars = [name for name, column in columns.items() if isinstance(column[0], Sequence)]
    width = 0.8 / len(bars)
    for name, column in columns.items():
        if name in bars:
            means = [statistics.mean(cell) for cell in column]
            spread = [statistics.stdev(cell) if len(cell) > 1 else 0 for cell in column]
            places = [i + (bars.index(name) - (len(bars) - 1) / 2) * width for i in range(len(rows))]
            axes.bar(places, means, width, yerr=spread, error_kw={"linewidth": 0.8}, label=name)
        else:
            starts = [i - 0.43 for i in range(len(rows))]
            axes.hlines(column, starts, [start + 0.86 for start in starts], colors="black", linewidth=1.2, label=name)
    lowest = min(statistics.mean(c) if isinstance(c, Sequence) else c for column in columns.values() for c in column)
    axes.set_ylim(bottom=int(lowest * 10 - 0.5) / 10)
    axes.set_xticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylabel(title)
    axes.legend(frameon=False, fontsize=8, ncols=len(columns), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _mean(column: Sequence[Cell]) -> Cell:
    if not isinstance(column[0], Sequence):
        return statistics.mean(column)
    return [statistics.mean(run) for run in zip(*column, strict=True)]
