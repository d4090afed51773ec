"""Balance: how the losses of several tasks become one step. Its `backward` stands where `loss.backward()` stood."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mtml_fast.multitask.copies import TaskCopies, in_memory_order, in_order_of
from mtml_fast.ops import _check, gradient_combine, gradient_gram

__all__ = ["Balance", "Surgery", "Weighting", "task_gradients"]


class Balance(nn.Module):
    """What all ways to balance tasks share: `backward(task_losses)`, and a state that `state_dict` holds.

    A `Weighting` looks at the losses alone: one ordinary backward pass. A `Surgery` looks at the tasks' gradients of
    what they share.

    Attributes: `num_tasks`, the number of tasks of those that remember something of each task, else `None`.
    """

    # whether something is kept for each task, and num_tasks is therefore an argument
    keeps_tasks = False

    def __init__(self, num_tasks: int | None = None):
        super().__init__()
        if self.keeps_tasks:
            _check.number("num_tasks", num_tasks, low=1, integer=True)
        self.num_tasks = num_tasks

    def backward(
        self,
        task_losses: Tensor | Sequence[Tensor],
        shared: Iterable[Tensor] | TaskCopies | None = None,
        *,
        representation: Tensor | None = None,
        tasks: Sequence[int] | None = None,
        chunk: int = 16,
    ) -> Tensor:
        r"""Adds to `.grad` of every parameter that the losses depend on, as `loss.backward()` does.

        Args:
            task_losses: L, `[T]`, or a list of T scalars.
            shared: the parameters that a `Surgery` balances, such as `trunk.parameters()`; `None`: all that the losses
                depend on. Every other parameter belongs to a task, and gets the gradient of the sum of the losses.
                Where each task has rows of its own, `TaskCopies` of the shared part spare T - 1 of T backward passes.
            representation: the output h of the shared part, from which the losses were computed. A `Surgery` then
                looks at the gradients of the losses in h instead of those in the shared parameters, and takes one
                backward pass through the shared part instead of T. For tasks with the same rows: in an h whose rows
                belong to one task each, no two gradients meet.
            tasks: whose losses these are, for those that remember something of each task; `None`: 0 .. num_tasks - 1.
            chunk: how many tasks a batched backward pass takes at a time. A `Surgery` holds the T gradients of what is
                shared, and beside them what a backward pass holds, `chunk` times. Where torch cannot batch an operator
                of the graph, the tasks run one after the other.

        Returns:
            The weights `[T]` that the losses (the gradients, for a `Surgery`) got.

        Raises:
            TypeError, ValueError: naming the argument, what it must be and what it was.
            FloatingPointError: a loss or a gradient is not finite; names the task. No gradient has changed.
        """
        losses = _losses(task_losses)
        tasks = self._tasks(tasks, losses)
        _check.number("chunk", chunk, low=1, integer=True)
        if representation is not None and not _check.tensor("representation", representation).requires_grad:
            raise ValueError("representation must require a gradient, got a tensor without one")
        bad = (~losses.detach().isfinite()).nonzero().flatten()[:1].tolist()
        for t in bad:
            raise FloatingPointError(f"the loss of task {int(tasks[t])} is {losses[t].item()}; no gradient is taken")
        return self._backward(losses, shared, representation, tasks, chunk)

    def _tasks(self, tasks, losses: Tensor) -> Tensor:
        """The task of each loss, on the CPU."""
        count = losses.numel()
        if tasks is None:
            if self.keeps_tasks and count != self.num_tasks:
                raise ValueError(
                    f"task_losses must be those of all {self.num_tasks} tasks, or tasks must name theirs, got {count}"
                )
            return torch.arange(count)
        ids = torch.as_tensor(tasks, device="cpu")
        if ids.shape != (count,) or ids.is_floating_point():
            raise ValueError(f"tasks must be {count} ids, one a loss, got {tasks!r}")
        if self.keeps_tasks:
            if len(set(ids.tolist())) < count:
                raise ValueError(f"tasks must name each task once, got {ids.tolist()}")
            for t in ids[(ids < 0) | (ids >= self.num_tasks)][:1].tolist():
                raise ValueError(f"tasks must be in 0..{self.num_tasks - 1}, got {t}")
        return ids


class Weighting(Balance):
    """A `Balance` that turns the losses into one number: `weighting(losses [T]) -> loss`, differentiable."""

    def _backward(self, losses, shared, representation, tasks, chunk) -> Tensor:
        self._observe(losses.detach().double(), tasks)
        with torch.enable_grad():
            # its own parameters, where it has some, get their gradient here
            leaf = losses.detach().double().requires_grad_()
            self(leaf, tasks).backward()
        losses.backward(leaf.grad.to(losses.dtype))
        if isinstance(shared, TaskCopies):
            _add(shared.parameters, [copies.grad.sum(0) for copies in shared.leaves.values()])
        return leaf.grad

    def _observe(self, losses: Tensor, tasks: Tensor) -> None:
        """What is remembered of a step's losses."""


class Surgery(Balance):
    """A `Balance` that looks at M, the Gram matrix of the tasks' gradients: `surgery(M [T, T]) -> weights [T]`."""

    def forward(self, gram: Tensor, losses: Tensor | None = None, tasks: Sequence[int] | None = None) -> Tensor:
        """The weights `[T]`, float64, of T gradients with the Gram matrix `[T, T]`."""
        _check.tensor("gram", gram)
        count = gram.shape[0] if gram.dim() else 0
        _check.shape("gram", gram, ("T", count), ("T", count))
        tasks = self._tasks(tasks, gram.diagonal())
        require_finite(gram.detach().diagonal(), tasks)
        losses = None if losses is None else losses.detach().double().cpu().numpy()
        weights = self._weights(gram.detach().double().cpu().numpy(), losses, tasks)
        return torch.as_tensor(weights, device=gram.device)

    def _backward(self, losses, shared, representation, tasks, chunk) -> Tensor:
        leaves = _leaves(losses, representation)
        if isinstance(shared, TaskCopies):
            return self._backward_of_copies(losses, leaves, shared, tasks)
        shared = leaves if shared is None else [p for p in shared if p.requires_grad]
        taken = shared if representation is None else [representation]
        specific = leaves if representation is not None else _without(leaves, shared)
        if not taken:
            raise ValueError("shared must hold parameters that require a gradient, got none")
        gradients = task_gradients(losses, taken, chunk)
        combined, weights = self._combined(gradients, losses.detach(), tasks)
        if specific:
            losses.backward(self._specific(weights).to(losses.dtype), inputs=specific)
        if representation is not None:
            representation.backward(combined[0])
        else:
            _add(shared, combined)
        return weights

    def _backward_of_copies(self, losses: Tensor, leaves: list[Tensor], copies: TaskCopies, tasks: Tensor) -> Tensor:
        """The gradients of all tasks, and those of what is not shared, from one backward pass."""
        if not copies.leaves or next(iter(copies.leaves.values())).shape[0] != losses.numel():
            raise ValueError(
                f"shared must be copies for the {losses.numel()} tasks of task_losses: call it on their rows"
            )
        taken = list(copies.leaves.values())
        specific = _without(leaves, taken)
        options = {"allow_unused": True, "materialize_grads": True}
        # what is not shared waits for its weights, where it has others than one
        waits = type(self)._specific is not Surgery._specific
        now = taken if waits else [*taken, *specific]
        gradients = torch.autograd.grad(losses.sum(), now, retain_graph=waits, **options)
        combined, weights = self._combined(list(gradients[: len(taken)]), losses.detach(), tasks)
        if waits and specific:
            losses.backward(self._specific(weights).to(losses.dtype), inputs=specific)
        _add(copies.parameters, combined)
        if not waits:
            # autograd may give two parameters one and the same tensor
            _add(specific, [gradient.clone() for gradient in gradients[len(taken) :]])
        return weights

    def _combined(self, gradients: list[Tensor], losses: Tensor, tasks: Tensor) -> tuple[list[Tensor], Tensor]:
        """The gradient that the step follows, and the weights `[T]`."""
        views = in_memory_order(gradients)
        weights = self(gradient_gram(views), losses, tasks)
        combined = gradient_combine(views, weights.to(gradients[0].dtype))
        return in_order_of(gradients, combined), weights

    def _specific(self, weights: Tensor) -> Tensor:
        """The weights of the losses for the parameters that are not shared."""
        return torch.ones_like(weights)


def task_gradients(losses: Tensor, parameters: Sequence[Tensor], chunk: int = 16) -> list[Tensor]:
    """The gradient of each loss in each parameter, `[T, ...]` a parameter; keeps the graph."""
    count = losses.numel()
    gradients = [p.new_zeros(count, *p.shape) for p in parameters]
    for rows in torch.eye(count, dtype=losses.dtype, device=losses.device).split(chunk):
        first = int(rows[0].argmax())
        for gradient, part in zip(gradients, _rows_of_gradients(losses, parameters, rows), strict=True):
            if part is not None:
                gradient[first : first + len(rows)] = part
    return gradients


def _add(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Adds to `.grad`, in the memory layout of the parameter, which optimizers are fastest with."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not None:
            parameter.grad = parameter.grad + gradient
        elif gradient.stride() == parameter.stride():
            parameter.grad = gradient
        else:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _without(leaves: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    held = set(map(id, others))
    return [leaf for leaf in leaves if id(leaf) not in held]


def require_finite(sizes: Tensor, tasks: Tensor) -> None:
    """FloatingPointError naming the task whose gradient, of the given size, is not finite."""
    # where one is infinite the others may be NaN because of it: zero times infinity
    for bad in (sizes.isinf(), ~sizes.isfinite()):
        for t in bad.nonzero().flatten()[:1].tolist():
            raise FloatingPointError(f"the gradient of task {int(tasks[t])} is not finite")


def _rows_of_gradients(losses: Tensor, parameters: Sequence[Tensor], rows: Tensor) -> Sequence[Tensor | None]:
    options = {"retain_graph": True, "allow_unused": True}
    try:
        return torch.autograd.grad(losses, parameters, rows, is_grads_batched=True, **options)
    except torch.OutOfMemoryError:
        # a RuntimeError too, and no reason to try again
        raise
    except RuntimeError:
        # an operator that cannot be batched; any other trouble shows up once more
        each = [torch.autograd.grad(losses, parameters, row, **options) for row in rows]
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]


def _losses(task_losses) -> Tensor:
    """`[T]`, differentiable."""
    losses = task_losses
    if isinstance(losses, (list, tuple)):
        for t, loss in enumerate(_check.tensor_list("task_losses", losses)):
            _check.shape(f"task_losses[{t}]", loss)
        losses = torch.stack(list(losses)) if losses else torch.zeros(0)
    _check.tensor("task_losses", losses)
    if losses.dim() != 1 or not losses.numel():
        raise ValueError(f"task_losses must be [T] for one task or more, got shape {list(losses.shape)}")
    if not losses.requires_grad:
        raise ValueError("task_losses must require a gradient, got losses without a graph")
    return losses


def _leaves(losses: Tensor, representation: Tensor | None) -> list[Tensor]:
    """The leaves that the losses depend on, but for those that they depend on through the representation alone."""
    seen, leaves = set(), []
    stop = None if representation is None else representation.grad_fn
    todo = [losses.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen or node is stop:
            continue
        seen.add(node)
        todo.extend(source for source, _ in node.next_functions)
        # where a graph ends in a tensor that collects its gradient
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not representation:
            leaves.append(leaf)
    return leaves
