"""GraphedStep: a trainer's whole meta-step as a CUDA graph, captured once and replayed for every step.

A replay runs the kernels of the capture on the tensors of the capture, and no Python. So whatever differs from step to
step lies in tensors that stay where they are:

* the tasks. Of data sets that draw ahead (`mf.data.Sinusoid`, `Omniglot`, `Digits`, `TensorClasses`), on the
  algorithm's device: all that is random about many steps is put there at once, and the graph goes through it and takes
  the rows from the data. Of any other: sampled as without a graph, and copied into buffers before each replay; that
  needs rows of the same shapes at every step.
* the optimizer's counters, and the rates that a schedule moves: the schedule moves numbers, as ever, and they are
  written into the tensors that the graph reads.

The first steps run without a graph, on the stream of the capture: they compile kernels, and make the optimizer's state.
They are steps of the run like all others, so it is the same as without a graph; with a schedule up to the rounding of
its rates to float32. Random numbers of the device continue through replays as torch's generator counts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mtml_fast.tasks import TaskBatch, TaskRows

__all__ = ["CudaGraphs", "GraphedStep", "check_optimizer"]

WARM_UP = 3
# tasks whose random part lies on the device at a time
_TASKS_AHEAD = 4096

# a step's loss and, where there are some, its tasks' accuracies
Outcome = tuple[Tensor, Tensor | None]


class GraphedStep:
    """The meta-steps of one `fit`.

    Args:
        descend: a batch -> the outcome of an optimizer step on it; reads nothing on the host.
        tasks, meta_batch: where the batches come from.
        optimizer: one that `check_optimizer` takes.
        scheduled: whether something moves its rates from step to step.
        device: the algorithm's.
        graphs: who captures.
    """

    def __init__(
        self,
        descend: Callable[[TaskBatch], Outcome],
        tasks: Any,
        meta_batch: int,
        optimizer: torch.optim.Optimizer,
        scheduled: bool,
        device: torch.device,
        graphs: CudaGraphs,
    ):
        drawn_ahead = callable(getattr(tasks, "assembled", None)) and _lie_on(tasks, device)
        self._source = (_DrawnAhead if drawn_ahead else _Copied)(tasks, meta_batch, device)
        self._descend, self._optimizer, self._graphs = descend, optimizer, graphs
        # what takes the place of each group's rate in the graph; None where it is a tensor already, or stays
        self._rates = [
            torch.tensor(group["lr"], dtype=torch.float32, device=device)
            if scheduled and not isinstance(group["lr"], Tensor)
            else None
            for group in optimizer.param_groups
        ]
        self._warm_up, self._replay, self._captured = WARM_UP, None, []
        _counters_to_device(optimizer)

    def __call__(self, step: int) -> Outcome:
        """The meta-step on the tasks of this step."""
        self._source.load(step)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            if rate is not None:
                rate.fill_(group["lr"])
        if self._warm_up:
            self._warm_up -= 1
            with self._graphs.warming_up():
                return self._step()
        if self._replay is None:
            self._captured = self._settings()
            self._replay = self._graphs.capture(self._step)
        self._check_unchanged()
        loss, accuracies = self._replay()
        # the next replay writes in the same place
        return loss.clone(), None if accuracies is None else accuracies.clone()

    def _step(self) -> Outcome:
        with self._capturable():
            return self._descend(self._source.batch())

    @contextlib.contextmanager
    def _capturable(self) -> Iterator[None]:
        """The optimizer as a graph needs it; outside, and in checkpoints, it is what it was."""
        groups = self._optimizer.param_groups
        before = [dict(group) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            if "capturable" in group:
                group["capturable"] = True
            if rate is not None:
                group["lr"] = rate
                if type(self._optimizer) is torch.optim.SGD:
                    # its other implementations read the rate
                    group["fused"], group["foreach"] = True, False
        try:
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update({name: value for name, value in settings.items() if name != "params"})

    def _settings(self) -> list[dict]:
        """What the graph holds of the optimizer's settings."""
        return [
            {
                name: id(value) if isinstance(value, Tensor) else value
                for name, value in group.items()
                if name != "params" and not (name == "lr" and rate is not None)
            }
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True)
        ]

    def _check_unchanged(self) -> None:
        now = self._settings()
        if now != self._captured:
            pairs = [(a, b) for a, b in zip(self._captured, now, strict=True) if a != b]
            moved = next(name for a, b in pairs for name in b if a.get(name) != b[name])
            raise ValueError(f"scheduler must move lr alone with cuda_graph=True, got one that moves {moved}")


class CudaGraphs:
    """What a graph takes of CUDA, and all of it: a stream beside the others, and a capture on it."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"cuda_graph must be False for an algorithm on {device}: only CUDA has graphs, got True")
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """On the stream of the capture, between what was asked for before and what will be after."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                yield
            current.wait_stream(self._stream)

    def capture(self, function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """What runs the kernels of `function` once more; it does not run now."""
        graph = torch.cuda.CUDAGraph()
        host = torch.get_rng_state()
        with torch.cuda.device(self._device):
            try:
                # the stream by itself too: a capture that fails does not give the one before back
                with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream):
                    outcome = function()
            except RuntimeError as error:
                raise RuntimeError(
                    f"the meta-step cannot be captured, train it with cuda_graph=False: {_cause(error)}"
                ) from error
        if not torch.equal(host, torch.get_rng_state()):
            raise RuntimeError(
                "the meta-step cannot be captured, train it with cuda_graph=False: it draws random numbers on the CPU, "
                "which every replay would repeat"
            )

        def replay() -> Outcome:
            with torch.cuda.device(self._device):
                graph.replay()
            return outcome

        return replay


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """ValueError where its step reads numbers on the host."""
    if type(optimizer) is not torch.optim.SGD and not all("capturable" in group for group in optimizer.param_groups):
        raise ValueError(
            "optimizer must be one of torch's with the argument capturable, or SGD, with cuda_graph=True, got "
            f"{type(optimizer).__name__}"
        )


class _DrawnAhead:
    """Tasks that the graph samples itself, from what was drawn for many steps."""

    def __init__(self, tasks: Any, meta_batch: int, device: torch.device):
        self._tasks, self._meta_batch = tasks, meta_batch
        self._steps = max(1, _TASKS_AHEAD // meta_batch)
        # the first step of what is there, and the one that the graph will take next
        self._first = self._next = -1
        self._drawn: tuple[Tensor, ...] = ()  # [steps, T, ...] each
        self._place = torch.zeros(1, dtype=torch.int64, device=device)  # of the next step among them

    def load(self, step: int) -> None:
        if self._first < 0 or not self._first <= step < self._first + self._steps:
            drawn = self._tasks.drawn(self._meta_batch, step, self._steps)
            if self._drawn:
                for held, new in zip(self._drawn, drawn, strict=True):
                    held.copy_(new)
            else:
                self._drawn = drawn
            self._first, self._next = step, -1
        if step != self._next:
            self._place.fill_(step - self._first)
        self._next = step + 1

    def batch(self) -> TaskBatch:
        batch = self._tasks.assembled(*(drawn.index_select(0, self._place).squeeze(0) for drawn in self._drawn))
        self._place += 1
        return batch


class _Copied:
    """Tasks that are sampled outside, in buffers that stay where they are."""

    def __init__(self, tasks: Any, meta_batch: int, device: torch.device):
        self._tasks, self._meta_batch, self._device = tasks, meta_batch, device
        self._batch: TaskBatch | None = None

    def load(self, step: int) -> None:
        batch = self._tasks.sample(self._meta_batch, step=step)
        for name, rows in (("support", batch.support), ("query", batch.query)):
            if rows.is_ragged:
                raise ValueError(
                    f"tasks must be rectangles [T, N, ...] with cuda_graph=True, got ragged {name} rows at step {step}"
                )
        if self._batch is None:
            # a copy, as a data set may give the same memory again
            self._batch = TaskBatch(*(self._own(rows) for rows in (batch.support, batch.query)))
            return
        for name in ("support", "query"):
            for field in fields(TaskRows):
                self._copy(f"{name}.{field.name}", getattr(getattr(self._batch, name), field.name), batch, step)

    def batch(self) -> TaskBatch:
        return self._batch

    def _own(self, rows: TaskRows) -> TaskRows:
        own = lambda t: None if t is None else t.detach().to(self._device, copy=True)  # noqa: E731
        return TaskRows(own(rows.x), own(rows.y), None, own(rows.class_mask))

    def _copy(self, name: str, held: Tensor | None, batch: TaskBatch, step: int) -> None:
        rows, field = name.split(".")
        new = getattr(getattr(batch, rows), field)
        if _kind(held) != _kind(new):
            raise ValueError(
                f"tasks must have the same shapes at every step with cuda_graph=True, got {name} {_kind(new)} at step "
                f"{step} after {_kind(held)}"
            )
        if held is not None:
            held.copy_(new)


def _kind(value: Tensor | None) -> str:
    return "absent" if value is None else f"{list(value.shape)} {value.dtype}"


def _lie_on(tasks: Any, device: torch.device) -> bool:
    # "cuda" is another name of "cuda:0", or of whichever is the current one
    return torch.empty(0, device=tasks.device).device == device


def _counters_to_device(optimizer: torch.optim.Optimizer) -> None:
    """Counters of steps that were kept on the host: a checkpoint of a run without a graph has them there."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() == 0 and value.device != parameter.device:
                state[name] = value.to(parameter.device)


def _cause(error: BaseException) -> str:
    """The first of a chain of errors, in one line: ending a capture that has failed fails too."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
