"""The truth of sgd_step in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def sgd_step(
    params: list[Tensor],  # each [T, ...]
    grads: list[Tensor],  # as params
    lr: list[Tensor],  # one for all leaves, or one a leaf: [], [T], [1, ...] or [T, ...]
    momentum_buffers: list[Tensor],  # as params; none without momentum
    momentum: float,
    weight_decay: float,
    clip: float | None,
) -> list[Tensor]:
    """The new parameters, then the new momentum buffers where there are any."""
    if clip is not None:
        square = sum(g.square().unsqueeze(-1).flatten(1).sum(1) for g in grads)  # [T]
        # the norm's derivative at zero is infinite: a zero gradient is not clipped, so it takes no part; a gradient
        # with a NaN is no such case and stays NaN
        norm = torch.where(square == 0, 1.0, square).sqrt()
        scale = torch.where(square == 0, 1.0, clip / (norm + 1e-6)).clamp(max=1.0)
        grads = [g * _per_task(scale, g) for g in grads]
    directions = grads
    if weight_decay:
        directions = [g + weight_decay * p for g, p in zip(grads, params, strict=True)]
    if momentum:
        directions = [momentum * m + d for m, d in zip(momentum_buffers, directions, strict=True)]
    rates = lr if len(lr) == len(params) else lr * len(params)
    steps = [p - _per_task(a, p) * d for p, a, d in zip(params, rates, directions, strict=True)]
    return steps + directions if momentum else steps


def _per_task(a: Tensor, leaf: Tensor) -> Tensor:
    """[T] -> [T, 1, ...] of the leaf's rank; scalars and full shapes broadcast as they are."""
    return a.reshape(-1, *[1] * (leaf.dim() - 1)) if a.dim() == 1 else a
