"""The plan `functional`: any nn.Module, its gradients by torch.func.vmap over tasks, its steps by sgd_step."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtml_fast.inner.cost import forward_cost
from mtml_fast.inner.exact_layers import ExactLayers
from mtml_fast.inner.loop import InnerLoop, masked_outputs, mean_loss
from mtml_fast.ops import _check, sgd_step
from mtml_fast.tasks import TaskBatch, TaskRows

# what the intermediate results of one chunk of tasks may take, where the user gives no number of tasks
MEMORY = 2 << 30


@dataclass
class _Known:
    """What has been found out about a model."""

    # the losses with which it was tried under vmap, and those with which vmap could not take it
    tried: set = field(default_factory=set)
    looped: set = field(default_factory=set)
    # what a task takes, by the shapes of its rows
    bytes: dict[tuple, int] = field(default_factory=dict)


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()

# functional_call puts tensors into the user's module for a while, and the choice of an attention kernel is the whole
# process's: one thread at a time
_ONE_AT_A_TIME = threading.RLock()


def _one_at_a_time(method: Callable) -> Callable:
    @functools.wraps(method)
    def alone(*args, **kwargs):
        with _ONE_AT_A_TIME:
            return method(*args, **kwargs)

    return alone


class FunctionalPlan:
    """Tasks of equal sizes together, in chunks; every inner step is one vmap of grad and one sgd_step."""

    name = "functional"

    @_one_at_a_time
    def __init__(self, model: nn.Module, inner: InnerLoop, why: str):
        self.model, self.inner, self.why = model, inner, why
        self._slots, self._buffers = _slots(model)
        self._known = _KNOWN.setdefault(model, _Known())

    @_one_at_a_time
    def query(self, batch: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Query outputs [T, Q, C] or [R, C], the tasks' query losses [T], and their mean."""
        loss = self.inner.loss
        self._check(batch.support, batch.query)
        self._try(batch.support)
        outputs, losses = _Collected(batch.query), _Collected(batch.query)
        for tasks in self._chunks(batch.support, batch.query):
            support, query = _rectangle(batch.support, tasks), _rectangle(batch.query, tasks)
            theta = self._adapt(support, {})
            statistics = self._statistics(theta, support)
            z = self._forward(theta, statistics, query.x)
            mask = support.class_mask
            if query.y is None:
                losses.add(tasks, z.new_zeros(z.shape[0]))
            else:
                if loss == "cross_entropy":
                    _check.labels("query_y", query.y, z.shape[2] if z.dim() > 2 else 1)
                mean = lambda z, y, m: mean_loss(loss, z, y, m)  # noqa: E731
                losses.add(tasks, self._map(mean, (0, 0, None if mask is None else 0), z, query.y, mask))
            outputs.add(tasks, masked_outputs(z, mask, loss))
        task_losses = losses.tasks()
        return outputs.rows(), task_losses, task_losses.mean()

    @_one_at_a_time
    def parameters(self, support: TaskRows, start: dict[str, Tensor]) -> tuple[dict[str, Tensor], list]:
        """The adapted parameters, name -> [T, ...], and the batch statistics that predictions need."""
        self._check(support)
        self._try(support)
        collected = {name: _Collected(support) for name in self.inner.adapted_names(self.model)}
        statistics: list[tuple[_Collected, _Collected]] = []
        for tasks in self._chunks(support, support):
            rows = _rectangle(support, tasks)
            theta = self._adapt(rows, {name: value[tasks] for name, value in start.items()})
            for name, value in theta.items():
                collected[name].add(tasks, value)
            recorded = self._statistics(theta, rows)
            statistics = statistics or [(_Collected(support), _Collected(support)) for _ in recorded]
            for pair, values in zip(statistics, recorded, strict=True):
                for part, value in zip(pair, values, strict=True):
                    part.add(tasks, value)
        parameters = {name: value.tasks() for name, value in collected.items()}
        return parameters, [(mean.tasks(), variance.tasks()) for mean, variance in statistics]

    @_one_at_a_time
    def predict(self, parameters: dict[str, Tensor], statistics: list, rows: TaskRows) -> Tensor:
        """Outputs of the adapted networks: [T, Q, C] or [R, C]."""
        outputs = _Collected(rows)
        for tasks in self._chunks(rows, rows):
            query = _rectangle(rows, tasks)
            theta = {name: value[tasks] for name, value in parameters.items()}
            z = self._forward(theta, [(m[tasks], v[tasks]) for m, v in statistics], query.x)
            outputs.add(tasks, masked_outputs(z, query.class_mask, self.inner.loss))
        return outputs.rows()

    def forms(self, batch: TaskBatch) -> list[str]:
        """None: the layers are PyTorch's."""
        return []

    @_one_at_a_time
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

    def _adapt(self, support: TaskRows, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """K steps for tasks of equal size: name -> [T, ...]."""
        inner, tasks = self.inner, support.num_tasks
        names = inner.adapted_names(self.model)
        shared = {name: p for name, p in self.model.named_parameters() if name in names}
        theta = start or shared
        per_task = bool(start)
        rates = inner.rates(names, list(shared.values()))
        buffers = None
        mask = support.class_mask

        def task_loss(values, x, y, class_mask):
            return mean_loss(inner.loss, self._call(values, x), y, class_mask)

        for k in range(inner.steps):
            in_dims = (0 if per_task else None, 0, 0, None if mask is None else 0)
            grads = self._map(grad(task_loss), in_dims, theta, support.x, support.y, mask)
            if inner.first_order:
                grads = {name: g.detach() for name, g in grads.items()}
            if not per_task:
                theta = {name: p.expand(tasks, *p.shape) for name, p in theta.items()}
                per_task = True
            values, buffers = sgd_step(
                [theta[name] for name in names],
                [grads[name] for name in names],
                lr=[_rate(rate, k) for rate in rates],
                momentum_buffers=buffers,
                momentum=inner.momentum,
                weight_decay=inner.weight_decay,
                clip=inner.clip,
            )
            buffers = buffers or None
            theta = dict(zip(names, values, strict=True))
        if not per_task:
            theta = {name: p.expand(tasks, *p.shape) for name, p in theta.items()}
        return theta

    def _statistics(self, theta: dict[str, Tensor], support: TaskRows) -> list[tuple[Tensor, Tensor]]:
        """Where the policy asks for them, each batch norm's mean and variance [T, ...] of the support rows."""
        if self.inner.batch_stats != "support":
            return []

        def record(values, x):
            with ExactLayers("record") as recorder:
                functional_call(self.model, self._state(values), (x,), tie_weights=False)
            return recorder.statistics

        return self._map(record, (0, 0), theta, support.x)

    def _forward(self, theta: dict[str, Tensor], statistics: list, x: Tensor) -> Tensor:
        return self._map(self._call, (0, 0, 0 if statistics else None), theta, x, statistics)

    def _call(self, values: dict[str, Tensor], x: Tensor, statistics: list | None = None) -> Tensor:
        """One task's rows [N, ...] through the model with these parameters."""
        policy = "running" if self.inner.batch_stats == "running" else ("replay" if statistics else "own")
        # attention by its plain formula: the fused kernels have no batching rule and no second derivative
        with ExactLayers(policy, statistics), sdpa_kernel(SDPBackend.MATH):
            outputs = functional_call(self.model, self._state(values), (x,), tie_weights=False)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"model must return one tensor, got {type(outputs).__name__}")
        return outputs

    def _state(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stands in every slot of the model."""
        # buffers as copies: a batch norm in train mode counts its calls in one
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        return {
            slot: values[name] if name in values else buffers[name]
            for slot, name in self._slots
            if name in values or name in buffers
        }

    def _try(self, support: TaskRows) -> None:
        """Find out on one task whether vmap can take the model, once and without a trace in the random numbers.

        Otherwise the first step of a process would begin under vmap and end in the loop, with other roundings than
        every later step: a resumed run would not have the bits of an undisturbed one.
        """
        if self.inner.loss in self._known.tried:
            return
        with torch.no_grad(), _check.forked_random(support.x):
            one = _rectangle(support, [0])
            plan = FunctionalPlan(self.model, replace(self.inner, steps=1, lr=0.0, first_order=True), self.why)
            theta = plan._adapt(one, {})
            plan._adapt(one, theta)
            plan._forward(theta, [], one.x)
        self._known.tried.add(self.inner.loss)

    def _map(self, function: Callable, in_dims: tuple, *args):
        """function over the task axis of its arguments: by vmap, or task by task for a model that vmap cannot take."""
        batchable = self.inner.loss not in self._known.looped
        if batchable:
            try:
                return vmap(function, in_dims=in_dims, randomness="different")(*args)
            except torch.OutOfMemoryError:
                raise
            except (IndexError, RuntimeError) as error:
                if "out of bounds" in str(error):
                    raise ValueError(f"support_y must be a class among the model's outputs: {error}") from None
                reason = str(error).splitlines()[0]
        taken = [
            [_task(arg, t) if dim == 0 else arg for arg, dim in zip(args, in_dims, strict=True)]
            for t in range(next(arg.shape[0] for arg in args[1:] if isinstance(arg, Tensor)))
        ]
        results = _stacked([function(*arguments) for arguments in taken])
        if batchable:
            # the loop got through where vmap did not, so it is vmap that cannot take the model
            self._known.looped.add(self.inner.loss)
            warnings.warn(
                f"{type(self.model).__name__} runs one task after the other, torch.func.vmap cannot take it: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        return results

    def _check(self, *parts: TaskRows) -> None:
        param = next(p for p in self.model.parameters() if p.is_floating_point())
        for name, rows in zip(("support", "query"), parts, strict=False):
            if rows.num_tasks == 0:
                raise ValueError(f"{name} must hold at least one task, got none")
            _check.same_device(f"{name}_x", rows.x, param, "the model's parameters")
            if rows.x.is_floating_point() and rows.x.dtype != param.dtype:
                raise TypeError(f"{name}_x must have the dtype of the model ({param.dtype}), got {rows.x.dtype}")
            if self.inner.loss == "cross_entropy" and rows.y is not None:
                # how many outputs there are only the model knows: labels above are found when it has answered
                mask = parts[0].class_mask
                classes = None if mask is None else mask.shape[1]
                task = torch.arange(rows.num_tasks).repeat_interleave(rows.counts)
                extra = rows.y.dim() == (1 if rows.is_ragged else 2)
                _check.labels(f"{name}_y", rows.y, classes, mask if extra else None, task)

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
        # a run that draws at random must not notice that its memory was estimated
        with torch.no_grad(), _check.forked_random(x):
            return forward_cost(lambda: self._call({}, x))


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
    if not rows.is_ragged and tasks == list(range(tasks[0], tasks[-1] + 1)):
        # neighbours are views: indices would have to be copied to the device, which a CUDA graph cannot capture
        part = slice(tasks[0], tasks[-1] + 1)
        y, mask = (None if t is None else t[part] for t in (rows.y, rows.class_mask))
        return TaskRows(rows.x[part], y, None, mask)
    chosen = rows.select(tasks)
    if not rows.is_ragged:
        return chosen
    lead = (len(tasks), int(chosen.counts[0]))
    y = None if chosen.y is None else chosen.y.unflatten(0, lead)
    return TaskRows(chosen.x.unflatten(0, lead), y, None, chosen.class_mask)


def _slots(model: nn.Module) -> tuple[list[tuple[str, str]], dict[str, Tensor]]:
    """Every place of a parameter or buffer in the model with the tensor's first name, and the buffers by that name.

    A tensor may stand in several places (tied weights), and a module may be reached by several names: each place is
    named once here, because functional_call with tie_weights fills the place of a shared module twice and then leaves
    a stranger's tensor in it.
    """
    first: dict[int, str] = {}
    places = []
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        own += module.named_buffers(recurse=False, remove_duplicate=False)
        for key, tensor in own:
            name = f"{prefix}.{key}" if prefix else key
            places.append((name, first.setdefault(id(tensor), name)))
    return places, dict(model.named_buffers())


def _rate(rate: Tensor, k: int) -> Tensor:
    """The rate of step k, as sgd_step takes it: a scalar, or [1, *shape]."""
    rate = rate[min(k, rate.shape[0] - 1)]
    return rate.reshape(()) if rate.numel() == 1 else rate[None]
