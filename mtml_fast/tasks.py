"""TaskRows and TaskBatch: the rows of many tasks, the one type that every floor passes on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["TaskBatch", "TaskRows"]


@dataclass(frozen=True, eq=False)
class TaskRows:
    """The rows of T tasks: rectangular `[T, N, ...]`, or packed `[R, ...]` with `offsets`.

    Args:
        x: inputs, `[T, N, ...]`, or `[R, ...]` where `offsets` is given.
        y: labels with the same leading axes as `x` (int64 classes, or float targets); `None` for rows to predict.
        offsets: int64 `[T + 1]`, increasing, from 0 to R: task t owns the rows `offsets[t]:offsets[t + 1]`.
        class_mask: bool `[T, C]`: which of the model's C outputs exist in each task (tasks of different ways).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> rows = TaskRows(torch.zeros(5, 3), torch.zeros(5), offsets=torch.tensor([0, 2, 5]))
        >>> rows.num_tasks, rows.counts.tolist()
        (2, [2, 3])
    """

    x: Tensor
    y: Tensor | None = None
    offsets: Tensor | None = None
    class_mask: Tensor | None = None

    def __post_init__(self):
        for name, value in (("x", self.x), ("y", self.y), ("offsets", self.offsets), ("class_mask", self.class_mask)):
            if not isinstance(value, Tensor) and (value is not None or name == "x"):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        lead = 1 if self.is_ragged else 2
        if self.x.dim() < lead:
            shape = "[R, ...] with offsets" if self.is_ragged else "[T, N, ...]"
            raise ValueError(f"x must be {shape}, got shape {list(self.x.shape)}")
        if self.y is not None:
            if self.y.shape[:lead] != self.x.shape[:lead]:
                rows = list(self.x.shape[:lead])
                raise ValueError(f"y must have the rows of x {rows}, got shape {list(self.y.shape)}")
            if self.y.device != self.x.device:
                raise ValueError(f"y must be on the device of x ({self.x.device}), got {self.y.device}")
        if self.is_ragged:
            check_offsets("offsets", self.offsets, self.x.shape[0])
        elif self.x.shape[0] > 0 and self.x.shape[1] == 0:
            raise ValueError(f"x must hold at least one row in every task, got shape {list(self.x.shape)}")
        if self.class_mask is not None:
            mask = self.class_mask
            if mask.dtype != torch.bool:
                raise TypeError(f"class_mask must be bool, got {mask.dtype}")
            if mask.dim() != 2 or mask.shape[0] != self.num_tasks:
                raise ValueError(f"class_mask must be [T={self.num_tasks}, C], got shape {list(mask.shape)}")

    @property
    def is_ragged(self) -> bool:
        return self.offsets is not None

    @property
    def num_tasks(self) -> int:
        return self.offsets.numel() - 1 if self.is_ragged else self.x.shape[0]

    @property
    def counts(self) -> Tensor:
        """Rows of each task, int64 `[T]`, on the CPU."""
        if self.is_ragged:
            return self.offsets.cpu().diff()
        return torch.full((self.num_tasks,), self.x.shape[1])

    def task(self, t: int) -> tuple[Tensor, Tensor | None]:
        """The rows `(x, y)` of task t."""
        if not -self.num_tasks <= t < self.num_tasks:
            raise IndexError(f"t must be a task in 0..{self.num_tasks - 1}, got {t}")
        rows = t
        if self.is_ragged:
            start, stop = self.offsets[t % self.num_tasks :][:2].tolist()
            rows = slice(start, stop)
        return self.x[rows], None if self.y is None else self.y[rows]

    def select(self, tasks: Tensor) -> TaskRows:
        """The rows of the given tasks (int64 indices), in the given order."""
        tasks = torch.as_tensor(tasks, dtype=torch.int64, device=self.x.device)
        rows, offsets = tasks, None
        if self.is_ragged:
            counts = self.offsets.diff()[tasks]
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            # first row of the task, plus the row's place inside the task
            place = torch.arange(int(offsets[-1]), device=tasks.device) - offsets[:-1].repeat_interleave(counts)
            rows = self.offsets[tasks].repeat_interleave(counts) + place
        mask = None if self.class_mask is None else self.class_mask[tasks]
        return TaskRows(self.x[rows], None if self.y is None else self.y[rows], offsets, mask)

    def to(self, *args, **kwargs) -> TaskRows:
        """As `Tensor.to`; labels, offsets and masks move device and keep their integer dtype."""
        x = self.x.to(*args, **kwargs)
        y = self.y
        if y is not None:
            y = y.to(x.device, x.dtype) if y.is_floating_point() else y.to(x.device)
        move = lambda t: None if t is None else t.to(x.device)  # noqa: E731
        return TaskRows(x, y, move(self.offsets), move(self.class_mask))

    def without_labels(self) -> TaskRows:
        return replace(self, y=None)


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """The support and query rows of the same T tasks.

    Example:
        >>> rows = TaskRows(torch.zeros(4, 5, 3), torch.zeros(4, 5, 1))
        >>> TaskBatch(support=rows, query=rows).num_tasks
        4
    """

    support: TaskRows
    query: TaskRows

    def __post_init__(self):
        for name, rows in (("support", self.support), ("query", self.query)):
            if not isinstance(rows, TaskRows):
                raise TypeError(f"{name} must be TaskRows, got {type(rows).__name__}")
        if self.support.num_tasks != self.query.num_tasks:
            tasks = self.support.num_tasks
            raise ValueError(f"query must hold the {tasks} tasks of support, got {self.query.num_tasks}")

    @property
    def num_tasks(self) -> int:
        return self.support.num_tasks

    def select(self, tasks: Tensor) -> TaskBatch:
        """The given tasks (int64 indices), in the given order."""
        return TaskBatch(self.support.select(tasks), self.query.select(tasks))

    def to(self, *args, **kwargs) -> TaskBatch:
        return TaskBatch(self.support.to(*args, **kwargs), self.query.to(*args, **kwargs))


def check_offsets(name: str, offsets: Tensor, rows: int, *, empty_tasks: bool = False, values: bool = True) -> None:
    """int64 `[T + 1]`, from 0 to the number of rows, increasing (or not decreasing, where tasks may be empty)."""
    if offsets.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.numel() < 1:
        raise ValueError(f"{name} must be [T + 1], got shape {list(offsets.shape)}")
    if not values or offsets.is_meta or torch.compiler.is_compiling():
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != rows:
        raise ValueError(f"{name} must run from 0 to the number of rows {rows}, got {first} to {last}")
    rule = "not decrease" if empty_tasks else "increase (no task may be empty)"
    for t in (offsets.diff() < (0 if empty_tasks else 1)).nonzero().flatten()[:1].tolist():
        start, stop = offsets[t : t + 2].tolist()
        raise ValueError(f"{name} must {rule}, got {start} then {stop} at task {t}")
