"""The tables of results.md from run folders: python docs/results_table.py runs/maml-*

One row a run (its result.json), and for every figure the mean over the runs of the same experiment, whose spread is
over seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def main(folders: list[str]) -> None:
    experiments: dict[str, list[dict]] = {}
    for folder in folders:
        result = json.loads((Path(folder) / "result.json").read_text())
        experiments.setdefault(_name(result["settings"]), []).append(result)
    for name, results in experiments.items():
        print(f"\n## {name}\n\n{_table(sorted(results, key=lambda result: result['settings']['seed']))}")


def _name(settings: dict) -> str:
    if settings["experiment"] == "sinusoid":
        return "sinusoid"
    return f"{settings['experiment']}, {settings['ways']}-way {settings['shots']}-shot"


def _table(results: list[dict]) -> str:
    columns = [(figure["shots"], figure["steps"]) for figure in results[0]["figures"]]
    metric = results[0]["figures"][0]["metric"]
    head = ["seed", "iterations", "training", *(_column(metric, *column) for column in columns)]
    rows = [head, ["---"] * len(head)]
    means: dict[tuple, list[float]] = {column: [] for column in columns}
    for result in results:
        row = [str(result["settings"]["seed"]), f"{result['iterations']:,}", _duration(result["training_seconds"])]
        for column, figure in zip(columns, result["figures"], strict=True):
            means[column].append(figure["mean"])
            row.append(f"{figure['mean']:.3f} ± {figure['ci95']:.3f}")
        rows.append(row)
    if len(results) > 1:
        seeds = [f"{statistics.mean(values):.3f} (s {statistics.stdev(values):.3f})" for values in means.values()]
        rows.append([f"mean of {len(results)}", "", "", *seeds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _column(metric: str, shots: int, steps: int) -> str:
    counts = [f"{n} {name}{'s' * (n != 1)}" for n, name in ((shots, "shot"), (steps, "step"))]
    return ", ".join([metric, *counts])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    main(sys.argv[1:])
