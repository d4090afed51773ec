"""TensorTasks and TensorClasses: episodes from the user's own rows."""

from __future__ import annotations

import numbers
import zlib

import numpy as np
import torch
from torch import Tensor

from mtml_fast.data._episodes import ClassEpisodes, Episodes, check_dtype, check_int
from mtml_fast.data._random import Draws, places
from mtml_fast.tasks import TaskBatch, TaskRows, check_offsets

__all__ = ["TensorClasses", "TensorTasks"]


class TensorTasks(Episodes):
    """Your own tasks: draws tasks, and of each task different rows as support and as query.

    Every task of a step is a different one until all have been drawn, then all once more: `sample(len(tasks))` holds
    each task once.

    Args:
        x: inputs: tasks of equal sizes as `[T, N, ...]`, or the rows of all tasks as `[R, ...]` with `task_id` or
            `offsets`. Tensor or NumPy array. Floating values become `dtype`, integers (tokens) stay.
        y: integer labels 0 .. C - 1 (loss "cross_entropy"), or floating targets (loss "mse"), with the leading axes
            of `x`. Targets without further axes get one, `[..., 1]`, as the output of a model has.
        task_id: integers `[R]`, the task of each row, in any order; the tasks are numbered by increasing id.
        offsets: integers `[T + 1]`, from 0 to R: task t owns the rows `offsets[t]:offsets[t + 1]`.
        shots: support rows of each task: an int, or a fraction in (0, 1) of the task's rows (rounded down, at least 1).
        query_shots: query rows of each task: likewise, or `None` for all rows that are not support.
        seed: of the episodes.
        device: of the tensors; by default where `x` is.
        dtype: of floating `x` and `y`.

    Support (and likewise query) is rectangular, `[T, N, ...]`, where all tasks give the same number of rows, else
    packed with offsets.

    Raises:
        TypeError, ValueError: naming the argument, or the task that has too few rows.

    Example:
        >>> x, task_id = torch.randn(100, 3), torch.arange(100) % 7
        >>> tasks = TensorTasks(x, x.sum(-1), task_id, shots=5)
        >>> batch = tasks.sample(4, step=0)
        >>> batch.support.x.shape, batch.query.is_ragged
        (torch.Size([4, 5, 3]), True)
    """

    def __init__(
        self,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        task_id: Tensor | np.ndarray | None = None,
        offsets: Tensor | np.ndarray | None = None,
        *,
        shots: int | float = 0.5,
        query_shots: int | float | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        check_dtype(dtype)
        packed = task_id is not None or offsets is not None
        x, y = _check_rows(x, y, axes=1 if packed else 2, dtype=dtype)
        if not packed:
            ids, counts = np.arange(x.shape[0]), np.full(x.shape[0], x.shape[1])
            x, y = x.flatten(0, 1), y.flatten(0, 1)
        elif task_id is None:
            offsets = _as_tensor("offsets", offsets).cpu()
            check_offsets("offsets", offsets, len(x))
            counts = offsets.diff().numpy()
            ids = np.arange(len(counts))
        elif offsets is None:
            x, y, ids, counts = _sort_by(_check_ids("task_id", task_id, len(x)), x, y)
        else:
            raise ValueError("offsets must be None where task_id is given, got both")
        if len(x) == 0:
            raise ValueError("x must hold at least one row, got none")

        shots = _check_share("shots", shots)
        query_shots = None if query_shots is None else _check_share("query_shots", query_shots)
        self._support, self._query = _sizes(shots, query_shots, counts, ids, "task" if task_id is None else "task_id")
        # of the whole pool: whether a batch is rectangular does not depend on the tasks that it drew
        self._support_equal, self._query_equal = _all_equal(self._support), _all_equal(self._query)
        self._counts, self._starts = counts, np.cumsum(counts) - counts
        self.task_ids = tuple(ids.tolist())
        self.input_shape = tuple(x.shape[1:])
        self.loss, self.outputs = "mse", y.shape[-1]
        if not y.is_floating_point():
            self.loss, self.outputs = "cross_entropy", int(y.max()) + 1
        rows = _checksum(x, y, torch.from_numpy(counts))
        device = x.device if device is None else device
        super().__init__(seed=seed, device=device, dtype=dtype, shots=shots, query_shots=query_shots, rows=rows)
        self._x, self._y = x.to(self._device), y.to(self._device)

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.task_ids)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, tasks={len(self)})"

    def task_indices(self, num_tasks: int, step: int = 0, *, first_task: int = 0) -> Tensor:
        """Which tasks `sample` with the same arguments returns, int64 `[T]`: indices into `task_ids`.

        Example:
            >>> tasks = TensorTasks(torch.zeros(3, 4, 1), torch.zeros(3, 4, 1))
            >>> sorted(tasks.task_indices(3).tolist())
            [0, 1, 2]
        """
        return torch.from_numpy(self._draws(num_tasks, step, first_task).permuted(len(self)))

    def _sample(self, num_tasks: int, step: int, first_task: int) -> TaskBatch:
        draws = Draws(self.seed, step, first_task, num_tasks)
        tasks = draws.permuted(len(self))  # [T]
        counts, starts = self._counts[tasks], self._starts[tasks]
        support, query = self._support[tasks], self._query[tasks]
        if self._support_equal and self._query_equal:
            # few rows of what may be a large task
            rows = draws.distinct(counts, int(support[0] + query[0])) + starts[:, None]  # [T, N + Q]
            of_support, of_query = rows[:, : support[0]].ravel(), rows[:, support[0] :].ravel()
        else:
            rows = draws.shuffled(counts) + np.repeat(starts, counts)  # [R]
            place, end = places(counts), np.repeat(support, counts)
            of_support = rows[place < end]
            of_query = rows[(place >= end) & (place < end + np.repeat(query, counts))]
        return TaskBatch(
            self._rows(of_support, support, self._support_equal),
            self._rows(of_query, query, self._query_equal),
        )

    def _rows(self, rows: np.ndarray, counts: np.ndarray, rectangular: bool) -> TaskRows:
        rows = torch.from_numpy(rows).to(self._device)
        x, y = self._x.index_select(0, rows), self._y.index_select(0, rows)
        if rectangular:
            lead = (len(counts), -1)
            return TaskRows(x.unflatten(0, lead), y.unflatten(0, lead))
        offsets = torch.from_numpy(np.cumsum(np.concatenate([[0], counts])))
        return TaskRows(x, y, offsets.to(self._device))


class TensorClasses(ClassEpisodes):
    """Your own labelled rows, as N-way K-shot episodes: a task is `ways` of the classes, labelled 0 .. ways - 1 anew.

    To hold classes out, give their rows to another TensorClasses. Rows are ordered by label; which class gets which
    label is random. `classes` are the labels in `y`, in increasing order.

    Args:
        x: inputs `[R, ...]`. Tensor or NumPy array. Floating values become `dtype`, integers (tokens) stay.
        y: integer class of each row, `[R]`, any integers in any order.
        ways, shots, query_shots: classes of an episode; support rows and query rows of each.
        seed: of the episodes.
        device: of the tensors; by default where `x` is.
        dtype: of floating `x`.

    Raises:
        TypeError, ValueError: naming the argument, or the class that has too few rows.

    Example:
        >>> x, y = torch.randn(100, 3), torch.arange(100) % 10
        >>> tasks = TensorClasses(x, y, ways=5, shots=2, query_shots=3)
        >>> tasks.sample(4, step=0).query.x.shape
        torch.Size([4, 15, 3])
    """

    def __init__(
        self,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        *,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        x = _check_inputs(x, check_dtype(dtype))
        y = _check_ids("y", y, len(x))
        if len(x) == 0:
            raise ValueError("x must hold at least one row, got none")
        x, y, classes, counts = _sort_by(y, x, y)
        super().__init__(
            x,
            counts,
            classes.tolist(),
            ways=ways,
            shots=shots,
            query_shots=query_shots,
            seed=seed,
            device=x.device if device is None else device,
            dtype=dtype,
            rows=_checksum(x, y),
        )


def _as_tensor(name: str, value) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        # torch shares the memory of C-ordered arrays that can be written, and only of those
        return torch.from_numpy(np.require(value, requirements=("C", "W")))
    if not isinstance(value, Tensor):
        kind = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array of numbers, got {kind}")
    return value.detach()


def _check_inputs(x, dtype: torch.dtype) -> Tensor:
    x = _as_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [R, ...], got a scalar")
    return _check_finite("x", x.to(dtype)) if x.is_floating_point() else x


def _check_rows(x, y, axes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the same rows, which have one leading axis [R] or two [T, N]."""
    x, y = _check_inputs(x, dtype), _as_tensor("y", y)
    if x.dim() < axes:
        raise ValueError(f"x must be [T, N, ...] without task_id and offsets, got shape {list(x.shape)}")
    if y.shape[:axes] != x.shape[:axes]:
        raise ValueError(f"y must have the rows of x {list(x.shape[:axes])}, got shape {list(y.shape)}")
    if y.is_floating_point():
        y = _check_finite("y", y.to(dtype))
        return x, y if y.dim() > axes else y.unsqueeze(-1)
    if y.dim() != axes:
        raise ValueError(f"y must be {list(x.shape[:axes])} where it holds integer labels, got shape {list(y.shape)}")
    if y.numel() and y.min() < 0:
        raise ValueError(f"y must hold labels from 0 on, got {int(y.min())}")
    return x, y.long()


def _check_finite(name: str, values: Tensor) -> Tensor:
    for place in (~values.isfinite()).nonzero()[:1].tolist():
        raise ValueError(f"{name} must be finite, got {values[tuple(place)].item()} at {place}")
    return values


def _check_ids(name: str, ids, rows: int) -> Tensor:
    ids = _as_tensor(name, ids)
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} must hold integers, got {ids.dtype}")
    if list(ids.shape) != [rows]:
        raise ValueError(f"{name} must be [R={rows}], one for each row of x, got shape {list(ids.shape)}")
    return ids.long()


def _check_share(name: str, value) -> int | float:
    """A number of rows, or a fraction of each task's rows."""
    if isinstance(value, numbers.Integral):
        return check_int(name, value, 1)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be an int or a fraction in (0, 1), got {value!r}")
    if not 0 < value < 1:
        raise ValueError(f"{name} must be an int or a fraction in (0, 1), got {value!r}")
    return float(value)


def _sizes(shots, query_shots, counts: np.ndarray, ids: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Support and query rows of each task, int64 `[T]` both."""

    def share(value):
        if isinstance(value, int):
            return np.full(len(counts), value)
        # 0.29 * 100 is a little less than 29 in binary
        return np.maximum(np.floor(value * counts + 1e-9).astype(np.int64), 1)

    support = share(shots)
    query = np.maximum(counts - support, 1) if query_shots is None else share(query_shots)
    for t in np.flatnonzero(support + query > counts)[:1]:
        raise ValueError(
            f"{name} {ids[t]} must have at least {support[t]} + {query[t]} rows for shots={shots} and "
            f"query_shots={query_shots}, got {counts[t]}"
        )
    return support, query


def _sort_by(ids: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """The rows ordered by id, the different ids in increasing order, and the rows of each."""
    order = ids.argsort(stable=True)
    unique, counts = ids.unique(return_counts=True)
    return x[order.to(x.device)], y[order.to(y.device)], unique.cpu().numpy(), counts.cpu().numpy()


def _checksum(*tensors: Tensor) -> str:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(repr((tensor.dtype, tuple(tensor.shape))).encode(), value)
        value = zlib.crc32(tensor.contiguous().cpu().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def _all_equal(sizes: np.ndarray) -> bool:
    return bool((sizes == sizes[0]).all())
