"""Task affinity: how much a step on one task helps another, for all pairs, and which tasks so belong together."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mtml_fast.files import write_atomically
from mtml_fast.multitask.copies import TaskCopies, in_memory_order
from mtml_fast.nn.losses import LOSSES, fit_targets, task_losses
from mtml_fast.nn.meta_learner import Entries, MetaLearner
from mtml_fast.ops import _check, gradient_gram
from mtml_fast.tasks import TaskRows

__all__ = ["Affinity", "affinity"]

# up to so many tasks every partition is looked at
_EXACT = 10
# numbers in a heat map are legible up to so many tasks
_LEGIBLE = 15


@dataclass(frozen=True, eq=False)
class Affinity:
    """How tasks act on each other: `matrix[i, j]`, what task i does for task j.

    Attributes: `matrix`, float64 `[T, T]` on the CPU; `kind`, what it holds; `tasks`, the names of its rows.

    Example:
        >>> matrix = torch.tensor([[1.0, -0.2, 0.7], [-0.2, 1, -0.3], [0.6, -0.1, 1]])
        >>> print(Affinity(matrix.double(), "cosine", ["a", "b", "c"]))
        cosine   a      b      c
           a    1.00  -0.20   0.70
           b   -0.20   1.00  -0.30
           c    0.60  -0.10   1.00
        >>> Affinity(matrix.double(), "cosine", ["a", "b", "c"]).groups(2)
        [['a', 'c'], ['b']]
    """

    matrix: Tensor
    kind: str
    tasks: Sequence

    def groups(self, count: int) -> list[list]:
        """The best partition of the tasks into `count` groups, the one with the largest `score`.

        Exact for up to 10 tasks; beyond, groups are joined two by two, and then single tasks are moved and swapped as
        long as the score rises.

        Source: the objective of Fifty et al., "Efficiently identifying task groupings for multi-task learning",
        NeurIPS 2021, without overlaps.
        """
        size = len(self.tasks)
        _check.number("count", count, low=1, below=size + 1, integer=True)
        z = self._between()
        parts = _best_partition(z, count) if size <= _EXACT else _good_partition(z, count)
        return [[self.tasks[t] for t in part] for part in sorted(map(sorted, parts))]

    def score(self, groups: Sequence[Sequence]) -> float:
        """The sum over all tasks of the mean affinity that the others of its group have to it; alone it is zero."""
        place = {task: t for t, task in enumerate(self.tasks)}
        z = self._between()
        return float(sum(_score(z, [place[task] for task in group]) for group in groups))

    def save_picture(self, path: str | os.PathLike, groups: Sequence[Sequence] | None = None) -> None:
        """A heat map as a PNG; with `groups`, the tasks stand in their order and lines part them."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise ModuleNotFoundError("drawing needs matplotlib: pip install 'mtml_fast[train]'") from None
        order = list(self.tasks) if groups is None else [task for group in groups for task in group]
        index = [list(self.tasks).index(task) for task in order]
        values, size = self.matrix[index][:, index].numpy(), len(order)
        # the diagonal of a lookahead is far larger than all that matters
        off = np.abs(values[~np.eye(size, dtype=bool)])
        limit = float(off.max()) if off.size and off.max() > 0 else 1.0
        side = min(3.0 + 0.4 * size, 12.0)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
        figure.colorbar(image, ax=axes, shrink=0.8, label=self.kind)
        axes.set_xticks(range(size), [str(task) for task in order], rotation=90 if size > _LEGIBLE else 0)
        axes.set_yticks(range(size), [str(task) for task in order])
        axes.set_xlabel("has this effect on task")
        axes.set_ylabel("a step on task")
        if size <= _LEGIBLE:
            for i, j in itertools.product(range(size), repeat=2):
                dark = abs(values[i, j]) > 0.6 * limit
                axes.text(j, i, f"{values[i, j]:.2g}", ha="center", va="center", color="white" if dark else "black")
        for end in itertools.accumulate(len(group) for group in (groups or [])[:-1]):
            axes.axhline(end - 0.5, color="black", linewidth=1.5)
            axes.axvline(end - 0.5, color="black", linewidth=1.5)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
        write_atomically(path, content.getvalue())

    def __str__(self) -> str:
        cells = [[f"{value:.2f}" for value in row] for row in self.matrix.tolist()]
        names = [str(task) for task in self.tasks]
        width = max(len(text) for text in itertools.chain(names, *cells))
        first = max(len(text) for text in (self.kind, *names))
        head = "  ".join([self.kind.ljust(first), *(name.center(width).rstrip() for name in names)])
        rows = [
            "  ".join([n.rjust(first), *(c.rjust(width) for c in row)]) for n, row in zip(names, cells, strict=True)
        ]
        return "\n".join([head, *rows])

    def _between(self) -> np.ndarray:
        z = self.matrix.numpy().copy()
        np.fill_diagonal(z, 0)
        return z


def affinity(
    model: nn.Module,
    rows: TaskRows | tuple[Sequence[Tensor], Sequence[Tensor]],
    *,
    kind: str = "linear",
    loss: str | Callable | None = None,
    lr: float = 0.01,
    tasks: Sequence | None = None,
    measure: int | None = None,
    chunk: int = 4,
) -> Affinity:
    r"""How the gradients of all tasks in what they share act on each other's losses.

    .. math::
        Z_{ij} = 1 - \frac{L_j(\theta - \text{lr}\, g_i)}{L_j(\theta)} \ \text{(lookahead)}, \qquad
        \text{lr} \frac{\langle g_i, g_j \rangle}{L_j(\theta)} \ \text{(linear)}, \qquad
        \frac{\langle g_i, g_j \rangle}{\lVert g_i \rVert \lVert g_j \rVert} \ \text{(cosine)}

    All gradients come from one forward and backward pass in which each task has the shared parameters for itself, and
    "linear" (lookahead to first order in lr) and "cosine" from their Gram matrix: the time of about two training steps.
    "lookahead" takes T forward passes more, of all rows or of those that `measure` leaves, `chunk` at a time as one,
    for steps so long that the losses are no straight line.

    Args:
        model: a MetaLearner, whose trunk is what the tasks share, or a module that they share as a whole. It is used in
            evaluation mode and left as it is.
        rows: TaskRows with labels; or lists of one `[N_t, ...]` a task, of inputs and of targets.
        kind: "linear", "lookahead" or "cosine".
        loss: a name (cross_entropy, bce, mse, mae, huber) or a `callable(outputs, targets)` that gives a mean. `None`:
            cross_entropy for integer targets, mse for floating ones.
        lr: the rate of the step.
        tasks: for a MetaLearner, the tasks that the rows belong to; for a module, their names. `None`: 0 .. T - 1.
        measure: how many rows of each task, evenly spaced, tell a lookahead the losses before and after the steps; the
            steps themselves follow all rows. `None`: all.
        chunk: steps taken at a time. Memory: T gradients of what is shared, and the activations of all rows
            `chunk` times.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        FloatingPointError: a loss is not finite; names the task.

    Source: Fifty et al., "Efficiently identifying task groupings for multi-task learning" (TAG), NeurIPS 2021.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> x = torch.randn(3, 20, 3)
        >>> y = x.sum(2, keepdim=True) * torch.tensor([1.0, 1.0, -1.0])[:, None, None]
        >>> affinity(model, TaskRows(x, y)).groups(2)
        [[0, 1], [2]]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check.choice("kind", kind, ("linear", "lookahead", "cosine"))
    _check.number("lr", lr, low=0, exclusive=True)
    _check.number("chunk", chunk, low=1, integer=True)
    if measure is not None:
        _check.number("measure", measure, low=1, integer=True)
        if kind != "lookahead":
            raise ValueError(f"measure must be None where kind is {kind!r}, got {measure}")
    problem = _Problem(model, *_lists(rows), loss, tasks)
    with problem.evaluating():
        losses, gradients = problem.gradients()
        for t in (~losses.isfinite()).nonzero().flatten()[:1].tolist():
            raise FloatingPointError(f"the loss of task {problem.names[t]} is {losses[t].item()}")
        if kind == "lookahead":
            measured = problem if measure is None else problem.thinned(measure)
            before, after = measured.losses(), measured.losses_after_steps(gradients, lr, chunk)
            matrix = _share(before.double() - after.double(), before)
        else:
            gram = gradient_gram(in_memory_order(list(gradients.values())))
            norms = gram.diagonal().sqrt()
            scale = norms[:, None] * norms
            matrix = torch.where(scale > 0, gram / scale, 0.0) if kind == "cosine" else _share(lr * gram, losses)
    return Affinity(matrix.cpu(), kind, problem.names)


def _share(fallen: Tensor, losses: Tensor) -> Tensor:
    """By what share of itself each loss falls; of no loss nothing can fall."""
    return torch.where(losses == 0, 0.0, fallen / losses.double())


class _Problem:
    """The losses of all tasks as functions of what they share."""

    def __init__(self, model: nn.Module, inputs: list[Tensor], targets: list[Tensor], loss, tasks):
        self.model, self.inputs = model, inputs
        self.learner = model if isinstance(model, MetaLearner) else None
        self.shared = model if self.learner is None else model.trunk
        if self.shared is None:
            raise ValueError("model must have a trunk: without one its tasks share nothing")
        self.names = list(range(len(inputs))) if tasks is None else list(tasks)
        if len(self.names) != len(inputs):
            raise ValueError(f"tasks must be {len(inputs)}, one for each task of rows, got {len(self.names)}")
        self.parameters = {name: p for name, p in self.shared.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("model must share parameters that require a gradient, got none")
        self.entries = Entries(inputs, self.names, [x.shape[0] for x in inputs])
        if self.learner is not None:
            self.entries = self.learner.entries(inputs, self.names)
        self.loss = _loss(loss, targets)
        self.targets = targets

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def thinned(self, count: int) -> _Problem:
        """The same with at most `count` rows a task."""
        kept = [torch.linspace(0, len(x) - 1, min(count, len(x)), device=x.device).round().long() for x in self.inputs]
        inputs, targets = ([v[k] for v, k in zip(parts, kept, strict=True)] for parts in (self.inputs, self.targets))
        return _Problem(self.model, inputs, targets, self.loss, self.names)

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Each task's loss `[T]`, and its gradient in what is shared, name -> `[T, ...]`."""
        copies = TaskCopies(self.shared)
        losses = self._losses(copies(self.inputs))
        leaves = list(copies.leaves.values())
        gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        return losses.detach(), dict(zip(copies.leaves, gradients, strict=True))

    @torch.no_grad()
    def losses(self, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """All losses `[T]`, with other values in what is shared if they are given."""
        features = functional_call(self.shared, parameters or {}, (self.entries.joined(),))
        return self._losses(list(features.split(self.entries.counts)))

    def losses_after_steps(self, gradients: dict[str, Tensor], lr: float, chunk: int) -> Tensor:
        """`[T, T]`: row i has all losses after a step on task i."""
        parts = []
        for first in range(0, len(self.inputs), chunk):
            stepped = {
                name: p.detach() - lr * gradients[name][first : first + chunk] for name, p in self.parameters.items()
            }
            try:
                parts.append(vmap(self.losses)(stepped))
            except torch.OutOfMemoryError:
                # a RuntimeError too, and no reason to try again
                raise
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[0]
                warnings.warn(
                    f"torch.func.vmap cannot run the model, one step at a time instead: {reason}", stacklevel=3
                )
                count = len(next(iter(stepped.values())))
                each = [self.losses({name: value[i] for name, value in stepped.items()}) for i in range(count)]
                parts.append(torch.stack(each))
        return torch.cat(parts)

    def _losses(self, features: list[Tensor]) -> Tensor:
        """The mean loss of each task `[T]`, from what the shared part gives for its rows."""
        outputs = features
        if self.learner is not None:
            outputs = self.learner.head_outputs(replace(self.entries, x=features))
        targets = [
            fit_targets(f"targets[{t}]", y, z.shape, z.dtype, self.loss)
            for t, (z, y) in enumerate(zip(outputs, self.targets, strict=True))
        ]
        return task_losses(self.loss, outputs, targets)


def _lists(rows) -> tuple[list[Tensor], list[Tensor]]:
    if isinstance(rows, TaskRows):
        if rows.y is None:
            raise ValueError("rows must have labels y, got None")
        inputs, targets = zip(*(rows.task(t) for t in range(rows.num_tasks)), strict=True)
        return list(inputs), list(targets)
    if not isinstance(rows, (list, tuple)) or len(rows) != 2:
        raise TypeError(f"rows must be TaskRows or (inputs, targets), got {type(rows).__name__}")
    inputs, targets = _check.tensor_list("inputs", list(rows[0])), _check.tensor_list("targets", list(rows[1]))
    if not inputs or len(inputs) != len(targets):
        raise ValueError(f"rows must be as many inputs as targets, got {len(inputs)} and {len(targets)}")
    return inputs, targets


def _loss(loss, targets: list[Tensor]) -> Callable:
    if isinstance(loss, str):
        _check.choice("loss", loss, tuple(LOSSES))
        return LOSSES[loss]
    if loss is None:
        return F.mse_loss if targets[0].is_floating_point() else F.cross_entropy
    if not callable(loss):
        raise TypeError(f"loss must be a name or callable, got {type(loss).__name__}")
    return loss


def _score(z: np.ndarray, group: Sequence[int]) -> float:
    return float(z[np.ix_(group, group)].sum()) / (len(group) - 1) if len(group) > 1 else 0.0


def _best_partition(z: np.ndarray, count: int) -> list[list[int]]:
    """By dynamic programming over subsets: the group of the first task that is left, and the best of the others."""
    size = len(z)
    scores = [_score(z, [t for t in range(size) if mask >> t & 1]) for mask in range(1 << size)]
    # best[mask]: (score, the group that is split off first) with the present number of groups
    best = {mask: (scores[mask], mask) for mask in range(1, 1 << size)}
    choices = [best]
    for _ in range(count - 1):
        longer = {}
        for mask in range(1, 1 << size):
            first = mask & -mask
            others = rest = mask ^ first
            options = []
            while others:
                # `others` is what stays behind, never nothing
                if others in best:
                    options.append((scores[mask ^ others] + best[others][0], mask ^ others))
                others = (others - 1) & rest
            if options:
                longer[mask] = max(options)
        best = longer
        choices.append(best)
    mask, parts = (1 << size) - 1, []
    for best in reversed(choices):
        part = best[mask][1]
        parts.append([t for t in range(size) if part >> t & 1])
        mask ^= part
    return parts


def _good_partition(z: np.ndarray, count: int) -> list[list[int]]:
    parts = [[t] for t in range(len(z))]
    while len(parts) > count:
        pairs = itertools.combinations(range(len(parts)), 2)
        a, b = max(pairs, key=lambda p: _score(z, parts[p[0]] + parts[p[1]]) - sum(_score(z, parts[i]) for i in p))
        parts[a] += parts.pop(b)
    rising = True
    while rising:
        rising = False
        for a, b in itertools.permutations(range(len(parts)), 2):
            now = _score(z, parts[a]) + _score(z, parts[b])
            moves = [([s for s in parts[a] if s != t], [*parts[b], t]) for t in parts[a] if len(parts[a]) > 1]
            moves += [
                ([*(s for s in parts[a] if s != t), u], [*(s for s in parts[b] if s != u), t])
                for t, u in itertools.product(parts[a], parts[b])
            ]
            best = max(moves, key=lambda move: _score(z, move[0]) + _score(z, move[1]), default=None)
            # more than rounding, so that it ends
            if best and _score(z, best[0]) + _score(z, best[1]) > now + 1e-12 * (1 + abs(now)):
                parts[a], parts[b], rising = *best, True
    return parts
