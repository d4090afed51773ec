"""Arguments of a call, in dicts and lists: the same tensors in other layouts, roundings, tasks."""

from __future__ import annotations

import torch
from torch import Tensor


def tensors_in(value) -> list[Tensor]:
    """All tensors of a tensor, a list or a dict with more of them inside."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def floats(value) -> list[Tensor]:
    """The floating ones among them."""
    return [t for t in tensors_in(value) if t.is_floating_point()]


def map_tensors(value, function):
    """The same structure with a function applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return type(value)(map_tensors(v, function) for v in value) if isinstance(value, (list, tuple)) else value


def rounded(arguments: dict, eps: float) -> dict:
    """Every float one unit in the last place up or down, at random."""

    def off(t: Tensor) -> Tensor:
        return t * (1 + eps * (2 * torch.randint_like(t, 2) - 1)) if t.is_floating_point() else t

    return map_tensors(arguments, off)


def in_dtype(arguments: dict, dtype: torch.dtype) -> dict:
    """Every float in another dtype."""
    return map_tensors(arguments, lambda t: t.to(dtype) if t.is_floating_point() else t)


def transposed(t: Tensor) -> Tensor:
    """The first and last axes stored the other way round."""
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def offset(t: Tensor) -> Tensor:
    """A slice that starts one element into its storage."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """Stride 0 along the second axis of floats: every row of a task the same."""
    return t[:, :1].expand(t.shape) if t.is_floating_point() and t.dim() > 2 and t.shape[1] else t


def select(arguments: dict, axes: dict[str, str], tasks: list[int]) -> dict:
    """The call with these tasks alone."""
    selected = dict(arguments)
    for name, axis in axes.items():
        if arguments.get(name) is None:
            continue
        if axis == "T":
            selected[name] = map_tensors(arguments[name], lambda t: t[tasks] if t.dim() else t)
        else:
            bounds = arguments[axis].tolist()
            selected[name] = torch.cat([arguments[name][bounds[t] : bounds[t + 1]] for t in tasks])
            counts = arguments[axis].diff()[tasks]
            selected[axis] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return selected


def poison(arguments: dict, axes: dict[str, str], task: int) -> dict:
    """The call with NaN in all rows of one task."""

    def spoil(t: Tensor, rows) -> Tensor:
        t = t.clone()
        if t.is_floating_point() and t.dim():
            t[rows] = torch.nan
        return t

    poisoned = dict(arguments)
    for name, axis in axes.items():
        # a rate that is not finite is refused
        if arguments.get(name) is None or name == "lr":
            continue
        rows = task if axis == "T" else slice(*arguments[axis][task : task + 2].tolist())
        poisoned[name] = map_tensors(arguments[name], lambda t, rows=rows: spoil(t, rows))
    return poisoned
