"""The NumPy door gives torch's results and refuses what does not fit."""

import itertools
import re
import threading
import time

import numpy as np
import pytest
import torch

from mtml_fast.ops import (
    _library,
    gradient_combine,
    gradient_gram,
    heads,
    heads_loss,
    mlp_adapt,
    mlp_adapt_mean,
    sgd_step,
)

if _library.build_info() is None:
    pytest.skip(_library.native_status(), allow_module_level=True)
import mtml_fast.numpy as mfn

SHAPES = [(6, 5), (6,), (6, 3, 33), (6, 0)]


def arrays(rng, dtype, shapes=SHAPES):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def both(params, grads, lr, **options):
    """The results of NumPy and of torch."""

    def tensors(x):
        if isinstance(x, list):
            return [torch.from_numpy(v) for v in x]
        return torch.from_numpy(x) if isinstance(x, np.ndarray) else x

    mine = mfn.sgd_step(params, grads, lr=lr, **options)
    options = {name: tensors(value) for name, value in options.items()}
    return mine, sgd_step(tensors(params), tensors(grads), lr=tensors(lr), **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_bits_as_torch(dtype, rng):
    params, grads, buffers = (arrays(rng, dtype) for _ in range(3))
    rates = [
        0.1,
        np.asarray(0.1, dtype),
        rng.random(6).astype(dtype),
        [rng.random((1, *shape[1:])).astype(dtype) for shape in SHAPES],
        [rng.random(shape).astype(dtype) for shape in SHAPES],
    ]
    for lr, momentum, weight_decay, clip in itertools.product(rates, (0.0, 0.9), (0.0, 0.1), (None, 2.0)):
        options = {"momentum": momentum, "weight_decay": weight_decay, "clip": clip}
        if momentum:
            options["momentum_buffers"] = buffers
        (new_params, new_buffers), (torch_params, torch_buffers) = both(params, grads, lr, **options)
        assert len(new_params) == len(SHAPES)
        assert len(new_buffers) == (len(SHAPES) if momentum else 0)
        for a, b in zip(new_params + new_buffers, torch_params + torch_buffers, strict=True):
            assert a.dtype == dtype
            np.testing.assert_array_equal(a, b.numpy(), strict=True)


def test_inputs_stay_and_layouts_do_not_matter(rng):
    params, grads = [rng.standard_normal((7, 4)).T], [np.broadcast_to(rng.standard_normal((4, 1)), (4, 7))]
    before = params[0].copy()
    strided, _ = mfn.sgd_step(params, grads, lr=0.5, clip=1.0)
    plain, _ = mfn.sgd_step([np.ascontiguousarray(params[0])], [np.ascontiguousarray(grads[0])], lr=0.5, clip=1.0)
    np.testing.assert_array_equal(strided[0], plain[0])
    np.testing.assert_array_equal(params[0], before)


def test_missing_buffers_are_zeros():
    params, grads = [np.ones((2, 3))], [np.full((2, 3), 2.0)]
    (new_params,), (new_buffers,) = mfn.sgd_step(params, grads, lr=0.5, momentum=0.9)
    np.testing.assert_array_equal(new_params, np.zeros((2, 3)))
    np.testing.assert_array_equal(new_buffers, grads[0])


def test_no_tasks():
    (new,), buffers = mfn.sgd_step([np.empty((0, 3))], [np.empty((0, 3))], lr=np.empty(0), clip=1.0)
    assert new.shape == (0, 3)
    assert buffers == []


def test_other_threads_run_meanwhile():
    """The interpreter's lock is free during the call; on a busy machine one of five tries shows it."""
    params = [np.ones((64, 200_000), np.float32)]

    def longest_pause():
        duration = []

        def work():
            start = time.perf_counter()
            mfn.sgd_step(params, params, lr=0.1, momentum=0.9, weight_decay=0.1, clip=1.0)
            duration.append(time.perf_counter() - start)

        worker = threading.Thread(target=work)
        worker.start()
        ticks = [time.perf_counter()]
        while worker.is_alive():
            ticks.append(time.perf_counter())
        return max(b - a for a, b in itertools.pairwise(ticks)) / duration[0]

    # with the lock held this thread would stand still for nearly the whole call, every time
    assert min(longest_pause() for _ in range(5)) < 0.5


X, Y = np.zeros((2, 3)), np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": X}, TypeError, "params must be a list of NumPy arrays, got ndarray"),
        ({"params": [[1.0]]}, TypeError, "params[0] must be a NumPy array, got list"),
        ({"params": []}, ValueError, "params must hold at least one leaf, got none"),
        ({"params": [X.astype(np.int64)]}, TypeError, "params[0] must be float32 or float64, got int64"),
        ({"params": [np.zeros(())]}, ValueError, "params[0] must be [T, ...], got a 0-dim leaf"),
        ({"params": [X, X[:1]], "grads": [X, X[:1]]}, ValueError, "params[1] must have the 2 tasks of params[0]"),
        ({"grads": [Y]}, TypeError, "grads[0] must be float64 as params[0], got float32"),
        ({"grads": [X[:, :2]]}, ValueError, "grads[0] must have the shape of params[0] [2, 3], got [2, 2]"),
        ({"grads": []}, ValueError, "grads must hold one leaf per leaf of params (1), got 0"),
        ({"lr": np.zeros(3)}, ValueError, "lr[0] must be 0-dim, [T], [1, *shape] or [T, *shape]"),
        ({"lr": [X, X]}, ValueError, "lr must hold one array for each of the 1 leaves, got 2"),
        ({"lr": np.float32(0.1)}, TypeError, "lr[0] must be float64 as params[0], got float32"),
        ({"momentum_buffers": [X]}, ValueError, "momentum_buffers must hold 0 leaves with momentum 0, got 1"),
        ({"momentum": 1.0}, ValueError, "momentum must be in [0, 1), got 1"),
        (
            {"momentum": 0.9, "momentum_buffers": [X[:1]]},
            ValueError,
            "momentum_buffers[0] must have the shape of params",
        ),
        ({"weight_decay": -0.5}, ValueError, "weight_decay must be >= 0, got -0.5"),
        ({"clip": float("nan")}, ValueError, "clip must be > 0, got nan"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"params": [X], "grads": [X], "lr": 0.1, **change}
    with pytest.raises(error, match=re.escape(message)) as caught:
        mfn.sgd_step(arguments.pop("params"), arguments.pop("grads"), **arguments)
    assert "\n" not in str(caught.value)


def tensors(value):
    if isinstance(value, list):
        return [tensors(v) if isinstance(v, np.ndarray) else v for v in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def mlp_call(rng, dtype, ragged=False, **options):
    """Three tasks of 6-5-4-3, and their rows."""
    loss, bias, norm = options.get("loss", "cross_entropy"), options.get("bias", True), options.get("norm", False)
    shapes = []
    for i, (inputs, outputs) in enumerate(((6, 5), (5, 4), (4, 3))):
        shapes += [(outputs, inputs), *[(outputs,)] * (bias + 2 * (norm and i < 2))]
    call = {"params": arrays(rng, dtype, shapes), **options}
    for name, counts in (("support", [2, 5, 1] if ragged else [4] * 3), ("query", [7, 2, 3] if ragged else [5] * 3)):
        lead = (sum(counts),) if ragged else (3, counts[0])
        call[f"{name}_x"] = rng.standard_normal((*lead, 6)).astype(dtype)
        call[f"{name}_y"] = (
            rng.integers(0, 3, lead) if loss == "cross_entropy" else rng.random((*lead, 3)).astype(dtype)
        )
        if ragged:
            call[f"{name}_offsets"] = np.cumsum([0, *counts])
    return call


MLP_OPTIONS = {
    "plain": {"lr": 0.1},
    "steps": {"lr": np.array([0.1, 0.2, 0.3]), "steps": 3, "activation": "tanh"},
    "layers": {"lr": np.array([[0.1, 0.2, 0.3]]), "steps": 2, "loss": "mse"},
    "norm": {"lr": 0.1, "norm": True, "steps": 2, "bias": False},
    "everything": {
        "lr": 0.1, "steps": 2, "loss": "bce", "momentum": 0.5, "weight_decay": 0.1, "clip": 0.7, "every_step": True,
        "adapted": [True, True, False, False, True, True],
    },
    "mask": {"lr": 0.1, "loss": "mse", "class_mask": np.array([[True, False, True]] * 3)},
    "first": {"lr": 0.1, "steps": 3, "first_order": True},
}  # fmt: skip


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MLP_OPTIONS)
def test_mlp_adapt_has_the_bits_of_torch(name, dtype, ragged, rng):
    call = mlp_call(rng, dtype, ragged, **MLP_OPTIONS[name])
    if isinstance(call["lr"], np.ndarray):
        call["lr"] = call["lr"].astype(dtype)
    if name == "plain":
        call["lr"] = [np.full(p.shape, 0.1, dtype) for p in call["params"]]
    inputs = {k: tensors(v) for k, v in call.items()}
    before = [x.copy() for x in call["params"]]

    mine, theirs = mfn.mlp_adapt(**call, return_parameters=True), mlp_adapt(**inputs, return_parameters=True)
    assert mine.mean_loss is mine.gradients is None
    for a, b in zip([*mine[:2], *mine.parameters], [*theirs[:2], *theirs.parameters], strict=True):
        np.testing.assert_array_equal(a, b.numpy(), strict=True)

    mine = mfn.mlp_adapt(**call, gradient=True)
    inputs["params"] = [p.clone().requires_grad_() for p in inputs["params"]]
    theirs = mlp_adapt_mean(**inputs)
    gradients = torch.autograd.grad(theirs.mean_loss, inputs["params"])
    assert mine.parameters is None
    for a, b in zip([*mine[:2], mine.mean_loss, *mine.gradients], [*theirs, *gradients], strict=True):
        np.testing.assert_array_equal(a, b.detach().numpy(), strict=True)
    for a, b in zip(call["params"], before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_mlp_adapt_takes_any_layout_and_no_labels(rng):
    call = mlp_call(rng, np.float64, lr=0.1)
    strided = {
        k: [x.T.copy().T for x in v] if k == "params" else v.T.copy().T if isinstance(v, np.ndarray) else v
        for k, v in call.items()
    }
    for a, b in zip(mfn.mlp_adapt(**strided)[:2], mfn.mlp_adapt(**call)[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    unlabelled = mfn.mlp_adapt(**{**call, "query_y": None})
    np.testing.assert_array_equal(unlabelled.outputs, mfn.mlp_adapt(**call).outputs)
    np.testing.assert_array_equal(unlabelled.losses, np.zeros(3))


def test_mlp_adapt_without_tasks(rng):
    call = mlp_call(rng, np.float64, lr=0.1)
    none = {k: v[:0] if k.endswith(("_x", "_y")) else v for k, v in call.items()}
    with np.errstate(all="raise"):
        result = mfn.mlp_adapt(**none, gradient=True, return_parameters=True)
    assert result.outputs.shape == (0, 5, 3)
    assert [p.shape for p in result.parameters] == [(0, *p.shape) for p in call["params"]]
    assert all((g == 0).all() for g in result.gradients)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": X}, TypeError, "params must be a list of NumPy arrays, got ndarray"),
        ({"params": []}, ValueError, "params must hold at least one layer, got none"),
        ({"params": [X.astype(np.int64)]}, TypeError, "params[0] must be float32 or float64, got int64"),
        ({"params": [X]}, ValueError, "params must hold weight, bias for every layer (the last without norm), got 1"),
        ({"support_x": [1.0]}, TypeError, "support_x must be a NumPy array, got list"),
        ({"support_x": X}, ValueError, "support_x must be [T, N, D], got shape [2, 3]"),
        (
            {"support_x": np.zeros((3, 4, 6), np.float32)},
            TypeError,
            "support_x must be float64 as params[0], got float32",
        ),
        ({"query_y": np.zeros((3, 5), np.int32)}, TypeError, "query_y must be int64, got int32"),
        ({"support_offsets": np.zeros(4)}, TypeError, "support_offsets must be int64, got float64"),
        ({"class_mask": np.ones((3, 3))}, TypeError, "class_mask must be bool, got float64"),
        ({"steps": 1.0}, TypeError, "steps must be an integer, got 1.0"),
        ({"steps": 2**70}, ValueError, "steps must be below 2**63, got 1180591620717411303424"),
        ({"momentum": "x"}, TypeError, "momentum must be a number, got 'x'"),
        ({"clip": "x"}, TypeError, "clip must be a number, got 'x'"),
        ({"loss": None}, TypeError, "loss must be a string, got None"),
        ({"adapted": 1}, TypeError, "adapted must be a list of bools, got 1"),
        ({"lr": "0.1"}, TypeError, "lr must be a number or float64 as params[0], got <U3"),
        ({"support_y": np.full((3, 4), 3)}, ValueError, "support_y must be in 0..2, got 3"),
        ({"query_y": np.zeros((3, 4), np.int64)}, ValueError, "query_y must be [T=3, Q=5], got shape [3, 4]"),
        ({"query_y": None, "gradient": True}, ValueError, "query_y must be given where the gradient is wanted"),
        ({"lr": np.zeros(2), "steps": 3}, ValueError, "lr must be [1 or K=3, 1 or 6], got shape [2, 1]"),
        ({"lr": float("nan")}, ValueError, "lr must be finite, got nan"),
        ({"lr": [X]}, ValueError, "lr must hold one array for each of the 6 params, got 1"),
        ({"support_offsets": np.array([0, 1])}, ValueError, "support_x must be [R, D], got shape [3, 4, 6]"),
        ({"adapted": [True]}, ValueError, "adapted must hold one bool for each of the 6 params, got 1"),
        ({"loss": "hinge"}, ValueError, "loss must be one of 'cross_entropy', 'mse', 'bce', got 'hinge'"),
    ],
)
def test_mlp_adapt_bad_input(change, error, message, rng):
    call = {**mlp_call(rng, np.float64, lr=0.1), **change}
    with pytest.raises(error, match=re.escape(message)) as caught:
        mfn.mlp_adapt(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", ["huber", "cross_entropy", "bce"]])
def test_heads_in_the_same_bits_as_torch(dtype, loss, rng):
    rows, widths = [5, 1, 30], [3, 2, 40]
    offsets, out_offsets = np.cumsum([0, *rows]), np.cumsum([0, *widths])
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    call = dict(x=draw(36, 7), offsets=offsets, weight=draw(45, 6), bias=draw(45), out_offsets=out_offsets)
    call |= dict(hidden_weight=draw(3, 6, 7), hidden_bias=draw(3, 6), activation="gelu")
    labels = np.concatenate([rng.integers(0, c, n) for n, c in zip(rows, widths, strict=True)])
    targets = rng.random(int(np.dot(rows, widths))).astype(dtype)
    y = labels if loss == "cross_entropy" else targets if loss == "mse" else (labels, targets)
    options = dict(mask=rng.random(36) < 0.8, class_weights=rng.random(45).astype(dtype), label_smoothing=0.1)
    convert = lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v  # noqa: E731
    tensors = {name: convert(value) for name, value in call.items()}
    np.testing.assert_array_equal(mfn.heads(**call), heads(**tensors).numpy(), strict=True)
    mine = mfn.heads_loss(y=y, **call, **options, loss=loss, gradient=True)
    leaves = {n: tensors[n].requires_grad_() for n in ("x", "weight", "bias", "hidden_weight", "hidden_bias")}
    y = tuple(map(convert, y)) if isinstance(y, tuple) else convert(y)
    losses = heads_loss(y=y, **tensors, **{n: convert(v) for n, v in options.items()}, loss=loss)
    np.testing.assert_array_equal(mine.losses, losses.detach().numpy(), strict=True)
    assert mine.gradients.keys() == leaves.keys()
    for name, gradient in zip(leaves, torch.autograd.grad(losses.sum(), leaves.values()), strict=True):
        np.testing.assert_array_equal(mine.gradients[name], gradient.numpy(), strict=True)
    assert mfn.heads_loss(y=mine.losses[:0].astype(np.int64), **{**call, "x": call["x"][:0], "offsets": offsets * 0}
                          ).losses.tolist() == [0, 0, 0]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (dict(x=[1]), TypeError, "x must be a NumPy array, got list"),
        (dict(x=np.ones((3, 4), np.float16)), ValueError, "x must be float32 or float64"),
        (dict(weight=np.ones((2, 5))), ValueError, "weight must be [sum of C_t, D=4], got shape [2, 5]"),
        (dict(weight=np.ones((2, 4), np.float32)), ValueError, "weight must have the dtype of x"),
        (dict(offsets=np.array([0, 4, 3])), ValueError, "offsets must not decrease, got 4 then 3 at task 1"),
        (dict(y=np.array([0, 1, 0])), ValueError, "y must be in 0..0 in row 1, got 1"),
        (dict(y=np.zeros(2, np.int64)), ValueError, "y must be [3], got shape [2]"),
        (dict(loss="hinge"), ValueError, "loss must be one of 'cross_entropy'"),
        (dict(mask=np.ones(2, bool)), ValueError, "mask must be bool [R=3]"),
        (dict(label_smoothing=2.0), ValueError, "label_smoothing must be in 0..1, got 2"),
    ],
)
def test_bad_heads(changed, error, text):
    call = dict(x=np.ones((3, 4)), y=np.zeros(3, np.int64), offsets=np.array([0, 1, 3]), weight=np.ones((2, 4)))
    with pytest.raises(error, match=re.escape(text)):
        mfn.heads_loss(**{**call, **changed})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tasks", [0, 1, 7])
def test_gradients_in_the_same_bits_as_torch(dtype, tasks, rng):
    gradients = [rng.standard_normal((tasks, *shape)).astype(dtype) for shape in ((3, 5), (), (70_001,), (0, 2))]
    weights = rng.standard_normal(tasks).astype(dtype)
    tensors = [torch.from_numpy(g) for g in gradients]
    np.testing.assert_array_equal(mfn.gradient_gram(gradients), gradient_gram(tensors).numpy(), strict=True)
    expected = gradient_combine(tensors, torch.from_numpy(weights))
    turned = [np.asfortranarray(g) for g in gradients]
    for mine, theirs in zip(mfn.gradient_combine(turned, weights), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs.numpy(), strict=True)


@pytest.mark.parametrize(
    ("gradients", "weights", "error", "text"),
    [
        (np.ones((2, 3)), np.ones(2), TypeError, "gradients must be a list of NumPy arrays, got ndarray"),
        ([], np.ones(2), ValueError, "gradients must hold at least one tensor, got none"),
        (
            [np.ones((2, 3)), np.ones(3)],
            np.ones(2),
            ValueError,
            "gradients[1] must be [T, ...] with the T of gradients",
        ),
        ([np.ones((2, 3)), np.ones(2, np.float32)], np.ones(2), ValueError, "gradients[1] must have the dtype of grad"),
        ([np.ones((2, 3), np.int64)], np.ones(2), ValueError, "gradients must be float32 or float64"),
        ([np.ones((2, 3))], np.ones(3), ValueError, "weights must be [T=2] of the dtype of gradients, got shape [3]"),
        ([np.ones((2, 3))], [1, 2], TypeError, "weights[0] must be a NumPy array, got list"),
    ],
)
def test_bad_gradients(gradients, weights, error, text):
    with pytest.raises(error, match=re.escape(text)):
        mfn.gradient_combine(gradients, weights)
