"""TaskCopies: a shared module with a copy of its parameters for each task: one backward pass tells them apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtml_fast.nn.task_stack import run_stacked

__all__ = ["TaskCopies", "rows_stay_apart"]

# torch's layers that treat each row alone, by the files of torch.nn.modules that they are in, and those in there that
# do not
_ROWWISE = {"activation", "conv", "dropout", "flatten", "linear", "normalization", "padding", "pooling", "sparse"}
_MIXING = (nn.MultiheadAttention, nn.EmbeddingBag)


class TaskCopies:
    """Runs a shared module on each task's own rows, with parameters whose gradients stay apart.

    T ordinary backward passes, or a batched one, go through the rows of all tasks T times. Here each row is gone
    through once: the gradients of all tasks cost what one backward pass costs, and the memory of T gradients. The
    values are the shared ones, and so are the results, except that a layer which mixes rows (batch norm) sees those of
    one task; buffers (running statistics) stay as they are.

    Args:
        module: what the tasks share.

    Example:
        >>> from mtml_fast.multitask import PCGrad
        >>> trunk, heads = torch.nn.Linear(3, 4), [torch.nn.Linear(4, 1) for _ in range(2)]
        >>> copies = TaskCopies(trunk)
        >>> h = copies([torch.ones(5, 3), torch.ones(2, 3)])
        >>> weights = PCGrad().backward([head(z).square().mean() for head, z in zip(heads, h)], shared=copies)
        >>> [list(p.grad.shape) for p in trunk.parameters()]
        [[4, 3], [4]]
    """

    def __init__(self, module: nn.Module):
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError("module must have parameters that require a gradient, got none")
        self.module = module
        # of the last call: name -> [T, ...], for the parameters that require a gradient
        self.leaves: dict[str, Tensor] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The shared parameters, in the order of the leaves."""
        named = dict(self.module.named_parameters())
        return [named[name] for name in self.leaves]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for each task's rows `[N_t, ...]`; tasks whose rows have one shape run as one batch."""
        count = len(inputs)
        state = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        own = {name: value.detach().expand(count, *value.shape) for name, value in state.items()}
        self.leaves = {name: own[name].requires_grad_() for name, value in state.items() if value.requires_grad}
        members = {}
        for t, x in enumerate(inputs):
            members.setdefault((x.shape, x.dtype), []).append(t)
        outputs = [None] * count
        for tasks in members.values():
            selected = own if len(tasks) == count else {name: value[tasks] for name, value in own.items()}
            results, _ = run_stacked(self.module, selected, torch.stack([inputs[t] for t in tasks]))
            for t, result in zip(tasks, results.unbind(), strict=True):
                outputs[t] = result
        return outputs


def in_memory_order(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Views of gradients `[T, ...]` with the axes of each task in the order of memory, which a Gram matrix may take.

    Backward passes give linear layers transposed gradients, which would otherwise be copied into another order.
    """
    return [gradient.permute(0, *_memory_order(gradient)) for gradient in gradients]


def in_order_of(gradients: Sequence[Tensor], combined: Sequence[Tensor]) -> list[Tensor]:
    """Views `[...]` of the tensors combined from `in_memory_order(gradients)`, with the axes of `gradients`."""
    axes = [_memory_order(gradient) for gradient in gradients]
    return [
        c.permute([order.index(a) for a in range(1, len(order) + 1)]) for c, order in zip(combined, axes, strict=True)
    ]


def _memory_order(gradient: Tensor) -> list[int]:
    return sorted(range(1, gradient.dim()), key=lambda axis: -gradient.stride(axis))


def rows_stay_apart(module: nn.Module) -> bool:
    """Whether a module is known to treat each row alone: a Sequential of torch's layers that do.

    Example:
        >>> rows_stay_apart(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
        True
        >>> rows_stay_apart(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        False
    """
    if type(module) is nn.Sequential:
        return all(rows_stay_apart(layer) for layer in module)
    package, _, file = type(module).__module__.rpartition(".")
    return package == "torch.nn.modules" and file in _ROWWISE and not isinstance(module, _MIXING)
