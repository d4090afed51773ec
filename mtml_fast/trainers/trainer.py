"""Trainer: the outer loop around any meta-learning algorithm, with validation, checkpoints and exact resume."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mtml_fast.files import save_tensors
from mtml_fast.multitask import Balance, balance_of
from mtml_fast.ops._check import readable
from mtml_fast.tasks import TaskBatch, TaskRows
from mtml_fast.trainers import _names
from mtml_fast.trainers.arguments import check_counts, check_rates, make_scheduler
from mtml_fast.trainers.checkpoint import Checkpoints, check_state, pack, random_state, set_random_state
from mtml_fast.trainers.cuda_graph import CudaGraphs, GraphedStep, Outcome, check_optimizer
from mtml_fast.trainers.evaluation import VALIDATION_STEP, Evaluation, check_tasks, evaluate
from mtml_fast.trainers.identity import identity
from mtml_fast.trainers.interrupts import Interrupts
from mtml_fast.trainers.progress import Progress
from mtml_fast.trainers.report import save_curves, save_history

__all__ = ["Trainer"]


class Trainer:
    """Meta-trains an algorithm on the tasks of a data set.

    The loop, with `step` counted from 0 and the tasks a function of (seed, step) alone:

        while step < steps:
            batch = tasks.sample(meta_batch, step)
            loss = algorithm(batch).loss                    # the mean over tasks of the query loss
            stop with an error if loss is not finite, before any weight changes
            loss.backward() (or balance.backward(task_losses)); clip; optimizer.step(); scheduler.step(); step += 1
            every validate_every steps: validate, note the best, stop after `patience` validations without a better one
            every log_every steps: a row of history
            every checkpoint_every steps: a checkpoint

    A run that was killed, stopped or interrupted and then resumed ends with the same bits as one that was not: weights,
    optimizer, best, history (all but its clock); on the same machine, versions and thread count. SIGINT and SIGTERM
    finish the step, save, and then raise KeyboardInterrupt or SystemExit(143); a second signal acts at once.

    Args:
        algorithm: a module with `algorithm(batch, steps=None) -> result` (`loss`, `task_losses` [T], `metrics`: name ->
            [T]) and `adapt(support, steps=None)`; `mf.MAML` and all others of this library. It is evaluated under
            `torch.no_grad()`.
        tasks: a data set with `sample(num_tasks, step, first_task=0) -> TaskBatch`.
        meta_lr: outer learning rate.
        meta_batch: tasks a meta-step.
        optimizer: a name ("adam", ...), a callable `(params, lr) -> torch optimizer`, or a torch optimizer, which then
            brings its own rate.
        scheduler: a callable `(optimizer) -> torch scheduler`, or a torch scheduler; stepped once a meta-step.
        clip_grad: the largest norm of the meta-gradient.
        balance: how the tasks' losses become one step, instead of by their mean: a name ("pcgrad", "mgda", "gls", ...)
            or a `mtml_fast.multitask.Balance`, of those that remember nothing of a task, as each meta-batch holds other
            tasks. The losses are given to it undivided. Surgery needs the gradient of each task: T backward passes,
            batched where torch can; MAML's store="all" spares each of them its forward pass.
        validation: a data set; every `validate_every` meta-steps, `validation_tasks` fixed tasks of it are adapted by
            `validation_steps` inner steps (None: the algorithm's own number).
        monitor: what is best: "loss" (lower is better) or the name of a metric (higher is better); None takes
            "accuracy" where there is one, else "loss".
        patience: stop early after this many validations without a better one.
        checkpoint: a folder, see `mtml_fast/trainers/checkpoint.py` for what it holds; None saves nothing.
        cuda_graph: capture the meta-step in a CUDA graph and replay it, tasks included where they can be sampled on the
            device: see `mtml_fast/trainers/cuda_graph.py`. The run is the same. For an algorithm on a CUDA device that
            reads no values on the host, rectangular tasks, no `balance`.
        resume: "auto" goes on from the folder's checkpoint if there is one; True insists on one, False on none.

    Attributes:
        step: meta-steps done.  seconds: the time that they took.  history: list of rows.
        best: `{"step", "value", "weights"}` or None.

    Raises:
        ValueError, TypeError: naming the argument; a checkpoint of another run is refused naming what differs (data,
            outer loop, validation, and what the modules' `extra_repr` shows: an algorithm of your own should show its
            settings).
        FloatingPointError: the loss is not finite; names the step. Weights and the last checkpoint are as before it.
        OSError: naming the file that cannot be written; BlockingIOError where another trainer is using the folder.

    Example:
        >>> import mtml_fast as mf
        >>> maml = mf.MAML(mf.nn.mlp(1, (16,), 1), lr=0.01)
        >>> trainer = mf.Trainer(maml, mf.data.Sinusoid(shots=5, seed=0), meta_batch=4, progress=False)
        >>> trainer.fit(20).step
        20
        >>> print(trainer.evaluate(mf.data.Sinusoid(shots=5, seed=1), num_tasks=50))
        loss ... +- ... over 50 tasks
    """

    def __init__(
        self,
        algorithm: nn.Module,
        tasks: Any,
        *,
        meta_lr: float = 1e-3,
        meta_batch: int = 32,
        optimizer: str | Callable | torch.optim.Optimizer = "adam",
        scheduler: Any = None,
        clip_grad: float | None = None,
        balance: str | Balance | None = None,
        validation: Any = None,
        validate_every: int = 1000,
        validation_tasks: int = 200,
        validation_steps: int | None = None,
        monitor: str | None = None,
        patience: int | None = None,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 1000,
        log_every: int = 100,
        progress: bool = True,
        cuda_graph: bool = False,
        resume: str | bool = "auto",
    ):
        if not isinstance(algorithm, nn.Module):
            raise TypeError(f"algorithm must be an nn.Module, got {type(algorithm).__name__}")
        check_tasks("tasks", tasks)
        if validation is not None:
            check_tasks("validation", validation)
        check_counts(
            meta_batch=meta_batch,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
            log_every=log_every,
            validation_tasks=validation_tasks,
            **({} if patience is None else {"patience": patience}),
        )
        check_rates(meta_lr=meta_lr, **({} if clip_grad is None else {"clip_grad": clip_grad}))
        if validation_steps is not None and (type(validation_steps) is not int or validation_steps < 0):
            raise ValueError(f"validation_steps must be an int >= 0 or None, got {validation_steps!r}")
        if monitor is not None and not isinstance(monitor, str):
            raise TypeError(f"monitor must be the name of a metric or None, got {type(monitor).__name__}")
        if patience is not None and validation is None:
            raise ValueError(f"patience needs validation tasks, got patience={patience} and validation=None")
        if not isinstance(cuda_graph, bool):
            raise TypeError(f"cuda_graph must be a bool, got {cuda_graph!r}")
        if cuda_graph and balance is not None:
            raise ValueError(f"balance must be None with cuda_graph=True, as it decides on the host, got {balance!r}")
        if resume not in ("auto", True, False):
            raise ValueError(f"resume must be 'auto', True or False, got {resume!r}")
        if resume is True and checkpoint is None:
            raise ValueError("resume=True needs a checkpoint folder, got checkpoint=None")

        self.balance = None if balance is None else balance_of(balance, meta_batch)
        if self.balance is not None and self.balance.keeps_tasks:
            raise ValueError(
                f"balance must not remember tasks, as every meta-batch holds others, got {type(self.balance).__name__}"
            )
        self.algorithm, self.tasks, self.validation = algorithm, tasks, validation
        self.meta_batch, self.clip_grad, self.patience = meta_batch, clip_grad, patience
        self.validate_every, self.validation_tasks = validate_every, validation_tasks
        self.validation_steps, self.monitor = validation_steps, monitor
        self.checkpoint_every, self.log_every, self.progress = checkpoint_every, log_every, progress
        self._parameters = [p for p in algorithm.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("algorithm must have parameters to train, got none that requires a gradient")
        self._device = self._parameters[0].device
        self.optimizer = _names.optimizer(optimizer, self._parameters, meta_lr)
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer must step once a gradient, without a closure, got LBFGS")
        self.scheduler = make_scheduler(scheduler, self.optimizer)
        self._graphs = self._graphed = None
        if cuda_graph:
            self._graphs = CudaGraphs(self._device)
            check_optimizer(self.optimizer)
        # before any of it moves
        self._run = identity(
            algorithm,
            tasks,
            self.optimizer,
            self.scheduler,
            meta_batch=meta_batch,
            meta_lr=None if isinstance(optimizer, torch.optim.Optimizer) else meta_lr,
            clip_grad=clip_grad,
            balance=None if self.balance is None else repr(self.balance),
            **_described_validation(validation, validation_tasks, validation_steps),
        )

        self.step = 0
        self.history: list[dict] = []
        self.best: dict | None = None
        self._without_better = 0
        self.seconds = 0.0
        # the run has its own stream of torch's random numbers: what is drawn elsewhere does not change it
        self._random = random_state(self._device)
        # losses and accuracies since the last row of history, left on their device until a row reads them
        self._losses: list[Tensor] = []
        self._accuracies: list[Tensor] = []
        self._saved_step = self._saved_best = None
        self._checkpoints = None if checkpoint is None else Checkpoints(checkpoint)
        if validation is not None and monitor not in (None, "loss"):
            # only a result tells which metrics there are
            self._evaluate_validation(2)
        if self._checkpoints is not None:
            self._resume(resume)

    def fit(self, steps: int, minutes: float | None = None) -> Trainer:
        """Train up to `steps` meta-steps in all (a resumed run goes on to the same total), or for `minutes`."""
        if type(steps) is not int or not 0 <= steps < VALIDATION_STEP:
            raise ValueError(f"steps must be an int in 0 .. 2^40 - 1, got {steps!r}")
        if minutes is not None and (not isinstance(minutes, int | float) or not minutes > 0):
            raise ValueError(f"minutes must be a number > 0, got {minutes!r}")
        outside = random_state(self._device)
        with Interrupts() as interrupts:
            set_random_state(self._random, self._device)
            try:
                if self.step < steps and not self.stopped_early:
                    with self._owned():
                        self._fit(steps, math.inf if minutes is None else 60 * minutes, interrupts)
            finally:
                self._random = random_state(self._device)
                set_random_state(outside, self._device)
        interrupts.raise_received()
        return self

    def evaluate(
        self,
        tasks: Any,
        num_tasks: int = 600,
        *,
        steps: int | None = None,
        meta_batch: int | None = None,
        metric: str | None = None,
    ) -> Evaluation:
        """The metric's mean and 95 % interval over `num_tasks` fixed tasks that training never sees, see `Evaluation`.

        Args:
            steps: inner steps, None for the algorithm's own number.
            meta_batch: tasks adapted at a time; up to rounding the result does not depend on it.
            metric: "loss" or the name of a metric, None for what the trainer monitors.
        """
        meta_batch = self.meta_batch if meta_batch is None else meta_batch
        metric = self.monitor if metric is None else metric
        return evaluate(self.algorithm, tasks, num_tasks, steps=steps, meta_batch=meta_batch, metric=metric)

    def adapt(self, support: TaskRows, steps: int | None = None) -> Any:
        """The algorithm adapted to new tasks, see `mf.adapt`."""
        return self.algorithm.adapt(support, steps=steps)

    def load_best(self) -> Trainer:
        """Give the algorithm the weights of the best validation so far."""
        if self.best is None:
            raise ValueError("load_best needs a validation with a finite result, and there was none yet")
        self.algorithm.load_state_dict(self.best["weights"])
        return self

    @property
    def stopped_early(self) -> bool:
        return self.patience is not None and self._without_better >= self.patience

    def _fit(self, steps: int, seconds: float, interrupts: Interrupts) -> None:
        if self._saved_step is None:
            # shows before any work that validation runs and that the folder takes a checkpoint
            if self.validation is not None:
                self._evaluate_validation(2)
            self._save()
        if self._graphs is not None:
            # anew in each fit: between two of them anybody may have changed what a graph holds
            self._graphed = GraphedStep(
                self._descend,
                self.tasks,
                self.meta_batch,
                self.optimizer,
                self.scheduler is not None,
                self._device,
                self._graphs,
            )
        progress = Progress(self.step, steps, self.progress)
        start = time.perf_counter() - self.seconds
        row_step, row_time, deadline = self.step, start + self.seconds, start + self.seconds + seconds
        now = row_time
        try:
            while self.step < steps and now < deadline and not interrupts.received and not self.stopped_early:
                self._train_step()
                validated = None
                if self.validation is not None and self.step % self.validate_every == 0:
                    validated = self._validate()
                now = time.perf_counter()
                self.seconds = now - start
                if validated is not None or self.step % self.log_every == 0 or self.step == steps:
                    rate = (self.step - row_step) * self.meta_batch / (now - row_time)
                    self._add_row(validated, rate)
                    row_step, row_time = self.step, now
                if self._checkpoints is not None and self.step % self.checkpoint_every == 0:
                    self._save()
                progress.step(self.step, now, self._summary)
        finally:
            self._graphed = None
            progress.close(self.step, self._summary)
        if self._checkpoints is not None:
            self._save()
            if self.history and find_spec("matplotlib") is not None:
                save_curves(self._checkpoints.folder / "curves.png", self.history, self.monitor)

    def _train_step(self) -> None:
        if self._graphed is not None:
            loss, accuracies = self._graphed(self.step)
        else:
            batch = self.tasks.sample(self.meta_batch, step=self.step)
            if batch.support.x.device != self._device:
                batch = batch.to(self._device)
            loss, accuracies = self._descend(batch)
        self._losses.append(loss)
        if accuracies is not None:
            self._accuracies.append(accuracies)
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1

    def _descend(self, batch: TaskBatch) -> Outcome:
        """One step of the optimizer."""
        result = self.algorithm(batch)
        loss, accuracies = result.loss.detach(), result.metrics.get("accuracy")
        # on a device reading a loss would stop the stream, so there rows and saves look
        if self._graphed is None and readable(loss):
            self._require_finite(loss.item(), self.step)
        # the optimizer's zero_grad takes 0.2 ms for the same
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self.balance is None:
            result.loss.backward()
        else:
            self.balance.backward(result.task_losses, self._parameters)
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.clip_grad)
        self.optimizer.step()
        return loss, None if accuracies is None else accuracies.detach()

    def _validate(self) -> float:
        result = self._evaluate_validation(self.validation_tasks)
        self.monitor = result.metric
        if self._is_better(result.mean):
            weights = copy.deepcopy(dict(self.algorithm.state_dict()))
            self.best = {"step": self.step, "value": result.mean, "weights": weights}
            self._without_better = 0
        else:
            self._without_better += 1
        return result.mean

    def _is_better(self, value: float) -> bool:
        # what is not finite is worse than anything
        if not math.isfinite(value) or self.best is None or not math.isfinite(self.best["value"]):
            return math.isfinite(value)
        return value < self.best["value"] if self.monitor == "loss" else value > self.best["value"]

    def _evaluate_validation(self, num_tasks: int) -> Evaluation:
        return evaluate(
            self.algorithm,
            self.validation,
            num_tasks,
            steps=self.validation_steps,
            meta_batch=self.meta_batch,
            metric=self.monitor,
            episodes=VALIDATION_STEP,
        )

    def _add_row(self, validated: float | None, rate: float) -> None:
        losses = torch.stack(self._losses).double().tolist()
        for i, loss in enumerate(losses):
            self._require_finite(loss, self.step - len(losses) + i)
        accuracies = [accuracy.double().mean() for accuracy in self._accuracies]
        self.history.append(
            {
                "step": self.step,
                "train_loss": sum(losses) / len(losses),
                "train_accuracy": torch.stack(accuracies).mean().item() if accuracies else None,
                "validation": validated,
                "tasks_per_second": round(rate, 1),
                "seconds": round(self.seconds, 3),
            }
        )
        self._losses, self._accuracies = [], []

    def _summary(self) -> str:
        if self._losses:
            loss = torch.stack(self._losses).mean().item()
            accuracy = torch.cat(self._accuracies).mean().item() if self._accuracies else None
        elif self.history:
            loss, accuracy = self.history[-1]["train_loss"], self.history[-1]["train_accuracy"]
        else:
            return ""
        parts = [f"loss {loss:.4f}"]
        if accuracy is not None:
            parts.append(f"accuracy {accuracy:.3f}")
        if self.best is not None:
            parts.append(f"best validation {self.best['value']:.4f}")
        if self.seconds > 0:
            parts.append(f"{self.step * self.meta_batch / self.seconds:,.0f} tasks/s")
        return "  ".join(parts)

    def _require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            last = self._checkpoints.paths()[-1].name if self._checkpoints is not None else "none"
            raise FloatingPointError(
                f"the training loss is {loss} at step {step} (a lower lr or meta_lr may help); last checkpoint: {last}"
            )

    def _state(self) -> dict:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "algorithm": self.algorithm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "random": random_state(self._device),
            "monitor": self.monitor,
            "best": self.best,
            "without_better": self._without_better,
            "history": self.history,
            "losses": self._losses,
            "accuracies": self._accuracies,
        }

    def _save(self) -> None:
        if self._checkpoints is None or self._saved_step == self.step:
            return
        for name, value in self.algorithm.named_parameters():
            if not value.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite after step {self.step - 1}: not saved, the last is kept"
                )
        self._checkpoints.save(self.step, self._state(), self._run)
        self._saved_step = self.step
        self._save_copies()

    def _save_copies(self) -> None:
        """best.safetensors and history.csv, as the checkpoint just written or read has them."""
        folder = self._checkpoints.folder
        if self.best is not None and self._saved_best != self.best["step"]:
            tensors, tree = pack(self.best["weights"])
            about = {"step": self.best["step"], "value": self.best["value"], "monitor": self.monitor}
            save_tensors(folder / "best.safetensors", tensors, {**about, "state": tree})
            self._saved_best = self.best["step"]
        save_history(folder / "history.csv", self.history)

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        """The checkpoint folder to itself, and as this trainer left it."""
        if self._checkpoints is None:
            yield
            return
        with self._checkpoints.owned():
            paths = self._checkpoints.paths()
            if paths and int(paths[-1].stem.removeprefix("step-")) != self._saved_step:
                raise FileExistsError(
                    f"checkpoint folder {self._checkpoints.folder} was written by another trainer meanwhile: "
                    f"make a new Trainer, which goes on from its {paths[-1].name}"
                )
            yield

    def _resume(self, resume: str | bool) -> None:
        checkpoints, folder = self._checkpoints, self._checkpoints.folder
        if resume is True and not checkpoints.paths():
            raise FileNotFoundError(f"resume=True needs a checkpoint, and folder {folder} holds none")
        if resume is False and checkpoints.paths():
            raise FileExistsError(f"checkpoint folder {folder} holds a run: choose another, or resume it")
        with checkpoints.owned():
            if checkpoints.paths():
                checkpoints.load(self._run, self._use)
                self._saved_step = self.step
                self._save_copies()

    def _use(self, state: dict) -> None:
        """Go on from a checkpoint's state; ValueError where it is none that this trainer could have saved."""
        check_state(state, self.algorithm)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"its optimizer or scheduler does not fit: {error!r}") from None
        self.algorithm.load_state_dict(state["algorithm"])
        self.step, self.seconds, self._random = state["step"], state["seconds"], state["random"]
        self.monitor, self.best, self._without_better = state["monitor"], state["best"], state["without_better"]
        self.history = state["history"]
        # a file's tensors are on the CPU, and those of the steps to come will join these
        self._losses = [loss.to(self._device) for loss in state["losses"]]
        self._accuracies = [accuracy.to(self._device) for accuracy in state["accuracies"]]


def _described_validation(tasks: Any, num_tasks: int, steps: int | None) -> dict:
    """What the best value was measured on: another would not compare with it."""
    if tasks is None:
        return {"validation": None}
    return {
        "validation": str(getattr(tasks, "fingerprint", type(tasks).__name__)),
        "validation_tasks": num_tasks,
        "validation_steps": steps,
    }
