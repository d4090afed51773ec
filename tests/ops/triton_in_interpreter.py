"""What the battery's cases are too small for, run by test_triton.py in the interpreter.

More leaves than a launch takes, more than one piece of a leaf, more than one block of tasks.
"""

import pytest
import torch

from mtml_fast.ops import backend, gradient_combine, gradient_gram

# twenty leaves, some of them empty; the last is five pieces where sums are kept, nine where they are not
SHAPES = [(i % 7,) for i in range(18)] + [(), (3, 723)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", [2, 35])
def test_more_than_one_of_everything(tasks, dtype):
    shapes = SHAPES if tasks == 2 else [(0,), (5, 8), (1300,)]
    leaves = [torch.randn(tasks, *shape, dtype=dtype) for shape in shapes]
    weights = torch.randn(tasks, dtype=dtype)
    d_gram = torch.randn(tasks, tasks, dtype=torch.float64)
    d_combined = [torch.randn(shape, dtype=dtype) for shape in shapes]

    def results(leaves, weights, d_combined):
        inputs = [t.clone().requires_grad_() for t in (*leaves, weights)]
        *xs, w = inputs
        gram, combined = gradient_gram(xs), gradient_combine(xs, w)
        gradients = [*torch.autograd.grad(gram, xs, d_gram), *torch.autograd.grad(combined, inputs, d_combined)]
        return [t.detach() for t in (gram, *combined, *gradients)]

    with backend("operator"):
        mine = results(leaves, weights, d_combined)
        again = results(leaves, weights, d_combined)
    with backend("reference"):
        exact = results([x.double() for x in leaves], weights.double(), [x.double() for x in d_combined])
    assert torch.equal(mine[0], mine[0].T)
    for i, (a, b, c) in enumerate(zip(mine, again, exact, strict=True)):
        assert torch.equal(a, b), f"result {i} has other bits the second time"
        # sums are float64 and rounded once, to a.dtype
        size = float(c.abs().max()) if c.numel() else 0.0
        atol = 1e-13 * (1 + size) + torch.finfo(a.dtype).eps * size
        torch.testing.assert_close(a.double(), c, rtol=0, atol=atol, msg=lambda m, i=i: f"result {i}: {m}")
