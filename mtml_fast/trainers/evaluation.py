"""evaluate: the mean of a metric over fixed evaluation tasks, with its 95 % confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mtml_fast.trainers.checkpoint import random_state, set_random_state

__all__ = ["EVALUATION_STEP", "VALIDATION_STEP", "Evaluation", "check_tasks", "evaluate"]

# training draws its tasks from the steps 0, 1, 2, ...; these two lie where no training arrives
VALIDATION_STEP = 2**40
EVALUATION_STEP = 2**40 + 1


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A metric over n tasks: `mean +- ci95`, with `ci95 = 1.96 s / sqrt(n)` (s: standard deviation over tasks).

    Attributes:
        metric: "accuracy" (the share of a task's query rows that are right), "loss" (its mean query loss), ...
        values: the metric of each task, float64 `[n]`.
        losses: the query loss of each task, float64 `[n]`.
        split: the data set's split ("test", ...), or "".

    A task whose metric or loss is not finite is not left out: the mean shows it, and the line says how many there are.

    Example:
        >>> values = torch.tensor([0.8, 1.0], dtype=torch.float64)
        >>> print(Evaluation("accuracy", values, values, "test"))
        test accuracy 0.900 +- 0.196 over 2 tasks
    """

    metric: str
    values: Tensor
    losses: Tensor
    split: str = ""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return self.values.mean().item()

    @property
    def ci95(self) -> float:
        # one task tells nothing about others
        return 1.96 * self.values.std().item() / math.sqrt(self.n) if self.n > 1 else math.nan

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    def where(self, kept: Tensor) -> Evaluation:
        """The same over the tasks where `kept`, bool `[n]`, is true."""
        return replace(self, values=self.values[kept], losses=self.losses[kept])

    def __str__(self) -> str:
        name = f"{self.split} {self.metric}".strip()
        lost = int((~(self.values.isfinite() & self.losses.isfinite())).sum())
        note = f", {lost} of them not finite" if lost else ""
        return f"{name} {self.mean:.3f} +- {self.ci95:.3f} over {self.n} task{'s' * (self.n != 1)}{note}"


def evaluate(
    algorithm: nn.Module,
    tasks: Any,
    num_tasks: int = 600,
    *,
    steps: int | None = None,
    meta_batch: int = 100,
    metric: str | None = None,
    episodes: int = EVALUATION_STEP,
) -> Evaluation:
    """Adapt `algorithm` to `num_tasks` fixed tasks of `tasks` and measure it on their query rows.

    The tasks are the same at every call (those of the reserved step `episodes`), training never sees them, and up to
    rounding the result does not depend on `meta_batch`. Dropout and the like are off, no graph is kept, torch's random
    numbers are left where they were.

    Args:
        algorithm: a module with `algorithm(batch, steps=...) -> result` that has `task_losses` and `metrics`.
        tasks: a data set with `sample(num_tasks, step, first_task=...)`.
        num_tasks: how many. A data set of a finite number of tasks, `len(tasks)`, gives at most those, each once: drawn
            again they would make the interval narrower than what is known. The result's `n` says how many it were.
        steps: inner steps, None for the algorithm's own number.
        meta_batch: tasks adapted at a time (memory against speed).
        metric: "loss" or one of `result.metrics`; None takes "accuracy" where there is one, else "loss".

    Raises:
        TypeError, ValueError: naming `tasks`, `num_tasks` (at least 2), `meta_batch` or `metric` and its value.
    """
    check_tasks("tasks", tasks)
    if not isinstance(num_tasks, int) or num_tasks < 2:
        raise ValueError(f"num_tasks must be an int >= 2 (an interval needs two), got {num_tasks!r}")
    if not isinstance(meta_batch, int) or meta_batch < 1:
        raise ValueError(f"meta_batch must be an int >= 1, got {meta_batch!r}")
    if hasattr(tasks, "__len__"):
        num_tasks = min(num_tasks, len(tasks))
    device = next((p.device for p in algorithm.parameters()), torch.device("cpu"))
    values, losses = [], []
    modes = [(module, module.training) for module in algorithm.modules()]
    random = random_state(device)
    algorithm.eval()
    try:
        with torch.no_grad():
            for first in range(0, num_tasks, meta_batch):
                batch = tasks.sample(min(meta_batch, num_tasks - first), step=episodes, first_task=first)
                result = algorithm(batch.to(device), steps=steps)
                if metric is None:
                    metric = "accuracy" if "accuracy" in result.metrics else "loss"
                if metric != "loss" and metric not in result.metrics:
                    known = ", ".join(["loss", *result.metrics])
                    raise ValueError(f"metric or monitor must be one of {known}, got {metric!r}")
                losses.append(result.task_losses.detach())
                values.append(losses[-1] if metric == "loss" else result.metrics[metric].detach())
    finally:
        for module, mode in modes:
            module.training = mode
        set_random_state(random, device)
    values, losses = (torch.cat(parts).double().cpu() for parts in (values, losses))
    return Evaluation(metric, values, losses, str(getattr(tasks, "split", "")))


def check_tasks(name: str, tasks: Any) -> None:
    if not callable(getattr(tasks, "sample", None)):
        raise TypeError(f"{name} must be a data set with a sample method, got {type(tasks).__name__}")
