"""What all data sets share: `sample`, fingerprint and checks; and N-way K-shot episodes from a pool of classes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtml_fast.data._random import VERSION, Draws
from mtml_fast.tasks import TaskBatch, TaskRows

__all__ = ["ClassEpisodes", "Episodes", "check_choice", "check_dtype", "check_int"]


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
        return self._sample(self._draws(num_tasks, step, first_task))

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

    def _sample(self, draws: Draws) -> TaskBatch:
        """The tasks that the draws lead to: what each data set adds."""
        raise NotImplementedError


class ClassEpisodes(Episodes):
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
        self.classes = tuple(classes)
        self.outputs = ways
        self.input_shape = tuple(pool.shape[1:])

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, classes={len(self.classes)})"

    def _sample(self, draws: Draws) -> TaskBatch:
        ways, shots, query_shots = self.outputs, self._shots, self._query_shots
        classes = draws.distinct(len(self._counts), ways)  # [T, C]
        rows = draws.distinct(self._counts[classes], shots + query_shots, ways)  # [T, C, shots + query_shots]
        start = self._starts[classes]  # [T, C]
        if self._variants > 1:
            start += draws.integers(self._variants, ways) * int(self._counts.sum())
        rows += start[..., None]
        return TaskBatch(self._rows(rows[..., :shots]), self._rows(rows[..., shots:]))

    def _rows(self, rows: np.ndarray) -> TaskRows:
        tasks, ways, shots = rows.shape
        rows = torch.from_numpy(rows.reshape(-1)).to(self._device)
        x = self._pool.index_select(0, rows)
        if self._scale is not None:
            x = x.to(self._dtype).mul_(self._scale)
        labels = torch.arange(ways, device=self._device).repeat_interleave(shots)
        return TaskRows(x.view(tasks, ways * shots, *self.input_shape), labels.repeat(tasks, 1))


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
