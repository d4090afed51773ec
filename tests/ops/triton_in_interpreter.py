"""What the battery's cases are too small for, run by test_triton.py in the interpreter.

More leaves than a launch takes, more than one piece of a leaf, more than one block of tasks; rows of a task in several
tiles of several parts, outputs and columns in several tiles.
"""

import pytest
import torch

from benchmarks.gpu.precision import products_in
from mtml_fast.ops import OPERATORS, backend, gradient_combine, gradient_gram, heads, heads_loss
from mtml_fast.testing.arguments import in_dtype
from tests.ops.test_heads import make

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


def heads_results(call, with_loss):
    """Outputs or losses, and all gradients for random cotangents."""
    call = dict(call)
    names = [n for n in ("x", "weight", "bias", "hidden_weight", "hidden_bias") if call.get(n) is not None]
    leaves = [call[n].detach().requires_grad_() for n in names]
    call |= dict(zip(names, leaves, strict=True))
    results = (heads_loss if with_loss else heads)(**call)
    q = torch.randn(results.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(results)
    return [results.detach(), *torch.autograd.grad(results, leaves, q)]


@pytest.mark.parametrize(
    ("loss", "dtype", "hidden", "features", "widths", "options"),
    [
        (None, torch.float32, 17, 5, 3, dict(activation="silu")),
        (None, torch.float64, None, 33, [3, 2, 35], {}),
        ("cross_entropy", torch.float32, None, 33, [3, 2, 35], dict(label_smoothing=0.1)),
        ("bce", torch.float64, None, 17, [3, 2, 17], {}),
    ],
    ids=["hidden", "ragged", "cross_entropy", "bce"],
)
def test_more_of_rows_and_outputs(loss, dtype, hidden, features, widths, options, seed):
    """Rows in nine parts of two tiles each, none, and a tile and a bit."""
    call = make([1100, 0, 70], widths, features, hidden=hidden, loss=loss, **options)
    call = call(dtype, torch.Generator().manual_seed(seed))
    wide = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in call.items()}
    with backend("operator"):
        mine, again = heads_results(call, loss is not None), heads_results(call, loss is not None)
    with backend("reference"):
        eager, exact = heads_results(call, loss is not None), heads_results(wide, loss is not None)
    for i, (a, b, c, e) in enumerate(zip(mine, again, eager, exact, strict=True)):
        assert torch.equal(a, b), f"result {i} has other bits the second time"
        # the sums of 1,100 rows are in another order than eager's
        slack = 64 * torch.finfo(dtype).eps * float(e.abs().max())
        assert (a.double() - e).abs().max() <= 2 * (c.double() - e).abs().max() + slack, i


@pytest.mark.parametrize("with_loss", [False, True])
def test_bfloat16_products_where_asked(with_loss):
    """Factors are rounded to 8 bits, sums are not."""
    call = make([70, 3], [3, 20], 40, loss="mse" if with_loss else None)
    call = call(torch.float32, torch.Generator().manual_seed(0))
    exact = heads_results(in_dtype(call, torch.float64), with_loss)
    with backend("operator"):
        full = heads_results(call, with_loss)
        with products_in("medium"):
            rounded = heads_results(call, with_loss)
    # outputs: the rounded numbers' products, to float32
    if not with_loss:
        less = {n: t.bfloat16().double() if n in ("x", "weight") else t for n, t in call.items()}
        less["bias"] = less["bias"].double()
        torch.testing.assert_close(rounded[0].double(), heads_results(less, with_loss)[0], rtol=1e-5, atol=1e-5)
    for i, (a, b, e) in enumerate(zip(rounded, full, exact, strict=True)):
        error, before = ((t - e).abs().max() / e.abs().max() for t in (a, b))
        assert before < 2e-6, i
        assert error < 0.03, i
        # sums of cotangents are no products
        assert error > 1e-4 or i == 3, i


def test_mixed_losses_of_many_tasks():
    """More than a word of them: each task has the loss that is its own."""
    names = ["cross_entropy", "mse", "bce", "huber"]
    losses = [names[(i * i) % 7 % 4] for i in range(40)]
    call = make([1] * 40, 3, 2, loss="mse")(torch.float64, torch.Generator().manual_seed(0))
    call |= dict(y=(torch.arange(40) % 3, call["y"]), loss=losses)
    with backend("operator"):
        mine = heads_results(call, with_loss=True)
    with backend("reference"):
        exact = heads_results(call, with_loss=True)
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_label_out_of_place_is_not_silent():
    """On a device nobody can look at labels beforehand: the task's loss and gradients are NaN, and no other's."""
    call = make([3, 2], 2, 4, loss="cross_entropy")(torch.float32, torch.Generator().manual_seed(0))
    x, offsets, weight, bias = (call[n] for n in ("x", "offsets", "weight", "bias"))
    labels = torch.tensor([0, 2, 1, 1, 0])
    inputs = (x, labels, None, offsets, weight, bias, None, None, None, None, None, "relu", [0], 0.0, -100, 1.0)
    operator = OPERATORS["heads_loss"]
    losses = operator.forward(*inputs)
    dx, dw, db = operator.backward([torch.ones(2)], *inputs, [True] * 3)
    assert losses.isnan().tolist() == [True, False]
    assert dx[:3].isnan().all()
    assert dw[:2].isnan().all()
    assert db.isnan().tolist() == [True, True, False, False]
    assert not dx[3:].isnan().any()
