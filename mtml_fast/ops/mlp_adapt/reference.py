"""The truth of mlp_adapt in plain PyTorch: dense weights per task, and autograd through the inner loop."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_fast.ops.heads.reference import ACTIVATIONS, kept, pad
from mtml_fast.ops.heads_loss.reference import task_losses
from mtml_fast.ops.sgd_step.reference import sgd_step


def mlp_adapt(
    params: list[Tensor],  # layer after layer: weight [O, I], bias [O], gain [O], shift [O]; or [T, ...] each
    lr: list[Tensor],  # one table [1 or K, 1 or len(params)], or one tensor a parameter [1 or K, ...]
    support_x: Tensor,  # [T, N, D] or [R, D]
    support_y: Tensor,  # [T, N] or [R] classes, or targets with an axis C more
    query_x: Tensor,  # [T, Q, D] or [R, D]
    query_y: Tensor | None,
    support_offsets: Tensor | None,  # [T + 1]
    query_offsets: Tensor | None,  # [T + 1]
    class_mask: Tensor | None,  # [T, C]
    adapted: list[bool],  # which params the inner loop moves
    steps: int,
    loss: str,
    activation: str,
    bias: bool,
    norm: bool,
    norm_eps: float,
    momentum: float,
    weight_decay: float,
    clip: float | None,
    first_order: bool,
    every_step: bool,
    return_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query outputs [S, T, Q, C] or [S, R, C], query losses [S, T], adapted parameters [T, P]."""
    tasks = support_x.shape[0] if support_offsets is None else support_offsets.numel() - 1
    xs, support_mask = (support_x, None) if support_offsets is None else pad(support_x, support_offsets)
    ys = support_y if support_offsets is None else pad(support_y, support_offsets)[0]
    xq, query_mask = (query_x, None) if query_offsets is None else pad(query_x, query_offsets)
    yq = query_y if query_offsets is None or query_y is None else pad(query_y, query_offsets)[0]

    # weights are matrices: the first parameter of a layer tells where a layer starts and whether it has a task axis
    per_layer = 1 + bias + 2 * norm
    ranks = [2 if i % per_layer == 0 else 1 for i in range(len(params))]
    theta = [p if p.dim() > rank else p.expand(tasks, *p.shape) for p, rank in zip(params, ranks, strict=True)]
    moving = [i for i, moves in enumerate(adapted) if moves]

    def support_loss(values: list[Tensor], theta: list[Tensor]) -> Tensor:
        # a task's loss depends on its own parameters alone, so the sum over tasks has every task's gradient
        theta = _replaced(theta, moving, values)
        outputs = _forward(theta, xs, support_mask, per_layer, activation, bias, norm, norm_eps)
        return task_losses(outputs, ys, loss, support_mask, class_mask).sum()

    outputs: list[Tensor] = []
    losses: list[Tensor] = []

    def answer(theta: list[Tensor]) -> None:
        z = _forward(theta, xq, query_mask, per_layer, activation, bias, norm, norm_eps)  # [T, Q, C]
        losses.append(z.new_zeros(tasks) if yq is None else task_losses(z, yq, loss, query_mask, class_mask))
        if class_mask is not None:
            z = torch.where(class_mask[:, None], z, -torch.inf if loss == "cross_entropy" else 0.0)
        outputs.append(z if query_mask is None else z.flatten(0, 1)[kept(query_mask)])

    velocity = [torch.zeros_like(theta[i]) for i in moving] if momentum else []
    for k in range(steps):
        if every_step:
            answer(theta)
        if not moving:
            continue
        values = [theta[i] for i in moving]
        grads = torch.func.grad(support_loss)(values, theta)
        if first_order:
            grads = [g.detach() for g in grads]
        rates = [rate_of_step(lr, k, i) for i in (moving[:1] if _is_shared(lr) else moving)]
        results = sgd_step(values, grads, rates, velocity, momentum, weight_decay, clip)
        values, velocity = results[: len(moving)], results[len(moving) :]
        theta = _replaced(theta, moving, values)
    answer(theta)
    fast = torch.cat([p.flatten(1) for p in theta], 1) if return_parameters else xs.new_zeros(0)
    return torch.stack(outputs), torch.stack(losses), fast


def _forward(theta, x, row_mask, per_layer, activation, bias, norm, norm_eps) -> Tensor:
    """[T, N, D] -> [T, N, C]"""
    for start in range(0, len(theta), per_layer):
        weight, *rest = theta[start : start + per_layer]
        last = start + per_layer >= len(theta)
        x = x @ weight.mT
        if bias:
            x = x + rest[0][:, None]
        if norm and not last:
            x = _batch_norm(x, row_mask, norm_eps) * rest[-2][:, None] + rest[-1][:, None]
        if not last:
            x = ACTIVATIONS[activation](x)
    return x


def _batch_norm(z: Tensor, row_mask: Tensor | None, eps: float) -> Tensor:
    """Each task's rows by the mean and the biased variance of these rows."""
    if row_mask is None:
        mean, variance = z.mean(1, keepdim=True), z.var(1, correction=0, keepdim=True)
    else:
        rows, count = row_mask[:, :, None], row_mask.sum(1)[:, None, None]
        mean = torch.where(rows, z, 0.0).sum(1, keepdim=True) / count
        variance = torch.where(rows, z - mean, 0.0).square().sum(1, keepdim=True) / count
    return (z - mean) * (variance + eps).rsqrt()


def rate_of_step(lr: list[Tensor], k: int, i: int) -> Tensor:
    """The rate of step k for parameter i: a scalar, or [1, ...] with the parameter's shape."""
    if len(lr) == 1 and lr[0].dim() == 2:
        rows, columns = lr[0].shape
        return lr[0][min(k, rows - 1), min(i, columns - 1)]
    return lr[i][min(k, lr[i].shape[0] - 1)][None]


def _is_shared(lr: list[Tensor]) -> bool:
    """Whether all parameters have the same rate."""
    return len(lr) == 1 and lr[0].dim() == 2 and lr[0].shape[1] == 1


def _replaced(theta: list[Tensor], places: list[int], values: list[Tensor]) -> list[Tensor]:
    theta = list(theta)
    for i, value in zip(places, values, strict=True):
        theta[i] = value
    return theta
