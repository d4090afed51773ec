"""The native core on NumPy arrays: the same kernels as the torch operators, on one thread.

Example:
    >>> import numpy as np
    >>> import mtml_fast.numpy as mfn
    >>> params, grads = [np.ones((2, 3))], [np.ones((2, 3))]
    >>> new_params, _ = mfn.sgd_step(params, grads, lr=np.array([0.5, 0.25]))
    >>> new_params[0].tolist()
    [[0.5, 0.5, 0.5], [0.75, 0.75, 0.75]]
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtml_fast import __version__

try:
    from mtml_fast import _numpy
except ImportError as error:
    raise ImportError(
        f"mtml_fast.numpy needs the native module ({error}): "
        "run `pip install --no-build-isolation -e .` in the source folder of mtml_fast"
    ) from None

if (_built := json.loads(_numpy.build_info())["version"]) != __version__:
    raise ImportError(
        f"mtml_fast.numpy needs a native module of version {__version__}, got {_built}: "
        "run `pip install --no-build-isolation -e .` in the source folder of mtml_fast"
    )

__all__ = [
    "HeadsLoss",
    "MLPAdapted",
    "gradient_combine",
    "gradient_gram",
    "heads",
    "heads_loss",
    "mlp_adapt",
    "sgd_step",
]

# in the order of the core
_HEAD_LOSSES = ("cross_entropy", "mse", "bce", "huber")


def sgd_step(
    params: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    *,
    lr: float | np.ndarray | Sequence[np.ndarray],
    momentum_buffers: Sequence[np.ndarray] | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    r"""One SGD step on every leaf of a parameter tree, for all tasks at once, out of place.

    .. math::
        d = c\,g + \lambda p, \qquad m' = \mu m + d, \qquad p' = p - a\,m',
        \qquad c = \min\bigl(1, \tfrac{\text{clip}}{\lVert g \rVert + 10^{-6}}\bigr)

    The norm is taken over all leaves of one task. As `mtml_fast.ops.sgd_step`, without derivatives.

    Args:
        params: leaves `[T, ...]`, all float32 or all float64.
        grads: as `params`.
        lr: the rate a: a number, or an array `[]` or `[T]` for all leaves; or a list of one array a leaf, `[]`, `[T]`,
            or of the leaf's rank, `[1, ...]` (a rate per parameter) or `[T, ...]`.
        momentum_buffers: the leaves m of the last step, as `params`; `None` stands for zeros.
        momentum: the factor mu, in [0, 1).
        weight_decay: the factor lambda, not negative.
        clip: the largest norm of one task's gradient; `None` leaves it alone.

    Returns:
        The new leaves, and the new momentum buffers (none without momentum).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, in the
    form torch.optim.SGD uses.

    Example:
        >>> params, grads = [np.ones((2, 3))], [np.full((2, 3), 3.0)]
        >>> sgd_step(params, grads, lr=0.1, momentum=0.9)[0][0].round(2).tolist()
        [[0.7, 0.7, 0.7], [0.7, 0.7, 0.7]]
    """
    params = _arrays("params", params)
    dtype = params[0].dtype if params else np.dtype(np.float64)
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"params[0] must be float32 or float64, got {dtype}")
    if isinstance(lr, (list, tuple)):
        rates = _arrays("lr", lr)
        if len(rates) != len(params):
            raise ValueError(f"lr must hold one array for each of the {len(params)} leaves, got {len(rates)}")
    else:
        # a Python number takes the dtype of the leaves, an array must have it
        rates = [np.asarray(lr, dtype if isinstance(lr, (int, float)) else None)]
    if momentum_buffers is None:
        buffers = [np.zeros_like(p) for p in params] if momentum else []
    else:
        buffers = _arrays("momentum_buffers", momentum_buffers)
    named = {"params": params, "grads": _arrays("grads", grads), "lr": rates, "momentum_buffers": buffers}
    for name, arrays in named.items():
        for i, x in enumerate(arrays):
            if x.dtype != dtype:
                raise TypeError(f"{name}[{i}] must be {dtype} as params[0], got {x.dtype}")
    return _numpy.sgd_step(*map(_contiguous, named.values()), float(momentum), float(weight_decay), clip)


class MLPAdapted(NamedTuple):
    """What the adapted networks say about the query rows."""

    outputs: np.ndarray  # [T, Q, C] or [R, C]; with every_step [K + 1, ...], the first before any step
    losses: np.ndarray  # [T], or [K + 1, T]: each task's mean query loss (zeros without labels)
    parameters: list[np.ndarray] | None  # as params, each [T, ...], where they were asked for
    mean_loss: np.ndarray | None  # []: the mean over the tasks of the last losses, where the gradient was asked for
    gradients: list[np.ndarray] | None  # of mean_loss, as params


def mlp_adapt(
    params: Sequence[np.ndarray],
    support_x: np.ndarray,
    support_y: np.ndarray,
    query_x: np.ndarray,
    query_y: np.ndarray | None = None,
    *,
    lr: float | np.ndarray | Sequence[np.ndarray],
    steps: int = 1,
    loss: str = "cross_entropy",
    activation: str = "relu",
    bias: bool = True,
    norm: bool = False,
    norm_eps: float = 1e-5,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    support_offsets: np.ndarray | None = None,
    query_offsets: np.ndarray | None = None,
    class_mask: np.ndarray | None = None,
    adapted: Sequence[bool] | None = None,
    first_order: bool = False,
    every_step: bool = False,
    return_parameters: bool = False,
    gradient: bool = False,
) -> MLPAdapted:
    r"""K SGD steps of an MLP on every task's support rows, then the query rows through each task's own weights.

    .. math::
        \theta_{t,0} = \theta, \qquad
        \theta_{t,k+1} = \theta_{t,k} - a_k \nabla_\theta L\bigl(\theta_{t,k}; \text{support}_t\bigr), \qquad
        J = \frac{1}{T} \sum_t L\bigl(\theta_{t,K}; \text{query}_t\bigr)

    Args:
        params: layer after layer the weight `[O, I]`, then the bias `[O]` (where `bias`), then, on all layers but the
            last (where `norm`), gain and shift `[O]` of a batch norm. Any may be `[T, ...]`: a start per task.
        gradient: return J and its gradient with respect to params too, exact through all the inner steps.
        The other arguments are those of `mtml_fast.ops.mlp_adapt`, as NumPy arrays.

    Returns:
        `MLPAdapted(outputs, losses, parameters, mean_loss, gradients)`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Source: Finn et al., "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017.

    Example:
        >>> weight, bias = np.zeros((2, 3)), np.zeros(2)
        >>> x, y = np.tile(np.eye(3), (4, 1, 1)), np.tile([0, 1, 0], (4, 1))
        >>> result = mlp_adapt([weight, bias], x, y, x, y, lr=1.0, steps=5, gradient=True)
        >>> result.outputs.shape, bool(result.mean_loss < 0.6), [g.shape for g in result.gradients]
        ((4, 3, 2), True, [(2, 3), (2,)])
    """
    params = _arrays("params", params)
    if not params:
        raise ValueError("params must hold at least one layer, got none")
    dtype = params[0].dtype
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"params[0] must be float32 or float64, got {dtype}")
    for i, p in enumerate(params):
        if p.dtype != dtype:
            raise TypeError(f"params[{i}] must be {dtype} as params[0], got {p.dtype}")
    _number("steps", steps, integer=True)
    for name, value in (("norm_eps", norm_eps), ("momentum", momentum), ("weight_decay", weight_decay), ("clip", clip)):
        if value is not None or name != "clip":
            _number(name, value)
    for name, value in (("loss", loss), ("activation", activation)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {value!r}")
    if adapted is not None and not isinstance(adapted, (list, tuple, np.ndarray)):
        raise TypeError(f"adapted must be a list of bools, got {adapted!r}")
    per_layer = 1 + bool(bias) + 2 * bool(norm)
    ranks = [2 if i % per_layer == 0 else 1 for i in range(len(params))]
    shapes = [p.shape[max(p.ndim - rank, 0) :] for p, rank in zip(params, ranks, strict=True)]
    rates = _rates(lr, shapes, [i // per_layer for i in range(len(params))], dtype)
    rows = {"support_x": support_x, "support_y": support_y, "query_x": query_x, "query_y": query_y}
    optional = {"support_offsets": support_offsets, "query_offsets": query_offsets, "class_mask": class_mask}
    named = {**rows, **optional}
    for name, x in named.items():
        if not isinstance(x, np.ndarray) and (x is not None or name in ("support_x", "support_y", "query_x")):
            raise TypeError(f"{name} must be a NumPy array, got {type(x).__name__}")
    # the core says which losses there are
    labels = np.int64 if loss == "cross_entropy" else dtype if loss in ("mse", "bce") else None
    expected = dict(support_x=dtype, query_x=dtype, support_y=labels, query_y=labels, class_mask=np.bool_)
    for name, x in named.items():
        right = expected.get(name, np.int64)
        if x is not None and right is not None and x.dtype != right:
            as_params = " as params[0]" if right is dtype else ""
            raise TypeError(f"{name} must be {np.dtype(right)}{as_params}, got {x.dtype}")
    for name, x in (("support_y", "support_x"), ("query_y", "query_x")):
        # targets of a single output need no axis for it
        y, single = named[name], shapes[-1][:1] == (1,)
        if y is not None and loss != "cross_entropy" and single and y.ndim == named[x].ndim - 1:
            named[name] = y[..., None]
    results = _numpy.mlp_adapt(
        _contiguous(params),
        _contiguous(rates),
        *(x if x is None else _contiguous([x])[0] for x in named.values()),
        [True] * len(params) if adapted is None else [bool(moves) for moves in adapted],
        steps,
        loss,
        activation,
        bool(bias),
        bool(norm),
        float(norm_eps),
        float(momentum),
        float(weight_decay),
        clip,
        bool(first_order),
        bool(every_step),
        bool(return_parameters),
        bool(gradient),
    )
    outputs, losses, fast, *rest = results
    if not every_step:
        outputs, losses = outputs[0], losses[0]
    parameters = None
    if return_parameters:
        parts = np.split(fast, np.cumsum([math.prod(shape) for shape in shapes])[:-1], axis=1)
        parameters = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
    return MLPAdapted(outputs, losses, parameters, rest[0] if gradient else None, rest[1:] if gradient else None)


def gradient_gram(gradients: Sequence[np.ndarray]) -> np.ndarray:
    r"""The Gram matrix of T gradients, each spread over a list of parameters that is never concatenated.

    .. math::
        M_{ij} = \sum_p \langle g_{p,i},\, g_{p,j} \rangle

    Arguments and result as of `mtml_fast.ops.gradient_gram`, as arrays: float64 `[T, T]` whatever the gradients are.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> gradient_gram([np.array([[1.0, 2], [0, 1]]), np.array([1.0, -3])]).tolist()
        [[6.0, -1.0], [-1.0, 10.0]]
    """
    return _numpy.gradient_gram(_contiguous(_arrays("gradients", gradients)))


def gradient_combine(gradients: Sequence[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
    r"""The weighted sum of T gradients, each spread over a list of parameters that is never concatenated.

    .. math::
        d_p = \sum_t w_t \, g_{p,t}

    Arguments and result as of `mtml_fast.ops.gradient_combine`, as arrays.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> [d.tolist() for d in gradient_combine([np.eye(2), np.ones(2)], np.array([3.0, 4.0]))]
        [[3.0, 4.0], 7.0]
    """
    gradients = _contiguous(_arrays("gradients", gradients))
    return _numpy.gradient_combine(gradients, *_contiguous(_arrays("weights", [weights])))


def heads(
    x: np.ndarray,
    offsets: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    out_offsets: np.ndarray | None = None,
    *,
    hidden_weight: np.ndarray | None = None,
    hidden_bias: np.ndarray | None = None,
    activation: str = "relu",
) -> np.ndarray:
    r"""Every task's rows through the task's own head.

    .. math::
        z_t = h_t W_t^\top + b_t, \qquad h_t = x_t \ \text{ or } \ \sigma(x_t V_t^\top + c_t)

    Arguments and result as of `mtml_fast.ops.heads`, as arrays.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> weight = np.array([[1.0, 2, 3], [10, 20, 30]])
        >>> heads(np.eye(3), np.array([0, 1, 3]), weight).tolist()
        [1.0, 20.0, 30.0]
    """
    arguments = _heads_arguments(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation)
    return _numpy.heads(*arguments)[0]


class HeadsLoss(NamedTuple):
    """Each task's mean loss, and the gradients of their sum."""

    losses: np.ndarray  # [T]
    # of x, weight, and of what there is of bias, hidden_weight and hidden_bias; None where not asked for
    gradients: dict[str, np.ndarray] | None


def heads_loss(
    x: np.ndarray,
    y: np.ndarray | tuple[np.ndarray, np.ndarray],
    offsets: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    out_offsets: np.ndarray | None = None,
    *,
    hidden_weight: np.ndarray | None = None,
    hidden_bias: np.ndarray | None = None,
    activation: str = "relu",
    loss: str | Sequence[str] = "cross_entropy",
    mask: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weights: np.ndarray | None = None,
    delta: float = 1.0,
    gradient: bool = False,
) -> HeadsLoss:
    r"""Each task's mean loss over its own rows and outputs.

    .. math::
        L_t = \frac{1}{R_t} \sum_{r \in t} \ell_t(z_{t,r}, y_r)

    Arguments as of `mtml_fast.ops.heads_loss`, as arrays.

    Args:
        gradient: whether to compute the gradients of the sum of the losses too.

    Returns:
        `(losses, gradients)`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> weight = np.array([[1.0, 2, 3], [10, 20, 30]])
        >>> result = heads_loss(np.eye(3), np.zeros(3), np.array([0, 1, 3]), weight, loss="mse", gradient=True)
        >>> result.losses.tolist(), result.gradients["weight"].tolist()
        ([1.0, 650.0], [[2.0, 0.0, 0.0], [0.0, 20.0, 30.0]])
    """
    arguments = _heads_arguments(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation)
    names = [loss] if isinstance(loss, str) else list(loss)
    for name in names:
        if name not in _HEAD_LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, _HEAD_LOSSES))}, got {name!r}")
    classes, others = "cross_entropy" in names, {*names} - {"cross_entropy"}
    if isinstance(y, (list, tuple)) and len(y) == 2:
        labels, targets = y
    elif classes and others:
        raise ValueError("y must be the pair (classes, targets) where cross_entropy and other losses are mixed")
    else:
        labels, targets = (y, None) if classes else (None, y)
    given = {"y": labels if classes else None, "targets": targets if others else None}
    given |= {"class_weights": class_weights, "mask": mask}
    labels, targets, class_weights, mask = (_maybe(name, value) for name, value in given.items())
    if targets is not None:
        targets = targets.reshape(-1)
    if mask is not None:
        mask = mask.reshape(-1)
    for name, value in (("label_smoothing", label_smoothing), ("delta", delta)):
        _number(name, value)
    _number("ignore_index", ignore_index, integer=True)
    x, *rest, activation = arguments
    losses, *gradients = _numpy.heads_loss(
        x,
        labels,
        targets,
        *rest,
        class_weights,
        mask,
        activation,
        [_HEAD_LOSSES.index(name) for name in names],
        float(label_smoothing),
        ignore_index,
        float(delta),
        bool(gradient),
    )
    if not gradient:
        return HeadsLoss(losses, None)
    named = dict(x=x, weight=weight, bias=bias, hidden_weight=hidden_weight, hidden_bias=hidden_bias)
    present = [name for name, value in named.items() if value is not None]
    return HeadsLoss(losses, dict(zip(present, gradients, strict=True)))


def _heads_arguments(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation) -> list:
    named = dict(x=x, offsets=offsets, weight=weight)
    for name, value in named.items():
        if value is None:
            raise TypeError(f"{name} must be a NumPy array, got NoneType")
    named |= dict(bias=bias, out_offsets=out_offsets, hidden_weight=hidden_weight, hidden_bias=hidden_bias)
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a string, got {activation!r}")
    return [*(_maybe(name, value) for name, value in named.items()), activation]


def _maybe(name: str, value: np.ndarray | None) -> np.ndarray | None:
    """A contiguous array, if there is one."""
    if value is not None and not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(value).__name__}")
    return None if value is None else _contiguous([value])[0]


def _rates(lr, shapes: list[tuple], layer_of: list[int], dtype: np.dtype) -> list[np.ndarray]:
    """One table [1 or K, 1 or P] of rates, or one array a parameter, [1 or K, *shape]."""
    if isinstance(lr, (list, tuple)):
        rates = _arrays("lr", lr)
        if len(rates) != len(shapes):
            raise ValueError(f"lr must hold one array for each of the {len(shapes)} params, got {len(rates)}")
        for i, rate in enumerate(rates):
            if rate.dtype != dtype:
                raise TypeError(f"lr[{i}] must be {dtype} as params[0], got {rate.dtype}")
        return [np.broadcast_to(r, (1, *own)) if r.ndim == 0 or r.shape == own else r
                for r, own in zip(rates, shapes, strict=True)]  # fmt: skip
    table = np.asarray(lr, dtype if isinstance(lr, (int, float)) else None)
    if table.dtype != dtype:
        raise TypeError(f"lr must be a number or {dtype} as params[0], got {table.dtype}")
    if table.ndim < 2:
        table = table.reshape(-1, 1)
    layers = layer_of[-1] + 1
    if table.ndim == 2 and table.shape[1] == layers and layers not in (1, len(shapes)):
        table = table[:, layer_of]
    return [table]


def _number(name: str, value, *, integer: bool = False) -> None:
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name} must be {'an integer' if integer else 'a number'}, got {value!r}")
    if integer and value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value}")


def _contiguous(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.require(x, requirements="CA") for x in arrays]


def _arrays(name: str, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of NumPy arrays, got {type(values).__name__}")
    for i, x in enumerate(values):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}[{i}] must be a NumPy array, got {type(x).__name__}")
    return list(values)
