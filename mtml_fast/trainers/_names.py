"""Optimizers, losses and metrics by name, in any case, or as objects; an unknown name lists the known ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_fast.nn.losses import LOSSES, fit_targets, kind, task_losses
from mtml_fast.ops import _check

__all__ = [
    "FUSED_LOSSES",
    "LOSSES",
    "METRICS",
    "OPTIMIZERS",
    "fit_targets",
    "kind",
    "loss",
    "metric",
    "optimizer",
    "task_losses",
]


def _fused(kind: type[torch.optim.Optimizer]) -> Callable:
    """All parameters in one kernel: 39 microseconds a step instead of 117 for a network of six small tensors."""

    def make(params, lr):
        try:
            return kind(params, lr, fused=True)
        except RuntimeError:
            # a device without one
            return kind(params, lr)

    return make


OPTIMIZERS = {
    "adam": _fused(torch.optim.Adam),
    "adamw": _fused(torch.optim.AdamW),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}

# what mtml_fast.ops.heads_loss calls the losses that it computes together with the outputs
FUSED_LOSSES = {F.cross_entropy: "cross_entropy", F.mse_loss: "mse", F.binary_cross_entropy_with_logits: "bce"}


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of rows whose class is right: the largest of several logits, the sign of a single one."""
    if outputs.dim() > 1 and outputs.shape[1] > 1:
        classes = outputs.argmax(1)
        if targets.shape == outputs.shape:
            targets = targets.argmax(1)
    else:
        classes = outputs > 0
    return (classes.flatten() == targets.flatten()).double().mean()


METRICS = {
    "accuracy": accuracy,
    "acc": accuracy,
    "mae": F.l1_loss,
    "mean_absolute_error": F.l1_loss,
    "mse": F.mse_loss,
    "mean_squared_error": F.mse_loss,
}


def optimizer(value, params: Iterable[Tensor], lr: float | None = None) -> torch.optim.Optimizer:
    """A torch optimizer of `params`, from its name, a `callable(params, lr)` such as its class, or itself.

    Without `lr` a rate of 1e-3 is used, and 1e-2 for "sgd". An optimizer that exists keeps its own rate.
    """
    params = list(params)
    if isinstance(value, torch.optim.Optimizer):
        held = {id(p) for group in value.param_groups for p in group["params"]}
        if not any(id(p) in held for p in params):
            raise ValueError("optimizer must hold the parameters of the model that it trains, got one of other tensors")
        return value
    if lr is None:
        lr = 1e-2 if isinstance(value, str) and value.lower() == "sgd" else 1e-3
    _check.number("lr", lr, low=0, exclusive=True)
    made = _named("optimizer", value, OPTIMIZERS)(params, lr)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {type(made).__name__}")
    return made


def loss(value) -> Callable[[Tensor, Tensor], Tensor]:
    """A `callable(outputs, targets)` that gives the mean loss, from its name or itself."""
    return _named("loss", value, LOSSES)


def metric(value) -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """A metric's name and its `callable(outputs, targets)`, from its name or itself."""
    function = _named("metrics", value, METRICS)
    return (value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)), function


def _named(argument: str, value, known: dict):
    if isinstance(value, str):
        if value.lower() not in known:
            raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, or callable, got {value!r}")
        return known[value.lower()]
    if not callable(value):
        raise TypeError(f"{argument} must be a name or callable, got {type(value).__name__}")
    return value
