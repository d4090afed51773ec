"""heads: a linear layer, or one with a hidden layer before it, of its own for every task, over ragged packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_fast.ops._define import define_op
from mtml_fast.ops._heads import checked_heads, equal_width, sorted_by_task
from mtml_fast.ops.heads import reference


def _fake(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation):
    if out_offsets is None:
        return x.new_empty(x.shape[0] * (weight.shape[0] // max(offsets.shape[0] - 1, 1)))
    # how many outputs there are depends on the values of both offsets
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


OPERATOR = define_op(
    "heads",
    "(Tensor x, Tensor offsets, Tensor weight, Tensor? bias, Tensor? out_offsets, Tensor? hidden_weight, "
    "Tensor? hidden_bias, str activation) -> Tensor",
    reference.heads,
    fake=_fake,
    differentiable=("x", "weight", "bias", "hidden_weight", "hidden_bias"),
    double_backward=True,
)


def heads(
    x: Tensor,
    offsets: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    out_offsets: Tensor | None = None,
    *,
    hidden_weight: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    activation: str = "relu",
    task_index: Tensor | None = None,
) -> Tensor:
    r"""Every task's rows through the task's own head.

    .. math::
        z_t = h_t W_t^\top + b_t, \qquad h_t = x_t \ \text{ or } \ \sigma(x_t V_t^\top + c_t)

    Args:
        x: rows packed by task, `[R, D]`, float32 or float64.
        offsets: int64 `[T + 1]`, from 0 to R: task t owns the rows `offsets[t]:offsets[t + 1]`; a task may have none.
        weight: the weights W of all tasks, one below the other, `[sum of C_t, D]` (`[sum of C_t, H]` behind a hidden
            layer).
        bias: b, `[sum of C_t]`.
        out_offsets: int64 `[T + 1]`: task t owns the rows `out_offsets[t]:out_offsets[t + 1]` of `weight`; `None`
            where all tasks have equally many outputs.
        hidden_weight: V, `[T, H, D]`.
        hidden_bias: c, `[T, H]`.
        activation: relu, tanh, gelu, gelu_tanh, silu, elu, leaky_relu, sigmoid, softplus or identity.
        task_index: int64 `[R]`, the task of each row, for rows in any order; `offsets` is `None` then, and
            `out_offsets` or `hidden_weight` tells how many tasks there are.

    Returns:
        Task after task its outputs `[R_t, C_t]`, flattened to `[sum of R_t * C_t]`: for equal widths
        `.view(R, C)` gives one row an input row. With `task_index` they are in the rows' own order where all tasks
        have equally many outputs; else task after task, each task's rows as they come.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Derivatives: any order for x, weight, bias, hidden_weight and hidden_bias.

    Example:
        >>> import torch
        >>> x, offsets = torch.eye(3), torch.tensor([0, 1, 3])
        >>> weight = torch.tensor([[1.0, 2, 3], [10, 20, 30]])
        >>> heads(x, offsets, weight).view(3, 1).tolist()
        [[1.0], [20.0], [30.0]]
    """
    if task_index is None:
        return OPERATOR(*checked_heads(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation))
    order, offsets = sorted_by_task(task_index, x, offsets, weight, out_offsets, hidden_weight)
    x = x.index_select(0, order)
    packed = OPERATOR(*checked_heads(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation))
    width = equal_width(weight, out_offsets, offsets.numel() - 1)
    if width is None:
        return packed
    back = torch.empty_like(order).index_copy(0, order, torch.arange(order.numel(), device=order.device))
    return packed.view(-1, width).index_select(0, back).flatten() if width else packed
