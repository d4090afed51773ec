"""The rows that MultiTaskMetaLearningModel takes: arrays or tensors, for one task or many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows with their targets, and the task of each row where it has only one."""

    # [R, D]
    x: Tensor
    # one tensor a task, or one for all where there are tasks: [R] or [R, O] each
    y: list[Tensor] | None
    # [R]
    tasks: Tensor | None

    def take(self, rows: Tensor | slice) -> Rows:
        y = None if self.y is None else [target[rows] for target in self.y]
        return Rows(self.x[rows], y, None if self.tasks is None else self.tasks[rows])

    def part(self, start: int, stop: int) -> Rows:
        return self.take(slice(start, stop))

    def to(self, like: Tensor) -> Rows:
        """On the device of a tensor, `x` in its dtype too."""
        y = None if self.y is None else [target.to(like.device) for target in self.y]
        return Rows(self.x.to(like), y, self.tasks)


def rows_of(x, y, tasks, num_tasks: int) -> Rows:
    """The arguments of fit, evaluate and predict as tensors, checked."""
    x = _finite("x", _tensor("x", x).float())
    if x.dim() == 1:
        x = x[:, None]
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"x must be [R, D] with at least one row, got shape {list(x.shape)}")
    if tasks is not None:
        # their values are the learner's to check
        tasks = _tensor("tasks", tasks)
        if list(tasks.shape) != [len(x)]:
            raise ValueError(f"tasks must be [R={len(x)}], got shape {list(tasks.shape)}")
    if y is not None:
        y = _targets(y, 1 if tasks is not None else num_tasks)
        for target in y:
            if target.dim() == 0 or len(target) != len(x):
                raise ValueError(f"y must have the {len(x)} rows of x, got shape {list(target.shape)}")
            _finite("y", target)
    return Rows(x, y, tasks)


def _targets(y, num_tasks: int) -> list[Tensor]:
    """One tensor a task."""
    if num_tasks == 1:
        return [_tensor("y", y)]
    if isinstance(y, (list, tuple)):
        if len(y) != num_tasks:
            raise ValueError(f"y must be {num_tasks} arrays, one a task, got {len(y)}")
        return [_tensor(f"y[{t}]", target) for t, target in enumerate(y)]
    y = _tensor("y", y)
    if y.dim() < 2 or y.shape[1] != num_tasks:
        raise ValueError(f"y must be [R, T={num_tasks}] or a list of {num_tasks} arrays, got shape {list(y.shape)}")
    return list(y.unbind(1))


def _tensor(name: str, value) -> Tensor:
    try:
        value = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be an array or a tensor of numbers, got {type(value).__name__}") from None
    if value.is_complex():
        raise TypeError(f"{name} must be real numbers, got {value.dtype}")
    return value


def _finite(name: str, value: Tensor) -> Tensor:
    if not bool(value.isfinite().all()):
        row, *rest = (~value.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {value[(row, *rest)].item()} in row {row}")
    return value
