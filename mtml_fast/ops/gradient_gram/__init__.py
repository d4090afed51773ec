"""gradient_gram: the inner products of all pairs of task gradients, over lists of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_fast.ops import _check
from mtml_fast.ops._define import define_op
from mtml_fast.ops.gradient_gram import reference


def _fake(gradients):
    tasks = gradients[0].shape[0]
    return gradients[0].new_empty((tasks, tasks), dtype=torch.float64)


OPERATOR = define_op(
    "gradient_gram",
    "(Tensor[] gradients) -> Tensor",
    reference.gradient_gram,
    fake=_fake,
    differentiable=("gradients",),
)


def gradient_gram(gradients: Sequence[Tensor]) -> Tensor:
    r"""The Gram matrix of T gradients, each spread over a list of parameters that is never concatenated.

    .. math::
        M_{ij} = \sum_p \langle g_{p,i},\, g_{p,j} \rangle

    Args:
        gradients: one tensor a parameter, `[T, ...]` each, float32 or float64.

    Returns:
        M, `[T, T]` in float64 whatever the gradients are: the sums over millions of parameters are taken in float64,
        and the small problems that are solved with M ask for its differences, which would be lost in float32.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Derivatives: any order for gradients.

    Example:
        >>> gradient_gram([torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([1.0, -3])])
        tensor([[ 6., -1.],
                [-1., 10.]], dtype=torch.float64)
    """
    return OPERATOR(_check.task_leaves("gradients", gradients))
