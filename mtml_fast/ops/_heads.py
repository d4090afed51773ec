"""The arguments that heads and heads_loss share."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_fast.ops import _check
from mtml_fast.ops.heads.reference import ACTIVATIONS


def checked_heads(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation) -> tuple:
    """The arguments of a batch of heads, checked."""
    x = _check.widened(x, weight)
    _check.floating("x", x)
    _check.shape("x", x, ("R", None), ("D", None))
    _check.offsets("offsets", offsets, x, empty_tasks=True)
    tasks, features = offsets.numel() - 1, x.shape[1]
    _check.choice("activation", activation, tuple(ACTIVATIONS))
    if hidden_weight is not None:
        _check.floating("hidden_weight", hidden_weight, like=x, like_name="x")
        _check.shape("hidden_weight", hidden_weight, ("T", tasks), ("H", None), ("D", features))
        features = hidden_weight.shape[1]
    if hidden_bias is not None:
        if hidden_weight is None:
            raise ValueError(f"hidden_bias must be None without hidden_weight, got shape {list(hidden_bias.shape)}")
        _check.floating("hidden_bias", hidden_bias, like=x, like_name="x")
        _check.shape("hidden_bias", hidden_bias, ("T", tasks), ("H", features))
    _check.floating("weight", weight, like=x, like_name="x")
    _check.shape("weight", weight, ("sum of C_t", None), ("D" if hidden_weight is None else "H", features))
    if out_offsets is not None:
        _check.offsets("out_offsets", out_offsets, weight)
        _check.shape("out_offsets", out_offsets, ("T + 1", tasks + 1))
    elif tasks and weight.shape[0] % tasks:
        raise ValueError(
            f"weight must have equally many rows for each of the {tasks} tasks (or out_offsets must be given), "
            f"got {weight.shape[0]}"
        )
    if bias is not None:
        _check.floating("bias", bias, like=x, like_name="x")
        _check.shape("bias", bias, ("sum of C_t", weight.shape[0]))
    return x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation


def sorted_by_task(task_index, x, offsets, weight, out_offsets, hidden_weight) -> tuple[Tensor, Tensor]:
    """The order that puts unsorted rows task after task, each task's as they come, and its offsets."""
    _check.tensor("x", x)
    if offsets is not None:
        raise ValueError("offsets must be None where task_index says whose the rows are")
    _check.same_device("task_index", _check.tensor("task_index", task_index), x, "x")
    if task_index.dtype != torch.int64:
        raise TypeError(f"task_index must be int64, got {task_index.dtype}")
    _check.shape("task_index", task_index, ("R", x.shape[0] if x.dim() else 0))
    if hidden_weight is not None:
        tasks = _check.tensor("hidden_weight", hidden_weight).shape[0]
    elif out_offsets is not None:
        tasks = _check.tensor("out_offsets", out_offsets).numel() - 1
    else:
        raise ValueError("out_offsets must be given with task_index (they say how many tasks there are)")
    if _check.readable(task_index) and task_index.numel():
        low, high = map(int, task_index.aminmax())
        if low < 0 or high >= tasks:
            raise ValueError(f"task_index must be in 0..{tasks - 1}, got {low if low < 0 else high}")
    counts = torch.zeros(tasks, dtype=torch.int64, device=x.device).index_add(
        0, task_index, torch.ones_like(task_index)
    )
    return torch.argsort(task_index, stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def equal_width(weight: Tensor, out_offsets: Tensor | None, tasks: int) -> int | None:
    """How many outputs every task has; `None` where they differ, or where that cannot be read."""
    if out_offsets is None:
        return weight.shape[0] // max(tasks, 1)
    if not _check.readable(out_offsets) or tasks == 0 or weight.shape[0] % tasks:
        return None
    width = weight.shape[0] // tasks
    return width if bool((out_offsets.diff() == width).all()) else None
