"""gradient_combine: one weighted sum of all task gradients, over lists of parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtml_fast.ops import _check
from mtml_fast.ops._define import define_op
from mtml_fast.ops.gradient_combine import reference


def _fake(gradients, weights):
    return [g.new_empty(g.shape[1:]) for g in gradients]


OPERATOR = define_op(
    "gradient_combine",
    "(Tensor[] gradients, Tensor weights) -> Tensor[]",
    reference.gradient_combine,
    fake=_fake,
    differentiable=("gradients", "weights"),
)


def gradient_combine(gradients: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    r"""The weighted sum of T gradients, each spread over a list of parameters that is never concatenated.

    .. math::
        d_p = \sum_t w_t \, g_{p,t}

    Args:
        gradients: one tensor a parameter, `[T, ...]` each, float32 or float64.
        weights: w, `[T]`, of their dtype.

    Returns:
        One tensor `[...]` a parameter.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Derivatives: any order for gradients and weights.

    Example:
        >>> import torch
        >>> gradient_combine([torch.eye(2), torch.ones(2)], torch.tensor([3.0, 4.0]))
        [tensor([3., 4.]), tensor(7.)]
    """
    leaves = _check.task_leaves("gradients", gradients)
    _check.floating("weights", weights, like=leaves[0], like_name="gradients[0]")
    _check.shape("weights", weights, ("T", leaves[0].shape[0]))
    return list(OPERATOR(leaves, weights))
