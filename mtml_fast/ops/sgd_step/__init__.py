"""sgd_step: one functional gradient step on the batched parameters of a whole parameter tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_fast.ops import _check
from mtml_fast.ops._define import define_op
from mtml_fast.ops.sgd_step import reference


def _fake(params, grads, lr, momentum_buffers, momentum, weight_decay, clip):
    return [p.new_empty(p.shape) for p in (params + params if momentum else params)]


OPERATOR = define_op(
    "sgd_step",
    "(Tensor[] params, Tensor[] grads, Tensor[] lr, Tensor[] momentum_buffers, "
    "float momentum, float weight_decay, float? clip) -> Tensor[]",
    reference.sgd_step,
    fake=_fake,
    differentiable=("params", "grads", "lr", "momentum_buffers"),
)


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: float | Tensor | Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    r"""One SGD step on every leaf of a parameter tree, for all tasks at once, out of place.

    .. math::
        d = c\,g + \lambda p, \qquad m' = \mu m + d, \qquad p' = p - a\,m',
        \qquad c = \min\bigl(1, \tfrac{\text{clip}}{\lVert g \rVert + 10^{-6}}\bigr)

    The norm is taken over all leaves of one task. Without momentum m' is d, and there are no buffers.

    Args:
        params: leaves `[T, ...]`, float32 or float64.
        grads: as `params`.
        lr: the rate a: a number, or a tensor `[]` or `[T]` for all leaves; or one tensor a leaf, `[]`, `[T]`, or of
            the leaf's rank, `[1, ...]` (a rate per parameter) or `[T, ...]`.
        momentum_buffers: the leaves m of the last step, as `params`; `None` stands for zeros.
        momentum: the factor mu, in [0, 1).
        weight_decay: the factor lambda, not negative.
        clip: the largest norm of one task's gradient; `None` leaves it alone.

    Returns:
        The new leaves, and the new momentum buffers (none without momentum).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Derivatives: any order for params, grads, lr and momentum_buffers; the first is native on the CPU and in CUDA.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, in the
    form torch.optim.SGD uses.

    Example:
        >>> params, grads = [torch.ones(2, 3)], [torch.ones(2, 3)]
        >>> sgd_step(params, grads, lr=torch.tensor([0.5, 0.25]))[0]
        [tensor([[0.5000, 0.5000, 0.5000],
                [0.7500, 0.7500, 0.7500]])]
    """
    params, grads = _check.task_leaves("params", params), _check.tensor_list("grads", grads)
    _check.same_tree("grads", grads, params)
    rates = _rates(lr, params)
    _check.number("momentum", momentum, low=0.0, below=1.0)
    _check.number("weight_decay", weight_decay, low=0.0)
    if clip is not None:
        _check.number("clip", clip, low=0.0, exclusive=True)
    if momentum_buffers is None:
        buffers = [torch.zeros_like(p) for p in params] if momentum else []
    else:
        buffers = _check.tensor_list("momentum_buffers", momentum_buffers)
        if not momentum and buffers:
            raise ValueError(f"momentum_buffers must be None without momentum, got {len(buffers)} tensors")
        if momentum:
            _check.same_tree("momentum_buffers", buffers, params)
    results = OPERATOR(params, grads, rates, buffers, float(momentum), float(weight_decay), clip)
    return list(results[: len(params)]), list(results[len(params) :])


def _rates(lr, params: list[Tensor]) -> list[Tensor]:
    """The rates as a list: one for all leaves, or one a leaf."""
    tasks = params[0].shape[0]
    if isinstance(lr, (list, tuple)):
        rates = _check.tensor_list("lr", lr)
        if len(rates) != len(params):
            raise ValueError(f"lr must hold one tensor for each of the {len(params)} leaves, got {len(rates)}")
    else:
        rates = [_check.rate("lr", lr, like=params[0])]
    for i, rate in enumerate(rates):
        name = f"lr[{i}]" if isinstance(lr, (list, tuple)) else "lr"
        _check.rate(name, rate, like=params[0])
        shape, leaf = list(rate.shape), list(params[i].shape)
        per_parameter = isinstance(lr, (list, tuple)) and shape in (leaf, [1, *leaf[1:]])
        if shape not in ([], [tasks]) and not per_parameter:
            allowed = f"[], [T={tasks}]" + (f", {[1, *leaf[1:]]} or {leaf}" if isinstance(lr, (list, tuple)) else "")
            raise ValueError(f"{name} must have shape {allowed}, got {shape}")
    return rates
