"""New tasks on what is learned, for `MetaLearnerTrainer.adapt`: by gradient steps, or in closed form.

Both make a learner of the new tasks alone. Its trunk is a frozen copy of the learned one, or `TaskOutputs` of a frozen
copy of the whole learner; where layers of the trunk learn as well, there is no trunk, and each task module begins with
the task's own copy of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_fast.inner import InnerLoop, ridge_head
from mtml_fast.nn.meta_learner import Entries, MetaLearner
from mtml_fast.nn.task_heads import TaskHeads
from mtml_fast.nn.task_outputs import TaskOutputs, some_tasks
from mtml_fast.ops import _check
from mtml_fast.tasks import TaskRows
from mtml_fast.trainers import _names
from mtml_fast.trainers._inner import Objective


@dataclass(frozen=True)
class NewTasks:
    """The rows of new tasks with their targets, and what of a learner is to learn them."""

    entries: Entries
    targets: list[Tensor]
    loss: Callable
    # of each task
    out_features: list[int]
    layers: str | Sequence[str]
    # the learned tasks whose outputs are mapped
    from_tasks: Sequence[int] | None


def check_request(
    learner: MetaLearner, layers, how: str, steps: int, lr: float, penalty: float, from_tasks: Sequence[int] | None
) -> None:
    """The arguments of `adapt` besides the rows."""
    _check.number("steps", steps, low=1, integer=True)
    _check.number("lr", lr, low=0, exclusive=True)
    _check.number("penalty", penalty, low=0, exclusive=True)
    _check.choice("how", how, ("steps", "ridge"))
    if isinstance(layers, str):
        _check.choice("layers", layers, ("head", "all", "outputs"))
    elif not isinstance(layers, (list, tuple)):
        raise TypeError(f"layers must be 'head', 'all', 'outputs' or a list of names, got {layers!r}")
    elif learner.trunk is None:
        raise ValueError(f"layers must be 'head', 'all' or 'outputs' for a learner without a trunk, got {layers!r}")
    else:
        InnerLoop(layers=layers).adapted_names(learner.trunk)
    if how == "ridge" and layers not in ("head", "outputs"):
        raise ValueError(f"how must be 'steps' where the trunk learns (layers={layers!r}), got 'ridge'")
    if from_tasks is not None and layers != "outputs":
        raise ValueError(f"from_tasks must be None but for layers='outputs', got {from_tasks!r}")
    if isinstance(learner.heads, TaskHeads) and learner.heads.is_lazy:
        raise RuntimeError("adapt must come after the learner's first call or training: it has no widths yet")
    some_tasks("from_tasks", from_tasks, learner.num_tasks)


def by_steps(learner: MetaLearner, new: NewTasks, steps: int, lr: float) -> MetaLearner:
    """A learner of the new tasks after so many gradient steps on all of each one's rows."""
    adapted = _started(copy.deepcopy(learner).eval(), learner, new)
    features = adapted.features(new.entries)
    objective, optimizer = Objective(adapted, new.loss), torch.optim.SGD(adapted.heads.parameters(), lr)
    for step in range(steps):
        optimizer.zero_grad()
        _finite_sum(objective(features, new.targets), step).backward()
        optimizer.step()
    optimizer.zero_grad()
    adapted.eval()
    with torch.no_grad():
        _finite_sum(objective(features, new.targets), steps)
    return adapted


@torch.no_grad()
def by_ridge(learner: MetaLearner, new: NewTasks, penalty: float) -> MetaLearner:
    """A learner of the new tasks with linear heads in closed form."""
    adapted, features = _linear(copy.deepcopy(learner).eval(), new)
    rows = features.rows()
    widths = torch.tensor(new.out_features)
    exists = torch.arange(int(widths.max())) < widths[:, None]  # [T, O]
    exists = exists.to(rows.x.device)
    y = torch.cat(_regressed(new.targets, new.loss, exists.shape[1]))
    y = y if rows.is_ragged else y.unflatten(0, rows.x.shape[:2])
    weight, bias = ridge_head(TaskRows(rows.x, y, rows.offsets, exists), penalty)
    for t in (~(weight.isfinite().all(2) & bias.isfinite()).all(1)).nonzero()[:1].flatten().tolist():
        raise FloatingPointError(f"the head of new task {t} is not finite; its inputs or targets may be too large")
    adapted.heads.weight.copy_(weight[exists])
    adapted.heads.bias.copy_(bias[exists])
    return adapted.eval()


def _started(learned: MetaLearner, learner: MetaLearner, new: NewTasks) -> MetaLearner:
    """A learner of the new tasks before its first step, in the mode to take it in.

    `learned` is a copy of the learner, which may be used up.
    """
    with torch.no_grad():
        features = learned.features(new.entries)
        tasks = range(learned.num_tasks) if new.from_tasks is None else new.from_tasks
        # of the learned tasks, whatever the rows
        widths = dict(zip(tasks, _widths(learned, features.split()[0], tasks), strict=True))
        nearest = [
            _nearest(learned, x, target, new.loss, [t for t in tasks if widths[t] == width])
            for x, target, width in zip(features.split(), new.targets, new.out_features, strict=True)
        ]
    if new.layers == "outputs":
        adapted, _ = _linear(learned, new)
        starts = dict(zip(tasks, torch.tensor([0, *widths.values()]).cumsum(0).tolist(), strict=False))
        with torch.no_grad():
            for weight, bias, t in zip(*_parts(adapted.heads), nearest, strict=True):
                if t is not None:
                    # the outputs of the nearest task as they are
                    weight.zero_()[:, starts[t] : starts[t] + widths[t]].fill_diagonal_(1)
                    bias.zero_()
        return adapted
    modules = [_module(learned, t, width) for t, width in zip(nearest, new.out_features, strict=True)]
    if learned.trunk is not None and new.layers != "head":
        trunks = _trunks(learner.trunk, new.layers, len(modules))
        return MetaLearner(
            len(modules), task_module=[nn.Sequential(*parts) for parts in zip(trunks, modules, strict=True)]
        )
    if learned.trunk is not None:
        learned.trunk.requires_grad_(False)
    if not isinstance(learned.heads, TaskHeads):
        return MetaLearner(len(modules), task_module=modules, trunk=learned.trunk)
    heads = learned.heads
    adapted = MetaLearner(len(modules), heads.in_features, new.out_features, hidden=heads.hidden, trunk=learned.trunk)
    adapted.heads.to(heads.weight).load_heads(modules)
    return adapted


def _linear(learned: MetaLearner, new: NewTasks) -> tuple[MetaLearner, Entries]:
    """A learner of the new tasks with new linear heads over what is learned, and the entries after its trunk."""
    trunk = TaskOutputs(learned, new.from_tasks).eval() if new.layers == "outputs" else learned.trunk
    if trunk is not None:
        trunk.requires_grad_(False)
    adapted = MetaLearner(len(new.out_features), None, new.out_features, hidden=None, trunk=trunk)
    features = adapted.features(new.entries)
    x = features.rows().x
    adapted.heads.materialize(x.shape[-1])
    # a trunk under autocast leaves half precision
    like = next((p for p in learned.parameters() if p.is_floating_point()), x)
    adapted.heads.to(_check.widened(x, like))
    return adapted, features


def _trunks(trunk: nn.Module, layers: str | Sequence[str], count: int) -> list[nn.Module]:
    """Copies of the trunk: of all of it, or with all but the named layers frozen and in common."""
    if layers == "all":
        return [copy.deepcopy(trunk).train() for _ in range(count)]
    names = set(InnerLoop(layers=layers).adapted_names(trunk))
    frozen = {
        id(p): nn.Parameter(p.detach().clone(), requires_grad=False)
        for name, p in trunk.named_parameters()
        if name not in names
    }
    trunks = [copy.deepcopy(trunk, dict(frozen)).eval() for _ in range(count)]
    for each in trunks:
        for name, module in each.named_modules():
            # batch statistics move in these alone
            module.training = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
    return trunks


def _module(learned: MetaLearner, t: int | None, width: int) -> nn.Module:
    """A copy of task t's module, in the mode to learn in, or a new one of that width where there is none."""
    heads = learned.heads
    if t is not None:
        return heads.head(t).train()
    if isinstance(heads, TaskHeads):
        fresh = TaskHeads(heads.in_features, [width], heads.hidden, heads.activation, heads.bias is not None)
        return fresh.to(heads.weight).head(0)
    raise ValueError(f"out_features must be the outputs of some task module of the learner, got {width}")


def _nearest(learned: MetaLearner, x: Tensor, target: Tensor, loss: Callable, tasks: Sequence[int]) -> int | None:
    """The one of these tasks whose loss on the rows is the smallest; `None` of none."""
    if not tasks:
        return None
    entries = Entries(x, tasks, [x.shape[0]] * len(tasks), shared=True)
    return tasks[int(Objective(learned, loss)(entries, [target] * len(tasks)).argmin())]


def _widths(learned: MetaLearner, x: Tensor, tasks: Sequence[int]) -> list[int | None]:
    """The number of outputs of each task; `None` for outputs of more axes."""
    if isinstance(learned.heads, TaskHeads):
        return [learned.heads.out_features[t] for t in tasks]
    return [z.shape[1] if z.dim() == 2 else None for z in learned.heads([x] * len(tasks), tasks)]


def _parts(heads: TaskHeads) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The weights and biases of linear heads, each task's as a view."""
    return heads.weight.split(heads.out_features), heads.bias.split(heads.out_features)


def _regressed(targets: list[Tensor], loss: Callable, width: int) -> list[Tensor]:
    """The targets that least squares takes: classes `[N]`, or floats `[N, O]`, padded to one width."""
    if not targets[0].is_floating_point():
        for i, target in enumerate(targets):
            _check.shape(f"targets[{i}]", target, ("N", None))
        return targets
    if _names.kind(loss) is F.binary_cross_entropy_with_logits:
        # as logits, the outputs say by their sign which it is
        targets = [2 * target - 1 for target in targets]
    return [F.pad(target, (0, width - target.shape[1])) for target in targets]


def _finite_sum(losses: Tensor, taken: int) -> Tensor:
    """The sum of the losses after the steps taken."""
    total = losses.sum()
    if not bool(total.isfinite()):
        raise FloatingPointError(f"the loss after {taken} steps of adapt is {total.item()}; a smaller lr may help")
    return total
