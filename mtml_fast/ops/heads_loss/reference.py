"""The truth of heads_loss in plain PyTorch, and of every loss in the library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_fast.ops.heads.reference import kept, pad, padded_heads

# of the inner loops, and of heads
LOSSES = ("cross_entropy", "mse", "bce")
HEAD_LOSSES = (*LOSSES, "huber")


def heads_loss(
    x: Tensor,  # [R, D]
    labels: Tensor | None,  # [R]: read where a task has cross_entropy
    targets: Tensor | None,  # [sum of R_t * C_t]: read where it has another loss
    offsets: Tensor,  # [T + 1]
    weight: Tensor,  # [sum of C_t, D or H]
    bias: Tensor | None,  # [sum of C_t]
    out_offsets: Tensor | None,  # [T + 1]
    hidden_weight: Tensor | None,  # [T, H, D]
    hidden_bias: Tensor | None,  # [T, H]
    class_weights: Tensor | None,  # [sum of C_t]
    mask: Tensor | None,  # [R], or [sum of R_t * C_t]
    activation: str,
    losses: list[int],  # places in HEAD_LOSSES, one a task or one for all
    label_smoothing: float,
    ignore_index: int,
    delta: float,
) -> Tensor:
    """Each task's mean loss [T]; zero for a task without rows that count."""
    outputs, row_mask, class_mask = padded_heads(
        x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation
    )
    tasks = outputs.shape[0]
    counts = row_mask[:, :, None] & class_mask[:, None, :]  # [T, N, C]
    exists = kept(counts)
    if mask is not None and mask.numel() == x.shape[0]:
        row_mask = row_mask & pad(mask, offsets)[0]
        counts = counts & row_mask[:, :, None]
    elif mask is not None:
        counts = counts & torch.zeros_like(counts).flatten().index_copy(0, exists, mask).view_as(counts)
    if class_weights is None:
        class_weights = class_mask.to(outputs)
    else:
        offsets_of_classes = equal_offsets(weight, offsets) if out_offsets is None else out_offsets
        class_weights = pad(class_weights, offsets_of_classes)[0]  # [T, C]
    kinds = losses if len(losses) == tasks else [*losses] * tasks
    result = outputs.new_zeros(tasks)
    for kind in set(losses):
        which = torch.tensor([t for t in range(tasks) if kinds[t] == kind], dtype=torch.int64, device=x.device)
        if HEAD_LOSSES[kind] == "cross_entropy":
            values = cross_entropy(
                outputs[which],
                pad(labels, offsets)[0][which],
                row_mask[which],
                class_mask[which],
                class_weights[which],
                label_smoothing,
                ignore_index,
            )
        else:
            packed = torch.zeros_like(outputs).flatten().index_copy(0, exists, targets).view_as(outputs)
            values = mean_of_outputs(outputs[which], packed[which], counts[which], HEAD_LOSSES[kind], delta)
        result = result.index_copy(0, which, values)
    return result


def equal_offsets(weight: Tensor, offsets: Tensor) -> Tensor:
    """The out_offsets of tasks with equally many outputs."""
    tasks = offsets.numel() - 1
    return torch.arange(tasks + 1, device=weight.device) * (weight.shape[0] // max(tasks, 1))


def cross_entropy(outputs, labels, row_mask, class_mask, class_weights, label_smoothing, ignore_index) -> Tensor:
    """As F.cross_entropy of each task's rows, with its classes and their weights; zero where no row counts."""
    row_mask = row_mask & (labels != ignore_index)
    labels = torch.where(row_mask, labels, 0)
    logs = F.log_softmax(torch.where(class_mask[:, None], outputs, -torch.inf), 2)
    logs = torch.where(class_mask[:, None], logs, 0.0)  # [T, N, C]
    weights = class_weights.gather(1, labels)  # [T, N]
    values = -weights * logs.gather(2, labels[:, :, None])[:, :, 0]
    if label_smoothing:
        smooth = -(logs * class_weights[:, None]).sum(2) / class_mask.sum(1).clamp(min=1)[:, None]
        values = (1 - label_smoothing) * values + label_smoothing * smooth
    total, count = (torch.where(row_mask, t, 0.0).sum(1) for t in (values, weights))
    return torch.where(count == 0, 0.0, total / torch.where(count == 0, 1.0, count))


def mean_of_outputs(outputs: Tensor, targets: Tensor, counts: Tensor, loss: str, delta: float) -> Tensor:
    """The mean of another loss over the outputs of each task that count; zero where none does."""
    # a missing target may be NaN
    targets = torch.where(counts, targets, 0.0)
    if loss == "bce":
        values = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    elif loss == "mse":
        values = (outputs - targets).square()
    else:
        difference = outputs - targets
        size = difference.abs()
        values = torch.where(size < delta, 0.5 * difference.square(), delta * (size - 0.5 * delta))
    return torch.where(counts, values, 0.0).sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)


def task_losses(
    outputs: Tensor,  # [T, N, C]
    targets: Tensor,  # [T, N] classes, or [T, N, C]
    loss: str,
    row_mask: Tensor | None = None,  # [T, N]
    class_mask: Tensor | None = None,  # [T, C]
) -> Tensor:
    """The mean loss of each task [T] over the rows and outputs that it has."""
    tasks, rows, _ = outputs.shape
    if loss == "cross_entropy":
        if class_mask is not None:
            outputs = torch.where(class_mask[:, None], outputs, -torch.inf)
        values = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(tasks, rows)
    else:
        if class_mask is not None:
            # a missing target may be NaN
            targets = torch.where(class_mask[:, None], targets, 0.0)
        if loss == "mse":
            values = (outputs - targets).square()
        else:
            values = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        if class_mask is None:
            values = values.mean(2)
        else:
            count = class_mask.sum(1)[:, None].clamp(min=1)
            values = torch.where(class_mask[:, None], values, 0.0).sum(2) / count
    if row_mask is None:
        return values.mean(1)
    return torch.where(row_mask, values, 0.0).sum(1) / row_mask.sum(1).clamp(min=1)
