"""Losses by name, the targets that each takes, and the mean loss of each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_fast.ops import _check

__all__ = ["LOSSES", "MODULES", "fit_targets", "kind", "task_losses"]

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
