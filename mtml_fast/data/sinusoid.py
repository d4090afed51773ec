"""Sinusoid: the regression tasks of the MAML paper, made on the fly."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mtml_fast.data._episodes import DrawnAhead, check_int
from mtml_fast.data._random import Draws
from mtml_fast.tasks import TaskBatch, TaskRows

__all__ = ["Sinusoid"]


class Sinusoid(DrawnAhead):
    """Sine waves with an amplitude and a phase per task: y = amplitude * sin(x - phase).

    All three are uniform, by default amplitude in [0.1, 5], phase in [0, pi] (radians) and x in [-5, 5]: Finn, Abbeel
    and Levine, "Model-Agnostic Meta-Learning", 2017, section 5.1. Train and test tasks come from the same
    distribution: give them different seeds.

    Args:
        shots: support rows of a task; `x` and `y` are `[T, shots, 1]`.
        query_shots: query rows of a task.
        seed: of the episodes.
        amplitude, phase, x: ranges (low, high).
        device, dtype: of the tensors.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> tasks = Sinusoid(shots=5, query_shots=10)
        >>> batch = tasks.sample(25, step=0)
        >>> batch.support.x.shape, batch.query.y.shape
        (torch.Size([25, 5, 1]), torch.Size([25, 10, 1]))
    """

    loss = "mse"
    input_shape = (1,)
    outputs = 1

    def __init__(
        self,
        shots: int = 10,
        query_shots: int = 10,
        seed: int = 0,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x: tuple[float, float] = (-5.0, 5.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self._shots, self._query_shots = check_int("shots", shots, 1), check_int("query_shots", query_shots, 1)
        self._amplitude, self._phase = _check_range("amplitude", amplitude), _check_range("phase", phase)
        self._x = _check_range("x", x)
        settings = {"shots": self._shots, "query_shots": self._query_shots}
        settings |= {"amplitude": self._amplitude, "phase": self._phase, "x": self._x}
        super().__init__(seed=seed, device=device, dtype=dtype, **settings)

    def parameters(self, num_tasks: int, step: int = 0, *, first_task: int = 0) -> tuple[Tensor, Tensor]:
        """`(amplitude, phase)`, each `[T]`, of the tasks that `sample` with the same arguments returns.

        Example:
            >>> amplitude, phase = Sinusoid().parameters(3)
            >>> amplitude.shape
            torch.Size([3])
        """
        amplitude, phase = self._parameters(self._draws(num_tasks, step, first_task))
        return self._tensor(amplitude), self._tensor(phase)

    def _draw(self, draws: Draws) -> tuple[np.ndarray, ...]:
        amplitude, phase = self._parameters(draws)
        x = _between(self._x, draws.uniform(self._shots + self._query_shots))  # [T, N + Q]
        y = amplitude[:, None] * np.sin(x - phase[:, None])
        support, query = slice(None, self._shots), slice(self._shots, None)
        parts = x[:, support], y[:, support], x[:, query], y[:, query]
        return tuple(np.ascontiguousarray(part[..., None]) for part in parts)  # [T, N or Q, 1] each

    def assembled(self, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> TaskBatch:
        return TaskBatch(TaskRows(x, y), TaskRows(query_x, query_y))

    def _parameters(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        unit = draws.uniform(2)  # [T, 2]
        return _between(self._amplitude, unit[:, 0]), _between(self._phase, unit[:, 1])

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device, self._dtype, copy=True)


def _between(limits: tuple[float, float], unit: np.ndarray) -> np.ndarray:
    low, high = limits
    return low + (high - low) * unit


def _check_range(name: str, limits) -> tuple[float, float]:
    try:
        low, high = (float(limit) for limit in limits)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a range (low, high), got {limits!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name} must be a finite range (low, high), got {limits!r}")
    return low, high
