"""folds: cross-validation inside every task."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mtml_fast.data._episodes import check_int
from mtml_fast.tasks import TaskBatch, TaskRows

__all__ = ["folds", "selected"]


def folds(rows: TaskRows, count: int = 5, seed: int = 0) -> list[TaskBatch]:
    """`count` splits of every task's rows: those to learn from as support, the others as query.

    Each row is a query row once. The parts of a task differ by one row at most in size, and in the number of rows of
    each class where the targets are integers `[R]`.

    Args:
        rows: rectangular or packed, with targets.
        count: of parts; every task needs as many rows.
        seed: of the order that rows are dealt out in.

    Returns:
        Batches of packed rows, each task's in the order that they came in.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> rows = TaskRows(torch.zeros(7, 2), torch.tensor([0, 1, 0, 1, 0, 1, 1]), torch.tensor([0, 4, 7]))
        >>> [batch.query.counts.tolist() for batch in folds(rows, 2)]
        [[2, 2], [2, 1]]
    """
    count, seed = check_int("count", count, 2), check_int("seed", seed, 0)
    if rows.y is None:
        raise ValueError("rows.y must hold the targets, got None")
    if not rows.is_ragged:
        ends = torch.arange(0, rows.x.shape[0] * rows.x.shape[1] + 1, max(rows.x.shape[1], 1))
        rows = TaskRows(rows.x.flatten(0, 1), rows.y.flatten(0, 1), ends.to(rows.x.device), rows.class_mask)
    if (smallest := int(rows.counts.min())) < count:
        raise ValueError(f"count must be at most the rows of every task, {smallest} in the smallest, got {count}")
    part = torch.empty(len(rows.y), dtype=torch.int64)
    classes = rows.y.cpu().numpy() if rows.y.dim() == 1 and not rows.y.is_floating_point() else np.zeros(len(rows.y))
    for t, (start, stop) in enumerate(pairwise(rows.offsets.tolist())):
        # in an order of chance, class after class, then dealt out in turn
        order = start + np.random.default_rng([seed, t]).permutation(stop - start)
        order = order[np.argsort(classes[order], kind="stable")]
        part[torch.from_numpy(order)] = torch.arange(stop - start) % count
    return [TaskBatch(selected(rows, part != k), selected(rows, part == k)) for k in range(count)]


def selected(rows: TaskRows, chosen: Tensor) -> TaskRows:
    """The chosen rows (bool `[R]`) of packed ones, of the tasks that have any."""
    tasks = torch.arange(rows.num_tasks).repeat_interleave(rows.counts)[chosen]
    counts = tasks.bincount(minlength=rows.num_tasks)
    kept = counts > 0
    mask = None if rows.class_mask is None else rows.class_mask[kept]
    offsets = torch.cat([counts.new_zeros(1), counts[kept].cumsum(0)]).to(rows.x.device)
    return TaskRows(rows.x[chosen], rows.y[chosen], offsets, mask)
