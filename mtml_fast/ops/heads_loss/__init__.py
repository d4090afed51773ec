"""heads_loss: every task's rows through the task's own head, and each task's mean loss."""

from __future__ import annotations

from torch import Tensor

from mtml_fast.ops import _check
from mtml_fast.ops._define import define_op
from mtml_fast.ops._heads import checked_heads
from mtml_fast.ops.heads_loss import reference
from mtml_fast.ops.heads_loss.reference import LOSSES

OPERATOR = define_op(
    "heads_loss",
    "(Tensor x, Tensor y, Tensor offsets, Tensor weight, Tensor? bias, Tensor? out_offsets, Tensor? hidden_weight, "
    "Tensor? hidden_bias, str activation, str loss) -> Tensor",
    reference.heads_loss,
    fake=lambda x, y, offsets, *_: x.new_empty(offsets.shape[0] - 1),
    differentiable=("x", "weight", "bias", "hidden_weight", "hidden_bias"),
)


def heads_loss(
    x: Tensor,
    y: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_offsets: Tensor | None = None,
    *,
    hidden_weight: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    activation: str = "relu",
    loss: str = "cross_entropy",
) -> Tensor:
    r"""Each task's mean loss over its own rows and outputs.

    .. math::
        L_t = \frac{1}{R_t} \sum_{r \in t} \ell(z_{t,r}, y_r)

    Args:
        x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation: as for `heads`.
        y: int64 classes `[R]` in 0..C_t - 1 for cross_entropy; else float targets, packed as the outputs of `heads`
            are, `[sum of R_t * C_t]`, or `[R, C]` for equal widths.
        loss: "cross_entropy", "mse" (the mean over rows and outputs of the squared error) or "bce" (the same of the
            binary cross-entropy of logits).

    Returns:
        `[T]`; zero for a task without rows.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Derivatives: any order for x, weight, bias, hidden_weight and hidden_bias.

    Example:
        >>> import torch
        >>> x, offsets = torch.eye(3), torch.tensor([0, 1, 3])
        >>> weight = torch.tensor([[1.0, 2, 3], [10, 20, 30]])
        >>> heads_loss(x, torch.zeros(3), offsets, weight, loss="mse")
        tensor([  1., 650.])
    """
    arguments = checked_heads(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation)
    _check.choice("loss", loss, LOSSES)
    _check.same_device("y", _check.tensor("y", y), x, "x")
    _check.no_gradient("y", y)
    tasks = offsets.numel() - 1
    if loss == "cross_entropy":
        _check.shape("y", y, ("R", x.shape[0]))
        _check_classes(y, offsets, weight.shape[0], out_offsets)
    else:
        _check.floating("y", y, like=x, like_name="x")
        if out_offsets is None:
            classes = weight.shape[0] // max(tasks, 1)
            if list(y.shape) not in ([x.shape[0], classes], [x.shape[0] * classes]):
                raise ValueError(f"y must be [R={x.shape[0]}, C={classes}], got shape {list(y.shape)}")
        elif y.dim() != 1 or (_check.readable(offsets) and y.numel() != _outputs(offsets, out_offsets)):
            expected = _outputs(offsets, out_offsets) if _check.readable(offsets) else "sum of R_t * C_t"
            raise ValueError(f"y must be [{expected}], packed as the outputs of heads, got shape {list(y.shape)}")
        y = y.reshape(-1)
    return OPERATOR(arguments[0], y, *arguments[1:], loss)


def _outputs(offsets: Tensor, out_offsets: Tensor) -> int:
    return int((offsets.diff() * out_offsets.diff()).sum())


def _check_classes(y: Tensor, offsets: Tensor, outputs: int, out_offsets: Tensor | None) -> None:
    tasks = offsets.numel() - 1
    if out_offsets is None:
        _check.labels("y", y, outputs // max(tasks, 1))
        return
    _check.labels("y", y, outputs)
    if _check.readable(y) and y.numel():
        widths = out_offsets.diff().repeat_interleave(offsets.diff())  # [R]
        for row in (y >= widths).nonzero().flatten()[:1].tolist():
            raise ValueError(f"y must be in 0..{int(widths[row]) - 1} in row {row}, got {int(y[row])}")
