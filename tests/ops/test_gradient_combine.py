"""gradient_combine: the battery."""

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
    # more than one piece and one thread
    Case("T6-threads", make(6, [(300, 1001), (7,)])),
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
