"""The NumPy door gives torch's results and refuses what does not fit."""

import itertools
import re
import threading
import time

import numpy as np
import pytest
import torch

from mtml_fast.ops import _library, sgd_step

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
def test_same_bits_as_torch(dtype):
    rng = np.random.default_rng()
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


def test_inputs_stay_and_layouts_do_not_matter():
    rng = np.random.default_rng()
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
