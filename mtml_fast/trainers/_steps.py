"""One optimizer step on parameters that hold many tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtml_fast.nn.task_heads import TaskHeads
from mtml_fast.nn.task_stack import TaskStack


def descend(
    backward: Callable[[], object],
    optimizer: torch.optim.Optimizer,
    heads: TaskHeads | TaskStack,
    tasks: Sequence[int],
) -> None:
    """`backward()`, and a step of the optimizer that leaves every task which is not in `tasks` as it is.

    Those tasks have a zero gradient here, where a module of their own would have none: momentum and weight decay would
    move them.
    """
    optimizer.zero_grad()
    backward()
    kept = _kept(optimizer, heads, tasks)
    optimizer.step()
    with torch.no_grad():
        for tensor, rows, values in kept:
            tensor[rows] = values


def _kept(optimizer: torch.optim.Optimizer, heads: TaskHeads | TaskStack, tasks: Sequence[int]):
    """What belongs to absent tasks, in the parameters and in the optimizer's state: (tensor, rows, their values)."""
    absent = set(range(heads.num_tasks)) - set(tasks)
    if not absent:
        return []
    kept = []
    for parameter, owners in heads.owners():
        rows = torch.isin(owners, torch.tensor(sorted(absent), device=owners.device)).nonzero().squeeze(1)
        state = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.shape == parameter.shape]
        kept += [(tensor, rows, tensor.detach()[rows]) for tensor in (parameter, *state)]
    return kept
