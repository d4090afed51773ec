"""MAML and FOMAML: the query loss after the inner loop, differentiated through it or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtml_fast.inner import Adapted, InnerLoop, KnownPlan, adapt
from mtml_fast.tasks import TaskBatch, TaskRows


@dataclass(frozen=True)
class Result:
    """A meta-step's outcome.

    Attributes:
        loss: the mean over tasks of each task's mean query loss; call `.backward()` on it.
        task_losses: `[T]`.
        outputs: of the query rows, `[T, Q, C]` or `[R, C]`.
        query: the query rows.
    """

    loss: Tensor
    task_losses: Tensor
    outputs: Tensor
    query: TaskRows

    @cached_property
    def metrics(self) -> dict[str, Tensor]:
        """Each task's figures `[T]`: "accuracy" for integer labels."""
        y = self.query.y
        if y is None or y.is_floating_point() or self.outputs.dim() <= y.dim():
            return {}
        with torch.no_grad():
            classes = 1 if self.query.is_ragged else 2
            right = (self.outputs.argmax(classes) == y).to(self.outputs.dtype)
            if not self.query.is_ragged:
                return {"accuracy": right.flatten(1).mean(1)}
            counts = self.query.offsets.diff()
            task = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
            sums = right.new_zeros(counts.numel()).index_add_(
                0, task, right.flatten(1).mean(1) if right.dim() > 1 else right
            )
            return {"accuracy": sums / counts}


def meta_loss(model: nn.Module, batch: TaskBatch, inner: InnerLoop, plan: KnownPlan | None = None) -> Result:
    """Adapt to every task's support rows, and take the loss of its query rows: what MAML minimises.

    .. math::
        J(\\theta) = \\frac{1}{T} \\sum_t L\\bigl(\\theta_{t,K}; \\text{query}_t\\bigr)

    `plan`: remembers from call to call how model and settings are served.

    Example:
        >>> import mtml_fast as mf
        >>> batch = mf.data.Sinusoid().sample(4)
        >>> meta_loss(mf.nn.mlp(1, (8,), 1), batch, InnerLoop(steps=2)).task_losses.shape
        torch.Size([4])
    """
    if not isinstance(batch, TaskBatch):
        raise TypeError(f"batch must be a TaskBatch, got {type(batch).__name__}")
    if batch.query.y is None:
        raise ValueError("query must have labels y, got None")
    if batch.num_tasks == 0:
        raise ValueError("batch must hold at least one task, got none")
    if batch.support.y is None:
        raise ValueError("support must have labels y, got None")
    if batch.support.class_mask is None and batch.query.class_mask is not None:
        batch = TaskBatch(replace(batch.support, class_mask=batch.query.class_mask), batch.query)
    plan = KnownPlan() if plan is None else plan
    outputs, losses, mean = plan(model, inner, batch.support).query(batch)
    return Result(mean, losses, outputs, batch.query)


class MAML(nn.Module):
    """Model-agnostic meta-learning: learn a start from which K gradient steps do well, exact to second order.

    .. math::
        J(\\theta) = \\frac{1}{T} \\sum_t L\\bigl(\\theta_{t,K}; \\text{query}_t\\bigr), \\qquad
        \\theta_{t,k+1} = \\theta_{t,k} - a_k \\nabla_\\theta L\\bigl(\\theta_{t,k}; \\text{support}_t\\bigr)

    Args:
        model: any nn.Module that maps rows [N, ...] to outputs [N, C, ...]; it is used, not copied, and its parameters
            are the algorithm's.
        lr: the inner rate, see `InnerLoop`; an nn.Parameter (or a dict with such) is learned with the model.
        steps: K.
        inner: loss, layers, first_order, momentum, weight_decay, clip, batch_stats, chunk, plan: see `InnerLoop`.

    Source: Finn et al., "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017.

    Example:
        >>> import mtml_fast as mf
        >>> tasks = mf.data.Sinusoid()
        >>> maml = MAML(mf.nn.mlp(1, (40, 40), 1), lr=0.01, steps=1)
        >>> result = maml(tasks.sample(25, step=0))
        >>> result.loss.backward()
        >>> maml.adapt(tasks.sample(3, step=1).support, steps=5)
        Adapted(Sequential, 3 tasks, 5 steps of 0.weight, 0.bias, 2.weight, 2.bias, 4.weight, 4.bias)
    """

    first_order = False

    def __init__(self, model: nn.Module, lr: float | Tensor | Mapping[str, Tensor] = 0.01, steps: int = 1, **inner):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.model = model
        inner.setdefault("first_order", self.first_order)
        self._inner = InnerLoop(lr=lr, steps=steps, **inner)
        self._known: dict[int, _Known] = {}
        unknown = [] if not isinstance(lr, Mapping) else [n for n in lr if n not in dict(model.named_parameters())]
        if unknown:
            raise ValueError(f"lr must name parameters of the model, got {unknown[0]!r}")
        # rates that learn are parameters of the algorithm
        learned = {"lr": lr} if not isinstance(lr, Mapping) else {_attribute(name): rate for name, rate in lr.items()}
        for name, rate in learned.items():
            if isinstance(rate, nn.Parameter):
                self.register_parameter(name, rate)
            elif isinstance(rate, Tensor):
                self.register_buffer(name, rate)

    @property
    def inner(self) -> InnerLoop:
        """The inner loop's settings."""
        return self._with(None).inner

    def forward(self, batch: TaskBatch, steps: int | None = None) -> Result:
        """The outcome of a batch of tasks, after `steps` inner steps (K of them by default)."""
        known = self._with(steps)
        return meta_loss(self.model, batch, known.inner, known.plan)

    def adapt(self, support: TaskRows, steps: int | None = None) -> Adapted:
        """The model adapted to new tasks, without a graph."""
        with torch.no_grad():
            return adapt(self.model, support, **vars(self._with(steps).inner)).detach()

    def extra_repr(self) -> str:
        inner = self._inner
        learned = isinstance(inner.lr, (Tensor, Mapping))
        settings = {
            f.name: getattr(inner, f.name) for f in fields(inner) if f.name not in ("lr", "chunk", "plan", "store")
        }
        # a function's address is another one in every process
        settings["loss"] = getattr(inner.loss, "__qualname__", inner.loss)
        return ", ".join([f"lr={'a tensor' if learned else inner.lr}", *(f"{k}={v}" for k, v in settings.items())])

    def _with(self, steps: int | None) -> _Known:
        """The settings with so many steps: the same object, as long as they stay the same."""
        given, lr = self._inner, self._inner.lr
        if isinstance(lr, Mapping):
            lr = {name: getattr(self, _attribute(name), rate) for name, rate in lr.items()}
        elif isinstance(lr, Tensor):
            lr = self.lr
        steps = given.steps if steps is None else steps
        known = self._known.get(steps) if type(steps) is int else None
        if known is None or known.given is not given or not _same_rates(known.inner.lr, lr):
            known = _Known(given, replace(given, lr=lr, steps=steps), KnownPlan())
            self._known[steps] = known
        return known


class _Known(NamedTuple):
    """What was found out in an earlier call."""

    given: InnerLoop  # the algorithm's settings at that time
    inner: InnerLoop  # with the rates and the number of steps of that call
    plan: KnownPlan


def _same_rates(a, b) -> bool:
    """Whether these are the same numbers or the very same tensors."""
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same_rates(a[name], b[name]) for name in a)
    return not isinstance(a, (Tensor, Mapping)) and not isinstance(b, (Tensor, Mapping)) and a == b


def _attribute(name: str) -> str:
    """Where a parameter's rate is kept: an attribute may hold no dots, and no parameter's name holds a slash."""
    return f"lr/{name.replace('.', '/')}"


class FOMAML(MAML):
    """First-order MAML: the inner gradient is treated as a constant, which saves the second-order sweep.

    Everything else as in `MAML`.

    Source: Finn et al., ICML 2017, section 5.2; Nichol et al., "On first-order meta-learning algorithms", 2018.

    Example:
        >>> import mtml_fast as mf
        >>> FOMAML(mf.nn.mlp(1, (8,), 1)).inner.first_order
        True
    """

    first_order = True
