"""Argument checks: one line that names the argument, what it must be and what it was.

The only file, besides the dispatcher, that asks where a tensor lives: values (labels, rates) are read where reading is
free, on the CPU and outside of compilation and transforms, and never on a device, where a read would stop the stream.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_fast.ops._route import in_transform
from mtml_fast.tasks import check_offsets


def tensor(name: str, value) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def tensor_list(name: str, values) -> list[Tensor]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, got {type(values).__name__}")
    return [tensor(f"{name}[{i}]", value) for i, value in enumerate(values)]


def floating(name: str, value: Tensor, *, like: Tensor | None = None, like_name: str = "") -> Tensor:
    """A float32 or float64 tensor, of the dtype and on the device of another."""
    tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name} ({like.dtype}), got {value.dtype}")
    if like is not None:
        same_device(name, value, like, like_name)
    return value


def widened(value: Tensor, like: Tensor) -> Tensor:
    """Features in half precision, which a trunk leaves under autocast, in the dtype of the parameters."""
    if not isinstance(value, Tensor) or not isinstance(like, Tensor) or value.dtype == like.dtype:
        return value
    kind = value.device.type
    half = value.dtype in (torch.float16, torch.bfloat16)
    # not of every device, such as meta, may one ask whether it is enabled
    if half and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return value.to(like.dtype)
    return value


def same_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {value.device}")


def same_tree(name: str, values: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Leaves with the shapes, the dtype and the device of params."""
    if len(values) != len(params):
        raise ValueError(f"{name} must hold one tensor for each of the {len(params)} params, got {len(values)}")
    for i, (value, param) in enumerate(zip(values, params, strict=True)):
        floating(f"{name}[{i}]", value, like=param, like_name=f"params[{i}]")
        if value.shape != param.shape:
            expected = list(param.shape)
            raise ValueError(f"{name}[{i}] must have the shape of params[{i}] {expected}, got {list(value.shape)}")


def task_leaves(name: str, values: Sequence[Tensor]) -> list[Tensor]:
    """Leaves `[T, ...]` of one T, one dtype and one device, at least one of them."""
    leaves = tensor_list(name, values)
    if not leaves:
        raise ValueError(f"{name} must hold at least one tensor, got none")
    first = leaves[0]
    for i, leaf in enumerate(leaves):
        floating(f"{name}[{i}]", leaf, like=first, like_name=f"{name}[0]")
        if leaf.dim() < 1 or leaf.shape[0] != first.shape[0]:
            tasks = first.shape[0] if first.dim() else "T"
            raise ValueError(f"{name}[{i}] must be [T={tasks}, ...], got shape {list(leaf.shape)}")
    return leaves


def shape(name: str, value: Tensor, *expected: tuple[str, int | None]) -> None:
    """The exact shape, given as (axis letter, size or None for any)."""
    right = value.dim() == len(expected)
    if not right or any(size is not None and size != n for (_, size), n in zip(expected, value.shape, strict=True)):
        axes = ", ".join(letter if size is None else f"{letter}={size}" for letter, size in expected)
        raise ValueError(f"{name} must be [{axes}], got shape {list(value.shape)}")


def number(
    name: str, value, *, low: float = -math.inf, below: float = math.inf, exclusive: bool = False, integer: bool = False
) -> None:
    """A finite Python number in [low, below), or above low where that is exclusive."""
    kinds = int if integer else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name} must be {'an integer' if integer else 'a number'}, got {value!r}")
    if not math.isfinite(value) or value < low or value >= below or (exclusive and value == low):
        lower = "" if low == -math.inf else f" {'above' if exclusive else 'at least'} {low:g}"
        upper = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name} must be finite{lower and ','}{lower}{upper}, got {value!r}")


def choice(name: str, value, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def rate(name: str, value, *, like: Tensor, read: bool = True) -> Tensor:
    """A learning rate, a number or a tensor, as a finite tensor of the dtype and on the device of another."""
    if not isinstance(value, Tensor):
        number(name, value)
        # filled in on the device: a copy from the host could not be captured in a graph
        return torch.full((), value, dtype=like.dtype, device=like.device)
    floating(name, value, like=like, like_name="the parameters")
    if read and readable(value) and not bool(value.isfinite().all()):
        bad = value.detach().flatten()[~value.detach().isfinite().flatten()][0]
        raise ValueError(f"{name} must be finite, got {bad.item()}")
    return value


def labels(
    name: str,
    value: Tensor,
    classes: int | None,
    class_mask: Tensor | None = None,
    task: Tensor | None = None,
) -> None:
    """int64 classes in [0, classes), where their number is known, and present in their task where there is a mask."""
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 class labels, got {value.dtype}")
    if value.numel() == 0 or not readable(value):
        return
    low, high = map(int, value.aminmax())
    if low < 0 or (classes is not None and high >= classes):
        allowed = "0 or more" if classes is None else f"in 0..{classes - 1}"
        raise ValueError(f"{name} must be {allowed}, got {low if low < 0 else high}")
    if class_mask is not None:
        absent = ~class_mask[task, value.flatten()]
        if absent.any():
            i = int(absent.nonzero()[0])
            bad, of = int(value.flatten()[i]), int(task[i])
            raise ValueError(f"{name} must be a class of its task in class_mask, got {bad} in task {of}")


def offsets(name: str, value, rows: Tensor, *, empty_tasks: bool = False) -> None:
    """int64 `[T + 1]` from 0 to the number of packed rows, on their device."""
    check_offsets(name, tensor(name, value), rows.shape[0], empty_tasks=empty_tasks, values=readable(value))
    same_device(name, value, rows, "its rows")


def no_gradient(name: str, value: Tensor | None) -> None:
    """There is no derivative for this argument, and none is made up."""
    if value is not None and value.requires_grad:
        raise ValueError(f"{name} must not require a gradient (there is no derivative for it); detach it")


def readable(value: Tensor) -> bool:
    """Whether reading the values costs nothing: on the CPU, not in a compiler or under a transform."""
    plain = type(value) in (Tensor, torch.nn.Parameter)
    return value.device.type == "cpu" and plain and not torch.compiler.is_compiling() and not in_transform()


def cuda_device() -> str | None:
    """The name of the CUDA device, where there is one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def forked_random(like: Tensor) -> contextlib.AbstractContextManager:
    """Puts the random numbers of the CPU and of a tensor's device back; of no other, which torch would warn of."""
    device = like.device
    return torch.random.fork_rng([device.index] if device.type == "cuda" else [])
