"""The core's vector mathematics, activations, losses and batch norm (csrc/core), called through
tests/native/math_check.cpp, against torch and wider numbers."""

import ctypes
import math
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mtml_fast.ops.heads.reference import ACTIVATIONS as TORCH_ACTIVATIONS
from mtml_fast.ops.heads_loss.reference import task_losses

ROOT = Path(__file__).parents[1]
SETS = {"baseline": [], "avx2": ["-DCHECK_AVX2"], "avx512": ["-DCHECK_AVX512"]}
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
# as setup.py compiles the core
FLAGS = shlex.split(
    "-O2 -std=c++17 -fPIC -shared -ffp-contract=fast -fno-math-errno -fno-tree-vectorize -Wall -Wextra -Wno-psabi"
)
DTYPES = {"f32": np.float32, "f64": np.float64}
# the numbers of the C++ enums
LOSSES = ["cross_entropy", "mse", "bce"]
ACTIVATIONS = ["relu", "tanh", "gelu", "gelu_tanh", "silu", "elu", "leaky_relu", "sigmoid", "softplus", "identity"]
LINEAR = {"relu", "leaky_relu", "identity"}

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")


class Native:
    """The functions of one instruction set: native(name, dtype, arguments), arrays by their addresses."""

    def __init__(self, library):
        self.library = library

    def __call__(self, name, dtype, *args):
        suffix = "f32" if dtype == np.float32 else "f64"
        function = getattr(self.library, f"{name}_{suffix}")
        if name == "loss_forward":
            function.restype = ctypes.c_float if dtype == np.float32 else ctypes.c_double
        return function(*map(_argument, args))

    def lanes(self, dtype):
        return self("lanes", dtype)

    def padded(self, n, dtype):
        return -(-n // self.lanes(dtype)) * self.lanes(dtype)


def _argument(value):
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


@pytest.fixture(scope="module", params=SETS)
def native(request, tmp_path_factory):
    if request.param != "baseline" and platform.machine() != "x86_64":
        pytest.skip(f"{request.param} is for x86-64")
    library = tmp_path_factory.mktemp(request.param) / "math_check.so"
    source = ROOT / "tests/native/math_check.cpp"
    command = [
        *COMPILER,
        *FLAGS,
        "-Werror",
        f"-I{ROOT / 'csrc'}",
        *SETS[request.param],
        str(source),
        "-o",
        str(library),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    native = Native(ctypes.CDLL(str(library)))
    if not native.library.runs_here():
        pytest.skip(f"this processor lacks {request.param}")
    return native


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def wide(x):
    return x.astype(np.longdouble)


def erfc(x):
    return np.array([math.erfc(v) for v in x.astype(np.float64)])


# name: the number in math_check.cpp, the truth, where it is defined, the error in units in the last place
FUNCTIONS = {
    "exp": (0, np.exp, (-np.inf, np.inf), 1.25),
    "exp_of_negative": (1, np.exp, (-np.inf, 0), 1.25),
    "expm1_of_negative": (2, np.expm1, (-np.inf, 0), 1.25),
    "tanh": (3, np.tanh, (-np.inf, np.inf), 2.75),
    "sigmoid": (4, lambda x: 1 / (1 + np.exp(-x)), (-np.inf, np.inf), 2.25),
    "sigmoid_slope": (5, lambda x: 1 / (2 + np.exp(x) + np.exp(-x)), (-np.inf, np.inf), 4.5),
    "log1p_of_unit": (6, np.log1p, (0, 1), 2.25),
    "log_from_one": (7, np.log, (1, np.inf), 2.0),
    "sqrt": (10, np.sqrt, (0, np.inf), 0.51),
}


def numbers(dtype, low=-np.inf, high=np.inf):
    """Many numbers of all sizes between two, without zeros and infinities."""
    far = 1.01 * math.log(np.finfo(dtype).max)
    near = np.concatenate([np.linspace(-12, 12, 40_001), np.linspace(-far, far, 40_001), np.linspace(-1, 1, 20_001)])
    tiny, huge = math.log10(np.finfo(dtype).tiny), math.log10(np.finfo(dtype).max)
    sizes = np.logspace(tiny + 1, huge - 1, 4001)
    x = np.concatenate([near, sizes, -sizes]).astype(dtype)
    return np.ascontiguousarray(x[(x >= low) & (x <= high) & (x != 0)])


def apply(native, function, x):
    out = np.empty_like(x)
    native("apply", x.dtype, function, x.size, x, out)
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(native, dtype, name):
    function, truth, (low, high), most = FUNCTIONS[name]
    x = numbers(dtype, low, high)
    with np.errstate(over="ignore", under="ignore"):
        expected = truth(wide(x))
        rounded = expected.astype(dtype)
    out = apply(native, function, x)
    info = np.finfo(dtype)
    # below the smallest normal number anything down to zero will do
    small = np.abs(expected) < info.tiny
    assert (np.abs(out[small]) <= info.tiny).all()
    assert (out[np.isinf(rounded)] == rounded[np.isinf(rounded)]).all()
    rest = ~small & np.isfinite(rounded)
    assert rest.sum() > 1000
    ulps = np.abs(wide(out[rest]) - expected[rest]) / np.spacing(np.abs(rounded[rest]))
    worst = ulps.argmax()
    print(f"{name} {dtype.__name__}: {ulps[worst]:.2f} at {x[rest][worst]}")
    # two functions' roundings where there are no wider numbers to compare with
    assert ulps[worst] <= most + (np.finfo(np.longdouble).eps == info.eps)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_at_the_ends(native, dtype, name):
    function, truth, (low, high), _ = FUNCTIONS[name]
    ends = np.array([-np.inf, -0.0, 0.0, np.inf], dtype)
    x = np.append(ends[(ends >= low) & (ends <= high)], dtype(np.nan))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = truth(x)
    out = apply(native, function, x)
    assert np.array_equal(out, expected, equal_nan=True)
    zero = x == 0
    assert (np.signbit(out[zero]) == np.signbit(expected[zero])).all() or name == "expm1_of_negative"


def test_normal_distribution(native, dtype):
    x = numbers(dtype, -36, 36)
    eps = np.finfo(dtype).eps
    below, density = (apply(native, function, x).astype(np.float64) for function in (8, 9))
    expected = np.exp(-0.5 * wide(x) ** 2) / math.sqrt(2 * math.pi)
    # the rounding of x^2 is all that grows
    bound = (1 + 0.5 * wide(x) ** 2) * eps * expected + np.finfo(dtype).tiny
    assert (np.abs(density - expected) <= bound).all()
    expected = 0.5 * erfc(-x.astype(np.float64) * math.sqrt(0.5))
    # and the truth's argument is rounded too
    bound = (4 + wide(x) ** 2) * (eps + np.finfo(np.float64).eps) * expected + np.finfo(dtype).tiny
    assert (np.abs(below - expected) <= bound).all()
    ends = np.array([-np.inf, 0, np.inf, np.nan], dtype)
    assert np.array_equal(apply(native, 8, ends), np.array([0, 0.5, 1, np.nan], dtype), equal_nan=True)
    assert np.array_equal(apply(native, 9, ends)[[0, 2, 3]], np.array([0, 0, np.nan], dtype), equal_nan=True)


def test_place_does_not_matter(native, dtype):
    lanes = native.lanes(dtype)
    x = np.linspace(0.01, 1, 5 * lanes + 3).astype(dtype)
    for name, (function, _, (low, high), _) in FUNCTIONS.items():
        values = np.ascontiguousarray(1 / x if low == 1 else -x if high == 0 else x)
        whole = apply(native, function, values)
        for start in range(lanes + 1):
            for n in (1, 2, lanes - 1, lanes, lanes + 1):
                part = apply(native, function, values[start : start + n].copy())
                assert part.tobytes() == whole[start : start + n].tobytes(), name
    for name in ACTIVATIONS:
        whole = native_activation(native, name, x - dtype(0.5), x, -x, x * x)
        for start in range(lanes + 1):
            # whole vectors: a rest is other code, whose sums of two products a compiler may contract in another way
            y = x[start : start + lanes].copy()
            part = native_activation(native, name, y - dtype(0.5), y, -y, y * y)
            for one, all_of_them in zip(part, whole, strict=True):
                assert one.tobytes() == all_of_them[start : start + lanes].tobytes(), name


# activations


def torch_activation(name, y, e, Re, Ry):
    """h, e * act'(y), and Re * act'(y) + e * act''(y) * Ry by torch's own derivatives."""
    act = TORCH_ACTIVATIONS[name]
    y, e, Re, Ry = (torch.from_numpy(a).requires_grad_() for a in (y, e, Re, Ry))
    h = act(y)
    (dy,) = torch.autograd.grad(h, y, e, create_graph=True)
    (second,) = torch.autograd.grad((dy * Ry).sum(), y, allow_unused=True)
    (tangent,) = torch.autograd.grad(act(y), y, Re)
    if second is not None:
        tangent = tangent + second
    return [v.detach().numpy() for v in (h, dy, tangent)]


def native_activation(native, name, y, e, Re, Ry):
    which = ACTIVATIONS.index(name)
    traits = native("traits", y.dtype, which)
    assert (name in LINEAR) == bool(traits & 2)
    h, dy, tangent = (np.empty_like(y) for _ in range(3))
    native("activation", y.dtype, which, y.size, y, None, None, None, None, h)
    # what an activation does not need is not there
    y = y if traits & 1 else None
    native("activation", h.dtype, which, h.size, y, h, e, None, None, dy)
    if name in LINEAR:
        e = Ry = None
    native("activation", h.dtype, which, h.size, y, h, e, Re, Ry, tangent)
    return h, dy, tangent


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(native, dtype, name, rng):
    # not a multiple of any number of lanes
    y = np.concatenate([np.linspace(-30, 30, 40_001), rng.standard_normal(2000)]).astype(dtype)
    e, Re, Ry = (rng.standard_normal(y.size).astype(dtype) for _ in range(3))
    results = native_activation(native, name, y, e, Re, Ry)
    exact = torch_activation(name, *(a.astype(np.float64) for a in (y, e, Re, Ry)))
    same = torch_activation(name, y, e, Re, Ry)
    # a derivative that is found from h = act(y) has the rounding error of h
    sizes = (1 + np.abs(y), 1 + np.abs(e), 1 + np.abs(Re) + np.abs(e * Ry))
    for what, ours, truth, theirs, size in zip(("value", "first", "second"), results, exact, same, sizes, strict=True):
        error, torch_error = (np.abs(v - truth) / size for v in (ours, theirs))
        bound = 1e-14 if dtype == np.float64 else 2 * torch_error.max() + np.finfo(dtype).eps
        assert error.max() <= bound, f"{what} at {y[error.argmax()]}"


def test_gelu_tanh_in_its_tail(native, dtype):
    """y / (1 + exp(-v)), v = sqrt(8 / pi) (y + 0.044715 y^3): what v is wrong by shows in full where h is small."""
    y = np.linspace(-6, -1, 5001).astype(dtype)
    exact = y.astype(np.longdouble if dtype == np.float64 else np.float64)
    v = np.sqrt(8 / (4 * np.arctan(exact.dtype.type(1)))) * (exact + exact**3 * 44715 / 1000000)
    truth = exact / (1 + np.exp(-v))
    (h, _, _) = native_activation(native, "gelu_tanh", y, y, y, y)
    # four roundings of v, and those of the rest; of the truth too, where nothing is wider
    bound = (np.finfo(dtype).eps + np.finfo(exact.dtype).eps) * (4 + 2 * np.abs(v))
    error = np.abs(h / truth - 1) / bound
    assert error.max() <= 1, f"{error.max():.2f} bounds at {y[error.argmax()]}"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_at_kinks_and_ends(native, dtype, name):
    y = np.array([0, -0.0, 20, 50, -50, 700, -700, 1e4, -1e4, 1e30, -1e30, np.inf, -np.inf, np.nan, 1], dtype)
    e, Re, Ry = (np.full_like(y, v) for v in (0.75, -1.5, 0.5))
    results = native_activation(native, name, y, e, Re, Ry)
    # torch's float32 gives NaN for some that its float64 has right
    expected = torch_activation(name, *(a.astype(np.float64) for a in (y, e, Re, Ry)))
    eps = np.finfo(dtype).eps
    for what, ours, theirs in zip(("value", "first", "second"), results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=max(4 * eps, 1e-13), atol=eps, err_msg=what)


def test_closed_units_pass_nothing(native, dtype):
    """As torch's relu, which selects and does not multiply."""
    y = np.array([-1, 0, 1], dtype)
    for e in (np.inf, np.nan):
        e = np.full_like(y, e)
        _, dy, tangent = native_activation(native, "relu", y, e, e, e)
        assert (dy[:2] == 0).all()
        assert not np.isfinite(dy[2])
        assert (tangent[:2] == 0).all()


# losses


def torch_loss(loss, z, labels, targets, mask, Rz):
    """Loss, its gradient and the gradient's tangent for one task."""
    z = torch.from_numpy(z).requires_grad_()
    y = torch.from_numpy(labels if loss == "cross_entropy" else targets)
    class_mask = None if mask is None else torch.from_numpy(mask)[None]
    value = task_losses(z[None], y[None], loss, None, class_mask)[0]
    (d,) = torch.autograd.grad(value, z, create_graph=True)
    (Rd,) = torch.autograd.grad(d, z, torch.from_numpy(Rz))
    return value.item(), d.detach().numpy(), Rd.numpy()


SENTINEL = 7.0


def native_loss(native, loss, z, labels, targets, mask, Rz=None, extra=0):
    """The same of the kernel, whose columns behind the last hold NaN; and p."""
    dtype, (N, C) = z.dtype, z.shape
    ld = native.padded(C, dtype) + extra * native.lanes(dtype)
    which = LOSSES.index(loss)
    rows = np.full((N, ld), np.nan, dtype)
    rows[:, :C] = z
    # one row more, which must stay as it is
    p, d, Rd = (np.full((N + 1, ld), SENTINEL, dtype) for _ in range(3))
    labels, targets = (labels, None) if loss == "cross_entropy" else (None, targets)
    value = native("loss_forward", dtype, which, N, C, ld, rows, labels, targets, mask, p, d)
    for some_p, some_d in ((None, None), (p.copy(), None), (None, d.copy())):
        again = native("loss_forward", dtype, which, N, C, ld, rows, labels, targets, mask, some_p, some_d)
        assert np.array_equal(again, value, equal_nan=True)
        assert some_p is None or np.array_equal(some_p, p, equal_nan=True)
        assert some_d is None or np.array_equal(some_d, d, equal_nan=True)
    if Rz is not None:
        tangent = np.full((N, ld), np.nan, dtype)
        tangent[:, :C] = Rz
        native("loss_tangent", dtype, which, N, C, ld, p, tangent, mask, Rd)
        # in place
        native("loss_tangent", dtype, which, N, C, ld, p, tangent, mask, tangent)
        assert np.array_equal(tangent, Rd[:N])
    if loss == "mse":
        assert (p == SENTINEL).all()
    results = (d,) if Rz is None else (d, Rd)
    for result in results if loss == "mse" else (*results, p):
        assert (result[N] == SENTINEL).all()
        assert (result[:N, C:] == 0).all()
    return value, d[:N, :C], Rd[:N, :C], p[:N, :C]


def loss_case(rng, dtype, N, C, masked):
    z, Rz = (rng.standard_normal((N, C)).astype(dtype) for _ in range(2))
    z *= 3
    mask = None
    if masked:
        mask = rng.random(C) > 0.4
        mask[rng.integers(C)] = True
    labels = rng.choice(np.arange(C) if mask is None else np.flatnonzero(mask), N).astype(np.int64)
    return z, labels, rng.random((N, C)).astype(dtype), mask, Rz


def cancelled_size(loss, what, z, Rz, mask):
    """The size of the rounded numbers whose difference a result is: their rounding errors stay when they cancel."""
    if mask is not None:
        z, Rz = z[:, mask], Rz[:, mask]
    if loss == "mse":
        # z - target, of numbers that are exact: a rounding of the difference alone
        return 0
    if what == "loss":
        # log(sum) of a sum >= 1 that is rounded; (1 - target) z - min(z, 0)
        return 1 if loss == "cross_entropy" else np.abs(z).mean()
    # p - onehot, p - target; p Rz - p <p, Rz>, p (1 - p) Rz: p is a rounded number up to 1
    return (np.abs(Rz).max() if what == "Rd" else 1) / (len(z) if loss == "cross_entropy" else z.size)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss(native, dtype, loss, masked, rng):
    eps = np.finfo(dtype).eps
    for C in (1, 2, 3, 5, 8, 15, 16, 17, 20, 64, 300, 2100):
        for N in (1, 2, 5, 16, 17, 75, 130) if C < 2000 else (3,):
            z, labels, targets, mask, Rz = loss_case(rng, dtype, N, C, masked)
            hidden = [z.copy(), targets.copy(), Rz.copy()]
            if masked:
                # a class that does not exist may hold anything
                for array in hidden:
                    array[:, ~mask] = np.nan
            value, d, Rd, p = native_loss(native, loss, hidden[0], labels, hidden[1], mask, hidden[2], extra=N % 2)
            as_wide = [a.astype(np.float64) for a in (z, targets, Rz)]
            exact = torch_loss(loss, as_wide[0], labels, as_wide[1], mask, as_wide[2])
            same = torch_loss(loss, z, labels, targets, mask, Rz)
            for what, ours, truth, theirs in zip(("loss", "d", "Rd"), (value, d, Rd), exact, same, strict=True):
                size = max(np.abs(truth).max(), cancelled_size(loss, what, z, Rz, mask))
                error, torch_error = (np.abs(v - truth).max() for v in (ours, theirs))
                bound = 1e-12 * size if dtype == np.float64 else 2 * torch_error + 4 * eps * size
                assert error <= bound, (what, N, C, error, torch_error)
            if masked:
                assert (d[:, ~mask] == 0).all()
                assert (Rd[:, ~mask] == 0).all()
            if loss == "cross_entropy":
                truth = F.softmax(torch.from_numpy(as_wide[0] if mask is None else as_wide[0][:, mask]), 1).numpy()
                np.testing.assert_allclose(p if mask is None else p[:, mask], truth, rtol=1e3 * eps, atol=4 * eps)


@pytest.mark.parametrize("C", [5, 40])
def test_labels_that_are_no_class(native, dtype, C, rng):
    z, labels, _, _, _ = loss_case(rng, dtype, 9, C, False)
    _, good, _, _ = native_loss(native, "cross_entropy", z, labels, None, None)
    for label in (-1, C, C + 1, 2**40, -(2**62)):
        wrong = labels.copy()
        wrong[4] = label
        value, d, _, _ = native_loss(native, "cross_entropy", z, wrong, None, None)
        assert np.isnan(value)
        rest = np.arange(9) != 4
        assert np.array_equal(d[rest], good[rest])
    # a class that this task does not have has probability zero
    mask = np.arange(C) != labels[4]
    labels = np.where(mask[labels], labels, (labels[4] + 1) % C)
    labels[4] = np.flatnonzero(~mask)[0]
    value, d, _, _ = native_loss(native, "cross_entropy", z, labels, None, mask)
    assert value == np.inf
    assert np.isfinite(d).all()


@pytest.mark.parametrize("C", [1, 5, 40])
@pytest.mark.parametrize("loss", LOSSES)
def test_broken_rows_stay_alone(native, dtype, loss, C, rng):
    z, labels, targets, _, _ = loss_case(rng, dtype, 11, C, False)
    targets[:2] = np.array([[0], [1]])
    _, good, _, _ = native_loss(native, loss, z, labels, targets, None)
    for value in (np.nan, np.inf, -np.inf):
        for row in (0, 1, 6, 10):
            for column in {0, C - 1, int(labels[row])}:
                broken = z.copy()
                broken[row, column] = value
                ours, d, _, _ = native_loss(native, loss, broken, labels, targets, None)
                theirs = torch_loss(loss, broken, labels, targets, None, z)
                np.testing.assert_allclose(ours, theirs[0], rtol=1e-4, err_msg=f"{value} at {row}, {column}")
                rest = np.arange(11) != row
                assert np.array_equal(d[rest], good[rest])


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_do_not_depend_on_the_others(native, dtype, loss, rng):
    for C in (4, 30):
        z, labels, targets, _, _ = loss_case(rng, dtype, 32, C, False)
        _, d, _, p = native_loss(native, loss, z, labels, targets, None)
        # a power of two, so that the mean over rows changes no bit
        for row in range(0, 32, 8):
            part = slice(row, row + 4)
            some = [np.ascontiguousarray(a[part]) for a in (z, labels, targets)]
            _, some_d, _, some_p = native_loss(native, loss, *some, None)
            assert np.array_equal(some_d / 8, d[part])
            assert loss == "mse" or np.array_equal(some_p, p[part])


def test_no_rows(native, dtype):
    for loss in range(3):
        empty = np.empty(0, dtype)
        labels = np.empty(0, np.int64)
        ld = native.padded(3, dtype)
        assert native("loss_forward", dtype, loss, 0, 3, ld, empty, labels, empty, None, empty, empty) == 0
        native("loss_tangent", dtype, loss, 0, 3, ld, empty, empty, None, empty)


# batch norm

EPS = 1e-5


def torch_batch_norm(z, gain, shift, d, Rz, Rgain, Rshift, Rd):
    """y, dz, dgain, dshift, and their tangents."""
    point = tuple(torch.from_numpy(a).requires_grad_() for a in (z, gain, shift, d))
    direction = tuple(torch.from_numpy(a) for a in (Rz, Rgain, Rshift, Rd))
    y = (point[0] - point[0].mean(0)) * (point[0].var(0, correction=0) + EPS).rsqrt() * point[1] + point[2]
    results = (y, *torch.autograd.grad(y, point[:3], point[3], create_graph=True))
    tangents = []
    for result in results:
        # a derivative by a cotangent v is linear in v, and its own derivative by v the tangent
        v = torch.zeros_like(result, requires_grad=True)
        back = torch.autograd.grad(result, point, v, create_graph=True, materialize_grads=True)
        inner = sum((b * t).sum() for b, t in zip(back, direction, strict=True))
        tangents += torch.autograd.grad(inner, v)
    return [r.detach().numpy() for r in (*results, *tangents)]


def native_batch_norm(native, z, gain, shift, d, Rz, Rgain, Rshift, Rd):
    dtype, (N, ld) = z.dtype, z.shape
    y, xh, Rxh, Ry, dz, Rdz = (np.full((N, ld), np.nan, dtype) for _ in range(6))
    r, Rr, dgain, dshift, Rdgain, Rdshift = (np.full(ld, np.nan, dtype) for _ in range(6))
    native("batch_norm", dtype, N, ld, z, gain, shift, EPS, y, xh, r)
    native("batch_norm_backward", dtype, N, ld, d, xh, r, gain, dz, dgain, dshift)
    native("batch_norm_tangent", dtype, N, ld, Rz, xh, r, gain, Rgain, Rshift, Rxh, Rr, Ry)
    native("batch_norm_backward_tangent", dtype, N, ld, d, Rd, xh, Rxh, r, Rr, gain, Rgain, Rdz, Rdgain, Rdshift)
    return [y, dz, dgain, dshift, Ry, Rdz, Rdgain, Rdshift]


def batch_norm_case(rng, dtype, N, ld):
    rows = [rng.standard_normal((N, ld)).astype(dtype) for _ in range(4)]
    channels = [rng.standard_normal(ld).astype(dtype) for _ in range(4)]
    return rows[0] + 2, channels[0], channels[1], rows[1], rows[2], channels[2], channels[3], rows[3]


@pytest.mark.parametrize("N", [1, 2, 3, 5, 16, 17, 33, 80, 1000])
def test_batch_norm(native, dtype, N, rng):
    lanes, eps = native.lanes(dtype), np.finfo(dtype).eps
    names = ("y", "dz", "dgain", "dshift", "Ry", "Rdz", "Rdgain", "Rdshift")
    for ld in (lanes, 2 * lanes, 7 * lanes):
        case = batch_norm_case(rng, dtype, N, ld)
        results = native_batch_norm(native, *case)
        exact = torch_batch_norm(*(a.astype(np.float64) for a in case))
        same = torch_batch_norm(*case)
        # how rounding z and its mean moves xh, which all results are made of
        z, gain, _, d, Rz, _, _, Rd = (a.astype(np.float64) for a in case)
        r = (z.var(0) + EPS) ** -0.5
        condition = 1 + np.abs(z).max(0) * r
        first = (1 + np.abs(d).max(0)) * (1 + np.abs(gain)) * (1 + r) * condition
        second = first * (1 + r) * (1 + np.abs(Rz).max(0) + np.abs(Rd).max(0)) * condition
        sizes = (first,) * 4 + (second,) * 4
        for name, ours, truth, theirs, size in zip(names, results, exact, same, sizes, strict=True):
            scale = (math.sqrt(N) if truth.ndim == 1 else 1) * size
            error, torch_error = (np.abs(v - truth) / scale for v in (ours, theirs))
            bound = 1e-12 if dtype == np.float64 else 2 * torch_error.max() + 4 * eps
            assert error.max() <= bound, (name, ld, error.max(), torch_error.max())


def test_batch_norm_channels_are_independent(native, dtype, rng):
    lanes = native.lanes(dtype)
    case = batch_norm_case(rng, dtype, 37, 7 * lanes)
    whole = native_batch_norm(native, *case)
    for v in range(7):
        channels = slice(v * lanes, (v + 1) * lanes)
        alone = native_batch_norm(native, *(np.ascontiguousarray(a[..., channels]) for a in case))
        for one, all_of_them in zip(alone, whole, strict=True):
            # compilers may contract a sum of two products in two ways
            bound = 100 * np.finfo(dtype).eps
            np.testing.assert_allclose(one, all_of_them[..., channels], rtol=bound, atol=bound)
    # nothing spreads from a channel that holds anything
    broken = [a.copy() for a in case]
    for array in broken:
        array[..., 3] = np.inf
    for one, all_of_them in zip(native_batch_norm(native, *broken), whole, strict=True):
        rest = np.arange(7 * lanes) != 3
        assert np.array_equal(one[..., rest], all_of_them[..., rest])


def test_batch_norm_absent_tangents_are_zeros(native, dtype, rng):
    case = batch_norm_case(rng, dtype, 9, 3 * native.lanes(dtype))
    for absent in ([5], [6], [5, 6]):
        zeros = [np.zeros_like(a) if i in absent else a for i, a in enumerate(case)]
        nulls = [None if i in absent else a for i, a in enumerate(case)]
        for ours, expected in zip(native_batch_norm(native, *nulls), native_batch_norm(native, *zeros), strict=True):
            assert np.array_equal(ours, expected)
