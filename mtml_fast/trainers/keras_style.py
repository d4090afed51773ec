"""MultiTaskMetaLearningModel: compile, fit, evaluate and predict as Keras users know them, for one task or many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mtml_fast.nn.meta_learner import MetaLearner
from mtml_fast.nn.mlp import ACTIVATIONS
from mtml_fast.ops import _check
from mtml_fast.trainers import _names
from mtml_fast.trainers._keras_rows import Rows, rows_of
from mtml_fast.trainers._steps import descend
from mtml_fast.trainers.interrupts import Interrupts
from mtml_fast.trainers.progress import Progress

__all__ = ["History", "MultiTaskMetaLearningModel"]


@dataclass
class History:
    """What `fit` returns: `history[name]`, one number an epoch, for "loss", each metric, and "val_" of these."""

    history: dict[str, list[float]] = field(default_factory=dict)
    epoch: list[int] = field(default_factory=list)

    def add(self, epoch: int, values: dict[str, float]) -> None:
        self.epoch.append(epoch)
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)


class MultiTaskMetaLearningModel:
    """A body of dense layers that all tasks share, and a linear head for each task, behind the methods of Keras.

    Args:
        hidden: the widths of the body's layers.
        outputs: the outputs of each task, one number or a list of one a task.
        num_tasks: T.
        activation: after each of the body's layers, a name of `mtml_fast.nn.mlp`: relu, tanh, gelu, silu, elu, ...
        in_features: D; `None`: the width of the first `x`, at which the model is built.

    One task: `x [R, D]`, `y [R]` or `[R, O]`. Several tasks, in one of two ways:

    * every row has a target for every task: `y` is a list of T arrays `[R]` or `[R, O_t]`, or one array of columns
      `[R, T]`. The loss is the sum over the tasks, the metrics are means over them; `predict` gives `[R, T]` where each
      task has one output, else a list.
    * every row belongs to one task: `tasks [R]` holds its number (an argument of fit, evaluate and predict), `y` is
      `[R]` or `[R, O]`. The loss is the mean over the rows. Tasks absent from a batch stay exactly as they are.

    NumPy arrays and tensors are taken; `x` and floating targets become float32. The outputs are logits: losses and
    metrics of classes expect no softmax. `network` is the MetaLearner behind it all, `history` the last fit's History.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: a method that comes before compile, or before the model is built.
        FloatingPointError: the loss is not finite; the step is not taken.

    Example:
        >>> model = MultiTaskMetaLearningModel()
        >>> model.compile(optimizer="adam", loss="mse", metrics=["mae"])
        >>> x, y = np.random.rand(64, 3), np.random.rand(64, 1)
        >>> history = model.fit(x, y, epochs=2, validation_split=0.25, verbose=0)
        >>> sorted(history.history), model.predict(x).shape
        (['loss', 'mae', 'val_loss', 'val_mae'], (64, 1))
    """

    def __init__(
        self,
        hidden: Sequence[int] = (128, 64),
        outputs: int | Sequence[int] = 1,
        *,
        num_tasks: int = 1,
        activation: str = "relu",
        in_features: int | None = None,
    ):
        if not isinstance(hidden, (list, tuple)):
            raise TypeError(f"hidden must be a list of widths, got {hidden!r}")
        for i, width in enumerate(hidden):
            _check.number(f"hidden[{i}]", width, low=1, integer=True)
        _check.number("num_tasks", num_tasks, low=1, integer=True)
        _check.choice("activation", activation, tuple(ACTIVATIONS))
        widths = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs] * num_tasks
        if len(widths) != num_tasks:
            raise ValueError(f"outputs must be a number or a list of {num_tasks}, one a task, got {outputs!r}")
        for width in widths:
            _check.number("outputs", width, low=1, integer=True)
        self.hidden, self.outputs, self.num_tasks, self.activation = list(hidden), widths, num_tasks, activation
        self.network: MetaLearner | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.history = History()
        self._compiled = None
        if in_features is not None:
            self.build(in_features)

    def build(self, in_features: int) -> None:
        """Makes the layers for rows of this width; `fit` does it by itself."""
        _check.number("in_features", in_features, low=1, integer=True)
        if self.network is not None:
            raise RuntimeError("build must be called once; the model is built")
        layers, width = [], in_features
        for wider in self.hidden:
            layers += [nn.Linear(width, wider), ACTIVATIONS[self.activation]()]
            width = wider
        trunk = nn.Sequential(*layers) if layers else None
        self.network = MetaLearner(self.num_tasks, width, self.outputs, hidden=None, trunk=trunk)
        self._in_features = in_features
        if self._compiled is not None:
            self._make_optimizer()

    def compile(
        self,
        optimizer: str | Callable | torch.optim.Optimizer = "adam",
        loss: str | Callable = "mse",
        metrics: Sequence[str | Callable] | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Chooses how to train; a name may be written in any case.

        Args:
            optimizer: a name (adam, adamw, nadam, radam, rmsprop, adagrad, sgd), a `callable(params, lr)` such as a
                torch optimizer's class, or a torch optimizer of `network.parameters()` (after `build`).
            loss: a name (mse, mae, huber, cross_entropy, bce, or Keras' longer names) or a
                `callable(outputs, targets)` that gives a mean.
            metrics: names (mae, mse, accuracy) or such callables; `None`: none.
            learning_rate: `None`: 1e-3, and 1e-2 for "sgd".
        """
        metrics = () if metrics is None else metrics
        if isinstance(metrics, str) or not isinstance(metrics, Sequence):
            raise TypeError(f"metrics must be a list, got {metrics!r}")
        named = [_names.metric(value) for value in metrics]
        if len({name for name, _ in named} | {"loss"}) <= len(named):
            raise ValueError(f"metrics must have names of their own, got {[name for name, _ in named]}")
        self._compiled = (optimizer, learning_rate)
        self._loss, self._metrics = _names.loss(loss), dict(named)
        # a name is wrong now, not at the first fit
        if self.network is None:
            _names.optimizer(optimizer, [torch.zeros(1, requires_grad=True)], learning_rate)
        else:
            self._make_optimizer()

    def fit(
        self,
        x,
        y,
        epochs: int = 1,
        batch_size: int = 32,
        validation_data: tuple | None = None,
        validation_split: float = 0.0,
        shuffle: bool = True,
        verbose: int = 1,
        seed: int | None = None,
        *,
        tasks=None,
    ) -> History:
        """Trains, batch by batch; an interrupt (Ctrl-C) lets the running step finish and is raised then.

        Args:
            x, y, tasks: the rows, see the class.
            validation_data: `(x, y)` or `(x, y, tasks)`, evaluated after every epoch.
            validation_split: or the share of the rows, the last ones, that is kept out of the training for it.
            shuffle: a new order of the rows in every epoch.
            verbose: 0 silent, 1 a progress bar, 2 a line an epoch.
            seed: fixes the order of the rows, and the first values of a model that this call builds.

        Returns:
            The History; training figures are means over the epoch's batches, as they were before each step.
        """
        self._require(compiled=True)
        _check.number("epochs", epochs, low=1, integer=True)
        _check.number("batch_size", batch_size, low=1, integer=True)
        _check.number("validation_split", validation_split, low=0, below=1)
        _check.choice("verbose", verbose, (0, 1, 2))
        rows = self._rows(x, y, tasks)
        if self.network is None:
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                self.build(rows.x.shape[1])
        rows, validation = self._validation(rows, validation_data, validation_split)
        order = None if seed is None else torch.Generator().manual_seed(seed)

        self.history = History()
        progress = Progress(0, epochs, enabled=verbose == 1)

        def text() -> str:
            return "  ".join(f"{name} {values[-1]:.4g}" for name, values in self.history.history.items())

        try:
            with Interrupts() as interrupts:
                for epoch in range(epochs):
                    self.network.train()
                    chosen = rows.take(torch.randperm(len(rows.x), generator=order)) if shuffle else rows
                    values = self._epoch(chosen, batch_size, interrupts)
                    if interrupts.received is not None:
                        break
                    if validation is not None:
                        values |= {f"val_{name}": value for name, value in self._evaluate(validation).items()}
                    self.history.add(epoch, values)
                    progress.step(epoch + 1, time.perf_counter(), text)
                    if verbose == 2:
                        print(f"epoch {epoch + 1} of {epochs}  {text()}")
        finally:
            progress.close(len(self.history.epoch), text)
        interrupts.raise_received()
        return self.history

    def evaluate(self, x, y, batch_size: int = 1024, return_dict: bool = False, *, tasks=None):
        """The loss, or `[loss, *metrics]` where there are metrics; with `return_dict` a dictionary of them."""
        self._require(compiled=True, built=True)
        _check.number("batch_size", batch_size, low=1, integer=True)
        values = self._evaluate(self._rows(x, y, tasks), batch_size)
        if return_dict:
            return values
        return list(values.values()) if len(values) > 1 else values["loss"]

    @torch.no_grad()
    def predict(self, x, batch_size: int = 1024, *, tasks=None) -> np.ndarray | list[np.ndarray]:
        """The outputs as NumPy arrays: `[R, O]`; for T tasks on every row `[R, T]` or a list of T arrays."""
        self._require(built=True)
        _check.number("batch_size", batch_size, low=1, integer=True)
        rows = self._rows(x, None, tasks)
        self.network.eval()
        parts = []
        for start in range(0, len(rows.x), batch_size):
            batch = rows.part(start, start + batch_size)
            outputs, order = self._outputs(batch)
            # back to the order of the caller's rows
            parts.append(outputs if order is None else [outputs[0][order.argsort()]])
        columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
        if len(columns) == 1:
            return columns[0]
        return np.concatenate(columns, 1) if set(self.outputs) == {1} else columns

    def summary(self) -> None:
        """Prints the layers, their output shapes and their numbers of parameters."""
        self._require(built=True)
        layers = [] if self.network.trunk is None else [m for m in self.network.trunk if isinstance(m, nn.Linear)]
        table = [(f"dense {self.activation}", f"[N, {layer.out_features}]", layer) for layer in layers]
        shapes = ", ".join(f"[N, {width}]" for width in sorted(set(self.outputs)))
        table.append((f"{self.num_tasks} task head{'s'[: self.num_tasks > 1]}", shapes, self.network.heads))
        counts = [sum(p.numel() for p in module.parameters()) for *_, module in table]
        print(f"{type(self).__name__}: {self._in_features} inputs, {sum(counts):,} parameters")
        for (name, shape, _), count in zip(table, counts, strict=True):
            print(f"  {name:<20}{shape:<20}{count:>12,}")

    def _epoch(self, rows: Rows, batch_size: int, interrupts: Interrupts) -> dict[str, float]:
        """One pass of training; its means so far if an interrupt came."""
        means = _Means()
        for start in range(0, len(rows.x), batch_size):
            batch = rows.part(start, start + batch_size)
            loss, metrics = self._loss_and_metrics(batch)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"the loss of batch {start // batch_size} is {loss.item()}; its step is not taken"
                )
            present = range(self.num_tasks) if batch.tasks is None else set(batch.tasks.tolist())
            descend(loss.backward, self.optimizer, self.network.heads, present)
            means.add({"loss": loss.detach(), **metrics}, len(batch.x))
            if interrupts.received is not None:
                break
        return means.values()

    @torch.no_grad()
    def _evaluate(self, rows: Rows, batch_size: int = 1024) -> dict[str, float]:
        self.network.eval()
        means = _Means()
        for start in range(0, len(rows.x), batch_size):
            batch = rows.part(start, start + batch_size)
            loss, metrics = self._loss_and_metrics(batch)
            means.add({"loss": loss, **metrics}, len(batch.x))
        return means.values()

    def _loss_and_metrics(self, batch: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, order = self._outputs(batch)
        targets = batch.y if order is None else [batch.y[0][order]]
        targets = [
            _names.fit_targets("y", target, z.shape, z.dtype, self._loss)
            for z, target in zip(outputs, targets, strict=True)
        ]
        loss = _names.task_losses(self._loss, outputs, targets).sum()
        with torch.no_grad():
            return loss, {name: _mean_metric(f, outputs, targets) for name, f in self._metrics.items()}

    def _outputs(self, batch: Rows) -> tuple[list[Tensor], Tensor | None]:
        """One output a task for all rows; or one for all, sorted by task, and where each of its rows came from."""
        if batch.tasks is None:
            return self.network(batch.x), None
        entries = self.network.entries(batch.x, batch.tasks)
        return [torch.cat(self.network.head_outputs(self.network.features(entries)))], entries.order

    def _rows(self, x, y, tasks) -> Rows:
        if tasks is not None and len(set(self.outputs)) > 1:
            raise ValueError(f"tasks must be None for tasks of different outputs {self.outputs}")
        rows = rows_of(x, y, tasks, self.num_tasks)
        if self.network is None:
            return rows
        if rows.x.shape[1] != self._in_features:
            raise ValueError(f"x must have {self._in_features} features, got shape {list(rows.x.shape)}")
        return rows.to(next(self.network.parameters()))

    def _validation(self, rows: Rows, data: tuple | None, share: float) -> tuple[Rows, Rows | None]:
        """The rows to train on, and those to validate on."""
        if data is not None:
            if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
                raise ValueError(f"validation_data must be (x, y) or (x, y, tasks), got {type(data).__name__}")
            return rows, self._rows(*data, *[None] * (3 - len(data)))
        if share == 0:
            return rows, None
        kept = len(rows.x) - int(len(rows.x) * share)
        if kept == len(rows.x):
            raise ValueError(f"validation_split must leave at least one row to validate on, got {share} of {kept}")
        return rows.part(0, kept), rows.part(kept, len(rows.x))

    def _make_optimizer(self) -> None:
        optimizer, learning_rate = self._compiled
        self.optimizer = _names.optimizer(optimizer, self.network.parameters(), learning_rate)

    def _require(self, compiled: bool = False, built: bool = False) -> None:
        if compiled and self._compiled is None:
            raise RuntimeError("the model must be compiled first: call compile(optimizer, loss, metrics)")
        if built and self.network is None:
            raise RuntimeError("the model must be built first: call fit, or build(in_features)")


class _Means:
    """Means over the rows of batches of different sizes; nothing is read from the device before the end."""

    def __init__(self):
        self._sums, self._rows = {}, 0

    def add(self, means: dict[str, Tensor], rows: int) -> None:
        self._rows += rows
        for name, mean in means.items():
            self._sums[name] = self._sums.get(name, 0) + mean * rows

    def values(self) -> dict[str, float]:
        return {name: float(total) / self._rows for name, total in self._sums.items()}


def _mean_metric(function: Callable, outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The mean over the tasks."""
    # the known metrics are means over rows, so that for tasks of equal size one call gives the mean over tasks
    if function in _names.METRICS.values() and len({z.shape for z in outputs}) == 1:
        return function(torch.cat(outputs), torch.cat(targets))
    values = [function(z, target) for z, target in zip(outputs, targets, strict=True)]
    return torch.stack([torch.as_tensor(value) for value in values]).mean()
