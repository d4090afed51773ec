"""The truth of heads_loss in plain PyTorch, and of every loss in the library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_fast.ops.heads.reference import kept, pad, padded_heads

LOSSES = ("cross_entropy", "mse", "bce")


def heads_loss(x, y, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation, loss) -> Tensor:
    """Each task's mean loss [T]; zero for a task without rows. Arguments as for heads, and y packed."""
    outputs, row_mask, class_mask = padded_heads(
        x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation
    )
    if loss == "cross_entropy":
        targets = pad(y, offsets)[0]  # [T, N]
    else:
        exists = kept(row_mask[:, :, None] & class_mask[:, None, :])
        targets = torch.zeros_like(outputs).flatten().index_copy(0, exists, y).view_as(outputs)
    return task_losses(outputs, targets, loss, row_mask, class_mask)


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
