"""MetaLearnerTrainer: trains a MetaLearner on all its tasks, meta-trains it, and adapts it to new tasks."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_fast.multitask import Affinity, Balance, TaskCopies, affinity, balance_of
from mtml_fast.multitask.balance import Surgery
from mtml_fast.multitask.copies import rows_stay_apart
from mtml_fast.nn.meta_learner import Entries, MetaLearner
from mtml_fast.nn.task_heads import TaskHeads
from mtml_fast.nn.task_stack import TaskStack
from mtml_fast.ops import _check
from mtml_fast.trainers import _names
from mtml_fast.trainers._inner import Objective, adapted_losses, split_rows
from mtml_fast.trainers._new_tasks import NewTasks, by_ridge, by_steps, check_request
from mtml_fast.trainers._steps import descend
from mtml_fast.trainers.interrupts import Interrupts
from mtml_fast.trainers.progress import Progress

__all__ = ["MetaLearnerTrainer"]


class MetaLearnerTrainer:
    r"""Trains a MetaLearner; the loss is the sum over the entries of each one's mean loss.

    .. math::
        L = \sum_i \frac{1}{N_i} \sum_n \ell\bigl(f_{t_i}(g(x_{i,n})),\, y_{i,n}\bigr)

    The articles' four steps are `initialize`, `pretrain` (all tasks jointly), `meta_train` (each task's module learns
    to adapt within a few steps) and `adapt` (new tasks); before them, `select_tasks` says which tasks belong together.
    A task that is absent from a call stays exactly as it is.

    Args:
        learner: the MetaLearner.
        num_tasks: its number of tasks.
        lr: the rate of the optimizer.
        optimizer: a name (adam, adamw, nadam, radam, rmsprop, adagrad, sgd), a `callable(params, lr)` such as a torch
            optimizer's class, or a torch optimizer that holds the learner's parameters.
        loss: a name (cross_entropy, bce, mse, mae, huber) or a `callable(outputs, targets)` that gives a mean.
            `None`: cross_entropy for integer targets, mse for floating ones.
        balance: how the task losses become one step: a name ("pcgrad", "uncertainty", ... see
            `mtml_fast.multitask.BALANCES`) or a `mtml_fast.multitask.Balance` of `num_tasks` tasks; its parameters, if
            it has some, are given to the optimizer. `None`: their sum. Gradient surgery needs a trunk, whose gradients
            it balances; each task module then gets the gradient of its own loss.

    Attributes: `task_losses [E]` of the last step or test, one mean loss an entry; `history`, a list of sums for each
    of "train", "pretrain" and "meta_train", one number an epoch.

    `inputs` and `tasks` are those of `MetaLearner.forward`. `targets` has the form of `inputs`, a list of one tensor an
    entry or one tensor: int64 classes `[N]`, or floats `[N, O]` (`[N]` where O is one).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        FloatingPointError: the loss is not finite; the step is not taken. `adapt` then returns no learner.

    An interrupt (Ctrl-C) lets the running step finish and is raised then.

    Example:
        >>> learner = MetaLearner(num_tasks=2)
        >>> trainer = MetaLearnerTrainer(learner, num_tasks=2)
        >>> inputs, targets = torch.randn(2, 8, 3), torch.randn(2, 8, 1)
        >>> first = trainer.train(inputs, [0, 1], targets, epochs=50)
        >>> trainer.test(inputs, [0, 1], targets) < trainer.history["train"][0]
        True
    """

    def __init__(
        self,
        learner: MetaLearner,
        num_tasks: int,
        *,
        lr: float = 1e-3,
        optimizer: str | Callable | torch.optim.Optimizer = "adam",
        loss: str | Callable | None = None,
        balance: str | Balance | None = None,
    ):
        if not isinstance(learner, MetaLearner):
            raise TypeError(f"learner must be a MetaLearner, got {type(learner).__name__}")
        if num_tasks != learner.num_tasks:
            raise ValueError(f"num_tasks must be the learner's {learner.num_tasks}, got {num_tasks!r}")
        self.learner = learner
        self.optimizer = _names.optimizer(optimizer, learner.parameters(), lr)
        self.balance = None if balance is None else balance_of(balance, num_tasks)
        if isinstance(self.balance, Surgery) and learner.trunk is None:
            raise ValueError(
                f"balance must be a weighting for a learner without a trunk, got {type(self.balance).__name__}"
            )
        if self.balance is not None:
            self.balance.to(next(learner.parameters()).device)
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            own = [p for p in self.balance.parameters() if id(p) not in held]
            if own:
                self.optimizer.add_param_group({"params": own})
            self._first_balance = copy.deepcopy(self.balance.state_dict())
        self.task_losses: Tensor | None = None
        self.affinity: Affinity | None = None
        self.history: dict[str, list[float]] = {"train": [], "pretrain": [], "meta_train": []}
        self._loss = None if loss is None else _names.loss(loss)

    def initialize(self, seed: int | None = None) -> None:
        """New first values in the learner, a fresh state of the optimizer and of `balance`, and an empty history.

        Layers without `reset_parameters` keep their values. `seed` goes to `torch.manual_seed`.
        """
        if seed is not None:
            torch.manual_seed(seed)
        self.learner.reset_parameters()
        self.optimizer.state.clear()
        if self.balance is not None:
            self.balance.load_state_dict(self._first_balance)
        self.task_losses = self.affinity = None
        for sums in self.history.values():
            sums.clear()

    def select_tasks(
        self, inputs, tasks, targets, groups: int, *, kind: str = "linear", lr: float = 0.01
    ) -> list[list[int]]:
        """The step before the articles' four: which tasks to train together, as groups of task ids.

        The affinity of the tasks is that in the learner's trunk as it is, best after some epochs of `pretrain`. It
        stays in `trainer.affinity`: a table, a picture, other groupings. See `mtml_fast.multitask.affinity`.

        Args:
            inputs, tasks, targets: as for `train`; each task at most once.
            groups: how many.
            kind, lr: "linear", what a step at rate lr on one task does to the loss of another, to first order;
                "lookahead", the same for the step itself; "cosine", of the gradients.
        """
        entries, targets, loss = self._prepared(inputs, tasks, targets)
        for i, t in enumerate(entries.tasks):
            if t in entries.tasks[:i]:
                raise ValueError(f"tasks must hold each task once, got {t} twice")
        if entries.single:
            raise ValueError("inputs must have an axis for the rows of each task, got one row of each")
        self.affinity = affinity(
            self.learner, (entries.split(), targets), kind=kind, loss=loss, lr=lr, tasks=entries.tasks
        )
        return self.affinity.groups(groups)

    def train(self, inputs, tasks, targets, epochs: int = 1) -> float:
        """One optimizer step on all rows an epoch; the sum of the task losses before the last step."""
        return self._train_jointly("train", inputs, tasks, targets, epochs)

    def pretrain(self, inputs, tasks, targets, epochs: int = 100) -> float:
        """All tasks jointly, trunk and heads: as `train`, with its own history."""
        return self._train_jointly("pretrain", inputs, tasks, targets, epochs)

    @torch.no_grad()
    def test(self, inputs, tasks, targets) -> float:
        """The sum of the task losses, in evaluation mode and without a gradient."""
        entries, targets, loss = self._prepared(inputs, tasks, targets)
        training = self.learner.training
        self.learner.eval()
        try:
            self.task_losses = Objective(self.learner, loss)(self.learner.features(entries), targets)
        finally:
            self.learner.train(training)
        return float(self.task_losses.sum())

    def meta_train(
        self,
        inputs,
        tasks,
        targets,
        epochs: int = 1,
        *,
        steps: int = 1,
        lr: float = 0.01,
        first_order: bool = False,
        support: float = 0.5,
        layers: str = "head",
    ) -> float:
        r"""Trains every task's module for what it becomes after a few steps on a part of its rows.

        .. math::
            \min_\theta \sum_t L_t^{query}(\theta_t^K), \qquad
            \theta_t^{k+1} = \theta_t^k - \text{lr} \, \nabla L_t^{support}(\theta_t^k), \quad \theta_t^0 = \theta_t

        Each epoch splits each task's rows anew, at random (torch's generator), and takes one optimizer step.

        Args:
            inputs, tasks, targets: as for `train`; each task at most once, with two rows or more.
            steps: K.
            lr: the rate of these steps.
            first_order: leaves out the derivative of the inner gradient.
            support: the share of the rows that the steps see; the other rows are the query.
            layers: "head": the steps change the task modules, over the trunk; "all": each task also changes a copy of
                the trunk of its own, with batch statistics of its own.

        Returns:
            The sum of the query losses before the last epoch's optimizer step.

        Source: Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017;
        "head" is ANIL, Raghu et al., "Rapid learning or feature reuse?", ICLR 2020.
        """
        _check.number("steps", steps, low=1, integer=True)
        _check.number("lr", lr, low=0, exclusive=True)
        _check.choice("layers", layers, ("head", "all"))
        _check.number("support", support, low=0, below=1, exclusive=True)
        entries, targets, loss = self._prepared(inputs, tasks, targets)
        for i, t in enumerate(entries.tasks):
            if t in entries.tasks[:i]:
                raise ValueError(f"tasks must hold each task once, got {t} twice")
            if entries.single or entries.counts[i] < 2:
                raise ValueError(f"inputs must have two rows or more of each task, got one of task {t}")
        trunks = None
        if layers == "all" and self.learner.trunk is not None:
            trunks = TaskStack([self.learner.trunk] * len(entries.tasks))
        objective = Objective(self.learner, loss, trunks)

        def step() -> Tensor:
            support_set, query_set = split_rows(entries, targets, support)
            return adapted_losses(objective, support_set, query_set, steps=steps, lr=lr, first_order=first_order)

        return self._run("meta_train", epochs, step, entries.tasks)

    def adapt(
        self,
        inputs,
        targets,
        *,
        layers: str | Sequence[str] = "head",
        how: str = "steps",
        steps: int = 100,
        lr: float = 0.01,
        penalty: float = 1.0,
        from_tasks: Sequence[int] | None = None,
        out_features: Sequence[int] | None = None,
    ) -> MetaLearner:
        r"""Learns new tasks from their rows on top of what is learned; the learner itself stays as it is.

        .. math::
            z = f_{new}(g(x)) \quad \text{(a head over the trunk)} \qquad \text{or} \qquad
            z = A \, [f_1(g(x)), \dots, f_T(g(x))] + b \quad \text{(a map between outputs)}

        Args:
            inputs: the rows of the new tasks, a list of `[N_i, D]` or one tensor `[T, N, D]`.
            targets: theirs, in the same form.
            layers: what learns. "head": a new head for each task, over the trunk as it is; "outputs": an affine map
                from the outputs of learned tasks to those of the new one, for tasks that are related to them and have
                few rows; "all": a head and a copy of the trunk for each task; a list of names of modules and parameters
                of the trunk: a head and, for each task, copies of these. Everything else is shared and stays.
            how: "steps": gradient steps on the trainer's loss. Each new task starts from the task module whose loss on
                its rows is the smallest ("outputs": from that module's outputs), or from new values if none has its
                number of outputs. "ridge": a linear head, or map, in closed form, by least squares whatever the loss
                (see `mtml_fast.ridge_head`): the outputs for classes are scores, not logits, and those for bce estimate
                -1 and 1. Not where the trunk learns.
            steps, lr: the gradient steps, on all rows of the task, and their rate.
            penalty: of "ridge", the weight of the squared norm of the head beside the sum of the squared errors.
            from_tasks: of "outputs", the learned tasks; `None`: all.
            out_features: the outputs of each new task; `None`: those of the targets.

        Returns:
            A MetaLearner of the new tasks, in evaluation mode: call it on their rows.

        Example:
            >>> trainer = MetaLearnerTrainer(MetaLearner(2, trunk=torch.nn.Linear(3, 8)), num_tasks=2)
            >>> inputs, targets = torch.randn(2, 8, 3), torch.randn(2, 8, 1)
            >>> loss = trainer.pretrain(inputs, [0, 1], targets, epochs=5)
            >>> new = trainer.adapt([torch.randn(6, 3)], [torch.randn(6, 2)], how="ridge")
            >>> new([torch.randn(4, 3)])[0].shape, new.heads.head(0)
            (torch.Size([4, 2]), Linear(in_features=8, out_features=2, bias=True))
        """
        check_request(self.learner, layers, how, steps, lr, penalty, from_tasks)
        entries = self.learner.entries(inputs, range(len(inputs)), num_tasks=len(inputs))
        if entries.single:
            raise ValueError(
                "inputs must be [T, N, D] or a list of [N, D], got rows without an axis for the task's rows"
            )
        _check_finite(entries)
        targets = entries.arrange(targets)
        loss = self._checked_loss(targets)
        out_features = _widths(targets, loss) if out_features is None else list(out_features)
        if len(out_features) != len(targets):
            raise ValueError(f"out_features must be {len(targets)} widths, one a task, got {len(out_features)}")
        if isinstance(self.learner.heads, TaskHeads) or how == "ridge" or layers == "outputs":
            targets = self._fitted(targets, entries.counts, out_features, loss)
        new = NewTasks(entries, targets, loss, out_features, layers, from_tasks)
        return by_ridge(self.learner, new, penalty) if how == "ridge" else by_steps(self.learner, new, steps, lr)

    def _train_jointly(self, phase: str, inputs, tasks, targets, epochs: int) -> float:
        entries, targets, loss = self._prepared(inputs, tasks, targets)
        objective, trunk = Objective(self.learner, loss), self.learner.trunk
        copies = None
        if isinstance(self.balance, Surgery) and not entries.single and rows_stay_apart(trunk):
            copies = TaskCopies(trunk)

        def step() -> Tensor:
            if copies is None:
                return objective(self.learner.features(entries), targets)
            return objective(replace(entries, x=copies(entries.split()), shared=False), targets)

        return self._run(phase, epochs, step, entries.tasks, copies)

    def _run(
        self,
        phase: str,
        epochs: int,
        losses: Callable[[], Tensor],
        tasks: Sequence[int],
        copies: TaskCopies | None = None,
    ) -> float:
        """One optimizer step an epoch on the sum of `losses()`; the last sum. `copies`: those of the trunk in it."""
        _check.number("epochs", epochs, low=1, integer=True)
        self.learner.train()
        progress = Progress(0, epochs, enabled=epochs > 1)
        epoch, total = 0, math.nan

        def text() -> str:
            return f"loss {total:.4g}"

        try:
            with Interrupts() as interrupts:
                while epoch < epochs and interrupts.received is None:
                    task_losses = losses()
                    total = float(task_losses.detach().sum())
                    if not math.isfinite(total):
                        raise FloatingPointError(f"the loss of epoch {epoch + 1} is {total}; the step is not taken")
                    descend(
                        partial(self._backward, task_losses, tasks, copies), self.optimizer, self.learner.heads, tasks
                    )
                    self.task_losses = task_losses.detach()
                    self.history[phase].append(total)
                    epoch += 1
                    progress.step(epoch, time.perf_counter(), text)
        finally:
            progress.close(epoch, text)
        interrupts.raise_received()
        return total

    def _backward(self, task_losses: Tensor, tasks: Sequence[int], copies: TaskCopies | None) -> None:
        if self.balance is None:
            task_losses.sum().backward()
            return
        shared = copies
        if copies is None and self.learner.trunk is not None:
            shared = self.learner.trunk.parameters()
        self.balance.backward(task_losses, shared, tasks=tasks)

    def _prepared(self, inputs, tasks, targets) -> tuple[Entries, list[Tensor], Callable]:
        """The entries of a call, the targets of each, and the loss; the learner's outputs get their widths."""
        entries = self.learner.entries(inputs, tasks)
        _check_finite(entries)
        targets = entries.arrange(targets)
        loss = self._checked_loss(targets)
        if entries.single:
            targets = [target.unsqueeze(0) for target in targets]
        heads = self.learner.heads
        if isinstance(heads, TaskHeads):
            if None in heads.out_features:
                given = dict(zip(entries.tasks, _widths(targets, loss), strict=True))
                widest = max(given.values())
                heads.out_features = [known or given.get(t, widest) for t, known in enumerate(heads.out_features)]
            targets = self._fitted(targets, entries.counts, [heads.out_features[t] for t in entries.tasks], loss)
        return entries, targets, loss

    def _fitted(self, targets: list[Tensor], counts: list[int], widths: list[int], loss: Callable) -> list[Tensor]:
        """The targets as the loss takes them beside outputs `[N, O]`."""
        dtype = next((p.dtype for p in self.learner.heads.parameters()), torch.get_default_dtype())
        return [
            _names.fit_targets(f"targets[{i}]", target, [count, width], dtype, loss)
            for i, (target, count, width) in enumerate(zip(targets, counts, widths, strict=True))
        ]

    def _checked_loss(self, targets: list[Tensor]) -> Callable:
        """The loss for these targets, none of which may be NaN."""
        floating = [target.is_floating_point() for target in targets]
        if bool(torch.cat([target.flatten() for target in targets]).isnan().any()):
            bad = next(i for i, target in enumerate(targets) if bool(target.isnan().any()))
            raise ValueError(f"targets must not be NaN, got NaN in targets[{bad}]")
        if self._loss is not None:
            return self._loss
        if any(floating) != all(floating):
            raise TypeError("targets must be all integers (classes) or all floats, got both")
        return F.mse_loss if floating[0] else F.cross_entropy


def _check_finite(entries: Entries) -> None:
    """Names the first of the caller's inputs that holds NaN or infinity."""
    whole = isinstance(entries.x, Tensor)
    for i, part in enumerate([entries.x] if whole else entries.x):
        if bool(part.isfinite().all()):
            continue
        first = tuple((~part.isfinite()).nonzero()[0].tolist())
        if whole:
            # the row's place in the caller's tensor, or that of its entry
            i = first[0] if entries.shared else first[0] // entries.counts[0]
            i = i if entries.order is None else int(entries.order[first[0]])
        raise ValueError(f"inputs must be finite, got {part[first].item()} in inputs[{i}]")


def _widths(targets: list[Tensor], loss: Callable) -> list[int]:
    """How many outputs the targets `[N, ...]` of each entry ask for."""
    known = _names.kind(loss)
    elementwise = known is not F.cross_entropy and known in _names.LOSSES.values()
    if elementwise or targets[0].is_floating_point():
        return [target.shape[1] if target.dim() > 1 else 1 for target in targets]
    # one number for all: that a class is missing among a task's rows says nothing
    return [int(torch.cat([target.flatten() for target in targets]).max()) + 1] * len(targets)
