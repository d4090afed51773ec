"""Libraries that loop over the tasks in Python: higher, TorchOpt, learn2learn, where they can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import Settings, Unavailable
from mtml_fast.cli.meta_step import MetaStep, own_copy
from mtml_fast.cli.timing import Provider

# (model, x, y) -> one task's mean loss
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def higher(step: MetaStep, settings: Settings) -> Provider:
    library = _import("higher")
    if step.first_order:
        raise Unavailable("its first-order mode keeps no path to the initial weights")
    model = own_copy(step)
    optimizer = torch.optim.SGD(model.parameters(), step.lr)

    def query_loss(loss: Loss, xs, ys, xq, yq) -> Tensor:
        with library.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast_model, inner):
            for _ in range(step.steps):
                inner.step(loss(fast_model, xs, ys))
            return loss(fast_model, xq, yq)

    return Provider(_loop(step, model, query_loss), _version("higher"))


def torchopt(step: MetaStep, settings: Settings) -> Provider:
    library = _import("torchopt")
    if step.first_order:
        raise Unavailable("its MetaSGD is always second order")
    model = own_copy(step)
    inner = library.MetaSGD(model, lr=step.lr)
    start = library.extract_state_dict(model, by="reference"), library.extract_state_dict(inner, by="reference")

    def query_loss(loss: Loss, xs, ys, xq, yq) -> Tensor:
        for _ in range(step.steps):
            inner.step(loss(model, xs, ys))
        result = loss(model, xq, yq)
        library.recover_state_dict(model, start[0])
        library.recover_state_dict(inner, start[1])
        return result

    return Provider(_loop(step, model, query_loss), _version("torchopt"))


def learn2learn(step: MetaStep, settings: Settings) -> Provider:
    # the algorithm alone: the package's top imports data sets and simulators
    library = _import("learn2learn.algorithms.maml")
    model = own_copy(step)
    algorithm = library.MAML(model, lr=step.lr, first_order=step.first_order)

    def query_loss(loss: Loss, xs, ys, xq, yq) -> Tensor:
        learner = algorithm.clone()
        for _ in range(step.steps):
            learner.adapt(loss(learner, xs, ys))
        return loss(learner, xq, yq)

    return Provider(_loop(step, model, query_loss), _version("learn2learn"))


def _loop(step: MetaStep, model: nn.Module, query_loss: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
    """Task after task, and backward() after each, which frees its graph."""
    support, query = step.batch.support, step.batch.query
    params, tasks = list(model.parameters()), support.num_tasks
    features = [rows.x for rows in (support, query)] if step.feature_gradients else []

    def loss_of(mask: Tensor | None) -> Loss:
        def loss(network, x, y):
            outputs = network(x)
            if mask is not None:
                outputs = outputs.masked_fill(~mask, -1e30)
            return {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}[
                step.loss
            ](outputs, y)

        return loss

    def call() -> list[Tensor]:
        for p in (*params, *features):
            p.grad = None
        total = torch.zeros(())
        for t in range(tasks):
            loss = loss_of(None if support.class_mask is None else support.class_mask[t])
            task_loss = query_loss(loss, *support.task(t), *query.task(t)) / tasks
            task_loss.backward()
            total += task_loss.detach()
        return [total, *(p.grad for p in (*params, *features))]

    return call


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"cannot be imported ({error})") from None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # files put beside the packages by hand
        return ""
