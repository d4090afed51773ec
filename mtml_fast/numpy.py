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
from collections.abc import Sequence

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

__all__ = ["sgd_step"]


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
    lists = ([np.require(x, requirements="CA") for x in arrays] for arrays in named.values())
    return _numpy.sgd_step(*lists, float(momentum), float(weight_decay), clip)


def _arrays(name: str, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of NumPy arrays, got {type(values).__name__}")
    for i, x in enumerate(values):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}[{i}] must be a NumPy array, got {type(x).__name__}")
    return list(values)
