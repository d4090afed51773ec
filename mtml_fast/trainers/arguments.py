"""What a Trainer's arguments must be: each error names the argument and the value that it was."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["check_counts", "check_rates", "make_scheduler"]


def check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def check_rates(**rates: Any) -> None:
    for name, value in rates.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def make_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler itself, or what the callable makes of the optimizer; None where there is none."""
    if callable(scheduler) and not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        scheduler = scheduler(optimizer)
    if scheduler is None:
        return None
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("scheduler must step without a metric, got ReduceLROnPlateau")
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(f"scheduler must be a torch scheduler or a callable giving one, got {type(scheduler).__name__}")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must belong to the trainer's optimizer, got one of another optimizer")
    return scheduler
