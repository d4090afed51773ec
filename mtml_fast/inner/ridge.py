"""ridge_head: the linear head of every task in closed form, all tasks at once."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_fast.ops import _check
from mtml_fast.tasks import TaskRows

__all__ = ["ridge_head"]

# numbers of float64 in the rows and the systems of tasks that run together: 2 MiB, which stay in a cache
_GROUP = 2**18


def ridge_head(rows: TaskRows, penalty: float | Tensor = 1.0, *, classes: int | None = None) -> tuple[Tensor, Tensor]:
    r"""The linear head of every task that fits its rows best: ridge regression, whose bias is not penalised.

    .. math::
        W_t, b_t = \arg\min_{W, b} \sum_n \lVert W x_{t,n} + b - y_{t,n} \rVert^2 + \lambda_t \lVert W \rVert^2

        W_t^\top = (X^\top X + \lambda_t I)^{-1} X^\top Y = X^\top (X X^\top + \lambda_t I)^{-1} Y, \qquad
        b_t = \bar y_t - W_t \bar x_t

    with X, Y the rows and targets less their means. Each task takes the smaller system, `[D, D]` or `[N, N]`, solved in
    float64. Classes are regressed on as rows of zeros with a one. The outputs are then scores, about 0 to 1 and largest
    for the likeliest class; they are no logits, and a softmax of them is nearly flat: R2-D2 learns a scale and a shift
    of them together with the features.

    Args:
        rows: x `[T, N, D]` or packed `[R, D]`, float32 or float64; y floats `[T, N]` or `[T, N, O]` (`[R]`, `[R, O]`),
            or int64 classes `[T, N]` (`[R]`). Outputs that a task lacks by `class_mask` get zeros.
        penalty: lambda, above zero: a number, or a tensor `[]` or `[T]`, which may learn. Without one the solution is
            not unique where features outnumber rows, and zero is refused.
        classes: C. `None`: that of `class_mask`, or one more than the largest in y.

    Returns:
        weight `[T, O, D]` and bias `[T, O]`, in the dtype of x. A task's head does not depend on the other tasks, up to
        rounding in float64.

    Derivatives: any order, for x, y and penalty.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Source: Bertinetto, Henriques, Torr and Vedaldi, "Meta-learning with differentiable closed-form solvers", ICLR 2019
    (R2-D2, without the free bias); Hoerl and Kennard, "Ridge regression", Technometrics 1970.

    Example:
        >>> import mtml_fast as mf
        >>> body, scale = torch.nn.Linear(8, 64), torch.tensor(5.0, requires_grad=True)
        >>> support, query = torch.randn(3, 10, 8), torch.randn(3, 6, 8)
        >>> weight, bias = mf.ridge_head(mf.TaskRows(body(support), torch.randint(0, 2, (3, 10))), classes=2)
        >>> logits = scale * (body(query) @ weight.mT + bias[:, None])
        >>> torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 2, (18,))).backward()
    """
    x, y = _packed(rows, classes)
    penalty = _penalties(penalty, x, rows.num_tasks)
    if rows.num_tasks == 0:
        return x.new_zeros(0, y.shape[1], x.shape[1]), x.new_zeros(0, y.shape[1])
    groups, places = _groups(rows.counts, x.shape[1] + y.shape[1])
    # one gather for all groups: its derivative goes through the rows once
    index = torch.cat([place.flatten() for place in places]).to(x.device)
    sizes = [place.numel() for place in places]
    weights, biases = [], []
    for tasks, place, own_x, own_y in zip(
        groups, places, x.index_select(0, index).split(sizes), y.index_select(0, index).split(sizes), strict=True
    ):
        weight, bias = _solved(
            own_x.unflatten(0, place.shape),
            own_y.unflatten(0, place.shape),
            rows.counts[tasks].to(x.device),
            penalty[tasks.to(x.device)],
        )
        weights.append(weight.to(x.dtype))
        biases.append(bias.to(x.dtype))
    # from the order of the groups back to that of the tasks
    back = torch.cat(groups).argsort().to(x.device)
    return torch.cat(weights)[back], torch.cat(biases)[back]


def _groups(counts: Tensor, width: int) -> tuple[list[Tensor], list[Tensor]]:
    """The tasks that run together, and for each such group its packed rows [G, N].

    A task with fewer rows than N repeats its last one: what other tasks hold stays with them.
    """
    starts = counts.cumsum(0) - counts
    # equal for tasks whose rows differ by a quarter at most: four numbers to each power of two
    step = 2 ** (counts.double().log2().floor().long() - 2).clamp(min=0)
    alike = (counts + step - 1) // step * step
    groups, places = [], []
    for most in alike.unique().tolist():
        size = max(1, _GROUP // (most * width + min(most, width) ** 2))
        for tasks in (alike == most).nonzero().squeeze(1).split(size):
            last = counts[tasks, None] - 1
            groups.append(tasks)
            places.append(starts[tasks, None] + torch.arange(int(last.max()) + 1).minimum(last))
    return groups, places


def _solved(x: Tensor, y: Tensor, counts: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [G, O, D] and bias [G, O] of rows x [G, N, D], y [G, N, O], the first `counts` of each; in float64."""
    # products of features square their condition, which float32 does not bear
    x, y, counts = x.double(), y.double(), counts[:, None, None].double()
    exists = (torch.arange(x.shape[1], device=x.device)[:, None] < counts).double()  # [G, N, 1]
    mean_x, mean_y = (exists.mT @ x) / counts, (exists.mT @ y) / counts
    x, y = (x - mean_x) * exists, (y - mean_y) * exists
    # a padded row is zero: it adds nothing to the one system, and stands alone with a solution of zero in the other
    wide = x.shape[1] <= x.shape[2]
    system = x @ x.mT if wide else x.mT @ x
    try:
        factor = torch.linalg.cholesky(system + torch.diag_embed(penalty[:, None].expand(-1, system.shape[1])))
    except torch.linalg.LinAlgError:
        if not bool(x.isfinite().all()):
            raise ValueError("rows.x must be finite, got NaN or infinity") from None
        least = penalty.min().item()
        raise ValueError(f"penalty must not vanish beside the squares of the rows in float64, got {least:g}") from None
    weight = x.mT @ torch.cholesky_solve(y, factor) if wide else torch.cholesky_solve(x.mT @ y, factor)  # [G, D, O]
    return weight.mT, (mean_y - mean_x @ weight).squeeze(1)


def _packed(rows: TaskRows, classes: int | None) -> tuple[Tensor, Tensor]:
    """The rows [R, D] and their targets [R, O]."""
    if not isinstance(rows, TaskRows):
        raise TypeError(f"rows must be TaskRows, got {type(rows).__name__}")
    if rows.y is None:
        raise ValueError("rows.y must hold the targets, got None")
    lead, x, y, mask = 1 if rows.is_ragged else 2, rows.x, rows.y, rows.class_mask
    # solved in float64 in any case
    x = _check.floating("rows.x", _check.widened(x, x.new_empty(0, dtype=torch.float32)))
    if x.dim() != lead + 1:
        axes = "[R, D] with offsets" if rows.is_ragged else "[T, N, D]"
        raise ValueError(f"rows.x must be {axes}, got shape {list(x.shape)}")
    if y.dim() > lead + y.is_floating_point():
        axes = "[R] or [R, O]" if rows.is_ragged else "[T, N] or [T, N, O]"
        axes = axes if y.is_floating_point() else axes.split(" or ")[0]
        raise ValueError(f"rows.y must be {axes}, got shape {list(y.shape)}")
    x, y = x.flatten(0, lead - 1), y.flatten(0, lead - 1)
    task = torch.arange(rows.num_tasks).repeat_interleave(rows.counts).to(x.device)
    if y.is_floating_point():
        if classes is not None:
            raise ValueError(f"classes must be None for floating targets, got {classes!r}")
        y = y[:, None] if y.dim() == 1 else y
        if mask is not None and mask.shape[1] != y.shape[1]:
            raise ValueError(f"rows.class_mask must be [T, O={y.shape[1]}], got shape {list(mask.shape)}")
    else:
        classes = _number_of_classes(y, classes, mask)
        _check.labels("rows.y", y, classes, mask, task)
        y = (y[:, None] == torch.arange(classes, device=y.device)).to(x.dtype)
    # a target that is always zero has the solution zero
    return x, y if mask is None else torch.where(mask[task], y, 0)


def _number_of_classes(y: Tensor, classes: int | None, mask: Tensor | None) -> int:
    if classes is not None:
        _check.number("classes", classes, low=1, integer=True)
        if mask is not None and mask.shape[1] != classes:
            raise ValueError(f"classes must be those of rows.class_mask {list(mask.shape)}, got {classes}")
        return classes
    if mask is not None:
        return mask.shape[1]
    return max(int(y.max()) + 1, 1) if y.numel() else 1


def _penalties(penalty: float | Tensor, x: Tensor, num_tasks: int) -> Tensor:
    """One for each task, [T], in float64."""
    if not isinstance(penalty, Tensor):
        _check.number("penalty", penalty, low=0, exclusive=True)
        return torch.full((num_tasks,), penalty, dtype=torch.float64, device=x.device)
    _check.floating("penalty", penalty)
    _check.same_device("penalty", penalty, x, "rows.x")
    if list(penalty.shape) not in ([], [num_tasks]):
        raise ValueError(f"penalty must be a number, [] or [T={num_tasks}], got shape {list(penalty.shape)}")
    if _check.readable(penalty):
        for bad in penalty.detach()[~((penalty > 0) & penalty.isfinite())].flatten()[:1].tolist():
            raise ValueError(f"penalty must be finite, above 0, got {bad:g}")
    return penalty.double().expand(num_tasks)
