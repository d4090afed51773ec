"""What is timed: workloads, each with the providers that do the same work."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import mtml_fast as mf
from benchmarks.peers import HEADS_PEERS, INNER_PEERS, SURGERY_PEERS, Build
from benchmarks.peers.heads import Heads, bmm
from benchmarks.peers.surgery import Gradients, loop, matmul
from mtml_fast.cli import meta_step
from mtml_fast.cli.meta_step import MetaStep
from mtml_fast.cli.timing import Provider
from mtml_fast.ops import gradient_combine, gradient_gram, heads_loss, sgd_step
from mtml_fast.ops.sgd_step.reference import sgd_step as eager_sgd_step
from mtml_fast.tasks import TaskBatch, TaskRows

SUITES = ("inner", "heads", "surgery", "sgd_step")


@dataclass(frozen=True)
class Workload:
    """Providers of one result, and what it should be."""

    suite: str
    op: str
    case: str
    mode: str  # "forward", or "full": forward and backward
    ours: dict[str, Build]  # the first is what factors are taken against
    peers: dict[str, Build]
    exact: Callable[[], Sequence[Tensor]]  # in float64
    eager: Callable[[], Sequence[Tensor]]  # its error is the measure of everybody's
    operations: int | None = None
    floor: Callable[[], object] | None = None  # who takes the least time, where memory is what limits


def workloads(suite: str = "all") -> list[Workload]:
    chosen = SUITES if suite == "all" else (suite,)
    made = {"inner": _inner, "heads": _heads, "surgery": _surgery, "sgd_step": _sgd_steps}
    return [w for name in chosen for w in made[name]()]


# the inner loop: forward, and backward to all parameters


def _inner():
    for steps in (1, 5):
        step = sinusoid(steps)
        yield inner_of(f"sinusoid 1-40-40-1 T=25 N=Q=10 K={steps}", step)
        yield inner_of(f"sinusoid 1-40-40-1 T=25 N=Q=10 K={steps} first order", replace(step, first_order=True))
    widths = [784, 256, 128, 64, 64, 5]
    for norm, query, steps in itertools.product((False, True), (5, 75), (1, 5)):
        step = MetaStep(meta_step.model(widths, norm), drawings(32, 5, query), 0.4, steps, "cross_entropy")
        case = f"omniglot 784-256-128-64-64-5 T=32 N=5 Q={query} K={steps}" + " batch norm" * norm
        yield inner_of(case, step)
        if (norm, query, steps) == (False, 5, 5):
            yield inner_of(f"{case} first order", replace(step, first_order=True))
    for steps in (5, 10):
        step = MetaStep.random([512, 5], 32, 25, 75, lr=0.01, steps=steps)
        yield inner_of(f"head 512-5 T=32 N=25 Q=75 K={steps}", step)
        yield inner_of(f"head 512-5 T=32 N=25 Q=75 K={steps} feature gradients", _with_feature_gradients(step))
    yield inner_of("ragged 64-64-20 T=32 ways 2-20 shots 1-5 K=5", _ragged(5))


def inner_of(case: str, step: MetaStep) -> Workload:
    ours = {"mtml_fast": lambda _: Provider(meta_step.maml(step))}
    # the gradient of features concerns who computes them: the operator alone
    if step.feature_gradients:
        ours = {}
    ours["mlp_adapt"] = lambda _: Provider(meta_step.operator(step))
    return Workload(
        "inner",
        "mlp_adapt",
        case,
        "full",
        ours,
        {name: lambda settings, build=build: build(step, settings) for name, build in INNER_PEERS.items()},
        lambda: meta_step.exact(step),
        meta_step.torch_func(step),
        meta_step.operations(step),
    )


def sinusoid(steps: int) -> MetaStep:
    return MetaStep(meta_step.model([1, 40, 40, 1]), mf.data.Sinusoid().sample(25), 0.01, steps, "mse")


def drawings(tasks: int, ways: int, query: int) -> TaskBatch:
    """Rows like small black drawings on white: each class a tenth of the places, each row with a few changed."""
    draws = torch.Generator().manual_seed(0)
    classes = (torch.rand(tasks, ways, 784, generator=draws) < 0.1).float()

    def rows(count: int) -> TaskRows:
        y = (torch.arange(count) % ways).repeat(tasks, 1)
        x = classes[:, y[0]]
        changed = torch.rand(x.shape, generator=draws) < 0.02
        return TaskRows(torch.where(changed, 1 - x, x), y)

    return TaskBatch(rows(ways), rows(query))


def _with_feature_gradients(step: MetaStep) -> MetaStep:
    support, query = (
        replace(rows, x=rows.x.clone().requires_grad_()) for rows in (step.batch.support, step.batch.query)
    )
    return replace(step, batch=TaskBatch(support, query), feature_gradients=True)


def _ragged(steps: int) -> MetaStep:
    """Tasks of 2 to 20 ways and 1 to 5 shots, with 5 query rows a way."""
    draws = torch.Generator().manual_seed(0)
    ways = torch.randint(2, 21, (32,), generator=draws)
    shots = torch.randint(1, 6, (32,), generator=draws)
    mask = torch.arange(20) < ways[:, None]

    def rows(per_way: Tensor) -> TaskRows:
        counts = ways * per_way
        y = torch.cat([torch.arange(n) % w for n, w in zip(counts.tolist(), ways.tolist(), strict=True)])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return TaskRows(torch.randn(len(y), 64, generator=draws), y, offsets, mask)

    batch = TaskBatch(rows(shots), rows(torch.full((32,), 5)))
    return MetaStep(meta_step.model([64, 64, 20]), batch, 0.1, steps, "cross_entropy")


# per-task heads: losses, and their gradients for rows and heads


def _heads():
    for tasks in (10, 100, 1000):
        for unsorted in (False, True):
            yield heads_of(tasks, 32, 5, unsorted)
    for outputs in (1, 5, 100, 1000):
        yield heads_of(100, None, outputs, False)


def heads_of(
    tasks: int,
    hidden: int | None,
    outputs: int,
    unsorted: bool,
    rows: int = 4096,
    width: int = 64,
    device: str = "cpu",
) -> Workload:
    draws = torch.Generator().manual_seed(0)
    task_index = torch.randint(0, tasks, (rows,), generator=draws)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(task_index, minlength=tasks).cumsum(0)])
    draw = lambda *shape: torch.randn(shape, generator=draws) / shape[-1] ** 0.5  # noqa: E731
    x, y = torch.randn(rows, width, generator=draws), torch.randint(0, max(outputs, 2), (rows,), generator=draws)
    parameters = [draw(tasks, outputs, hidden or width), draw(tasks, outputs)]
    parameters += [draw(tasks, hidden, width), draw(tasks, hidden)] if hidden else []

    out_offsets = torch.arange(tasks + 1, device=device) * outputs

    def problem(dtype) -> Heads:
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, *parameters)]
        leaves += [None] * (5 - len(leaves))
        labels = y.to(device) if outputs > 1 else y.to(device, dtype)
        return Heads(leaves[0], labels, offsets.to(device), task_index.to(device) if unsorted else None, *leaves[1:])

    float32 = problem(torch.float32)

    def ours():
        p = float32
        return heads_loss(
            p.x,
            p.y,
            p.offsets if p.task_index is None else None,
            p.weight.flatten(0, 1),
            p.bias.flatten(),
            out_offsets,
            hidden_weight=p.hidden_weight,
            hidden_bias=p.hidden_bias,
            task_index=p.task_index,
            loss="cross_entropy" if outputs > 1 else "bce",
        )

    inner = hidden or 0
    operations = 6 * rows * (width * inner + (hidden or width) * outputs)
    return Workload(
        "heads",
        "heads_loss",
        f"T={tasks} {width}-{f'{hidden}-' if hidden else ''}{outputs} R={rows}" + " unsorted" * unsorted,
        "full",
        {"mtml_fast": lambda _: Provider(float32.gradients(ours))},
        {name: lambda settings, build=build: build(float32, settings) for name, build in HEADS_PEERS.items()},
        lambda: bmm(problem(torch.float64), None).call(),
        bmm(float32, None).call,
        operations,
    )


# gradient surgery: from the gradients of T tasks to the one that a step follows


def _surgery():
    million, less = (600, 640, 640, 320), (128, 512, 384, 96)
    for tasks, widths in ((3, million), (10, million), (40, less)):
        for method in ("PCGrad", "UPGrad", "MGDA"):
            yield surgery_of(tasks, widths, method)


def surgery_of(tasks: int, widths: tuple[int, ...], method: str, device: str = "cpu") -> Workload:
    # drawn when they are asked for, and kept for one workload at a time
    drawn = lambda: _drawn_gradients(tasks, widths, device)  # noqa: E731
    float32 = lambda: Gradients(drawn(), method)  # noqa: E731
    float64 = lambda: Gradients([leaf.double() for leaf in drawn()], method)  # noqa: E731

    def ours(_) -> Provider:
        problem = float32()
        return Provider(
            lambda: gradient_combine(problem.leaves, problem.weights(gradient_gram(problem.leaves)).float())
        )

    size = sum((i + 1) * o for i, o in itertools.pairwise(widths))
    # for the others the weights are ours: tests hold them against the methods' optimality conditions
    exact = loop if method == "PCGrad" else matmul
    peers = {name: build for name, build in SURGERY_PEERS.items() if name != "loop" or method == "PCGrad"}
    return Workload(
        "surgery",
        "gradient_gram",
        f"{method} T={tasks} P={size:,}",
        "forward",
        {"mtml_fast": ours},
        {name: lambda settings, build=build: build(float32(), settings) for name, build in peers.items()},
        lambda: exact(float64(), None).call(),
        lambda: matmul(float32(), None).call(),
        # once for the Gram matrix, once for the sum
        floor=lambda: [leaf.sum() for _ in range(2) for leaf in float32().leaves],
    )


@functools.lru_cache(maxsize=1)
def _drawn_gradients(tasks: int, widths: tuple[int, ...], device: str) -> list[Tensor]:
    """Of an MLP's parameters. Half of the pairs of tasks agree, half conflict; lengths differ threefold."""
    draws = torch.Generator().manual_seed(0)
    lengths = 0.5 + torch.rand(tasks, generator=draws)
    signs = 1 - 2 * (torch.arange(tasks) % 2)

    def leaf(*shape: int) -> Tensor:
        own, common = torch.randn(tasks, *shape, generator=draws), torch.randn(shape, generator=draws)
        each = (tasks, *[1] * len(shape))
        return (lengths.view(each) * (own + 0.5 * signs.view(each) * common)).to(device)

    return [leaf(*shape) for i, o in itertools.pairwise(widths) for shape in ((o, i), (o,))]


# one step on a whole parameter tree


def _sgd_steps():
    widths = (784, 256, 128, 64, 64, 5)
    shapes = [s for i, o in itertools.pairwise(widths) for s in ((o, i), (o,))]
    for tasks in (1, 32):
        for options in ({}, {"momentum": 0.9, "weight_decay": 1e-4, "clip": 10.0}):
            case = f"T={tasks} 784-256-128-64-64-5" + (" momentum decay clip" if options else "")
            for mode in ("forward", "full"):
                calls = _sgd_step_calls(shapes, tasks, options, mode)
                yield Workload(
                    "sgd_step",
                    "sgd_step",
                    case,
                    mode,
                    {"mtml_fast": lambda _, call=calls["ours"]: Provider(call)},
                    {"eager": lambda _, call=calls["eager"]: Provider(call)},
                    calls["exact"],
                    calls["eager"],
                )


def _sgd_step_calls(shapes, tasks, options, mode) -> dict[str, Callable[[], Sequence[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(tasks, *shape, generator=generator) for shape in shapes] for _ in range(4)]

    def calls(dtype):
        params, grads, cotangents, buffers = ([t.to(dtype) for t in tensors] for tensors in drawn)
        leaves = [t.requires_grad_() for t in (*params, *grads)]
        buffers = buffers if options else None
        lr = torch.tensor(0.1, dtype=dtype)

        def ours():
            return sgd_step(params, grads, lr=lr, momentum_buffers=buffers, **options)[0]

        def eager():
            momentum, decay, clip = (
                options.get(k, d) for k, d in (("momentum", 0.0), ("weight_decay", 0.0), ("clip", None))
            )
            return eager_sgd_step(params, grads, [lr], buffers or [], momentum, decay, clip)[: len(params)]

        def timed(step):
            if mode == "full":
                return lambda: torch.autograd.grad(step(), leaves, cotangents)
            return torch.no_grad()(step)

        return timed(ours), timed(eager)

    ours, eager = calls(torch.float32)
    # drawn anew when asked for: the float64 copies need not stay
    return {"ours": ours, "eager": eager, "exact": lambda: calls(torch.float64)[1]()}
