"""gradient_gram: the battery, and its sums where float32 has lost them."""

import math

import pytest
import torch

from mtml_fast.ops import OPERATORS, gradient_gram
from mtml_fast.testing import BadInput, Case, op_battery

SHAPES = [(5, 3), (7,), (1,), ()]


def make(tasks, shapes):
    def arguments(dtype, generator):
        return dict(gradients=[torch.randn((tasks, *shape), generator=generator, dtype=dtype) for shape in shapes])

    return arguments


CASES = [
    Case("T3", make(3, SHAPES)),
    Case("T2-tiny", make(2, [(2, 2), (3,), ()]), tiny=True),
    Case("T1", make(1, SHAPES)),
    Case("T0", make(0, SHAPES)),
    Case("T40-odd", make(40, [(31,), (63, 1), (1, 65)])),
    # more than one block of the sum
    Case("T3-wide", make(3, [(17, 2003)])),
    Case("empty-leaf", make(3, [(0, 4), (2,)])),
]


def change(**values):
    return lambda arguments: {**arguments, **values}


BAD = [
    BadInput("type", change(gradients=3), TypeError, "gradients must be a list of tensors, got int"),
    BadInput("none", change(gradients=[]), ValueError, "gradients must hold at least one tensor, got none"),
    BadInput("int", change(gradients=[torch.ones(3).long()]), TypeError, "gradients[0] must be float32 or float64"),
    BadInput(
        "tasks",
        change(gradients=[torch.ones(3, 2), torch.ones(2, 2)]),
        ValueError,
        "gradients[1] must be [T=3, ...], got shape [2, 2]",
    ),
    BadInput("scalar", change(gradients=[torch.ones(())]), ValueError, "gradients[0] must be [T=T, ...], got shape []"),
    BadInput(
        "dtype",
        change(gradients=[torch.ones(3), torch.ones(3).double()]),
        TypeError,
        "gradients[1] must have the dtype of gradients[0] (torch.float32), got torch.float64",
    ),
    BadInput(
        "device",
        change(gradients=[torch.ones(3), torch.ones(3, device="meta")]),
        ValueError,
        "gradients[1] must be on the device of gradients[0] (cpu), got meta",
    ),
]


@pytest.mark.parametrize(
    "check",
    op_battery(gradient_gram, OPERATORS["gradient_gram"], CASES, per_task=lambda results, _: [results], bad_inputs=BAD),
    ids=str,
)
def test_battery(check):
    check()


def test_sums_are_float64():
    """A million small numbers beside a large one, of which float32 would keep none."""
    row = torch.full((1_000_001,), 1e-4)
    row[0] = 1e4
    gram = gradient_gram([torch.stack([row, -row])])
    exact = row.double().square().sum()
    assert gram.dtype == torch.float64
    torch.testing.assert_close(
        gram, exact * torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.float64), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_columns(dtype):
    """More than one piece and one thread: the correctly rounded sums, and the same bits on any number of threads."""
    leaves = [torch.randn(6, *shape, dtype=dtype) for shape in ((300, 1001), (7,), (), (33, 1))]
    threads = torch.get_num_threads()
    try:
        grams = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            grams.append(gradient_gram(leaves))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gram, grams[0]) for gram in grams)
    assert torch.equal(grams[0], grams[0].T)
    whole = torch.cat([leaf.reshape(6, -1) for leaf in leaves], 1).double()
    for i, j in ((0, 0), (0, 5), (4, 5), (2, 3)):
        terms = whole[i] * whole[j]
        # no term goes through more than 350 additions: 256 in a block of 512, 64 blocks of a piece, lanes and pieces
        bound = 350 * 2**-53 * float(terms.abs().sum())
        assert abs(float(grams[0][i, j]) - math.fsum(terms.tolist())) <= bound


def test_the_first_call_of_all_may_be_compiled(monkeypatch):
    """Nobody has asked yet who serves the operator, and a compiler cannot."""
    monkeypatch.setattr(OPERATORS["gradient_gram"], "_known", {})
    torch.compiler.reset()
    compiled = torch.compile(lambda x: gradient_gram([x]), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5)
    torch.testing.assert_close(compiled(x), x.double() @ x.double().mT)
