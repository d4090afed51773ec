"""What all data sets share: `sample`, fingerprint and checks; and N-way K-shot episodes from a pool of classes."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtml_fast.data._random import VERSION, Draws
from mtml_fast.tasks import TaskBatch, TaskRows

__all__ = ["ClassEpisodes", "DrawnAhead", "Episodes", "check_choice", "check_dtype", "check_int"]

# tasks whose random numbers are drawn in one go: NumPy's calls then cost next to nothing a step, and what waits for its
# step stays small (a few 100 KiB)
_TASKS_AHEAD = 1024
# bytes: below, the allocator has memory at hand; above, it would be much to hold on to
_REUSED = range(1 << 17, 1 << 26)
_HOST = torch.device("cpu")


class Episodes:
    """Tasks as a pure function of (seed, step, task index).

    Attributes:
        seed: the seed of the episodes.
        loss: "mse" or "cross_entropy", the natural loss.
        input_shape: shape of one row of `x`.
        outputs: width of the model's output.
    """

    loss: str
    input_shape: tuple[int, ...]
    outputs: int

    def __init__(self, *, seed: int, device, dtype: torch.dtype, **settings):
        self.seed = check_int("seed", seed, 0)
        self._device = torch.device("cpu" if device is None else device)
        self._dtype = check_dtype(dtype)
        self._settings = settings

    def sample(self, num_tasks: int, step: int = 0, *, first_task: int = 0) -> TaskBatch:
        """Tasks `first_task .. first_task + num_tasks - 1` of a step, always the same ones for the same seed.

        A slice of a step equals that slice of the whole step, so ranks can share a step without talking.

        Raises:
            TypeError, ValueError: for counts that are not integers or are out of range.
        """
        num_tasks = check_int("num_tasks", num_tasks, 1)
        return self._sample(num_tasks, check_int("step", step, 0), check_int("first_task", first_task, 0))

    @property
    def device(self) -> torch.device:
        """Where the tasks lie."""
        return self._device

    @property
    def fingerprint(self) -> str:
        """All settings that define the episodes, in one line; equal fingerprints mean equal episodes."""
        settings = {**self._settings, "seed": self.seed, "dtype": str(self._dtype).removeprefix("torch.")}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in settings.items())}, version={VERSION})"

    def __repr__(self) -> str:
        settings = {**self._settings, "seed": self.seed}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"

    def _draws(self, num_tasks: int, step: int, first_task: int) -> Draws:
        num_tasks = check_int("num_tasks", num_tasks, 1)
        step, first_task = check_int("step", step, 0), check_int("first_task", first_task, 0)
        return Draws(self.seed, step, first_task, num_tasks)

    def _sample(self, num_tasks: int, step: int, first_task: int) -> TaskBatch:
        """The tasks: what each data set adds."""
        raise NotImplementedError


class DrawnAhead(Episodes):
    """Episodes whose random part is arrays `[T, ...]`, drawn for many steps at once where the steps come in turn."""

    # (seed, num_tasks, first_task), the first step, the step after the last, the arrays of all of them: replaced as a
    # whole, so that threads may share a data set
    _drawn: tuple | None = None

    def _sample(self, num_tasks: int, step: int, first_task: int) -> TaskBatch:
        key, drawn = (self.seed, num_tasks, first_task), self._drawn
        if drawn is None or drawn[0] != key or not drawn[1] <= step < drawn[2]:
            # a single step is drawn alone; its successor shows that a loop has begun
            in_turn = drawn is not None and drawn[0] == key and step == drawn[2]
            steps = max(1, _TASKS_AHEAD // num_tasks) if in_turn else 1
            arrays = self._draw(Draws(self.seed, step, first_task, num_tasks, steps))
            drawn = self._drawn = key, step, step + steps, arrays
        start = (step - drawn[1]) * num_tasks
        return self.assembled(*(self._tensor(array[start : start + num_tasks]) for array in drawn[3]))

    def drawn(self, num_tasks: int, step: int, steps: int) -> tuple[Tensor, ...]:
        """All that is random about the tasks of the steps `step .. step + steps - 1`, `[steps, T, ...]` each."""
        draws = self._draw(Draws(self.seed, step, 0, num_tasks, steps))
        return tuple(self._tensor(array).unflatten(0, (steps, num_tasks)) for array in draws)

    def assembled(self, *drawn: Tensor) -> TaskBatch:
        """The tasks of one step, from its part `[T, ...]` of what was drawn: work of the device alone.

        Example:
            >>> import mtml_fast as mf
            >>> tasks = mf.data.Sinusoid()
            >>> drawn = tasks.drawn(25, step=100, steps=4)
            >>> batch = tasks.assembled(*(part[3] for part in drawn))
            >>> torch.equal(batch.query.y, tasks.sample(25, step=103).query.y)
            True
        """
        raise NotImplementedError

    def _draw(self, draws: Draws) -> tuple[np.ndarray, ...]:
        """All that is random about the tasks, arrays `[T, ...]`."""
        raise NotImplementedError

    def _tensor(self, array: np.ndarray) -> Tensor:
        """One of them on the device."""
        return torch.from_numpy(array).to(self._device)


class ClassEpisodes(DrawnAhead):
    """N-way K-shot episodes: draw `ways` classes, label them 0 .. ways - 1 in random order, draw rows of each.

    The rows of a task are ordered by label: `shots` rows of label 0, then of label 1, ...; likewise the query rows.
    Support and query rows of a class are different rows.

    Args:
        pool: rows of all classes, `[variants * R, ...]`: the rows of class 0, of class 1, ...; then the same rows in
            the same order in their second variant (a rotation), ...
        counts: rows of each class, `[C]`, summing to R.
        classes: names of the classes, `[C]`.
        variants: how many variants of every class the pool holds. Each is a class of its own, but an episode never
            holds two of the same class.
        scale: for pictures stored as integers: their rows become `dtype`, times this factor.
    """

    loss = "cross_entropy"

    def __init__(
        self,
        pool: Tensor,
        counts: np.ndarray,
        classes: Sequence,
        *,
        ways: int,
        shots: int,
        query_shots: int,
        seed: int,
        device,
        dtype: torch.dtype,
        variants: int = 1,
        scale: float | None = None,
        **settings,
    ):
        ways, shots = check_int("ways", ways, 1), check_int("shots", shots, 1)
        query_shots = check_int("query_shots", query_shots, 1)
        settings |= {"ways": ways, "shots": shots, "query_shots": query_shots}
        super().__init__(seed=seed, device=device, dtype=dtype, **settings)
        if ways > len(counts):
            raise ValueError(f"ways must be at most the number of classes, {len(counts)}, got {ways}")
        least = int(counts.argmin())
        if shots + query_shots > counts[least]:
            raise ValueError(
                f"shots + query_shots must be at most the rows of every class, {counts[least]} in class "
                f"{classes[least]!r}, got {shots} + {query_shots}"
            )
        self._pool = pool.to(self._device)
        self._counts, self._starts = counts, np.cumsum(counts) - counts
        self._variants, self._scale = variants, scale
        self._shots, self._query_shots = shots, query_shots
        labels = torch.arange(ways, device=self._device)
        self._support = labels.repeat_interleave(shots), _Memory()
        self._query = labels.repeat_interleave(query_shots), _Memory()
        self.classes = tuple(classes)
        self.outputs = ways
        self.input_shape = tuple(pool.shape[1:])

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, classes={len(self.classes)})"

    def _draw(self, draws: Draws) -> tuple[np.ndarray, ...]:
        ways, shots, query_shots = self.outputs, self._shots, self._query_shots
        classes = draws.distinct(len(self._counts), ways)  # [T, C]
        rows = draws.distinct(self._counts[classes], shots + query_shots, ways)  # [T, C, shots + query_shots]
        start = self._starts[classes]  # [T, C]
        if self._variants > 1:
            start += draws.integers(self._variants, ways) * int(self._counts.sum())
        rows += start[..., None]
        return tuple(np.ascontiguousarray(part) for part in (rows[..., :shots], rows[..., shots:]))

    def assembled(self, support: Tensor, query: Tensor) -> TaskBatch:
        return TaskBatch(self._rows(support, *self._support), self._rows(query, *self._query))

    def _rows(self, rows: Tensor, labels: Tensor, memory: _Memory) -> TaskRows:
        tasks, ways, shots = rows.shape
        rows = rows.reshape(-1)
        dtype = self._pool.dtype if self._scale is None else self._dtype
        x = memory.empty((len(rows), *self.input_shape), dtype, self._device)
        if self._scale is None:
            torch.index_select(self._pool, 0, rows, out=x)
        else:
            x.copy_(self._pool.index_select(0, rows)).mul_(self._scale)
        return TaskRows(x.view(tasks, ways * shots, *self.input_shape), labels.repeat(tasks, 1))


class _Memory:
    """Memory for one large tensor at a time, used again once the tensor and all its views are gone.

    A training loop lets go of a batch before it takes the next one. The allocator returns such a block of megabytes to
    the system and gets another one, whose pages the system then fills in: that takes longer than the copy into it.
    """

    def __init__(self):
        self._blocks: list[np.ndarray] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `torch.empty`."""
        size = math.prod(shape) * dtype.itemsize
        if size not in _REUSED or device != _HOST:
            return torch.empty(shape, dtype=dtype, device=device)
        try:
            # taken out while it is in use here, so that threads may share a data set
            block = self._blocks.pop()
        except IndexError:
            block = None
        # tensors made by from_numpy hold the array: without them this name and the call's argument are all who know it
        if block is None or block.nbytes < size + 64 or sys.getrefcount(block) > 2:
            block = np.empty(size + 64, np.uint8)
        start = -block.ctypes.data % 64
        tensor = torch.from_numpy(block[start : start + size]).view(dtype).view(shape)
        self._blocks[:] = [block]
        return tensor

    def __reduce__(self):
        # copies and other processes begin with none
        return _Memory, ()


def check_int(name: str, value, least: int) -> int:
    """`value` as an int that is at least `least`."""
    try:
        # bool is an int in Python, and never meant here
        value = operator.index(None if isinstance(value, bool) else value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if not least <= value < 1 << 63:
        raise ValueError(f"{name} must be {f'at least {least}' if value < least else 'below 2^63'}, got {value}")
    return value


def check_choice(name: str, value, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_dtype(dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
    return dtype
