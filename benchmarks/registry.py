"""What is timed: workloads, each with the providers that do the same work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import mtml_fast as mf
from mtml_fast.ops import OPERATORS, sgd_step
from mtml_fast.ops.sgd_step.reference import sgd_step as eager_sgd_step


@dataclass(frozen=True)
class Workload:
    """Providers of one result; each call returns the tensors that the correctness gate compares.

    The first provider is ours.
    """

    op: str
    case: str
    mode: str  # "forward" or "full", forward and backward
    providers: dict[str, Callable[[], Sequence[Tensor]]]
    served_by: str


def workloads() -> list[Workload]:
    return [*_sgd_steps(), *_meta_steps()]


def _sgd_steps():
    widths = (784, 256, 128, 64, 64, 5)
    shapes = [s for i, o in itertools.pairwise(widths) for s in ((o, i), (o,))]
    for tasks in (1, 32):
        for options in ({}, {"momentum": 0.9, "weight_decay": 1e-4, "clip": 10.0}):
            generator = torch.Generator().manual_seed(0)
            draw = lambda shape, t=tasks, g=generator: torch.randn(t, *shape, generator=g)  # noqa: E731
            params, grads = ([draw(shape).requires_grad_() for shape in shapes] for _ in range(2))
            cotangents = [draw(shape) for shape in shapes]
            buffers = [draw(shape) for shape in shapes] if options else None
            lr = torch.tensor(0.1)

            def ours(params=params, grads=grads, lr=lr, buffers=buffers, options=options):
                return sgd_step(params, grads, lr=lr, momentum_buffers=buffers, **options)[0]

            def eager(params=params, grads=grads, lr=lr, buffers=buffers, options=options):
                momentum, decay, clip = (
                    options.get(k, d) for k, d in (("momentum", 0.0), ("weight_decay", 0.0), ("clip", None))
                )
                return eager_sgd_step(params, grads, [lr], buffers or [], momentum, decay, clip)[: len(params)]

            def full(step, params=params, grads=grads, cotangents=cotangents):
                results = step()
                return torch.autograd.grad(results, [*params, *grads], cotangents)

            case = f"T={tasks} 784-256-128-64-64-5" + (" momentum decay clip" if options else "")
            served = OPERATORS["sgd_step"].served_by("cpu")
            yield Workload("sgd_step", case, "forward", {"mtml_fast": _no_grad(ours), "eager": _no_grad(eager)}, served)
            modes = {"mtml_fast": lambda f=full, s=ours: f(s), "eager": lambda f=full, s=eager: f(s)}
            yield Workload("sgd_step", case, "full", modes, served)


def _meta_steps():
    for steps in (1, 5):
        torch.manual_seed(0)
        model = mf.nn.mlp(1, (40, 40), 1)
        params = list(model.parameters())
        batch = mf.data.Sinusoid().sample(25)
        maml = mf.MAML(model, lr=0.01, steps=steps, loss="mse")

        def ours(maml=maml, batch=batch, params=params):
            return torch.autograd.grad(maml(batch).loss, params)

        def torch_func(model=model, batch=batch, params=params, steps=steps):
            def loss(values, x, y):
                return (functional_call(model, values, (x,)) - y).square().mean()

            def task(values, sx, sy, qx, qy):
                for _ in range(steps):
                    grads = grad(loss)(values, sx, sy)
                    values = {name: p - 0.01 * grads[name] for name, p in values.items()}
                return loss(values, qx, qy)

            rows = (batch.support.x, batch.support.y, batch.query.x, batch.query.y)
            losses = vmap(task, in_dims=(None, 0, 0, 0, 0))(dict(model.named_parameters()), *rows)
            return torch.autograd.grad(losses.mean(), params)

        case = f"sinusoid 1-40-40-1 T=25 N=Q=10 K={steps}"
        served = OPERATORS["mlp_adapt"].served_by("cpu")
        yield Workload("mlp_adapt", case, "full", {"mtml_fast": ours, "torch.func": torch_func}, served)


def _no_grad(call):
    def without():
        with torch.no_grad():
            return call()

    return without
