"""Losses of per-task heads and their gradients, without mtml_fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_fast.cli.timing import Provider


@dataclass(frozen=True)
class Heads:
    """T heads of equal widths over ragged rows, and their labels; cross-entropy, binary where the width is one."""

    x: Tensor  # [R, D]
    y: Tensor  # [R], int64, or for a width of one floats
    offsets: Tensor  # [T + 1]
    task_index: Tensor | None  # [R]: the rows are in this order, and offsets those of the sorted ones
    weight: Tensor  # [T, C, H or D]
    bias: Tensor  # [T, C]
    hidden_weight: Tensor | None  # [T, H, D]
    hidden_bias: Tensor | None  # [T, H]

    @property
    def leaves(self) -> list[Tensor]:
        given = (self.x, self.weight, self.bias, self.hidden_weight, self.hidden_bias)
        return [t for t in given if t is not None]

    @cached_property
    def longest(self) -> int:
        """The rows of the largest task, read once: on a device every read stops the stream."""
        return int(self.offsets.diff().max())

    def gradients(self, losses: Callable[[], Tensor]) -> Callable[[], Sequence[Tensor]]:
        def call():
            values = losses()
            return [values, *torch.autograd.grad(values.sum(), self.leaves)]

        return call

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Rows and labels, task after task."""
        if self.task_index is None:
            return self.x, self.y
        order = self.task_index.argsort(stable=True)
        return self.x.index_select(0, order), self.y[order]


def loop(problem: Heads, _) -> Provider:
    """A Python loop of linear layers."""
    counts = problem.offsets.diff().tolist()

    def losses():
        found = []
        x, y = problem.sorted()
        for t, (rows, labels) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
            if problem.hidden_weight is not None:
                rows = F.relu(F.linear(rows, problem.hidden_weight[t], problem.hidden_bias[t]))
            z = F.linear(rows, problem.weight[t], problem.bias[t])
            found.append(_row_losses(z, labels).mean() if len(labels) else z.sum())
        return torch.stack(found)

    return Provider(problem.gradients(losses), torch.__version__)


def bmm(problem: Heads, _) -> Provider:
    """Rows padded to a rectangle, one baddbmm a layer."""

    def losses():
        x, y, mask = _rectangle(problem)
        if problem.hidden_weight is not None:
            x = F.relu(torch.baddbmm(problem.hidden_bias[:, None], x, problem.hidden_weight.mT))
        return _mean(torch.baddbmm(problem.bias[:, None], x, problem.weight.mT), y, mask)

    return Provider(problem.gradients(losses), torch.__version__)


def vmap(problem: Heads, _) -> Provider:
    """Rows padded to a rectangle, torch.func.vmap over one head."""

    def head(x, y, mask, weight, bias, *hidden):
        if hidden:
            x = F.relu(F.linear(x, *hidden))
        values = _row_losses(F.linear(x, weight, bias), y)
        return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)

    def losses():
        return torch.func.vmap(head)(*_rectangle(problem), *problem.leaves[1:])

    return Provider(problem.gradients(losses), torch.__version__)


def grouped_mm(problem: Heads, _) -> Provider:
    """torch.nn.functional.grouped_mm on the packed rows, outputs padded to the 16 bytes that it asks for."""
    ends = problem.offsets[1:].int()
    tasks, outputs = problem.bias.shape
    task_of = torch.arange(tasks, device=ends.device).repeat_interleave(problem.offsets.diff())
    missing = -outputs % 4

    def losses():
        x, y = problem.sorted()
        if problem.hidden_weight is not None:
            x = F.grouped_mm(x, problem.hidden_weight.mT, offs=ends) + problem.hidden_bias[task_of]
            x = F.relu(x)
        weight = F.pad(problem.weight, (0, 0, 0, missing)).mT.contiguous()
        z = F.grouped_mm(x, weight, offs=ends)[:, :outputs] + problem.bias[task_of]
        values = _row_losses(z, y)
        return values.new_zeros(tasks).index_add(0, task_of, values) / problem.offsets.diff().clamp(min=1)

    return Provider(problem.gradients(losses), torch.__version__)


def _row_losses(z: Tensor, y: Tensor) -> Tensor:
    if z.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(z.squeeze(1), y, reduction="none")
    return F.cross_entropy(z, y, reduction="none")


def _rectangle(problem: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T, N, D], labels [T, N], and which of them exist [T, N]."""
    counts = problem.offsets.diff()
    place = torch.arange(problem.longest, device=counts.device)
    mask = place < counts[:, None]
    rows = torch.where(mask, problem.offsets[:-1, None] + place, 0)
    x, y = problem.sorted()
    return x.index_select(0, rows.flatten()).view(*rows.shape, -1), y[rows], mask


def _mean(z: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    values = _row_losses(z.flatten(0, 1), y.flatten()).view_as(mask)
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)
