"""MetaLearner: one module a task, over a trunk that all tasks may share, computed as a few batched calls."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from mtml_fast.nn.task_heads import TaskHeads
from mtml_fast.nn.task_stack import TaskStack, reset_parameters
from mtml_fast.ops import _check
from mtml_fast.tasks import TaskRows

__all__ = ["Entries", "MetaLearner", "TaskModule"]


class TaskModule(nn.Sequential):
    """The ordinary module of one task: linear, ReLU, linear, `[N, D] -> [N, O]`.

    Example:
        >>> TaskModule(4, out_features=2, hidden=8)(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, in_features: int, out_features: int = 1, hidden: int = 64):
        super().__init__(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, out_features))


class MetaLearner(nn.Module):
    r"""T task modules, over a trunk that they share if there is one.

    .. math::
        z_i = f_{t_i}(g(x_i)) \qquad \text{for each entry } i \text{ of a call, of task } t_i

    Args:
        num_tasks: T.
        in_features: D, the width of the rows (of the trunk's output, where there is a trunk). `None`: the width of the
            first rows it sees.
        out_features: O, one number, or a list of one a task. `None`: the width of the targets, if a
            `MetaLearnerTrainer` sees them before the first call, else 1.
        hidden: the width of each task module's hidden layer (`TaskModule`); `None` for linear task modules.
        trunk: a module that all rows go through first. It sees all the rows of a call as one batch.
        task_module: the user's own task modules instead; in_features, out_features and hidden then do not apply.
            One of: a class or function, called once a task without arguments, or with the task's number if it has one
            argument without a default (functions only); a list of T modules, whose values are copied; or one module,
            copied for each task, with new values in every layer that has `reset_parameters`.

    The task modules run together: the default ones as `TaskHeads` (rows and outputs of any number), the user's own as a
    `TaskStack` (one `torch.func.vmap` for all inputs of one shape). `learner.heads` is that module, and
    `learner.task_modules[t]` a copy of task t's module in ordinary form. A parameter that has no shape before the first
    call is in `parameters()` nonetheless: an optimizer may be made at any time.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> learner = MetaLearner(3)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> outputs = learner([torch.zeros(5, 4), torch.zeros(2, 4)], tasks=[2, 0])
        >>> [list(z.shape) for z in outputs]
        [[5, 1], [2, 1]]
    """

    def __init__(
        self,
        num_tasks: int,
        in_features: int | None = None,
        out_features: int | Sequence[int] | None = None,
        *,
        hidden: int | None = 64,
        trunk: nn.Module | None = None,
        task_module: nn.Module | Sequence[nn.Module] | Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        _check.number("num_tasks", num_tasks, low=1, integer=True)
        if trunk is not None and not isinstance(trunk, nn.Module):
            raise TypeError(f"trunk must be an nn.Module, got {type(trunk).__name__}")
        self.trunk = trunk
        # in a tuple, because a module among the attributes would count as a part of the learner
        self._task_module = (task_module,)
        if task_module is None:
            widths = list(out_features) if isinstance(out_features, (list, tuple)) else [out_features] * num_tasks
            if len(widths) != num_tasks:
                raise ValueError(f"out_features must be a list of {num_tasks} widths, got {len(widths)}")
            self.heads = TaskHeads(in_features, widths, hidden)
        else:
            for name, value in (("in_features", in_features), ("out_features", out_features)):
                if value is not None:
                    raise ValueError(f"{name} must be None beside task_module, got {value!r}")
            self.heads = TaskStack(_modules(task_module, num_tasks))

    @property
    def num_tasks(self) -> int:
        return self.heads.num_tasks

    @property
    def task_modules(self) -> Sequence[nn.Module]:
        """The task modules as ordinary modules: copies, so changing one leaves the learner alone.

        To put modules back: `learner.heads.load_heads(list(learner.task_modules))`.
        """
        return _Copies(self.heads)

    def forward(self, inputs, tasks=None) -> list[Tensor]:
        """The outputs, a list of one tensor an entry: `outputs[i] = task_modules[tasks[i]](trunk(inputs[i]))`.

        Args:
            inputs, tasks: what makes an entry depends on both.

                ====================================  ===================================  ==========================
                inputs                                tasks                                entries
                ====================================  ===================================  ==========================
                list of `[N_i, D]` (or `[D]`)         E ids; `None`: 0..T-1                each tensor of the list
                `[E, N, D]`                           E ids; `None`: 0..T-1                each slice of the first axis
                tensor of any other shape             list, tuple or range of E ids        each slice of the first axis
                `[R, D]`                              tensor or array of R ids             each task present, ascending,
                                                                                           with its rows in their order
                `[R, D]`                              `None`                               each task, with all R rows
                ====================================  ===================================  ==========================

                Tensors of four and more axes with a tensor of ids, or without ids, could be read in two ways and are
                refused. Floating tensors have the learner's dtype. NumPy arrays are taken wherever tensors are, and
                their floats take on that dtype.
        """
        return self.head_outputs(self.features(self.entries(inputs, tasks)))

    def entries(self, inputs, tasks=None, *, num_tasks: int | None = None) -> Entries:
        """The entries of a call, checked; arguments as for `forward`, and the number of tasks if it is not T."""
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        return _entries(inputs, tasks, num_tasks or self.num_tasks, like)

    def features(self, entries: Entries) -> Entries:
        """The entries after the trunk."""
        if self.trunk is None:
            return entries
        x = entries.joined()
        try:
            return replace(entries, x=self.trunk(x))
        except ValueError as error:
            # batch norm of a single row, say
            raise ValueError(f"inputs {list(x.shape)} of the trunk: {error}") from error

    def head_outputs(self, entries: Entries) -> list[Tensor]:
        """The outputs of the entries of `features`, one tensor each."""
        if isinstance(self.heads, TaskStack):
            return self.heads(entries.split(), entries.tasks)
        outputs = self.heads.outputs(entries.rows(), self.head_tasks(entries))
        return [z.squeeze(0) for z in outputs] if entries.single else outputs

    def head_tasks(self, entries: Entries) -> list[int] | None:
        """The heads that serve the entries; `None` for all of them in order, which spares their selection."""
        return None if entries.tasks == list(range(self.num_tasks)) else entries.tasks

    def reset_parameters(self) -> None:
        """New first values in the trunk and in every task module."""
        if self.trunk is not None:
            reset_parameters(self.trunk)
        if isinstance(self.heads, TaskHeads):
            self.heads.reset_parameters()
            return
        (task_module,) = self._task_module
        if isinstance(task_module, (list, tuple)):
            # what is frozen may be in common, and stays so
            frozen = {id(p): copy.deepcopy(p) for m in task_module for p in m.parameters() if not p.requires_grad}
            task_module = [copy.deepcopy(module, dict(frozen)) for module in task_module]
            for module in task_module:
                reset_parameters(module)
        self.heads.load_heads(_modules(task_module, self.num_tasks))


@dataclass(frozen=True)
class Entries:
    """What a call covers: entry i is `counts[i]` rows for the module of task `tasks[i]`."""

    # [R, ...] entry after entry; or a list of one tensor an entry
    x: Tensor | list[Tensor]
    tasks: list[int]
    counts: list[int]
    # every entry is one row, without an axis for it
    single: bool = False
    # every entry is all of x
    shared: bool = False
    # the row of the caller's tensor that each row of x came from
    order: Tensor | None = None

    def joined(self) -> Tensor:
        """All rows, `[R, ...]`."""
        if isinstance(self.x, Tensor):
            return self.x
        shapes = {tuple(x.shape[0 if self.single else 1 :]) for x in self.x}
        if len(shapes) > 1:
            raise ValueError(f"inputs must have rows of one shape, got {' and '.join(map(str, sorted(shapes)))}")
        return torch.stack(self.x) if self.single else torch.cat(self.x)

    def rows(self) -> TaskRows:
        """The rows of each entry."""
        x = self.joined()
        if x.dim() != 2:
            raise ValueError(f"inputs must have rows [D] for these task modules, got rows {list(x.shape[1:])}")
        if not x.is_floating_point():
            raise TypeError(f"inputs must be floating point for these task modules, got {x.dtype}")
        if self.shared:
            return TaskRows(x.expand(len(self.tasks), *x.shape))
        if len(set(self.counts)) == 1:
            return TaskRows(x.reshape(len(self.counts), -1, x.shape[1]))
        return TaskRows(x, offsets=torch.tensor([0, *self.counts], device=x.device).cumsum(0))

    def split(self) -> list[Tensor]:
        """One tensor an entry."""
        if not isinstance(self.x, Tensor):
            return self.x
        if self.shared:
            return [self.x] * len(self.tasks)
        parts = self.x.split(self.counts)
        return [x.squeeze(0) for x in parts] if self.single else list(parts)

    def arrange(self, targets) -> list[Tensor]:
        """The targets of each entry, given in the form of the inputs: a list of one an entry, or a tensor."""
        device = self.x.device if isinstance(self.x, Tensor) else self.x[0].device
        if self.order is not None:
            targets = _tensor("targets", targets, None).to(device)
            if targets.dim() == 0 or targets.shape[0] != self.order.numel():
                raise ValueError(f"targets must have {self.order.numel()} rows as inputs, got {list(targets.shape)}")
            return list(targets[self.order].split(self.counts))
        if not isinstance(targets, (list, tuple)):
            targets = _tensor("targets", targets, None)
            if targets.dim() == 0:
                raise ValueError(f"targets must be a list or [E, ...], got the number {targets.item()}")
            targets = targets.unbind()
        if len(targets) != len(self.tasks):
            raise ValueError(f"targets must be {len(self.tasks)}, one an entry of inputs, got {len(targets)}")
        return [_tensor(f"targets[{i}]", target, None).to(device) for i, target in enumerate(targets)]


class _Copies(Sequence):
    def __init__(self, heads: TaskHeads | TaskStack):
        self._heads = heads

    def __len__(self) -> int:
        return self._heads.num_tasks

    def __getitem__(self, t: int) -> nn.Module:
        return self._heads.head(t + len(self) if -len(self) <= t < 0 else t)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[t] for t in range(len(self)))


def _entries(inputs, tasks, num_tasks: int, like: Tensor | None) -> Entries:
    if isinstance(inputs, (list, tuple)):
        x = [_tensor(f"inputs[{i}]", value, like) for i, value in enumerate(inputs)]
        if len({value.dim() for value in x}) > 1:
            raise ValueError(f"inputs must have equally many axes, got {sorted({value.dim() for value in x})}")
        if not x or x[0].dim() == 0:
            raise ValueError(f"inputs must be tensors [N, D], got {'an empty list' if not x else 'numbers'}")
        single = x[0].dim() == 1
        for i, value in enumerate(x):
            if value.shape[0] == 0:
                raise ValueError(f"inputs[{i}] must have at least one row, got shape {list(value.shape)}")
        return Entries(x, _ids(tasks, len(x), num_tasks).tolist(), [1 if single else len(v) for v in x], single)
    x = _tensor("inputs", inputs, like)
    by_tensor = isinstance(tasks, (Tensor, np.ndarray))
    if x.dim() < 2:
        raise ValueError(f"inputs must be [E, N, D], [R, D] or a list of tensors, got shape {list(x.shape)}")
    if x.dim() > 3 and (by_tensor or tasks is None):
        form = "None" if tasks is None else "a tensor"
        raise ValueError(
            f"tasks must be a list of ids (one for each inputs[i]) for inputs {list(x.shape)}, got {form}; "
            "or inputs a list of tensors, one an entry"
        )
    if x.dim() == 2 and tasks is None:
        return Entries(x, list(range(num_tasks)), [x.shape[0]] * num_tasks, shared=True)
    if x.dim() == 2 and by_tensor:
        ids = _ids(tasks, x.shape[0], num_tasks)
        order = ids.argsort(stable=True).to(x.device)
        present, counts = ids.unique(return_counts=True)
        return Entries(x[order], present.tolist(), counts.tolist(), order=order)
    ids = _ids(tasks, x.shape[0], num_tasks).tolist()
    if x.dim() == 2:
        return Entries(x, ids, [1] * len(ids), single=True)
    if x.shape[1] == 0:
        raise ValueError(f"inputs must have at least one row an entry, got shape {list(x.shape)}")
    return Entries(x.flatten(0, 1), ids, [x.shape[1]] * len(ids))


def _ids(tasks, count: int, num_tasks: int) -> Tensor:
    """The task of each entry, or of each row."""
    try:
        ids = torch.as_tensor(range(num_tasks) if tasks is None else tasks).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"tasks must be a list of task ids, got {tasks!r}") from None
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"tasks must be integers, got {ids.dtype}")
    if list(ids.shape) != [count]:
        raise ValueError(f"tasks must hold {count} ids, one an entry of inputs, got shape {list(ids.shape)}")
    for i in ((ids < 0) | (ids >= num_tasks)).nonzero().flatten()[:1].tolist():
        raise ValueError(f"tasks[{i}] must be in 0..{num_tasks - 1}, got {int(ids[i])}")
    return ids.long()


def _tensor(name: str, value, like: Tensor | None) -> Tensor:
    """A tensor as it is, if it has the dtype of `like`; anything else as one, in that dtype and on its device."""
    if isinstance(value, Tensor):
        if like is not None and value.is_floating_point() and value.dtype != like.dtype:
            raise TypeError(f"{name} must have the dtype of the learner ({like.dtype}), got {value.dtype}")
        return value
    try:
        value = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {type(value).__name__}") from None
    if like is None:
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)


def _modules(task_module, num_tasks: int) -> list[nn.Module]:
    """The modules that the argument stands for, one a task."""
    if isinstance(task_module, nn.Module):
        modules = [copy.deepcopy(task_module) for _ in range(num_tasks)]
        for module in modules:
            reset_parameters(module)
    elif isinstance(task_module, (list, tuple)):
        modules = list(task_module)
    elif callable(task_module):
        required = [
            p.name
            for p in inspect.signature(task_module).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        # a class with one argument means a width by it, hardly the task's number
        if len(required) > (0 if isinstance(task_module, type) else 1):
            raise TypeError(f"task_module must be callable without arguments, got one that needs {', '.join(required)}")
        modules = [task_module(t) if required else task_module() for t in range(num_tasks)]
    else:
        raise TypeError(f"task_module must be a module, a list of modules or a function, got {task_module!r}")
    if len(modules) != num_tasks:
        raise ValueError(f"task_module must be {num_tasks} modules, one a task, got {len(modules)}")
    for t, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"task_module must give an nn.Module for task {t}, got {type(module).__name__}")
    return modules
