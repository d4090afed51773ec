"""Optimizers, losses and metrics by name, in any case, or as objects; an unknown name lists the known ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_fast.ops import _check


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

# the torch name first, then the one Keras users know; outputs are logits, never probabilities
LOSSES = {
    "cross_entropy": F.cross_entropy,
    "sparse_categorical_crossentropy": F.cross_entropy,
    "categorical_crossentropy": F.cross_entropy,
    "bce": F.binary_cross_entropy_with_logits,
    "binary_crossentropy": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
    "mean_squared_error": F.mse_loss,
    "mae": F.l1_loss,
    "mean_absolute_error": F.l1_loss,
    "huber": F.huber_loss,
}

# torch's own modules run as they are, because their settings count, on targets checked as those of the named loss
MODULES = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.HuberLoss: F.huber_loss,
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


def kind(function: Callable) -> Callable:
    """The named loss whose targets a loss takes; any callable that is not known is itself."""
    return MODULES.get(type(function), function)


def fit_targets(name: str, targets: Tensor, outputs: Sequence[int], dtype: torch.dtype, function) -> Tensor:
    """The targets in the shape and dtype that the loss takes beside outputs of the given shape `[N, ...]`.

    Classes for cross-entropy are integers without the outputs' axis 1. Everything else has the outputs' shape; a last
    axis of one may be left out. Labels of bce lie in [0, 1].
    """
    shape, outputs, known = list(targets.shape), list(outputs), kind(function)
    if known is F.cross_entropy and not targets.is_floating_point():
        expected = [outputs[0], *outputs[2:]]
        if shape == [*expected, 1]:
            targets = targets.squeeze(-1)
        elif shape != expected:
            raise ValueError(f"{name} must be classes {expected} for outputs {outputs}, got shape {shape}")
        labels = targets.long()
        if isinstance(function, nn.CrossEntropyLoss):
            # the module leaves these rows out
            labels = labels.where(labels != function.ignore_index, 0)
        _check.labels(name, labels, outputs[1])
        return targets.long()
    if [*shape, 1] == outputs and (targets.is_floating_point() or known in LOSSES.values()):
        # left as they are, [N] beside [N, 1] would be compared pair by pair
        targets = targets.unsqueeze(-1)
    elif known not in LOSSES.values():
        # an unknown callable decides by itself what shape it takes
        return targets.to(dtype) if targets.is_floating_point() else targets
    elif shape != outputs:
        raise ValueError(f"{name} must have the shape {outputs} of the outputs, got {shape}")
    if known is F.binary_cross_entropy_with_logits and _check.readable(targets):
        for outside in targets[(targets < 0) | (targets > 1)][:1].tolist():
            raise ValueError(f"{name} must be in [0, 1] for bce, got {outside:g}")
    return targets.to(dtype)


def task_losses(function, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Each entry's mean loss `[E]`, for outputs and fitted targets `[N_e, ...]`.

    The named losses run once for all entries of equal width; any other callable runs once an entry.
    """
    if function not in LOSSES.values():
        return torch.stack([function(o, t) for o, t in zip(outputs, targets, strict=True)])
    alike = {}
    for i, (o, t) in enumerate(zip(outputs, targets, strict=True)):
        alike.setdefault((o.shape[1:], t.shape[1:], t.dtype), []).append(i)
    means = []
    for entries in alike.values():
        rows = function(
            torch.cat([outputs[i] for i in entries]), torch.cat([targets[i] for i in entries]), reduction="none"
        )
        rows = rows.reshape(rows.shape[0], -1).mean(1)
        counts = torch.tensor([outputs[i].shape[0] for i in entries], device=rows.device)
        entry = torch.arange(len(entries), device=rows.device).repeat_interleave(counts)
        means.append(rows.new_zeros(len(entries)).index_add(0, entry, rows) / counts)
    # from the order of the groups back to the order of the entries
    place = torch.tensor([i for entries in alike.values() for i in entries]).argsort()
    return torch.cat(means)[place.to(means[0].device)]
