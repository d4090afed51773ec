"""heads_loss: every task's rows through the task's own head, and each task's mean loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_fast.ops import _check
from mtml_fast.ops._define import define_op
from mtml_fast.ops._heads import checked_heads, equal_width, sorted_by_task
from mtml_fast.ops.heads_loss import eager, reference
from mtml_fast.ops.heads_loss.reference import HEAD_LOSSES

OPERATOR = define_op(
    "heads_loss",
    f"({eager.INPUTS}) -> Tensor",
    reference.heads_loss,
    fake=lambda x, labels, targets, offsets, *_: x.new_empty(offsets.shape[0] - 1),
    differentiable=("x", "weight", "bias", "hidden_weight", "hidden_bias"),
)


def heads_loss(
    x: Tensor,
    y: Tensor | tuple[Tensor, Tensor],
    offsets: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    out_offsets: Tensor | None = None,
    *,
    hidden_weight: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    activation: str = "relu",
    loss: str | Sequence[str] = "cross_entropy",
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weights: Tensor | None = None,
    delta: float = 1.0,
    task_index: Tensor | None = None,
) -> Tensor:
    r"""Each task's mean loss over its own rows and outputs.

    .. math::
        L_t = \frac{1}{R_t} \sum_{r \in t} \ell_t(z_{t,r}, y_r)

    Args:
        x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation, task_index: as for `heads`.
        y: for cross_entropy int64 classes `[R]` in 0..C_t - 1; for other losses float targets, packed as the outputs
            of `heads` are, `[sum of R_t * C_t]`, or `[R, C]` for equal widths. Where tasks of both kinds are mixed,
            the pair `(classes, targets)`: each is read where the task's loss asks for it, and may hold anything
            elsewhere.
        loss: "cross_entropy", "mse", "bce" (binary cross-entropy of logits) or "huber": a mean over the rows and, but
            for cross_entropy, over the outputs; or a list of T of these names.
        mask: which rows have a label, bool `[R]`; or, where no task has cross_entropy, which outputs have a target,
            bool like the targets. What it excludes is not read and not counted.
        label_smoothing, ignore_index, class_weights: of cross_entropy, as for `torch.nn.functional.cross_entropy`;
            the weights packed, `[sum of C_t]`. The mean is that over the weights of the rows' classes.
        delta: of huber, the error from which on it grows linearly.

    With `task_index`, classes and row masks are in the order of the rows; targets and masks of outputs are packed as
    `heads` returns its outputs.

    Returns:
        `[T]`; zero for a task without rows that count.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Derivatives: any order for x, weight, bias, hidden_weight and hidden_bias; the first comes with the losses.

    Example:
        >>> import torch
        >>> x, offsets = torch.eye(3), torch.tensor([0, 1, 3])
        >>> weight = torch.tensor([[1.0, 2, 3], [10, 20, 30]])
        >>> heads_loss(x, torch.zeros(3), offsets, weight, loss="mse")
        tensor([  1., 650.])
        >>> heads_loss(x, torch.zeros(3), offsets, weight, loss=["huber", "mse"])
        tensor([5.0000e-01, 6.5000e+02])
    """
    order = None
    if task_index is not None:
        order, offsets = sorted_by_task(task_index, x, offsets, weight, out_offsets, hidden_weight)
        x = x.index_select(0, order)
    # from here on in the dtype of the weights
    x, *heads, activation = checked_heads(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation)
    losses = _places(loss, offsets.numel() - 1)
    labels, targets = _labels_and_targets(y, x, offsets, weight, out_offsets, losses)
    if mask is not None:
        mask = _checked_mask(mask, x, offsets, weight, out_offsets, losses)
    if order is not None:
        width = equal_width(weight, out_offsets, offsets.numel() - 1)
        labels, targets, mask = (_in_order(values, order, width) for values in (labels, targets, mask))
    _check.number("label_smoothing", label_smoothing, low=0.0)
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing must be at most 1, got {label_smoothing!r}")
    _check.number("ignore_index", ignore_index, integer=True)
    _check.number("delta", delta, low=0.0, exclusive=True)
    if class_weights is not None:
        _check.floating("class_weights", class_weights, like=x, like_name="x")
        _check.shape("class_weights", class_weights, ("sum of C_t", weight.shape[0]))
        _check.no_gradient("class_weights", class_weights)
    tensors = (x, labels, targets, *heads, class_weights, mask)
    arguments = (*tensors, activation, losses, float(label_smoothing), ignore_index, float(delta))
    if (result := eager.losses(arguments)) is not None:
        return result
    if labels is not None:
        _check_classes(arguments)
    return OPERATOR(*arguments)


def _places(loss: str | Sequence[str], tasks: int) -> list[int]:
    """The losses as places in HEAD_LOSSES, one for all tasks or one each."""
    names = [loss] if isinstance(loss, str) else loss
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"loss must be a name or a list of names, got {loss!r}")
    for name in set(names):
        _check.choice("loss", name, HEAD_LOSSES)
    if not isinstance(loss, str) and len(names) != tasks:
        raise ValueError(f"loss must be one name, or one for each of the {tasks} tasks, got {len(names)}")
    if len(set(names)) == 1:
        names = names[:1]
    return [HEAD_LOSSES.index(name) for name in names]


def _labels_and_targets(y, x, offsets, weight, out_offsets, losses) -> tuple[Tensor | None, Tensor | None]:
    """What y holds, checked; of what no loss reads `None`."""
    classes, values = 0 in losses, any(losses)
    if isinstance(y, (list, tuple)):
        if len(y) != 2:
            raise ValueError(f"y must be one tensor, or the pair (classes, targets), got {len(y)}")
        labels, targets = y
    elif classes and values:
        raise ValueError("y must be the pair (classes, targets) where cross_entropy and other losses are mixed")
    else:
        labels, targets = (y, None) if classes else (None, y)
    if classes:
        _check.same_device("y", _check.tensor("y", labels), x, "x")
        _check.no_gradient("y", labels)
        if labels.dtype != torch.int64:
            raise TypeError(f"y must be int64 class labels, got {labels.dtype}")
        _check.shape("y", labels, ("R", x.shape[0]))
    if values:
        _check.same_device("y", _check.tensor("y", targets), x, "x")
        _check.no_gradient("y", targets)
        _check.floating("y", targets, like=x, like_name="x")
        targets = _like_outputs("y", targets, x, offsets, weight, out_offsets)
    return labels if classes else None, targets if values else None


def _like_outputs(name: str, value: Tensor, x, offsets, weight, out_offsets) -> Tensor:
    """A tensor in the shape of the outputs, flattened."""
    if out_offsets is None:
        classes = weight.shape[0] // max(offsets.numel() - 1, 1)
        if list(value.shape) not in ([x.shape[0], classes], [x.shape[0] * classes]):
            raise ValueError(f"{name} must be [R={x.shape[0]}, C={classes}], got shape {list(value.shape)}")
    elif value.dim() != 1 or (_check.readable(offsets) and value.numel() != _outputs(offsets, out_offsets)):
        expected = _outputs(offsets, out_offsets) if _check.readable(offsets) else "sum of R_t * C_t"
        raise ValueError(f"{name} must be [{expected}], packed as the outputs of heads, got shape {list(value.shape)}")
    return value.reshape(-1)


def _checked_mask(mask, x, offsets, weight, out_offsets, losses) -> Tensor:
    _check.same_device("mask", _check.tensor("mask", mask), x, "x")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if 0 in losses:
        _check.shape("mask", mask, ("R", x.shape[0]))
    elif list(mask.shape) != [x.shape[0]]:
        mask = _like_outputs("mask", mask, x, offsets, weight, out_offsets)
    return mask


def _in_order(values: Tensor | None, order: Tensor, width: int | None) -> Tensor | None:
    """Values of rows, or of outputs of rows with equally many of them, in another order of the rows."""
    if values is None or values.numel() == order.numel():
        return None if values is None else values[order]
    return values.view(-1, width)[order].flatten() if width else values


def _outputs(offsets: Tensor, out_offsets: Tensor) -> int:
    return int((offsets.diff() * out_offsets.diff()).sum())


def _check_classes(arguments: tuple) -> None:
    """Classes that the rows' tasks have, in the rows that count."""
    x, labels, _, offsets, weight, _, out_offsets, _, _, _, mask, _, losses, _, ignore_index, _ = arguments
    if not _check.readable(labels):
        return
    counts = offsets.diff()
    if out_offsets is None:
        out_offsets = reference.equal_offsets(weight, offsets)
    widths = out_offsets.diff().repeat_interleave(counts)  # [R]
    bad = ((labels < 0) | (labels >= widths)) & (labels != ignore_index)
    if len(losses) > 1:
        bad &= (torch.tensor(losses, device=x.device) == 0).repeat_interleave(counts)
    if mask is not None:
        bad &= mask
    for row in bad.nonzero().flatten()[:1].tolist():
        raise ValueError(f"y must be in 0..{int(widths[row]) - 1} in row {row}, got {int(labels[row])}")
