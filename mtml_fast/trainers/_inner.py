"""The inner loop of `MetaLearnerTrainer.meta_train`: rows split in two, and steps on stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtml_fast.nn.meta_learner import Entries, MetaLearner
from mtml_fast.nn.task_heads import TaskHeads
from mtml_fast.nn.task_stack import TaskStack
from mtml_fast.ops import sgd_step
from mtml_fast.trainers import _names


class Objective(nn.Module):
    """The mean loss of each entry, `[E]`: a module, so that `functional_call` can give it adapted parameters.

    Args:
        learner: its heads are used; the entries of a call are those after its trunk.
        loss: a `callable(outputs, targets)`.
        trunks: a trunk for each entry; the entries are then those before the trunk.
    """

    def __init__(self, learner: MetaLearner, loss: Callable, trunks: TaskStack | None = None):
        super().__init__()
        self.learner, self.loss, self.trunks = learner, loss, trunks

    def forward(self, entries: Entries, targets: list[Tensor]) -> Tensor:
        if self.trunks is not None:
            entries = replace(entries, x=self.trunks(entries.split()), shared=False)
        heads, name = self.learner.heads, _names.FUSED_LOSSES.get(self.loss)
        # a cross-entropy with one-hot targets, which are floating, is not among the fused losses
        if isinstance(heads, TaskHeads) and name and (name == "cross_entropy") != targets[0].is_floating_point():
            y = torch.cat([target.flatten() for target in targets])
            return heads.task_losses(entries.rows(), name, tasks=self.learner.head_tasks(entries), y=y)
        outputs = self.learner.head_outputs(entries)
        if entries.single:
            outputs = [z.unsqueeze(0) for z in outputs]
        targets = [
            _names.fit_targets(f"targets[{i}]", target, z.shape, z.dtype, self.loss)
            for i, (z, target) in enumerate(zip(outputs, targets, strict=True))
        ]
        return _names.task_losses(self.loss, outputs, targets)


def adapted_losses(
    objective: Objective,
    support: tuple[Entries, list[Tensor]],
    query: tuple[Entries, list[Tensor]],
    *,
    steps: int,
    lr: float,
    first_order: bool,
) -> Tensor:
    """Each task's query loss after some steps on its support rows, `[E]`, as a function of the learner's parameters."""
    learner, trunks = objective.learner, objective.trunks
    fast = {f"learner.heads.{name}": p for name, p in learner.heads.named_parameters() if p.requires_grad}
    if trunks is None:
        # the trunk takes no part in the steps: once is enough
        support, query = ((learner.features(entries), targets) for entries, targets in (support, query))
    else:
        fast |= {
            f"trunks.groups.0.{name}": p.expand(trunks.num_tasks, *p.shape)
            for name, p in learner.trunk.named_parameters()
            if p.requires_grad
        }
    for _ in range(steps):
        # tasks share nothing that adapts, so the gradient of the sum is each task's own
        grads = torch.autograd.grad(
            functional_call(objective, fast, support).sum(),
            list(fast.values()),
            create_graph=not first_order,
            allow_unused=True,
            materialize_grads=True,
        )
        fast = _stepped(fast, grads, lr)
    return functional_call(objective, fast, query)


def _stepped(fast: dict[str, Tensor], grads: Sequence[Tensor], lr: float) -> dict[str, Tensor]:
    """One SGD step."""
    # packed weights have one row an output, not one a task; sgd_step takes leaves with the same first axis
    alike = {}
    for (name, p), grad in zip(fast.items(), grads, strict=True):
        alike.setdefault(p.shape[0], []).append((name, p, grad))
    stepped = {}
    for leaves in alike.values():
        names, params, directions = zip(*leaves, strict=True)
        stepped |= zip(names, sgd_step(params, directions, lr=lr)[0], strict=True)
    return stepped


def split_rows(entries: Entries, targets: list[Tensor], support: float):
    """The entries twice, each row at random in the first or in the second, with its target.

    The first gets the given share of each entry's rows; both get at least one.
    """
    counts = torch.tensor(entries.counts)
    chosen = (counts * support).round().long().clamp(min=1).minimum(counts - 1)
    starts = counts.cumsum(0) - counts
    entry = torch.arange(len(counts)).repeat_interleave(counts)
    # sorting by entry and chance shuffles the rows inside each entry
    order = (entry + torch.rand(len(entry), dtype=torch.float64)).argsort()
    first = torch.arange(len(entry)) - starts[entry] < chosen[entry]
    halves = []
    for rows, sizes in ((order[first], chosen), (order[~first], counts - chosen)):
        sizes = sizes.tolist()
        x = _take(entries.split(), rows, sizes, starts)
        y = _take(targets, rows, sizes, starts)
        halves.append((Entries(x, entries.tasks, sizes), y))
    return halves


def _take(parts: list[Tensor], rows: Tensor, sizes: list[int], starts: Tensor) -> list[Tensor]:
    """The given rows, counted through all parts, as parts of the given sizes."""
    rows = rows.to(parts[0].device)
    if len({part.shape[1:] for part in parts}) == 1:
        return list(torch.cat(parts)[rows].split(sizes))
    return [part[r - start] for part, r, start in zip(parts, rows.split(sizes), starts.tolist(), strict=True)]
