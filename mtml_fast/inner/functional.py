"""The plan `functional`: any nn.Module, its gradients by torch.func.vmap over tasks, its steps by sgd_step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtml_fast.inner.cost import forward_cost
from mtml_fast.inner.exact_norms import ExactNorms
from mtml_fast.inner.loop import InnerLoop, masked_outputs, mean_loss
from mtml_fast.ops import _check, sgd_step
from mtml_fast.ops.mlp_adapt.reference import rate_at
from mtml_fast.tasks import TaskBatch, TaskRows

# what the intermediate results of one chunk of tasks may take, where the user gives no number of tasks
MEMORY = 2 << 30


@dataclass
class _Known:
    """What has been found out about a model."""

    batchable: bool = True  # whether vmap can take it
    bytes: dict[tuple, int] = field(default_factory=dict)  # what a task of these shapes takes


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


class FunctionalPlan:
    """Tasks of equal sizes together, in chunks; every inner step is one vmap of grad and one sgd_step."""

    name = "functional"

    def __init__(self, model: nn.Module, inner: InnerLoop, why: str):
        self.model, self.inner, self.why = model, inner, why
        self.names = inner.adapted_names(model)
        self._known = _KNOWN.setdefault(model, _Known())

    def query(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Query outputs [T, Q, C] or [R, C], and the tasks' query losses [T]."""
        inner, support_loss = self.inner, self.inner.loss_for(batch.support)
        _check_labels(support_loss, batch.support, batch.query)
        outputs, losses = _Collected(batch.query), _Collected(batch.query)
        for tasks in self._chunks(batch.support, batch.query):
            support, query = _rectangle(batch.support, tasks), _rectangle(batch.query, tasks)
            theta = self._adapt(support, support_loss, {})
            statistics = self._statistics(theta, support)
            z = self._forward(theta, statistics, query.x)
            mask = support.class_mask
            if query.y is None:
                losses.add(tasks, z.new_zeros(z.shape[0]))
            else:
                mean = lambda z, y, m: mean_loss(support_loss, z, y, m)  # noqa: E731
                losses.add(tasks, self._map(mean, (0, 0, None if mask is None else 0), z, query.y, mask))
            shape = None if mask is None else mask.reshape(mask.shape[0], *[1] * (z.dim() - 2), mask.shape[1])
            outputs.add(tasks, masked_outputs(z, shape, inner.loss or support_loss))
        return outputs.rows(), losses.tasks()

    def parameters(self, support: TaskRows, start: dict[str, Tensor]) -> tuple[dict[str, Tensor], list]:
        """The adapted parameters, name -> [T, ...], and the batch statistics that predictions need."""
        loss = self.inner.loss_for(support)
        _check_labels(loss, support)
        collected = {name: _Collected(support) for name in self.names}
        statistics: list[tuple[_Collected, _Collected]] = []
        for tasks in self._chunks(support, support):
            rows = _rectangle(support, tasks)
            theta = self._adapt(rows, loss, {name: value[tasks] for name, value in start.items()})
            for name, value in theta.items():
                collected[name].add(tasks, value)
            recorded = self._statistics(theta, rows)
            statistics = statistics or [(_Collected(support), _Collected(support)) for _ in recorded]
            for pair, values in zip(statistics, recorded, strict=True):
                for part, value in zip(pair, values, strict=True):
                    part.add(tasks, value)
        parameters = {name: value.tasks() for name, value in collected.items()}
        return parameters, [(mean.tasks(), variance.tasks()) for mean, variance in statistics]

    def predict(self, parameters: dict[str, Tensor], statistics: list, rows: TaskRows) -> Tensor:
        """Outputs of the adapted networks: [T, Q, C] or [R, C]."""
        outputs = _Collected(rows)
        for tasks in self._chunks(rows, rows):
            query = _rectangle(rows, tasks)
            theta = {name: value[tasks] for name, value in parameters.items()}
            z = self._forward(theta, [(m[tasks], v[tasks]) for m, v in statistics], query.x)
            mask = query.class_mask
            shape = None if mask is None else mask.reshape(mask.shape[0], *[1] * (z.dim() - 2), mask.shape[1])
            outputs.add(tasks, masked_outputs(z, shape, self.inner.loss or "cross_entropy"))
        return outputs.rows()

    def cost(self, batch: TaskBatch) -> tuple[int, int]:
        """Operations and bytes of the meta-step, from one task's forward pass."""
        operations = size = 0
        for tasks in self._groups(batch.support, batch.query):
            support, query = _rectangle(batch.support, tasks[:1]), _rectangle(batch.query, tasks[:1])
            (f_support, b_support), (f_query, b_query) = (self._forward_cost(rows.x[0]) for rows in (support, query))
            steps = self.inner.steps
            # a gradient is three forward passes, and going back through it about eight more
            per_step = f_support * (3 if self.inner.first_order else 11)
            operations += len(tasks) * (steps * per_step + 3 * f_query)
            size += len(tasks) * (steps * b_support * (1 if self.inner.first_order else 3) + b_query)
        return operations, size

    def _adapt(self, support: TaskRows, loss, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """K steps for tasks of equal size: name -> [T, ...]."""
        inner, tasks = self.inner, support.num_tasks
        shared = {name: p for name, p in self.model.named_parameters() if name in self.names}
        theta = start or shared
        per_task = bool(start)
        rates = inner.rates(self.names, list(shared.values())) if inner.steps else []
        buffers = None
        mask = support.class_mask

        def task_loss(values, x, y, class_mask):
            return mean_loss(loss, self._call(values, x), y, class_mask)

        for k in range(inner.steps):
            in_dims = (0 if per_task else None, 0, 0, None if mask is None else 0)
            grads = self._map(grad(task_loss), in_dims, theta, support.x, support.y, mask)
            if inner.first_order:
                grads = {name: g.detach() for name, g in grads.items()}
            if not per_task:
                theta = {name: p.expand(tasks, *p.shape) for name, p in theta.items()}
                per_task = True
            values, buffers = sgd_step(
                [theta[name] for name in self.names],
                [grads[name] for name in self.names],
                lr=[rate_at(rates, k, i) for i in range(len(self.names))],
                momentum_buffers=buffers,
                momentum=inner.momentum,
                weight_decay=inner.weight_decay,
                clip=inner.clip,
            )
            buffers = buffers or None
            theta = dict(zip(self.names, values, strict=True))
        if not per_task:
            theta = {name: p.expand(tasks, *p.shape) for name, p in theta.items()}
        return theta

    def _statistics(self, theta: dict[str, Tensor], support: TaskRows) -> list[tuple[Tensor, Tensor]]:
        """Where the policy asks for them, each batch norm's mean and variance [T, ...] of the support rows."""
        if self.inner.batch_stats != "support":
            return []

        def record(values, x):
            with ExactNorms("record") as recorder:
                functional_call(self.model, self._state(values), (x,))
            return recorder.statistics

        return self._map(record, (0, 0), theta, support.x)

    def _forward(self, theta: dict[str, Tensor], statistics: list, x: Tensor) -> Tensor:
        return self._map(self._call, (0, 0, 0 if statistics else None), theta, x, statistics)

    def _call(self, values: dict[str, Tensor], x: Tensor, statistics: list | None = None) -> Tensor:
        """One task's rows [N, ...] through the model with these parameters."""
        policy = "running" if self.inner.batch_stats == "running" else ("replay" if statistics else "own")
        # attention by its plain formula: the fused kernels have no batching rule and no second derivative
        with ExactNorms(policy, statistics), sdpa_kernel(SDPBackend.MATH):
            return functional_call(self.model, self._state(values), (x,))

    def _state(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        # buffers as copies: a batch norm in train mode counts its calls in one
        return {**values, **{name: buffer.clone() for name, buffer in self.model.named_buffers()}}

    def _map(self, function: Callable, in_dims: tuple, *args):
        """function over the task axis of its arguments: by vmap, or task by task for a model that vmap cannot take."""
        if self._known.batchable:
            try:
                return vmap(function, in_dims=in_dims, randomness="different")(*args)
            except (IndexError, RuntimeError) as error:
                if "out of bounds" in str(error):
                    raise ValueError(f"y must be a class among the model's outputs: {error}") from None
                reason = str(error).splitlines()[0]
        taken = [
            [_task(arg, t) if dim == 0 else arg for arg, dim in zip(args, in_dims, strict=True)]
            for t in range(next(arg.shape[0] for arg in args[1:] if isinstance(arg, Tensor)))
        ]
        results = _stacked([function(*arguments) for arguments in taken])
        if self._known.batchable:
            # the loop got through where vmap did not, so it is vmap that cannot take the model
            self._known.batchable = False
            warnings.warn(
                f"{type(self.model).__name__} runs one task after the other, torch.func.vmap cannot take it: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        return results

    def _chunks(self, support: TaskRows, query: TaskRows) -> Iterator[list[int]]:
        """Tasks of equal sizes, at most as many at a time as fit."""
        for tasks in self._groups(support, query):
            chunk = self.inner.chunk or self._fitting(support, query, tasks[:1])
            for start in range(0, len(tasks), chunk):
                yield tasks[start : start + chunk]

    @staticmethod
    def _groups(support: TaskRows, query: TaskRows) -> list[list[int]]:
        if not support.is_ragged and not query.is_ragged:
            return [list(range(support.num_tasks))]
        groups: dict[tuple[int, int], list[int]] = {}
        for t, sizes in enumerate(zip(support.counts.tolist(), query.counts.tolist(), strict=True)):
            groups.setdefault(sizes, []).append(t)
        return list(groups.values())

    def _fitting(self, support: TaskRows, query: TaskRows, task: list[int]) -> int:
        rows = [_rectangle(part, task).x[0] for part in (support, query)]
        key = tuple(x.shape for x in rows)
        if key not in self._known.bytes:
            # the transients of one step: forward, backward, and backward through that
            self._known.bytes[key] = 3 * self._forward_cost(rows[0])[1] + self._forward_cost(rows[1])[1]
        return max(1, MEMORY // max(1, self._known.bytes[key]))

    def _forward_cost(self, x: Tensor) -> tuple[int, int]:
        values = {name: p for name, p in self.model.named_parameters() if name in self.names}
        with torch.no_grad():
            return forward_cost(lambda: self._call(values, x))


def _task(value, t: int):
    """Task t of tensors [T, ...], of a dict or of a list of them."""
    if isinstance(value, dict):
        return {name: v[t] for name, v in value.items()}
    return [_task(v, t) for v in value] if isinstance(value, (list, tuple)) else value[t]


def _stacked(results: list):
    """The tasks' results as tensors [T, ...], as one dict or as one list of them."""
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    if isinstance(results[0], dict):
        return {name: _stacked([result[name] for result in results]) for name in results[0]}
    return [_stacked(list(parts)) for parts in zip(*results, strict=True)]


class _Collected:
    """Results of chunks of tasks, put back in the order of the tasks."""

    def __init__(self, like: TaskRows):
        self.like = like
        self.parts: list[Tensor] = []
        self.order: list[int] = []

    def add(self, tasks: list[int], values: Tensor) -> None:
        self.order += tasks
        # of a ragged set only tasks of one size come together
        self.parts += [values] if not self.like.is_ragged else list(values.unbind(0))

    def tasks(self) -> Tensor:
        """[T, ...]"""
        values = torch.stack(self.parts) if self.like.is_ragged else torch.cat(self.parts)
        if self.order == list(range(len(self.order))):
            return values
        places = torch.tensor(self.order, device=values.device).argsort()
        return values[places]

    def rows(self) -> Tensor:
        """[T, Q, ...], or packed [R, ...]"""
        if not self.like.is_ragged:
            return self.tasks()
        ordered = sorted(zip(self.order, self.parts, strict=True), key=lambda pair: pair[0])
        return torch.cat([part for _, part in ordered])


def _rectangle(rows: TaskRows, tasks: list[int]) -> TaskRows:
    """Tasks of equal size as [T, N, ...]."""
    if not rows.is_ragged and len(tasks) == rows.num_tasks:
        return rows
    chosen = rows.select(tasks)
    if not rows.is_ragged:
        return chosen
    lead = (len(tasks), int(chosen.counts[0]))
    y = None if chosen.y is None else chosen.y.unflatten(0, lead)
    return TaskRows(chosen.x.unflatten(0, lead), y, None, chosen.class_mask)


def _check_labels(loss, *parts: TaskRows) -> None:
    for name, rows in zip(("support", "query"), parts, strict=False):
        if loss == "cross_entropy" and rows.y is not None:
            # how many outputs there are only the model knows; torch reports labels above
            _check.labels(f"{name}_y", rows.y, None)
