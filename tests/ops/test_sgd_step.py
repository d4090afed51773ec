"""sgd_step: the battery, and its step against torch.optim.SGD."""

import pytest
import torch

from mtml_fast.ops import OPERATORS, backend, sgd_step
from mtml_fast.testing import BadInput, Case, op_battery

SHAPES = [(5, 3), (7,), (1,), ()]


def make(tasks, shapes, rates, **options):
    def arguments(dtype, generator):
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
        params, grads = ([draw(tasks, *shape) for shape in shapes] for _ in range(2))
        lr = {
            "scalar": lambda: draw().abs(),
            "task": lambda: draw(tasks).abs(),
            "leaf": lambda: [draw().abs() for _ in shapes],
            "parameter": lambda: [draw(1, *shape) for shape in shapes],
            "both": lambda: [draw(tasks, *shape) for shape in shapes],
        }[rates]()
        extra = {"momentum_buffers": [draw(tasks, *shape) for shape in shapes]} if "momentum" in options else {}
        return dict(params=params, grads=grads, lr=lr, **extra, **options)

    return arguments


AXES = {"params": "T", "grads": "T", "momentum_buffers": "T"}
EVERYTHING = dict(momentum=0.9, weight_decay=0.1, clip=0.5)
CASES = [
    Case("T3-scalar", make(3, SHAPES, "scalar"), AXES, tiny=False),
    Case("T2-tiny", make(2, [(2, 2), (3,)], "scalar"), AXES, tiny=True),
    Case("T2-tiny-all", make(2, [(2, 2), (3,)], "parameter", **EVERYTHING), AXES, tiny=True),
    Case("T2-tiny-clip", make(2, [(2, 2)], "task", clip=0.3), {**AXES, "lr": "T"}, tiny=True),
    Case("T4-task-decay", make(4, SHAPES, "task", weight_decay=0.3), {**AXES, "lr": "T"}),
    Case("T4-leaf-momentum", make(4, SHAPES, "leaf", momentum=0.5), AXES),
    Case("T5-both-all", make(5, SHAPES, "both", **EVERYTHING), {**AXES, "lr": "T"}),
    Case("T1-wide", make(1, [(1000, 17)], "parameter", clip=1.0), AXES),
    Case("T0", make(0, SHAPES, "scalar", clip=1.0)),
    Case("T64-odd", make(64, [(31,), (63, 1), (1, 65)], "both", **EVERYTHING), {**AXES, "lr": "T"}),
]


def change(**values):
    return lambda arguments: {**arguments, **values}


BAD = [
    BadInput("params-type", change(params=3), TypeError, "params must be a list of tensors, got int"),
    BadInput("params-none", change(params=[], grads=[]), ValueError, "params must hold at least one tensor"),
    BadInput("params-int", change(params=[torch.ones(3, 2).long()]), TypeError, "params[0] must be float32 or float64"),
    BadInput("grads-count", change(grads=[]), ValueError, "grads must hold one tensor for each of the 4 params, got 0"),
    BadInput(
        "grads-shape",
        lambda a: {**a, "grads": [g[:2] for g in a["grads"]]},
        ValueError,
        "grads[0] must have the shape of params[0] [3, 5, 3], got [2, 5, 3]",
    ),
    BadInput(
        "grads-dtype",
        lambda a: {**a, "grads": [g.double() for g in a["grads"]]},
        TypeError,
        "grads[0] must have the dtype of params[0] (torch.float32), got torch.float64",
    ),
    BadInput(
        "tasks",
        lambda a: {**a, "params": [a["params"][0], a["params"][1][:2], *a["params"][2:]]},
        ValueError,
        "params[1] must be [T=3, ...], got shape [2, 7]",
    ),
    BadInput(
        "grads-device",
        lambda a: {**a, "grads": [g.to("meta") for g in a["grads"]]},
        ValueError,
        "grads[0] must be on the device of params[0] (cpu), got meta",
    ),
    BadInput("lr-nan", change(lr=float("nan")), ValueError, "lr must be finite, got nan"),
    BadInput(
        "lr-tensor-inf",
        change(lr=torch.tensor([1.0, float("inf"), 1])),
        ValueError,
        "lr must be finite, got inf",
        reads=True,
    ),
    BadInput("lr-shape", change(lr=torch.ones(2)), ValueError, "lr must have shape [], [T=3], got [2]"),
    BadInput(
        "lr-count", change(lr=[torch.ones(())]), ValueError, "lr must hold one tensor for each of the 4 leaves, got 1"
    ),
    BadInput("momentum", change(momentum=1.0), ValueError, "momentum must be finite, at least 0 and below 1, got 1.0"),
    BadInput("decay", change(weight_decay=-1.0), ValueError, "weight_decay must be finite, at least 0, got -1.0"),
    BadInput("clip", change(clip=0.0), ValueError, "clip must be finite, above 0, got 0.0"),
    BadInput("clip-type", change(clip="1"), TypeError, "clip must be a number, got '1'"),
    BadInput(
        "buffers",
        change(momentum_buffers=[torch.ones(1)]),
        ValueError,
        "momentum_buffers must be None without momentum",
    ),
]


def per_task(results, arguments):
    return [[r[t] for r in results] for t in range(arguments["params"][0].shape[0])]


@pytest.mark.parametrize(
    "check", op_battery(sgd_step, OPERATORS["sgd_step"], CASES, per_task=per_task, bad_inputs=BAD), ids=str
)
def test_battery(check):
    check()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_steps_equal_torch_optim(momentum, clip):
    """Three steps equal those of torch.optim.SGD, whose first momentum buffer is the first gradient."""
    torch.manual_seed(0)
    params = [torch.randn(1, 4, 3, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)]
    theirs = [p[0].clone().requires_grad_() for p in params]
    optimizer = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, weight_decay=0.01)
    buffers = None
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g[0].clone()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
        optimizer.step()
        params, buffers = sgd_step(
            params, grads, lr=0.1, momentum=momentum, weight_decay=0.01, clip=clip, momentum_buffers=buffers or None
        )
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p[0], q.detach(), rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_not_a_number_is_not_taken_for_a_small_one():
    """Clipped by a norm that is NaN, all of the task's step is NaN: natively and by the reference."""
    params, grads = [torch.zeros(2, 3)], [torch.tensor([[1.0, 2, torch.nan], [3, 4, 0]])]
    for name in ("operator", "reference"):
        with backend(name):
            stepped = sgd_step(params, grads, lr=1.0, clip=1.0)[0][0]
        assert stepped[0].isnan().all(), name
        torch.testing.assert_close(stepped[1], -torch.tensor([0.6, 0.8, 0]), rtol=1e-5, atol=1e-6)
