"""gradient_combine: the battery."""

import math

import pytest
import torch

from mtml_fast.ops import OPERATORS, gradient_combine
from mtml_fast.testing import BadInput, Case, op_battery

SHAPES = [(5, 3), (7,), (1,), ()]


def make(tasks, shapes):
    def arguments(dtype, generator):
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
        return dict(gradients=[draw(tasks, *shape) for shape in shapes], weights=draw(tasks))

    return arguments


CASES = [
    Case("T3", make(3, SHAPES)),
    Case("T2-tiny", make(2, [(2, 2), (3,), ()]), tiny=True),
    Case("T1", make(1, SHAPES)),
    Case("T0", make(0, SHAPES)),
    Case("T40-odd", make(40, [(31,), (63, 1), (1, 65)])),
    Case("T3-wide", make(3, [(17, 2003)])),
    Case("empty-leaf", make(3, [(0, 4), (2,)])),
]


def change(**values):
    return lambda arguments: {**arguments, **values}


BAD = [
    BadInput("type", change(gradients=3), TypeError, "gradients must be a list of tensors, got int"),
    BadInput("none", change(gradients=[]), ValueError, "gradients must hold at least one tensor, got none"),
    BadInput(
        "tasks",
        change(gradients=[torch.ones(3, 2), torch.ones(2, 2)]),
        ValueError,
        "gradients[1] must be [T=3, ...], got shape [2, 2]",
    ),
    BadInput("weights-type", change(weights=[1.0]), TypeError, "weights must be a torch.Tensor, got list"),
    BadInput("weights-shape", change(weights=torch.ones(2)), ValueError, "weights must be [T=3], got shape [2]"),
    BadInput(
        "weights-dtype",
        change(weights=torch.ones(3).double()),
        TypeError,
        "weights must have the dtype of gradients[0] (torch.float32), got torch.float64",
    ),
]


@pytest.mark.parametrize(
    "check",
    op_battery(
        gradient_combine, OPERATORS["gradient_combine"], CASES, per_task=lambda results, _: [results], bad_inputs=BAD
    ),
    ids=str,
)
def test_battery(check):
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_columns(dtype):
    """More than one piece and one thread: the correctly rounded sums, and the same bits on any number of threads."""
    leaves = [torch.randn(6, *shape, dtype=dtype).requires_grad_() for shape in ((300, 1001), (7,), (), (33, 1))]
    weights = torch.randn(6, dtype=dtype).requires_grad_()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            combined = gradient_combine(leaves, weights)
            cotangents = [torch.sin(c.detach() + 1) for c in combined]
            results.append([*combined, *torch.autograd.grad(combined, [*leaves, weights], cotangents)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True))
    u = torch.cat([c.flatten() for c in cotangents]).double()
    eps = torch.finfo(dtype).eps
    for t in range(6):
        terms = u * torch.cat([leaf.detach()[t].flatten() for leaf in leaves]).double()
        exact = math.fsum(terms.tolist())
        # no term goes through more than 300 additions: 128 in a block of 256, 128 blocks of a piece, lanes and pieces
        bound = 300 * 2**-53 * float(terms.abs().sum()) + eps * abs(exact)
        assert abs(float(results[0][-1][t]) - exact) <= bound
