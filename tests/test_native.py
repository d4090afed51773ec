"""The native library itself: sgd_step through the dispatcher, its instruction sets, threads and symbols."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtml_fast
from mtml_fast.ops import _library

if _library.build_info() is None:
    pytest.skip(_library.native_status(), allow_module_level=True)
from mtml_fast import _numpy

RATES = ("number", "task", "parameter", "task and parameter", "one number", "one per task")
# every size around the widths of the vectors, no axis, two axes, none
SHAPES = [(n,) for n in range(1, 34)] + [(), (3, 5), (0,)]


def step(params, grads, lr, buffers, momentum, weight_decay, clip):
    """The truth, for autograd: new parameters, then new buffers."""
    if clip is not None:
        # [T, everything]
        norm = torch.cat([g.unsqueeze(-1).flatten(1) for g in grads], dim=1).norm(dim=1)
        scale = (clip / (norm + 1e-6)).clamp(max=1)
        grads = [over_tasks(scale, g) * g for g in grads]
    m = [g + weight_decay * p for p, g in zip(params, grads, strict=True)]
    if momentum:
        m = [momentum * old + new for old, new in zip(buffers, m, strict=True)]
    rates = lr if len(lr) == len(params) else lr * len(params)
    p = [p - over_tasks(a, p) * d for p, a, d in zip(params, rates, m, strict=True)]
    return p + m if momentum else p


def over_tasks(a, leaf):
    return a.reshape(-1, *[1] * (leaf.dim() - 1)) if a.dim() == 1 else a


def make(tasks, rate, momentum, dtype=torch.float64, shapes=SHAPES):
    """Random arguments of the operator: params, grads, lr, buffers."""
    leaves = [(tasks, *shape) for shape in shapes]
    params, grads, buffers = ([torch.randn(s, dtype=dtype) for s in leaves] for _ in range(3))
    # tasks of small and of large norm: clipping takes some and leaves others
    size = torch.tensor([0.01, 1.0], dtype=dtype).repeat(tasks)[:tasks]
    grads = [over_tasks(size, g) * g for g in grads]
    forms = {
        "number": [()] * len(leaves),
        "task": [(tasks,)] * len(leaves),
        "parameter": [(1, *s[1:]) for s in leaves],
        "task and parameter": leaves,
        "one number": [()],
        "one per task": [(tasks,)],
    }
    lr = [torch.rand(s, dtype=dtype) for s in forms[rate]]
    return params, grads, lr, buffers if momentum else []


def native(arguments, options, cotangents):
    """Results and all gradients of the native operator."""
    results = torch.ops.mtml_fast.sgd_step(*arguments, *options)
    needs = [True] * sum(map(len, arguments))
    return results + torch.ops.mtml_fast.sgd_step_backward(cotangents, *arguments, *options, needs)


def eager(arguments, options, cotangents):
    leaves = [[x.detach().requires_grad_() for x in xs] for xs in arguments]
    results = step(*leaves, *options)
    inputs = [x for xs in leaves for x in xs]
    grads = torch.autograd.grad(results, inputs, cotangents, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in results] + list(grads)


def convert(lists, dtype):
    return [[x.to(dtype) for x in xs] for xs in lists]


@pytest.mark.parametrize("tasks", [0, 1, 2, 7])
@pytest.mark.parametrize("rate", RATES)
def test_values_and_gradients(rate, tasks):
    for momentum, weight_decay, clip in itertools.product((0.0, 0.9), (0.0, 0.1), (None, 1.0, 1e4)):
        options = (momentum, weight_decay, clip)
        arguments = make(tasks, rate, momentum)
        cotangents = [torch.randn_like(x) for x in step(*arguments, *options)]
        params, grads, lr, _ = arguments
        rates = range(len(cotangents) + len(params) + len(grads), len(cotangents) + len(params) + len(grads) + len(lr))
        for dtype in (torch.float32, torch.float64):
            rounded, u = convert(arguments, dtype), [c.to(dtype) for c in cotangents]
            mine = native(rounded, options, u)
            theirs = eager(rounded, options, u)
            exact = eager(convert(rounded, torch.float64), options, [c.double() for c in u])
            for i, (a, b, c) in enumerate(zip(mine, theirs, exact, strict=True)):
                what = f"{options}, {dtype}, tensor {i}"
                assert (a.dtype, a.shape) == (dtype, c.shape), what
                if a.numel() == 0:
                    continue
                # all terms are of the order of 1, whatever remains when they cancel; a rate's gradient is a sum of many
                terms = sum(p.numel() for p in params) / a.numel() if i in rates else 1
                slack = 8 * torch.finfo(dtype).eps * max(1.0, c.abs().max().item(), terms**0.5)
                error, allowed = ((x.double() - c).abs().max().item() for x in (a, b))
                assert error <= 2 * allowed + slack, f"{what}: error {error:.2e}, eager {allowed:.2e}"


def test_backward_returns_exactly_what_is_needed():
    options, arguments = (0.9, 0.1, 1.0), make(3, "parameter", 0.9, shapes=[(5,), (2, 3)])
    u = [torch.randn_like(x) for x in step(*arguments, *options)]
    everything = torch.ops.mtml_fast.sgd_step_backward(u, *arguments, *options, [True] * 8)
    for needs in itertools.product((False, True), repeat=8):
        some = torch.ops.mtml_fast.sgd_step_backward(u, *arguments, *options, list(needs))
        expected = [x for x, needed in zip(everything, needs, strict=True) if needed]
        assert len(some) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(some, expected, strict=True))


def test_any_layout():
    def transposed(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    def expanded(x):
        return x[:, :1].expand(x.shape)

    def offset(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    options, arguments = (0.9, 0.1, 1.0), make(4, "task and parameter", 0.9, shapes=[(5, 6), (7,)])
    u = [torch.randn_like(x) for x in step(*arguments, *options)]
    for change in (transposed, expanded, offset):
        changed, v = [[change(x) for x in xs] for xs in arguments], [change(x) for x in u]
        plain, w = [[x.contiguous().clone() for x in xs] for xs in changed], [x.contiguous().clone() for x in v]
        for a, b in zip(native(changed, options, v), native(plain, options, w), strict=True):
            assert torch.equal(a, b), change.__name__


@pytest.mark.parametrize("rate", RATES)
def test_same_bits_on_any_number_of_threads_and_alone(rate):
    # large enough for every thread to get its share
    options, arguments = (0.9, 0.1, 1.0), make(9, rate, 0.9, torch.float32, shapes=[(140001,), (3, 5)])
    u = [torch.randn_like(x) for x in step(*arguments, *options)]
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 4, 8):
            torch.set_num_threads(count)
            runs.append(native(arguments, options, u))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))

    one_task = slice(5, 6)
    alone = [[x[one_task] if x.dim() and x.shape[0] == 9 else x for x in xs] for xs in arguments]
    results = native(alone, options, [x[one_task] for x in u])
    for together, single in zip(runs[0], results, strict=True):
        # the gradient of a rate that the tasks share is their sum
        if together.dim() and together.shape[0] == 9:
            assert torch.equal(together[one_task], single)


def test_nan_stays_in_its_task():
    options, arguments = (0.9, 0.1, 1.0), make(3, "task", 0.9)
    u = [torch.randn_like(x) for x in step(*arguments, *options)]
    clean = native(arguments, options, u)
    arguments[1][4][1, 2] = torch.nan
    dirty = native(arguments, options, u)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    # the norm is NaN, and with it the factor of every leaf of the task
    assert all(x[1].isnan().all() for x in dirty[: len(SHAPES)])


def test_zero_gradient_is_not_clipped():
    p, g, u = torch.randn(2, 3), torch.tensor([[0.0], [1.0]]).expand(2, 3), torch.randn(2, 3)
    arguments, needs = ([p], [g], [torch.tensor(0.5)], []), [False, True, False]
    (dg,) = torch.ops.mtml_fast.sgd_step_backward([u], *arguments, 0.0, 0.0, 1e-9, needs)
    assert torch.equal(dg[0], -0.5 * u[0])
    assert (dg[1].abs() <= 1e-9 * u.abs().max()).all()


def test_infinite_values_do_not_meet_a_zero_factor():
    p, g = torch.tensor([[torch.inf]]), torch.tensor([[1.0]])
    (new,) = torch.ops.mtml_fast.sgd_step([p], [g], [torch.tensor(0.1)], [], 0.0, 0.0, None)
    assert new.item() == torch.inf


SCRIPT = """
import sys, torch
import mtml_fast.ops
from mtml_fast.ops._library import build_info
from tests.test_native import native
results = [native(*call) for call in torch.load(sys.argv[1])]
torch.save((build_info()["isa"], results), sys.argv[2])
"""


def run_on(isa, tmp_path, calls):
    """In a new process: the instruction set that served, and the results of all calls."""
    torch.save(calls, tmp_path / "in.pt")
    command = [sys.executable, "-c", SCRIPT, tmp_path / "in.pt", tmp_path / "out.pt"]
    environment = {**os.environ, "MTML_FAST_ISA": isa}
    root = Path(__file__).parents[1]
    subprocess.run(command, env=environment, cwd=root, check=True)
    return torch.load(tmp_path / "out.pt")


def test_every_instruction_set(tmp_path):
    runnable = _numpy.cpu_features()["runnable"]
    assert set(runnable) <= set(_library.build_info()["isas_built"])
    options, calls = (0.9, 0.1, 1.0), []
    for dtype in (torch.float32, torch.float64):
        arguments = make(3, "parameter", 0.9, dtype)
        calls.append((arguments, options, [torch.randn_like(x) for x in step(*arguments, *options)]))
    for isa in runnable:
        name, results = run_on(isa, tmp_path, calls)
        assert name == isa
        for call, theirs in zip(calls, results, strict=True):
            for a, b in zip(theirs, native(*call), strict=True):
                tolerance = 64 * torch.finfo(a.dtype).eps
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_unknown_instruction_set_is_one_warning():
    code = "from mtml_fast.ops._library import build_info; print(build_info()['isa'])"
    environment = {**os.environ, "MTML_FAST_ISA": "sse9"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    *_, best = runnable = _numpy.cpu_features()["runnable"]
    assert done.stdout == f"{best}\n"
    possible = ", ".join(runnable)
    assert done.stderr == (
        f"mtml_fast: MTML_FAST_ISA must be one of {possible} on this machine, got 'sse9'; using {best}\n"
    )


def test_version_is_the_packages():
    info = _library.build_info()
    assert info["version"] == mtml_fast.__version__
    assert info["isa"] in info["isas_built"]
    assert json.loads(_numpy.build_info()) == info


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_only_stable_symbols_of_torch_and_none_of_python():
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", _library._PATH]
    symbols = [line.split(maxsplit=1)[1] for line in subprocess.check_output(command, text=True).splitlines()]
    assert "torch_library_impl" in symbols
    assert [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2)::|^_?Py", s)] == []


X, A = torch.zeros(2, 3), torch.tensor(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([X], [X], [A], [], 1.0, 0.0, None), "momentum must be in [0, 1), got 1"),
        (([X], [X], [A], [], 0.0, -1.0, None), "weight_decay must be >= 0, got -1"),
        (([X], [X], [A], [], 0.0, 0.0, 0.0), "clip must be > 0, got 0"),
        (([X], [X[:, 1:]], [A], [], 0.0, 0.0, None), "grads[0] must have the shape of params[0] [2, 3], got [2, 2]"),
        (([X], [], [A], [], 0.0, 0.0, None), "grads must hold one leaf per leaf of params (1), got 0"),
        (
            ([X, X], [X, X], [X], [], 0.0, 0.0, None),
            "lr must be 0-dim or [T] where 2 leaves share it, got shape [2, 3]",
        ),
        (([X], [X], [X[:, 1:]], [], 0.0, 0.0, None), "lr[0] must be 0-dim, [T], [1, *shape] or [T, *shape] for"),
        (([X], [X], [A], [X], 0.0, 0.0, None), "momentum_buffers must hold 0 leaves with momentum 0, got 1"),
        (
            ([X, X[:1]], [X, X[:1]], [A], [], 0.0, 0.0, None),
            "params[1] must have the 2 tasks of params[0], got shape [1",
        ),
        (([X], [X.double()], [A], [], 0.0, 0.0, None), "grads must all have the dtype of params[0], float32"),
        (([X.half()], [X.half()], [A.half()], [], 0.0, 0.0, None), "params must be float32 or float64"),
        (([A], [A], [A], [], 0.0, 0.0, None), "params[0] must be [T, ...], got a 0-dim leaf"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.mtml_fast.sgd_step(*arguments)
