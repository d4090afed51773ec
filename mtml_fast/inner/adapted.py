"""adapt and Adapted: models adapted to tasks."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mtml_fast.files import load_tensors, save_tensors
from mtml_fast.inner.loop import InnerLoop, mean_loss
from mtml_fast.inner.plan import plan_for
from mtml_fast.ops.heads_loss.reference import LOSSES
from mtml_fast.tasks import TaskRows


def adapt(model: nn.Module, support: TaskRows, **inner) -> Adapted:
    """Adapt a model to every task by K gradient steps on the task's support rows, all tasks at once.

    .. math::
        \\theta_{t,k+1} = \\theta_{t,k} - a_k \\nabla_\\theta L\\bigl(\\theta_{t,k}; \\text{support}_t\\bigr)

    The model is not changed. Gradients flow from the adapted parameters to the model's, through all the steps; under
    `torch.no_grad()` nothing is kept.

    Args:
        model: any nn.Module that maps rows [N, ...] to outputs [N, C, ...].
        support: the rows to learn from, with labels.
        inner: lr, steps, loss, layers ("all", "head", "body" or names of modules and parameters), first_order,
            momentum, weight_decay, clip, batch_stats, chunk, plan: see `InnerLoop`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> import torch
        >>> import mtml_fast as mf
        >>> support = mf.TaskRows(torch.randn(3, 10, 4), torch.randint(0, 2, (3, 10)))
        >>> adapted = mf.adapt(mf.nn.mlp(4, (8,), 2), support, lr=0.1, steps=5)
        >>> adapted(torch.randn(3, 6, 4)).shape, adapted.module(0)(torch.randn(6, 4)).shape
        (torch.Size([3, 6, 2]), torch.Size([6, 2]))
    """
    if not isinstance(support, TaskRows):
        raise TypeError(f"support must be TaskRows, got {type(support).__name__}")
    settings = InnerLoop(**inner).for_rows("support", support)
    if support.num_tasks == 0:
        raise ValueError("support must hold at least one task, got none")
    parameters, statistics = plan_for(model, settings, support).parameters(support, {})
    return Adapted(model, settings, parameters, statistics, support.class_mask)


class Adapted:
    """A model adapted to T tasks; call it on query rows.

    Attributes:
        model: the model that was adapted; parameters that were not adapted are its own.
        parameters: name -> `[T, ...]`, the adapted ones.
        inner: the `InnerLoop` that adapted them.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: InnerLoop,
        parameters: dict[str, Tensor],
        statistics: list[tuple[Tensor, Tensor]],
        class_mask: Tensor | None,
    ):
        self.model, self.inner, self.parameters = model, inner, parameters
        self._statistics = statistics
        self._class_mask = class_mask

    @property
    def num_tasks(self) -> int:
        return next(iter(self.parameters.values())).shape[0]

    def __repr__(self) -> str:
        names = ", ".join(self.parameters)
        return f"Adapted({type(self.model).__name__}, {self.num_tasks} tasks, {self.inner.steps} steps of {names})"

    def __call__(self, query: TaskRows | Tensor) -> Tensor:
        """Outputs `[T, Q, C]` of rows `[T, Q, ...]`, or `[R, C]` of packed rows."""
        rows = self._rows("query", query)
        return plan_for(self.model, self.inner, rows).predict(self.parameters, self._statistics, rows)

    def loss(self, query: TaskRows) -> Tensor:
        """Each task's mean loss `[T]`."""
        rows = self._rows("query", query)
        loss = self.inner.for_rows("query", rows).loss
        outputs = self(rows)
        masks = [None] * self.num_tasks if rows.class_mask is None else rows.class_mask
        if rows.is_ragged:
            parts = zip(outputs.split(rows.counts.tolist()), rows.y.split(rows.counts.tolist()), strict=True)
        else:
            parts = zip(outputs, rows.y, strict=True)
        return torch.stack([mean_loss(loss, z, y, mask) for (z, y), mask in zip(parts, masks, strict=True)])

    def module(self, t: int) -> nn.Module:
        """The model adapted to task t, as an ordinary nn.Module of its own.

        Batch norms keep their stored running statistics: in train() mode they use the rows at hand, as
        batch_stats="transductive" does.
        """
        if not -self.num_tasks <= t < self.num_tasks:
            raise IndexError(f"t must be a task in 0..{self.num_tasks - 1}, got {t}")
        module = copy.deepcopy(self.model)
        own = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in self.parameters.items():
                own[name].copy_(value[t])
        return module

    def detach(self) -> Adapted:
        """The same without the graph that led to it."""
        parameters = {name: value.detach() for name, value in self.parameters.items()}
        statistics = [(mean.detach(), variance.detach()) for mean, variance in self._statistics]
        return Adapted(self.model, self.inner, parameters, statistics, self._class_mask)

    def update(self, support: TaskRows, **changes) -> Adapted:
        """Go on from here: the same number of steps (or other settings of `InnerLoop`) on more support rows."""
        rows = self._rows("support", support)
        settings = replace(self.inner, **changes).for_rows("support", rows)
        if settings.layers != self.inner.layers:
            raise ValueError(f"layers must stay {self.inner.layers!r} in an update, got {settings.layers!r}")
        plan = plan_for(self.model, settings, rows)
        parameters, statistics = plan.parameters(rows, self.parameters)
        return Adapted(self.model, settings, parameters, statistics, rows.class_mask)

    def save(self, path: str | os.PathLike) -> None:
        """Write the adapted and the other parameters, and the settings, to one checksummed file."""
        inner = self.inner
        if inner.loss is not None and inner.loss not in LOSSES:
            raise ValueError(f"loss must be a name to be saved, got {inner.loss!r}")
        tensors = {f"adapted/{name}": value for name, value in self.parameters.items()}
        tensors |= {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for i, pair in enumerate(self._statistics):
            tensors |= {f"statistics/{i}/{part}": value for part, value in zip(("mean", "var"), pair, strict=True)}
        if self._class_mask is not None:
            tensors["class_mask"] = self._class_mask
        rates = dict(inner.lr) if isinstance(inner.lr, Mapping) else {"": inner.lr}
        numbers = {name: rate for name, rate in rates.items() if not isinstance(rate, Tensor)}
        tensors |= {f"lr/{name}": rate for name, rate in rates.items() if isinstance(rate, Tensor)}
        settings = {k: v for k, v in vars(inner).items() if k != "lr"}
        settings["layers"] = inner.layers if isinstance(inner.layers, str) else list(inner.layers)
        metadata = {
            "kind": "adapted",
            "model": repr(self.model),
            "settings": settings,
            "lr": numbers,
            "statistics": len(self._statistics),
        }
        save_tensors(path, {name: t.detach().contiguous() for name, t in tensors.items()}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> Adapted:
        """Read what `save` wrote, with a model of the same architecture (which is copied, not changed)."""
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != "adapted":
            raise ValueError(f"path must be a file of Adapted.save, got {os.fspath(path)} (a {metadata.get('kind')!r})")
        part = lambda head: {n[len(head) :]: t for n, t in tensors.items() if n.startswith(head)}  # noqa: E731
        missing = [key for key in ("model", "settings", "lr", "statistics") if key not in metadata]
        if missing:
            raise ValueError(f"path must be a file of Adapted.save, got {os.fspath(path)} (without {missing[0]!r})")
        model = copy.deepcopy(model)
        # a file's tensors are on the CPU
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        tensors = {name: t.to(device) for name, t in tensors.items()}
        state, own = part("model/"), model.state_dict()
        for name in sorted({*state, *own}):
            if name not in state or name not in own or state[name].shape != own[name].shape:
                raise ValueError(f"model must be the one that was saved in {os.fspath(path)}, it differs in {name!r}")
        if metadata["model"] != repr(model):
            raise ValueError(f"model must be the one that was saved in {os.fspath(path)}, its layers differ")
        model.load_state_dict(state)
        rates = {**metadata["lr"], **part("lr/")}
        inner = InnerLoop(lr=rates.get("", rates), **metadata["settings"])
        statistics = [
            (tensors[f"statistics/{i}/mean"], tensors[f"statistics/{i}/var"]) for i in range(metadata["statistics"])
        ]
        return cls(model, inner, part("adapted/"), statistics, tensors.get("class_mask"))

    def _rows(self, name: str, rows: TaskRows | Tensor) -> TaskRows:
        rows = TaskRows(rows) if isinstance(rows, Tensor) else rows
        if not isinstance(rows, TaskRows):
            raise TypeError(f"{name} must be TaskRows or a tensor [T, Q, ...], got {type(rows).__name__}")
        if rows.num_tasks != self.num_tasks:
            raise ValueError(f"{name} must hold the {self.num_tasks} tasks that were adapted to, got {rows.num_tasks}")
        return rows if rows.class_mask is not None else replace(rows, class_mask=self._class_mask)
