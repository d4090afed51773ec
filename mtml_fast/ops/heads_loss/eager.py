"""heads_loss where native kernels serve it and nothing but plain autograd watches: the common case, and the cheap one.

The losses come with their gradients, computed while a task's rows are in the cache; the backward pass multiplies each
task's part by the cotangent of its loss. Under create_graph the gradients are those of the losses as a composition of
the operator heads, which has its own derivatives, and of torch's operations on its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_fast.ops._library import LIB
from mtml_fast.ops._route import apply_of, has_kernel, is_plain
from mtml_fast.ops.heads_loss.reference import HEAD_LOSSES, equal_offsets

_HEADS = "Tensor offsets, Tensor weight, Tensor? bias, Tensor? out_offsets, Tensor? hidden_weight, Tensor? hidden_bias"
INPUTS = (
    f"Tensor x, Tensor? labels, Tensor? targets, {_HEADS}, Tensor? class_weights, Tensor? mask, str activation, "
    "int[] losses, float label_smoothing, int ignore_index, float delta"
)

# Operators without autograd, for the functions below. `needs`: one flag for each of x, weight, bias, hidden_weight and
# hidden_bias that there is.
# the losses, and the gradients of their sum that are needed
LIB.define(f"_heads_loss_gradients({INPUTS}, bool[] needs) -> Tensor[]")
# multiplies each task's part of these gradients by the cotangent of its loss, in place
LIB.define(
    f"_heads_loss_scale(Tensor(a!)[] gradients, Tensor d_losses, Tensor x, {_HEADS}, str activation, bool[] needs)"
    " -> ()"
)
_GRADIENTS, _SCALE = (getattr(torch.ops.mtml_fast, f"_heads_loss_{name}").default for name in ("gradients", "scale"))

NATIVE = has_kernel("mtml_fast::_heads_loss_gradients", "cpu")
_TENSORS = frozenset((Tensor, nn.Parameter))
# the places of all tensors, and of those with a gradient
_ALL, _DIFFERENTIABLE = range(11), (0, 4, 5, 7, 8)


def losses(arguments: tuple) -> Tensor | None:
    """Each task's mean loss, for the arguments of the operator; `None` where this is not the way to compute it."""
    if not NATIVE or not is_plain():
        return None
    tensors = [arguments[i] for i in _ALL if arguments[i] is not None]
    if not _TENSORS.issuperset(map(type, tensors)) or False in [t.is_cpu for t in tensors]:
        return None
    inputs = [arguments[i] for i in _DIFFERENTIABLE if arguments[i] is not None]
    needs = [t.requires_grad for t in inputs]
    if True not in needs or not torch.is_grad_enabled():
        return _GRADIENTS(*arguments, [False] * len(needs))[0]
    return _apply(arguments, needs, *compress(inputs, needs))


class _HeadsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arguments, needs, *inputs):
        losses, *ctx.gradients = _GRADIENTS(*arguments, needs)
        ctx.save_for_backward(*arguments[: len(_ALL)])
        ctx.options, ctx.needs = arguments[len(_ALL) :], needs
        return losses

    @staticmethod
    def backward(ctx, d_losses):
        arguments = (*ctx.saved_tensors, *ctx.options)
        if torch.is_grad_enabled():
            return None, None, *_composed_gradients(arguments, ctx.needs, d_losses)
        # handed over for good, so that a parameter's .grad may take them as they are: who comes a second time through
        # a retained graph gets them computed anew
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = _GRADIENTS(*arguments, ctx.needs)
        x, _, _, *heads = arguments[:9]
        _SCALE(gradients, d_losses, x, *heads, ctx.options[0], ctx.needs)
        return None, None, *gradients


_apply = apply_of(_HeadsLoss)


def _composed_gradients(arguments: tuple, needs: list[bool], d_losses: Tensor) -> Sequence[Tensor]:
    """The gradients with a graph of their own."""
    x, labels, targets, *heads = arguments[:9]
    offsets, weight, _, out_offsets, *_ = heads
    inputs = [arguments[i] for i in _DIFFERENTIABLE if arguments[i] is not None]
    z = torch.ops.mtml_fast.heads.default(x, *heads, arguments[11])
    if out_offsets is None:
        out_offsets = equal_offsets(weight, offsets)
    values = _packed_losses(z, labels, targets, offsets, out_offsets, *arguments[9:11], *arguments[12:])
    return torch.autograd.grad(values, list(compress(inputs, needs)), d_losses, create_graph=True)


def _packed_losses(
    z, labels, targets, offsets, out_offsets, class_weights, mask, losses, label_smoothing, ignore_index, delta
) -> Tensor:
    """Each task's mean loss from the outputs of heads, packed as they are."""
    counts, widths = offsets.diff(), out_offsets.diff()
    tasks, rows = counts.numel(), int(offsets[-1])
    loss_of = torch.tensor(losses).expand(tasks)
    task_of_row = torch.arange(tasks).repeat_interleave(counts)
    width_of_row = widths[task_of_row]
    row_of = torch.arange(rows).repeat_interleave(width_of_row)  # of each output
    total, count = z.new_zeros(tasks), z.new_zeros(tasks)
    # outputs that do not count are left out, so that a NaN in them stays there
    row_counts = mask if mask is not None and mask.numel() == rows else torch.ones(rows, dtype=torch.bool)
    output_counts = row_counts[row_of] if mask is None or mask.numel() == rows else mask

    if labels is not None:
        row_counts = row_counts & (labels != ignore_index) & (loss_of[task_of_row] == 0)
        at = row_counts[row_of].nonzero().squeeze(1)
        # from here on among the rows that count: of each output, and of each row
        row = (row_counts.cumsum(0) - 1)[row_of[at]]
        task, width, label = task_of_row[row_counts], width_of_row[row_counts], labels[row_counts]
        values = z[at]
        top = values.detach().new_full(task.shape, -torch.inf).scatter_reduce(0, row, values.detach(), "amax")
        below = values - top[row]
        logs = below - values.new_zeros(task.shape).index_add(0, row, below.exp()).log()[row]
        first = width.cumsum(0) - width
        weights = torch.ones_like(top) if class_weights is None else class_weights[out_offsets[task] + label]
        values = -weights * logs[first + label]
        if label_smoothing:
            if class_weights is not None:
                place = torch.arange(len(at)) - first[row]
                logs = logs * class_weights[out_offsets[task][row] + place]
            smooth = -torch.zeros_like(values).index_add(0, row, logs) / width
            values = (1 - label_smoothing) * values + label_smoothing * smooth
        total, count = total.index_add(0, task, values), count.index_add(0, task, weights)
    if targets is not None:
        task_of = task_of_row[row_of]
        for place in set(losses) - {0}:
            at = (output_counts & (loss_of[task_of] == place)).nonzero().squeeze(1)
            values = _OUTPUT_LOSSES[HEAD_LOSSES[place]](z[at], targets[at], delta)
            total = total.index_add(0, task_of[at], values)
            count = count.index_add(0, task_of[at], torch.ones_like(targets[at]))
    return torch.where(count == 0, 0.0, total / torch.where(count == 0, 1.0, count))


def _huber(z: Tensor, y: Tensor, delta: float) -> Tensor:
    size = (z - y).abs()
    return torch.where(size < delta, 0.5 * (z - y).square(), delta * (size - 0.5 * delta))


_OUTPUT_LOSSES = {
    "mse": lambda z, y, _: (z - y).square(),
    "bce": lambda z, y, _: F.binary_cross_entropy_with_logits(z, y, reduction="none"),
    "huber": _huber,
}
